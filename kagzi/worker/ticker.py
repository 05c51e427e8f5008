"""Starts the runs of schedules. Every worker has one; they need not know of each other.

It looks at the schedules of the store, by the store's clock, again and again: a tick that one
worker did not come to is found by the next look of any other. Which workflows a worker serves does
not matter here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from kagzi.cron import cron_of, due_ticks
from kagzi.errors import InvalidInput, StoreError, UnknownRun
from kagzi.model import Overlap
from kagzi.store.operations import change_run
from kagzi.store.schedules import (
    MOST_SCHEDULES,
    DueSchedule,
    Ticks,
    find_due_schedules,
    find_overlapped,
    start_ticks,
)
from kagzi.store.store import Store
from kagzi.worker.telling import Telling

logger = logging.getLogger("kagzi.worker")

MOST_TICKS = 500  # of one statement
ASIDE_S = 60.0
OVERLAP_EVERY = 10  # turns


class Ticker:
    """Looks for ticks that have come.

    Args:
        poll_s: Between looks.
        on_changed: Called when runs were started or cancelled.
    """

    def __init__(
        self,
        store: Store,
        poll_s: float,
        on_changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._poll_s = poll_s
        self._on_changed = on_changed
        self._aside: dict[str, float] = {}  # schedules that cannot be read here, and until when
        self._turns = 0

    async def tick_for_ever(self) -> None:
        waiting = Telling(logger, "schedules wait: %s")
        while True:
            wait_s = self._poll_s
            try:
                wait_s = await self.turn()
                waiting.clear()
            except StoreError as error:
                waiting.tell(error)
            except Exception:
                logger.exception("a look at the schedules failed, and is repeated")
            await asyncio.sleep(wait_s)

    async def turn(self) -> float:
        """One look; how many seconds later the next is due."""
        soon = await find_due_schedules(self._store, self._poll_s, self._left_aside())
        due = [one for one in soon if one.next_at <= one.now]
        ticks = self._ticks_of(due)
        moved = started = 0
        if ticks:
            moved, started = await start_ticks(self._store, ticks)
        if started:
            self._on_changed()
        self._turns += 1
        if self._turns % OVERLAP_EVERY == 0 or any(one.overlap is Overlap.CANCEL for one in due):
            await self._cancel_overlapped()
        more = len(due) == MOST_SCHEDULES or any(
            t.later_at is not None and t.later_at <= t.schedule.now for t in ticks
        )
        if moved and more:
            return 0.0  # more have come than one statement starts
        coming = [(one.next_at, one.now) for one in soon]
        coming += [(t.later_at, t.schedule.now) for t in ticks if t.later_at is not None]
        waits = [(at - now).total_seconds() for at, now in coming]
        return min([self._poll_s, *(wait_s for wait_s in waits if wait_s > 0)])

    def _ticks_of(self, due: list[DueSchedule]) -> list[Ticks]:
        found = []
        for schedule in due:
            try:
                cron = cron_of(schedule.cron, schedule.timezone)
            except InvalidInput as error:
                logger.warning("schedule %r is left to other workers: %s", schedule.id, error)
                self._aside[schedule.id] = asyncio.get_running_loop().time() + ASIDE_S
                continue
            ticks, later_at = due_ticks(
                cron,
                schedule.next_at,
                schedule.now,
                schedule.catch_up,
                schedule.overlap,
                max(1, MOST_TICKS // len(due)),
            )
            found.append(Ticks(schedule, ticks, later_at))
        return found

    def _left_aside(self) -> list[str]:
        now = asyncio.get_running_loop().time()
        self._aside = {name: until for name, until in self._aside.items() if until > now}
        return list(self._aside)

    async def _cancel_overlapped(self) -> None:
        """Also what another worker has left undone between its ticks and this."""
        while found := await find_overlapped(self._store):
            for run_id in found:
                with suppress(UnknownRun):  # deleted since
                    await change_run(self._store, run_id, "cancel")
            self._on_changed()
