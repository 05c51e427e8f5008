"""The store's clock, as a worker estimates it. It decides timers, not this machine's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class StoreClock:
    """This process's clock, put right by the store's at each heartbeat."""

    def __init__(self) -> None:
        self._offset = timedelta(0)

    def set(self, store_now: datetime, asked_at: float, answered_at: float) -> None:
        """Take in an answer of the store, asked and answered at these times (`time.time()`).

        The answer was given at some moment between the two. As long as the offset so far agrees
        with one, it is kept: clocks that run together do not jitter by the way of a message.
        """
        least = store_now - datetime.fromtimestamp(answered_at, UTC)
        most = store_now - datetime.fromtimestamp(asked_at, UTC)
        if not least <= self._offset <= most:
            self._offset = least + (most - least) / 2

    def now(self) -> datetime:
        return datetime.now(UTC) + self._offset

    def seconds_until(self, at: datetime) -> float:
        return (at - self.now()).total_seconds()

    @property
    def offset_s(self) -> float:
        return self._offset.total_seconds()
