"""Takes single starts in, those of one moment in one statement, and hands runs to a worker here.

While nothing is being written a start is written at once; while a write is under way the others
gather for the next. A run that a worker of this program can have is inserted as its own already.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kagzi.errors import StoreUnavailable
from kagzi.store.starts import NewRun
from kagzi.store.store import ClaimedRun, StartedRun, Store

MOST = 500
NOBODY = UUID(int=0)


class Taker(Protocol):
    """A worker of this program."""

    @property
    def worker_id(self) -> UUID: ...

    def room_for_starts(self) -> int:
        """How many runs it can have now, besides those that it has or was promised."""

    def takes(self, workflow: str, version: str, queue: str) -> bool:
        """Whether it serves such runs."""

    def promise(self, count: int) -> None:
        """So many runs may be on their way to it; negative: are no more."""

    def adopt(self, run: ClaimedRun) -> None:
        """It holds this run now."""

    def doubt(self) -> None:
        """Runs may have been given to it although the answer never came."""


@dataclass(slots=True, eq=False)
class _Start:
    run: NewRun
    workflow: str
    version: str
    priority: int
    queue: str
    pinned: bool
    done: asyncio.Future[StartedRun | None]


class Desk:
    """Of one client.

    Args:
        takers: The workers of this program, asked at each write.
    """

    def __init__(self, store: Store, takers: Callable[[], list[Taker]]) -> None:
        self._store = store
        self._takers = takers
        self._waiting: deque[_Start] = deque()
        self._task: asyncio.Task[None] | None = None

    async def start(
        self, run: NewRun, workflow: str, version: str, priority: int, queue: str, pinned: bool
    ) -> StartedRun | None:
        """As `Store.insert_run`: add a run, or find the one that has its id."""
        loop = asyncio.get_running_loop()
        start = _Start(run, workflow, version, priority, queue, pinned, loop.create_future())
        self._waiting.append(start)
        if self._task is None:
            self._task = loop.create_task(self._write_all())
        started = await start.done
        if started is not None:
            return started
        return await self._store.insert_run(
            run.run_id,
            run.external_id,
            workflow,
            version,
            priority,
            run.payload,
            pinned,
            queue,
            run.queue_key,
        )

    async def close(self) -> None:
        """Wait until what was taken in is written."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _write_all(self) -> None:
        starts: list[_Start] = []
        try:
            while self._waiting:
                starts = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
                try:
                    await self._write(starts)
                except StoreUnavailable as error:
                    _fail(starts, error)
        except BaseException as error:
            _fail([*starts, *self._waiting], error)
            self._waiting.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            self._task = None

    async def _write(self, starts: list[_Start]) -> None:
        taker = max(self._takers(), key=lambda one: one.room_for_starts(), default=None)
        wanted = [False] * len(starts)
        if taker is not None:
            room = taker.room_for_starts()
            for place, start in enumerate(starts):
                if room > 0 and taker.takes(start.workflow, start.version, start.queue):
                    wanted[place] = True
                    room -= 1
        count = sum(wanted)
        if taker is not None:
            taker.promise(count)
        try:
            added = await self._insert(starts, wanted, taker)
        except BaseException:
            if taker is not None and count:
                taker.doubt()
            raise
        finally:
            if taker is not None:
                taker.promise(-count)
        for start in starts:
            found = added.get(start.run.run_id)
            if found is not None and found[0]:
                assert taker is not None, "whose it is"
                taker.adopt(_claimed(start, found[1]))
            if not start.done.done():
                start.done.set_result(None if found is None else _started(start, found[0]))

    async def _insert(
        self, starts: list[_Start], wanted: list[bool], taker: Taker | None
    ) -> dict[UUID, tuple[bool, datetime]]:
        worker_id = NOBODY if taker is None else taker.worker_id
        if len(starts) == 1:
            start = starts[0]
            rows = await self._store.rows(
                "insert_start",
                worker_id=worker_id,
                id=start.run.run_id,
                external_id=start.run.external_id,
                workflow=start.workflow,
                version=start.version,
                priority=start.priority,
                input=start.run.payload,
                queue=start.queue,
                queue_key=start.run.queue_key,
                pinned=start.pinned,
                wanted=wanted[0],
            )
            return {row[0]: (row[1], row[2]) for row in rows}
        rows = await self._store.rows(
            "insert_starts",
            worker_id=worker_id,
            ids=[start.run.run_id for start in starts],
            external_ids=[start.run.external_id for start in starts],
            workflows=[start.workflow for start in starts],
            versions=[start.version for start in starts],
            priorities=[start.priority for start in starts],
            inputs=[start.run.payload for start in starts],
            queues=[start.queue for start in starts],
            queue_keys=[start.run.queue_key for start in starts],
            pinned=[start.pinned for start in starts],
            wanted=wanted,
        )
        return {row[0]: (row[1], row[2]) for row in rows}


def _fail(starts: list[_Start], error: BaseException) -> None:
    """Of these nobody knows whether they were added: each looks for itself, or gets the error."""
    for start in starts:
        if start.done.done():
            continue
        if isinstance(error, StoreUnavailable) and error.__cause__ is not None:
            start.done.set_result(None)
        elif isinstance(error, Exception):
            start.done.set_exception(error)
        else:
            start.done.cancel()


def _started(start: _Start, held: bool) -> StartedRun:
    run = start.run
    return StartedRun(run.run_id, run.external_id, start.workflow, start.version, True, held)


def _claimed(start: _Start, created_at: datetime) -> ClaimedRun:
    run = start.run
    return ClaimedRun(
        run.run_id,
        run.external_id,
        start.workflow,
        start.version,
        start.priority,
        1,
        run.payload,
        1,
        created_at,
    )
