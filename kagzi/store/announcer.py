"""Says on channels that something has happened; one word speaks for all until it is sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kagzi.background import begin_apart
from kagzi.errors import StoreError
from kagzi.store.store import Store

logger = logging.getLogger("kagzi.store")


class Announcer:
    """Of one client or worker. What is lost with the store is found by those who poll."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._channels: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def say(self, *channels: Callable[[str], str]) -> None:
        """Notify these channels, named as in `listener.py`, at the end of this turn of the loop."""
        self._channels |= {channel(self._store.connector.schema) for channel in channels}
        if self._task is None:
            self._task = begin_apart(self._notify())

    async def close(self) -> None:
        """Wait until what was said is sent."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _notify(self) -> None:
        try:
            while self._channels:
                channels, self._channels = self._channels, set()
                for channel in sorted(channels):
                    await self._store.notify(channel)
        except StoreError as error:
            logger.debug("no notification: %s", error)
        finally:
            self._task = None
