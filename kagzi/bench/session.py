"""What a benchmark is given: a client and a worker on a schema of its own, and its rounds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from kagzi.bench import work
from kagzi.bench.tap import Tap
from kagzi.client import Client, connect
from kagzi.definition import Workflow
from kagzi.errors import RunFailed, StoreError
from kagzi.store.connections import Connector
from kagzi.worker import Worker

T = TypeVar("T")

SCHEMA = "kagzi_bench"
TIMEOUT_S = 600.0


class Session:
    """A client and its worker."""

    def __init__(self, client: Client, worker: Worker) -> None:
        self.client = client
        self.worker = worker

    async def run(self, workflow: Workflow[..., T], *args: Any) -> T:
        """Start a run and wait for its result."""
        handle = await self.client.start(workflow, *args)
        return await handle.result(timeout=TIMEOUT_S)

    async def drive_again(self, times: int, *args: Any) -> list[float]:
        """Seconds of the body of `work.driven_again`: when it works, then over its checkpoints."""
        handle = await self.client.start(work.driven_again, *args)
        for drive in range(1 + times):
            if drive:
                await self.client.retry(handle)
            try:
                await handle.result(timeout=TIMEOUT_S)
            except RunFailed:
                if len(work.passes[handle.run_id]) != drive + 1:
                    raise  # before its body came to its end
        return work.passes.pop(handle.run_id)

    async def resume(self, *args: Any) -> tuple[float, float]:
        """Seconds to resume `work.resumed` over all its checkpoints: in all, and of its body."""
        handle = await self.client.start(work.resumed, *args)
        for _ in range(2):
            began = time.perf_counter()
            try:
                await handle.result(timeout=TIMEOUT_S)
            except RunFailed:
                taken = time.perf_counter() - began
            if len(work.passes[handle.run_id]) == 1:
                await self.client.retry(handle)
        return taken, work.passes.pop(handle.run_id)[1]

    def pool_processes(self) -> list[int]:
        return [] if self.worker.pool is None else self.worker.pool.process_ids

    @property
    def batches(self) -> int:
        """Transactions of the worker's checkpoint writer so far."""
        return self.worker.writer.batches

    @property
    def statements(self) -> int:
        """Statements of the worker's fenced connections so far."""
        return self.worker._fenced.statements + self.worker._fenced_large.statements


class Bench:
    """How and where to measure.

    Args:
        conninfo: Of the database.
        processes: Pool processes of each worker.
        quick: Fewer rounds of the same.
        advance: Told (rounds done, rounds in all) of the benchmark under way.
    """

    def __init__(
        self,
        conninfo: str,
        processes: int,
        quick: bool = False,
        advance: Callable[[int, int], None] = lambda done, rounds: None,
        schema: str = SCHEMA,
    ) -> None:
        self.conninfo = conninfo
        self.processes = processes
        self.quick = quick
        self.schema = schema
        self._advance = advance

    def rounds(self, full: int, quick: int) -> Iterator[int]:
        """Rounds in which what is compared takes turns."""
        rounds = quick if self.quick else full
        for done in range(rounds):
            self._advance(done, rounds)
            yield done
        self._advance(rounds, rounds)

    @asynccontextmanager
    async def counted_session(
        self, processes: int | None = None
    ) -> AsyncIterator[tuple[Session, Tap]]:
        """The same behind a tap that counts what goes to the server and back."""
        with closing(Tap(self.conninfo)) as tap:
            async with self.session(tap.conninfo, processes) as session:
                yield session, tap

    @asynccontextmanager
    async def session(
        self,
        conninfo: str | None = None,
        processes: int | None = None,
        poll_s: float = 60.0,
        warm: tuple[int, ...] = (10, 100, 500),
    ) -> AsyncIterator[Session]:
        """A new client and worker that have done this kind of work before.

        Nothing but the work is written meanwhile: the lease is long and polls are rare.

        Args:
            warm: Sizes of the groups that were run before.
        """
        async with (
            connect(conninfo or self.conninfo, schema=self.schema) as client,
            client.worker(
                processes=processes or self.processes,
                lease_s=600.0,
                heartbeat_s=300.0,
                poll_s=poll_s,
                modules=(work.__name__,),
            ) as worker,
        ):
            session = Session(client, worker.incarnation)
            for size in warm:
                await session.run(work.nothings, size)
            await session.run(work.nothings_in_sequence, 10)
            yield session


@contextmanager
def own_schema(dsn: str, schema: str = SCHEMA) -> Iterator[None]:
    """Guards the schema for one program at a time, and drops it in the end.

    Raises:
        StoreError: Another program measures in this database.
        StoreUnavailable, InvalidDsn: No usable server.
    """
    connector = Connector(dsn, schema)
    drop = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema))
    try:
        connection = psycopg.connect(connector.conninfo(), autocommit=True)
    except psycopg.Error as error:
        raise connector.unavailable(error) from None
    with connection:
        row = connection.execute(
            "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [f"kagzi.bench:{schema}"]
        ).fetchone()
        if row != (True,):
            raise StoreError(
                f"another benchmark measures in database {connector.database!r} at this moment; "
                "wait for its end, or give another database with --dsn"
            )
        connection.execute("SET client_min_messages = warning")
        connection.execute(drop)
        try:
            yield
        finally:
            connection.execute(drop)
