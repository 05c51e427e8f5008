"""The store's clock, as a worker estimates it. It decides timers, not this machine's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class StoreClock:
    """This process's clock, put right by the store's at each heartbeat."""

    def __init__(self) -> None:
        self._offset = timedelta(0)

    def set(self, store_now: datetime, asked_at: float, answered_at: float) -> None:
        """Take in an answer of the store, asked and answered at these times (`time.time()`)."""
        middle = datetime.fromtimestamp((asked_at + answered_at) / 2, UTC)
        self._offset = store_now - middle

    def now(self) -> datetime:
        return datetime.now(UTC) + self._offset

    def seconds_until(self, at: datetime) -> float:
        return (at - self.now()).total_seconds()

    @property
    def offset_s(self) -> float:
        return self._offset.total_seconds()
