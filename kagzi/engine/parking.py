"""Lets go of a run that only waits, so that it holds nothing meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from typing import Protocol

from kagzi.engine.group import Group
from kagzi.engine.inbox import EventWait
from kagzi.engine.sleeping import FARTHEST, Sleep
from kagzi.engine.timers import Timers
from kagzi.engine.work import Work

PARK_AFTER_S = 3.0  # a run that wakes sooner stays
QUIET_S = 0.2
HEAR_S = 1.0  # so long it stays for an event or a child that may come at once


class ParkingHome(Protocol):
    """What this module needs of the run."""

    loop: asyncio.AbstractEventLoop
    timers: Timers
    number: int

    def store_now(self) -> datetime: ...

    def open_works(self) -> Iterable[Work]:
        """What its code waits for; nothing once the run is being let go."""

    def is_waiting(self, step_id: str) -> bool:
        """Whether a step waits for its retry, or for the end of a child run."""

    def is_crowded(self) -> bool:
        """Whether other runs wait for this one's place in the worker."""

    def park(self, wake_at: datetime) -> None: ...


class Parking:
    """Looks, whenever it has been quiet for a moment, whether only long waits are left."""

    def __init__(self, run: ParkingHome) -> None:
        self._run = run
        self._handle: asyncio.TimerHandle | None = None

    def consider(self) -> None:
        """Something may have come to rest."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._run.loop.call_later(QUIET_S, self._look, self._run.number, False)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _look(self, number: int, patient: bool) -> None:
        self._handle = None
        run = self._run
        works = [work for work in run.open_works() if not work.ended]
        if not works or not all(self._is_idle(work) for work in works):
            return
        if number != run.number:
            self.consider()
            return
        wake_in_s = run.timers.next_s()
        if wake_in_s is not None and wake_in_s < PARK_AFTER_S:
            return
        hears = wake_in_s is None or any(not isinstance(work, Sleep) for work in works)
        if hears and not patient and not run.is_crowded():
            self._handle = run.loop.call_later(HEAR_S - QUIET_S, self._look, number, True)
            return
        run.park(FARTHEST if wake_in_s is None else run.timers.next_at(run.store_now()))

    def _is_idle(self, work: Work) -> bool:
        if work.closed:  # its outcome is on its way, however long the commit takes
            return False
        if isinstance(work, Sleep | EventWait):
            return work.durable
        if isinstance(work, Group) and work.is_timed:
            return False
        return all(self._run.is_waiting(step.id) for step in work.steps())
