"""Timers of one live run, so that it can be seen when nothing but waiting is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from kagzi import faultpoints


class Timers:
    """Timers that belong together.

    Args:
        on_change: Called whenever one is set, or is gone.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]) -> None:
        self._loop = loop
        self._on_change = on_change
        self._pending: set[Timer] = set()

    def set(
        self, delay_s: float, callback: Callable[[], None], at: datetime | None = None
    ) -> Timer:
        """Call back after `delay_s`, which is `at` by the store's clock, if that is known."""
        timer = Timer(self, callback, at)
        timer.due = self._loop.time() + max(0.0, delay_s)
        # A loop's timers reach no further than some weeks; a far one is looked at again then.
        timer.handle = self._loop.call_later(min(delay_s, LONGEST_S), timer.fire)
        self._pending.add(timer)
        self._on_change()
        return timer

    def next_s(self) -> float | None:
        """Seconds until the earliest; None when none is set."""
        if not self._pending:
            return None
        return min(timer.due for timer in self._pending) - self._loop.time()

    def next_at(self, now: datetime) -> datetime:
        """When the earliest is due, by the store's clock; `now` when none is set."""
        left = self._loop.time()
        moments = [
            timer.at if timer.at is not None else now + timedelta(seconds=timer.due - left)
            for timer in self._pending
        ]
        return min(moments, default=now)

    def close(self) -> None:
        for timer in list(self._pending):
            timer.cancel()


class Timer:
    """One of them."""

    __slots__ = ("_callback", "_timers", "at", "due", "handle")

    def __init__(self, timers: Timers, callback: Callable[[], None], at: datetime | None) -> None:
        self._timers = timers
        self._callback = callback
        self.at = at
        self.due = 0.0
        self.handle: asyncio.TimerHandle | None = None

    def fire(self) -> None:
        left_s = self.due - self._timers._loop.time()
        if left_s > 1.0:
            self.handle = self._timers._loop.call_later(min(left_s, LONGEST_S), self.fire)
            return
        if faultpoints.reach is not None:
            faultpoints.reach("timer.fires")
        self._timers._pending.discard(self)
        self._callback()
        self._timers._on_change()

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
        if self in self._timers._pending:
            self._timers._pending.discard(self)
            self._timers._on_change()


LONGEST_S = 86_400.0
