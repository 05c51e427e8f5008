"""Notes in the store what happens to a worker, beside its work and without waiting for it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from uuid import UUID

from kagzi.background import begin_apart, cancel_all
from kagzi.errors import StoreError
from kagzi.store.store import Store
from kagzi.store.workers import add_event, start_draining

logger = logging.getLogger("kagzi.worker")

MOST_WAITING = 50  # of a pool whose processes die again and again the newest are left out
DRAINING = "draining"


class Diary:
    """Writes events one after the other; what cannot be written is left out."""

    def __init__(self, store: Store, worker_id: UUID) -> None:
        self._store = store
        self._worker_id = worker_id
        self._waiting: deque[tuple[str, str | None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def note(self, event: str, detail: str | None = None) -> None:
        """Write it soon. `draining` also becomes the worker's status."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append((event, detail))
        if self._task is None:
            self._task = begin_apart(self._write())

    async def close(self, within_s: float) -> None:
        """Wait a moment for what is not written yet."""
        task = self._task
        if task is not None:
            await asyncio.wait([task], timeout=within_s)
            await cancel_all([task])

    async def _write(self) -> None:
        try:
            while self._waiting:
                event, detail = self._waiting.popleft()
                try:
                    if event == DRAINING:
                        await start_draining(self._store, self._worker_id)
                    await add_event(self._store, self._worker_id, event, detail)
                except StoreError as error:
                    logger.debug("%s is not noted: %s", event, error)
        finally:
            self._task = None
