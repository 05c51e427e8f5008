"""Takes single starts in, those of one moment in one statement, and hands runs to a worker here.

While nothing is being written a start is written at once; while a write is under way the others
gather for the next. A run that a worker of this program can have is inserted as its own already.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import psycopg
from psycopg.pq.abc import PGresult

from kagzi.background import begin_apart
from kagzi.errors import StoreUnavailable
from kagzi.store.direct import DirectConnection
from kagzi.store.recorded import ClaimedRun
from kagzi.store.starts import NewRun
from kagzi.store.statements import (
    BOOL_OID,
    BOOLS,
    BYTES,
    BYTES_OID,
    INT_OID,
    INTS,
    TEXT_OID,
    TEXTS,
    UUID_OID,
    UUIDS,
    Statement,
    typed_rows,
)
from kagzi.store.store import StartedRun, Store

logger = logging.getLogger("kagzi.store")

MOST = 500
NOBODY = UUID(int=0)

_ONE = {
    "worker_id": UUID_OID,
    "id": UUID_OID,
    "external_id": TEXT_OID,
    "workflow": TEXT_OID,
    "version": TEXT_OID,
    "priority": INT_OID,
    "input": BYTES_OID,
    "queue": TEXT_OID,
    "queue_key": TEXT_OID,
    "pinned": BOOL_OID,
    "wanted": BOOL_OID,
}
_MANY = {
    "worker_id": UUID_OID,
    "ids": UUIDS,
    "external_ids": TEXTS,
    "workflows": TEXTS,
    "versions": TEXTS,
    "priorities": INTS,
    "inputs": BYTES,
    "queues": TEXTS,
    "queue_keys": TEXTS,
    "pinned": BOOLS,
    "wanted": BOOLS,
}


def start_statements(queries: dict[str, str]) -> dict[str, Statement]:
    """By name: `insert_start`, `insert_starts`."""
    types = {"insert_start": _ONE, "insert_starts": _MANY}
    return {name: Statement(name, queries[name], oids) for name, oids in types.items()}


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
        connector = store.connector
        self._direct = DirectConnection(connector, "kagzi-starts")
        statements = start_statements(store.queries)
        self._one, self._many = statements["insert_start"], statements["insert_starts"]
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
            self._task = begin_apart(self._write_all())
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
        await self._direct.close()

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
        try:
            await self._direct.open()
        except psycopg.Error as error:  # nothing was sent; the store waits for the server
            logger.debug("starts go through the pool: %s", self._store.connector.explain(error))
            for start in starts:
                if not start.done.done():
                    start.done.set_result(None)
            return
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
        """Those that were added: whether they are the taker's, and when that was."""
        worker_id = NOBODY if taker is None else taker.worker_id
        sealer = self._store.connector.sealer
        inputs = [start.run.payload for start in starts]
        if sealer is not None:
            inputs = [sealer.seal(payload) for payload in inputs]
        if len(starts) == 1:
            start = starts[0]
            result = await self._ask(
                self._one,
                worker_id=worker_id,
                id=start.run.run_id,
                external_id=start.run.external_id,
                workflow=start.workflow,
                version=start.version,
                priority=start.priority,
                input=inputs[0],
                queue=start.queue,
                queue_key=start.run.queue_key,
                pinned=start.pinned,
                wanted=wanted[0],
            )
        else:
            result = await self._ask(
                self._many,
                worker_id=worker_id,
                ids=[start.run.run_id for start in starts],
                external_ids=[start.run.external_id for start in starts],
                workflows=[start.workflow for start in starts],
                versions=[start.version for start in starts],
                priorities=[start.priority for start in starts],
                inputs=inputs,
                queues=[start.queue for start in starts],
                queue_keys=[start.run.queue_key for start in starts],
                pinned=[start.pinned for start in starts],
                wanted=wanted,
            )
        return {run_id: (held, at) for run_id, held, at in typed_rows(result)}

    async def _ask(self, statement: Statement, **parameters: Any) -> PGresult:
        return await self._direct.ask(statement, parameters)


def _fail(starts: list[_Start], error: BaseException) -> None:
    """Of these nobody knows whether they were added: each looks for itself, or gets the error."""
    for start in starts:
        if start.done.done():
            continue
        if isinstance(error, StoreUnavailable):
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
