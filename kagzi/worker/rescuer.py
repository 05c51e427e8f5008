"""Frees the runs of workers that are gone; every worker does, again and again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from uuid import UUID

from kagzi.errors import StoreError
from kagzi.store.store import Store
from kagzi.worker.heartbeat import Heartbeat
from kagzi.worker.incarnation import host_name, is_gone
from kagzi.worker.telling import Telling

logger = logging.getLogger("kagzi.worker")


class Rescuer:
    """Of one worker.

    Args:
        every_s: Between two looks.
        heartbeat: The worker's own; while it fails, the leases of others say nothing.
        freed: Called when there may be runs to claim.
    """

    def __init__(
        self,
        store: Store,
        worker_id: UUID,
        every_s: float,
        heartbeat: Heartbeat,
        heartbeat_s: float,
        freed: Callable[[], None],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._every_s = every_s
        self._heartbeat = heartbeat
        self._heartbeat_s = heartbeat_s
        self._freed = freed

    async def rescue_for_ever(self) -> None:
        waiting = Telling(logger, "rescue waits: %s")
        while True:
            await asyncio.sleep(self._every_s)
            try:
                if time.monotonic() - self._heartbeat.good_since >= self._heartbeat_s:
                    await self._rescue_expired()
                await self.end_earlier_incarnations()
                waiting.clear()
            except StoreError as error:
                waiting.tell(error)
            except Exception:
                logger.exception("a rescue failed, and is tried again")

    async def _rescue_expired(self) -> None:
        """Not right after the store was away: others had no chance to renew their leases either."""
        for worker_id in await self._store.find_expired():
            if worker_id == self._worker_id:
                continue
            freed = await self._store.rescue(worker_id, "lease ran out")
            logger.warning("worker %s is gone; %d runs freed", worker_id, freed)
            self._freed()

    async def end_earlier_incarnations(self) -> None:
        """Workers of this host whose process is gone: their leases need not run out first."""
        for worker_id, boot, pid, started in await self._store.find_incarnations(host_name()):
            if worker_id == self._worker_id:
                continue
            if await asyncio.to_thread(is_gone, boot, pid, started):
                freed = await self._store.rescue(worker_id, "its process is gone", forced=True)
                logger.warning("worker %s died; %d runs freed", worker_id, freed)
                self._freed()
