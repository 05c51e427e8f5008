"""Keeps a worker going: when an incarnation has lost its lease, the next one takes its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from uuid import UUID

from kagzi.background import cancel_all
from kagzi.engine.runner import LiveRun
from kagzi.errors import PoolStartFailed, StoreError
from kagzi.store.workers import absolve_runs, add_event
from kagzi.worker.health import Health, check_port
from kagzi.worker.worker import Worker

logger = logging.getLogger("kagzi.worker")

# Before the next incarnation; the first comes at once, since a paused process loses its lease too.
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0
CLOSE_S = 10.0


class Keeper:
    """A worker as its program sees it, over any number of incarnations.

    An incarnation that lost its lease, or whose server was replaced, stops its runs where they are
    and writes nothing more. The next one has an id, a lease, connections and pool processes of its
    own, and loads what it claims from the store.

    Attributes:
        incarnation: The present one; between two of them the one that is lost.
        count: How many there were so far.
        health: The endpoint, if there is one.
        ended: Done when this was closed.

    Args:
        make: Makes an incarnation, not yet open.
        health_port, health_host: Where to tell over HTTP how it is; None: nowhere.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()  # earlier incarnations
        self._opened_at = 0.0
        self._draining = False
        self._is_open = False
        self.incarnation = make()
        self.count = 0
        self.ended = self._loop.create_future()
        self.health: Health | None = None
        if check_port(health_port) is not None:
            self.health = Health(lambda: self.incarnation, health_host, health_port or 0)

    # --- what a program uses ----------------------------------------------------------------

    @property
    def worker_id(self) -> UUID:
        """Of the present incarnation."""
        return self.incarnation.worker_id

    @property
    def runs(self) -> Mapping[UUID, LiveRun]:
        """What is held now."""
        return self.incarnation.runs

    @property
    def lost(self) -> BaseException | None:
        """Why there is no working incarnation at this moment; None when there is one."""
        return self.incarnation.lost

    def wake(self) -> None:
        """A run may be due."""
        self.incarnation.wake()

    def hear(self) -> None:
        """Somebody may want something of a run that is held here."""
        self.incarnation.hear()

    def look_at_queues(self) -> None:
        """Limits of a queue may have changed."""
        self.incarnation.look_at_queues()

    async def open(self) -> None:
        """Start the first incarnation. Raises as `Worker.open` and `Health.open`."""
        if self.health is not None:
            await self.health.open()
        try:
            await self.incarnation.open()
        except BaseException:
            if self.health is not None:
                await self.health.close()
            raise
        self._opened()
        self._task = self._loop.create_task(self._keep())

    async def drain(self, within_s: float) -> None:
        """Stop claiming; wait up to `within_s` until every run that is held has left."""
        self._draining = True
        await self.incarnation.drain(within_s)

    async def close(self, drain_s: float = 0.0) -> None:
        """As `Worker.close`; no incarnation follows."""
        self._draining = True
        if self._task is not None:
            await cancel_all([self._task])
        if self._is_open:
            await self.incarnation.close(drain_s)
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self.health is not None:
            await self.health.close()
        if not self.ended.done():
            self.ended.set_result(None)

    # --- keeping ----------------------------------------------------------------------------

    def _opened(self) -> None:
        self._is_open = True
        self._opened_at = self._loop.time()
        self.count += 1

    async def _keep(self) -> None:
        failures = 0
        while not self._draining:
            await asyncio.shield(self.incarnation.ended)
            if self._loop.time() - self._opened_at >= STEADY_S:
                failures = 0
            old = self.incarnation
            self._is_open = False
            ending = self._loop.create_task(self._end(old))
            self._closing.add(ending)
            ending.add_done_callback(self._closing.discard)
            await asyncio.wait([ending], timeout=CLOSE_S)  # user code may not let go
            failures = await self._begin_anew(old, failures)

    async def _end(self, old: Worker) -> None:
        with suppress(StoreError):
            await add_event(old.store, old.worker_id, "lost", str(old.lost))
        await old.close()

    async def _begin_anew(self, old: Worker, failures: int) -> int:
        """Until there is an incarnation again; how often in a row one was lost or did not start."""
        while not self._draining:
            pause_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            failures += 1
            await asyncio.sleep(pause_s)
            try:
                await self._release(old)
                self.incarnation = worker = self._make()
                await worker.open()
            except Exception as error:
                self.incarnation = old
                is_plain = isinstance(error, StoreError | PoolStartFailed)  # it says all there is
                log = logger.warning if is_plain else logger.exception
                log(
                    "worker %s was lost, and the next incarnation does not start yet, it is tried "
                    "again: %s",
                    old.worker_id,
                    error,
                )
                continue
            self._opened()
            logger.warning(
                "worker %s takes the place of %s, which was lost: %s",
                worker.worker_id,
                old.worker_id,
                old.lost,
            )
            break
        return failures

    async def _release(self, old: Worker) -> None:
        """End the old lease if it holds still, and take back what is not the runs' own fault."""
        await old.store.rescue(old.worker_id, f"lost: {old.lost}", forced=True)
        if old.lost_to_store:
            await absolve_runs(old.store, old.held_when_lost)
            old.held_when_lost = []
