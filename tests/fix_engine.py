"""A client and a worker with a pool of two processes, shared by the tests of a module.

Their event loop and database live as long as the module; runs are kept apart by their ids, and what
bodies did is read from a folder of each test's own (`tests.engine.witness`). What needs a worker of
its own (to kill, to configure) makes one on `dsn`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import pytest_asyncio

import kagzi
from kagzi.worker import Worker
from tests.engine.witness import Witness
from tests.fix_db import Databases

PATIENCE_S = 60.0
HOUR_S = 3600.0


async def until(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]], patience_s: float = PATIENCE_S
) -> Any:
    """Look until `condition` gives something true; that.

    Raises:
        TimeoutError: It did not in time.
    """
    async with asyncio.timeout(patience_s):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.005)


@dataclass
class Engine:
    """What a test drives: a client, its worker, and the database beneath."""

    client: kagzi.Client
    worker: Worker
    dsn: str

    async def start(self, workflow: Any, *args: Any, **options: Any) -> kagzi.RunHandle[Any]:
        return await self.client.start(workflow, *args, **options)

    async def run(self, workflow: Any, *args: Any, **options: Any) -> Any:
        """The result of a new run."""
        return (await self.drive(workflow, *args, **options))[0]

    async def drive(
        self, workflow: Any, *args: Any, **options: Any
    ) -> tuple[Any, kagzi.RunHandle[Any]]:
        """The result of a new run, and its handle."""
        handle = await self.client.start(workflow, *args, **options)
        return await handle.result(timeout=PATIENCE_S), handle

    async def outcome(self, handle: kagzi.RunHandle[Any]) -> Any:
        """Its result, or the exception that its `result()` raises."""
        try:
            return await handle.result(timeout=PATIENCE_S)
        except kagzi.KagziError as error:
            return error

    async def ids(self, handle: kagzi.RunHandle[Any]) -> dict[str, str]:
        """Recorded step ids of a run, sorted, each with the last part of its function's name."""
        steps = (await handle.describe()).steps
        return {s.id: s.function.rpartition(".")[2] for s in sorted(steps, key=lambda s: s.id)}

    async def rewind(self, handle: kagzi.RunHandle[Any], keep: int | None = None) -> None:
        """Make a finished run due again over its checkpoints, as after a crash at its end.

        Args:
            keep: Forget what was recorded after this number, as after a crash at that moment.
        """
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            if keep is not None:
                for table in ("step_runs", "parallel_groups"):
                    await connection.execute(
                        f"DELETE FROM kagzi.{table} WHERE run_id = %s AND completed_number > %s",  # noqa: S608
                        [handle.run_id, keep],
                    )
                    await connection.execute(
                        f"UPDATE kagzi.{table} SET visible_number = NULL"  # noqa: S608
                        " WHERE run_id = %s AND visible_number > %s",
                        [handle.run_id, keep],
                    )
            await connection.execute(
                "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL,"
                " output = NULL, error = NULL WHERE id = %s",
                [handle.run_id],
            )
        self.worker.wake()

    async def replay(self, handle: kagzi.RunHandle[Any], keep: int | None = None) -> Any:
        """Its outcome when it runs again from the top over its checkpoints."""
        await self.rewind(handle, keep)
        return await self.outcome(handle)

    async def numbers(self, handle: kagzi.RunHandle[Any]) -> list[int]:
        """When, in the run's own count, each of its checkpoints was made."""
        query = (
            "SELECT completed_number FROM kagzi.step_runs WHERE run_id = %(id)s UNION "
            "SELECT completed_number FROM kagzi.parallel_groups WHERE run_id = %(id)s ORDER BY 1"
        )
        return [row[0] for row in await self.rows(query, id=handle.run_id)]

    async def rows(self, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode(), parameters)
            return await cursor.fetchall() if cursor.description else []

    async def count(self, table: str, run_id: Any = None) -> int:
        """Rows of a table, of one run or of all."""
        where = "" if run_id is None else " WHERE run_id = %(id)s"
        return (await self.rows(f"SELECT count(*) FROM kagzi.{table}{where}", id=run_id))[0][0]  # noqa: S608

    async def move_clock(self, seconds: float) -> None:
        """Let the store's clock go ahead of the real one by so much."""
        await self.rows(
            "CREATE OR REPLACE FUNCTION kagzi.now_at() RETURNS timestamptz LANGUAGE sql STABLE"
            " PARALLEL SAFE AS $$SELECT pg_catalog.clock_timestamp()"
            f" + interval '{seconds} s'$$"
        )
        self.worker.wake()

    async def stored(self, handle: kagzi.RunHandle[Any], count: int) -> None:
        """Wait until so many steps of a run have their checkpoints."""

        async def are_stored() -> bool:
            return await self.count("step_runs", handle.run_id) >= count

        await until(are_stored)

    async def expire(self, handle: kagzi.RunHandle[Any]) -> None:
        """Let the earliest timer of a run that is held here be due now."""
        timers = self.worker.runs[handle.run_id].timers
        await until(lambda: timers._pending)
        timer = min(timers._pending, key=lambda one: one.due)
        assert timer.handle is not None, "it is set"
        timer.handle.cancel()
        timer.due = 0.0
        timer.fire()

    async def settled(self) -> None:
        """Wait until nothing runs: no run is held, and no body is begun or waits."""

        def idle() -> bool:
            scheduler = self.worker.executor.scheduler
            return not self.worker.runs and not scheduler.begun and not scheduler.waiting()

        await until(idle)


@asynccontextmanager
async def started(dsn: str, **options: Any) -> AsyncIterator[Engine]:
    """A client and a worker on this database."""
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(**{"processes": 2, "poll_s": 0.1, **options}) as worker:
            yield Engine(client, worker.incarnation, dsn)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _module_engine(databases: Databases) -> AsyncIterator[Engine]:
    name = databases.clone()
    async with started(databases.dsn_of(name)) as engine:
        yield engine
    databases.retire(name)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(_module_engine: Engine) -> AsyncIterator[Engine]:
    """The module's engine; a test that leaves it broken, or work behind, fails here."""
    worker = _module_engine.worker
    yield _module_engine
    assert worker.lost is None
    try:
        await _module_engine.settled()
    except TimeoutError:
        left = [run.claimed for run in worker.runs.values()]
        for run in list(worker.runs.values()):
            run.doom(kagzi.KagziError("left behind by a test"))
        await _module_engine.settled()
        pytest.fail(f"left behind: {[(run.workflow, run.external_id) for run in left]}")


@pytest.fixture
def witness(tmp_path: Any) -> Witness:
    return Witness(tmp_path)


@pytest.fixture
def warnings_of_kagzi(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What kagzi's loggers said at warning level or above so far."""
    caplog.set_level(logging.WARNING, logger="kagzi")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("kagzi") and record.levelno >= logging.WARNING
    ]
