"""Starts steps where there is room for them, and takes in their answers.

A worker has one executor for its pool processes and one for its own process. Each joins the core's
scheduler, which knows order, limits and room, to links, which know how to start a body.
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
    LANES,
    RESUMING,
    SUSPENDED,
    WAITING,
    Place,
    Scheduler,
    Step,
)


class Link(Protocol):
    """A place and the way to it."""

    place: Place

    def start(self, steps: list[Step]) -> None:
        """Begin these bodies, in order."""

    def cancel(self, step: Step) -> None:
        """Tell the place that nobody waits for this step; it answers in the end."""


class Executor:
    """Feeds the links from one scheduler."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.scheduler = Scheduler()
        self._links: list[Link] = []
        self._first = 0
        self._called = False
        self._resumed: dict[int, list[Callable[[], None]]] = {}
        self._ended: dict[int, list[asyncio.Future[None]]] = {}

    # --- links ------------------------------------------------------------------------------

    def add_link(self, link: Link) -> None:
        self._links.append(link)
        self.wake()

    def remove_link(self, link: Link) -> None:
        self._links.remove(link)

    @property
    def links(self) -> list[Link]:
        return self._links

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
            for link in self._links:
                if link.place is step.place:
                    link.cancel(step)
                    return

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

    def finished(self, steps: Iterable[Step]) -> None:
        """Steps that the scheduler itself has finished."""
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
        scheduler = self.scheduler
        links = self._links
        count = len(links)
        if not count:
            return
        self._first = (self._first + 1) % count
        ready = sum(scheduler.ready(lane) for lane in range(LANES))
        order = sorted(
            (links[(self._first + offset) % count] for offset in range(count)),
            key=lambda link: _held(link.place),
        )
        for place, link in enumerate(order):
            share = -(-ready // (count - place))
            begun = scheduler.take(link.place, share)
            if not begun:
                continue
            new = begun
            if self._resumed:
                new = [step for step in begun if not self._resume(step)]
            if new:
                ready -= len(new)
                link.start(new)

    def _resume(self, step: Step) -> bool:
        delivers = self._resumed.pop(step.number, None)
        if delivers is None:
            return False
        for deliver in delivers:
            deliver()
        return True


def _held(place: Place) -> int:
    return place.held(LANE_ASYNC) + place.held(LANE_THREAD) + place.held(LANE_CPU)
