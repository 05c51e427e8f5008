"""Starts steps where there is room for them.

Joins the core's scheduler, which knows order, limits and room, to the links, which know how to
start a body: the worker's own process, and its pool processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from kagzi._core import (
    BEGUN,
    LANE_ASYNC,
    LANE_CPU,
    LANE_THREAD,
    RESUMING,
    SUSPENDED,
    WAITING,
    Place,
    Scheduler,
    Step,
)

POOL_LANES = (LANE_ASYNC, LANE_THREAD, LANE_CPU)
NO_LIMIT = 1 << 31
# To wake a second process, and to commit what comes from it apart, takes longer than this.
TOGETHER_US = 1000.0


class Link(Protocol):
    """A place and the way to it; the place's name is the link."""

    place: Place

    def start(self, steps: list[Step]) -> None:
        """Begin these bodies, in order."""

    def cancel(self, step: Step) -> None:
        """Tell the place that nobody waits for this step; it answers in the end."""

    def suspended(self, step: Step) -> None:
        """A step of this place waits for inner work."""


class Executor:
    """Feeds the links from one scheduler."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.scheduler = Scheduler()
        self._processes: list[Link] = []
        self._own: list[Link] = []
        self._first = 0
        self._body_us = TOGETHER_US  # how long async bodies took lately
        self._called = False
        self._resumed: dict[int, list[Callable[[], None]]] = {}
        self._ended: dict[int, list[asyncio.Future[None]]] = {}

    # --- links ------------------------------------------------------------------------------

    def add_link(self, link: Link) -> None:
        """Start feeding a place. Pool processes share their work, other places have their own."""
        links = self._processes if link.place.room(LANE_ASYNC) else self._own
        links.append(link)
        self.wake()

    def remove_link(self, link: Link) -> None:
        links = self._processes if link in self._processes else self._own
        links.remove(link)

    # --- steps ------------------------------------------------------------------------------

    def submit(self, steps: Iterable[Step]) -> None:
        self.scheduler.add_all(steps)
        self.wake()

    def withdraw(self, step: Step) -> None:
        """Drop a step that waits; cancel one that has begun."""
        if self.scheduler.drop(step):
            self._tell_ended(step)
            return
        if step.state in (BEGUN, SUSPENDED, RESUMING):
            assert step.place is not None, "a step that has begun has a place"
            step.place.name.cancel(step)

    def finish(self, step: Step) -> None:
        """A step's body has ended; its permits are free."""
        self.scheduler.finish(step)
        self._resumed.pop(step.number, None)
        self._tell_ended(step)
        self.wake()

    def _tell_ended(self, step: Step) -> None:
        for waiter in self._ended.pop(step.number, ()):
            if not waiter.done():
                waiter.set_result(None)

    def finished(self, steps: list[Step]) -> None:
        """Steps that the scheduler itself has finished."""
        last = steps[-1]
        if last.lane == LANE_ASYNC:
            self._body_us += (last.completed_us - last.started_us - self._body_us) / 4
        if self._resumed or self._ended:
            for step in steps:
                self.finish(step)
        self.wake()

    def ending(self, step: Step) -> asyncio.Future[None]:
        """Resolves when a step that was submitted has ended, or was dropped."""
        future = self._loop.create_future()
        if step.state in (WAITING, BEGUN, SUSPENDED, RESUMING):
            self._ended.setdefault(step.number, []).append(future)
        else:
            future.set_result(None)
        return future

    def suspend(self, step: Step) -> None:
        """The body waits for inner work: give up what it shares with others."""
        self.scheduler.suspend(step)
        if step.state == SUSPENDED:
            assert step.place is not None, "a step that has begun has a place"
            step.place.name.suspended(step)
        self.wake()

    def resume(self, step: Step, deliver: Callable[[], None]) -> None:
        """Call `deliver` as soon as the step has its permits again."""
        if step.state == BEGUN:
            deliver()
            return
        self._resumed.setdefault(step.number, []).append(deliver)
        self.scheduler.resume(step)
        self.wake()

    # --- feeding ----------------------------------------------------------------------------

    def wake(self) -> None:
        """Look for work at the end of this turn of the loop."""
        if not self._called:
            self._called = True
            self._loop.call_soon(self._feed)

    def _feed(self) -> None:
        self._called = False
        for link in self._own:
            self._begin(link, NO_LIMIT)
        processes = self._processes
        count = len(processes)
        if not count:
            return
        ready = sum(self.scheduler.ready(lane) for lane in POOL_LANES)
        self._first = (self._first + 1) % count
        order = processes[self._first :] + processes[: self._first]
        if count > 1:
            order.sort(key=_held)
        together = self._belongs_together(ready)
        for place, link in enumerate(order):
            # An equal share for each process that is left, the idlest first.
            share = ready if together else -(-ready // (count - place))
            ready -= self._begin(link, share)

    def _belongs_together(self, ready: int) -> bool:
        """Whether all that is ready takes one process less time than it takes to wake another."""
        return ready * self._body_us < TOGETHER_US and self.scheduler.ready(LANE_ASYNC) == ready

    def _begin(self, link: Link, most: int) -> int:
        """Begin what fits; how many steps were new."""
        begun = self.scheduler.take(link.place, most)
        if not begun:
            return 0
        new = begun
        if self._resumed:
            new = [step for step in begun if not self._resume(step)]
        if new:
            link.start(new)
        return len(new)

    def _resume(self, step: Step) -> bool:
        delivers = self._resumed.pop(step.number, None)
        if delivers is None:
            return False
        for deliver in delivers:
            deliver()
        return True


def _held(link: Link) -> int:
    place = link.place
    return sum(place.held(lane) for lane in POOL_LANES)
