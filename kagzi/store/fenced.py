"""A worker's fenced connection: commits batches, each in one transaction behind the fence.

Two forms, by size: up to `UNNEST_MOST` steps one prepared INSERT over arrays, above that binary
COPY with its BEGIN, fence and COMMIT in one message. After a connection is lost while a commit is
under way nobody knows its outcome: the batch is sent again in the first form, which changes nothing
that is there already, and what was there is read back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from typing import Any, cast
from uuid import UUID

import psycopg
from psycopg import generators, pq
from psycopg.abc import Buffer
from psycopg.adapt import Dumper

from kagzi._core import STEP_COLUMN_OIDS, STEP_COLUMNS, Step, copy_rows, unnest_arrays
from kagzi.errors import LeaseLost
from kagzi.store.checkpoints import ContentRefused
from kagzi.store.connections import Connector, is_outage
from kagzi.store.queries import load_queries
from kagzi.store.rows import Batch, StoredStep

logger = logging.getLogger("kagzi.store")

UNNEST_MOST = 64
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
FENCE_SHUT = "KZ001"


class _Array(bytes):
    """A binary array, built already."""


def _array_type(oid: int) -> type[_Array]:
    made = type(f"_Array{oid}", (_Array,), {})

    class ArrayDumper(Dumper):
        format = pq.Format.BINARY

        def dump(self, obj: Any) -> Buffer | None:
            return cast(Buffer, obj)

    ArrayDumper.oid = oid
    psycopg.adapters.register_dumper(made, ArrayDumper)
    return made


_ARRAY_TYPES = {oid: _array_type(oid) for oid in set(STEP_COLUMN_OIDS)}


class FencedConnection:
    """Commits batches for one worker over one connection that it keeps up.

    Args:
        connector: Makes connections.
        worker_id: Whose fence guards every write.
    """

    def __init__(self, connector: Connector, worker_id: UUID) -> None:
        self._connector = connector
        self._worker_id = worker_id
        self._queries = load_queries(connector.schema)
        columns = ", ".join(STEP_COLUMNS)
        schema = connector.quoted_schema
        # The simple protocol, which takes no parameters: all parts are names and an id of our own.
        self._copy_start = (
            f"BEGIN; SELECT {schema}.hold_fence('{worker_id}'); "  # noqa: S608
            f"COPY {schema}.step_runs ({columns}) FROM STDIN (FORMAT binary)"
        ).encode()
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self.statements = 0

    async def write(self, batch: Batch) -> list[tuple[Step, StoredStep]]:
        """Commit a batch, however often the connection is lost meanwhile.

        Returns:
            The steps that were stored before, with what is stored.

        Raises:
            LeaseLost: The fence is shut.
            ContentRefused: Postgres refuses something in the batch for good.
        """
        careful = False
        failures = 0
        while True:
            try:
                if self._connection is None:
                    self._connection = await self._connector.connect(
                        application_name=f"kagzi:{self._worker_id}"
                    )
                return await self._send(self._connection, batch, careful)
            except psycopg.errors.UniqueViolation:
                if careful:
                    raise
                careful = True
                await self._rollback()
            except psycopg.Error as error:
                if error.sqlstate == FENCE_SHUT:
                    await self._rollback()
                    raise LeaseLost(
                        f"the lease of worker {self._worker_id} was ended by another worker"
                    ) from None
                if not is_outage(error):
                    await self._rollback()
                    raise ContentRefused(str(error).strip() or type(error).__name__) from error
                careful = True
                await self.close()
                pause_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                if failures in (0, 5) or failures % 30 == 0:
                    logger.warning(
                        "checkpoints wait: %s; trying again", self._connector.explain(error)
                    )
                failures += 1
                await asyncio.sleep(pause_s)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # --- one transaction --------------------------------------------------------------------

    async def _send(
        self, connection: psycopg.AsyncConnection[Any], batch: Batch, careful: bool
    ) -> list[tuple[Step, StoredStep]]:
        steps = batch.steps
        if not careful and len(steps) > UNNEST_MOST:
            alone = batch.only_steps
            await self._copy(connection, steps, commit=alone)
            if not alone:
                await self._write_rows(connection, "write_rows", [], batch)
                await self._clear(connection, batch)
                await self._execute(connection, "COMMIT")
            return []
        if batch.clears:
            await self._execute(connection, "BEGIN")
        name = "write_steps" if batch.only_steps else "write_rows"
        inserted = await self._write_rows(connection, name, steps, batch)
        if batch.clears:
            await self._clear(connection, batch)
            await self._execute(connection, "COMMIT")
        if inserted < len(steps):
            return await self._read_back(connection, steps)
        return []

    async def _write_rows(
        self,
        connection: psycopg.AsyncConnection[Any],
        name: str,
        steps: list[Step],
        batch: Batch,
    ) -> int:
        parameters: dict[str, Any] = {"worker_id": self._worker_id}
        for place, (oid, array) in enumerate(
            zip(STEP_COLUMN_OIDS, unnest_arrays(steps), strict=True)
        ):
            parameters[f"s{place}"] = _ARRAY_TYPES[oid](array)
        if name == "write_rows":
            parameters.update(_row_parameters(batch))
        self.statements += 1
        cursor = await connection.execute(self._queries[name], parameters, prepare=True)
        row = await cursor.fetchone()
        assert row is not None, "an aggregate gives one row"
        fence, inserted, released = row
        if fence == 0:
            raise LeaseLost(f"the lease of worker {self._worker_id} was ended by another worker")
        if name == "write_rows" and released < len(batch.runs):
            await self._check_released(connection, batch)
        return int(inserted)

    async def _check_released(self, connection: psycopg.AsyncConnection[Any], batch: Batch) -> None:
        """Runs not released now were released by a commit whose answer was lost, or taken."""
        parameters = {"run_ids": [row.run_id for row in batch.runs]}
        cursor = await connection.execute(self._queries["read_runs_back"], parameters)
        stored = {row[0]: row for row in await cursor.fetchall()}
        for row in batch.runs:
            found = stored.get(row.run_id)
            if found is None or found[1] != row.epoch:
                logger.warning(
                    "run %s was taken over or deleted before its %s could be recorded",
                    row.run_id,
                    row.status,
                )

    async def _clear(self, connection: psycopg.AsyncConnection[Any], batch: Batch) -> None:
        if batch.clears:
            self.statements += 1
            parameters = {
                "run_ids": [run_id for run_id, _ in batch.clears],
                "step_ids": [step_id for _, step_id in batch.clears],
            }
            await connection.execute(self._queries["clear_below"], parameters)

    async def _execute(self, connection: psycopg.AsyncConnection[Any], statement: str) -> None:
        self.statements += 1
        await connection.execute(statement.encode())

    async def _read_back(
        self, connection: psycopg.AsyncConnection[Any], steps: list[Step]
    ) -> list[tuple[Step, StoredStep]]:
        parameters = {
            "run_ids": [UUID(bytes=step.run_id) for step in steps],
            "step_ids": [step.id for step in steps],
        }
        cursor = await connection.execute(self._queries["read_steps_back"], parameters)
        stored = {(row[0].bytes, row[1]): StoredStep(*row[2:]) for row in await cursor.fetchall()}
        return [(step, stored[step.run_id, step.id]) for step in steps]

    async def _copy(
        self, connection: psycopg.AsyncConnection[Any], steps: list[Step], commit: bool
    ) -> None:
        self.statements += 4 if commit else 3
        start = self._copy_start + (b"; COMMIT" if commit else b"")
        data = copy_rows(steps)
        async with connection.lock:
            await connection.wait(_copy_messages(connection, start, data))

    async def _rollback(self) -> None:
        if self._connection is not None:
            try:
                await self._connection.rollback()
            except psycopg.Error:
                await self.close()


def _copy_messages(
    connection: psycopg.AsyncConnection[Any], start: bytes, data: bytes
) -> Generator[Any, Any, None]:
    """Statements that end in (or go on after) a COPY, and its data: two round trips in all.

    Source: PostgreSQL manual, "Message Flow", "Simple Query" and "COPY Operations".
    """
    pgconn = connection.pgconn
    pgconn.send_query(start)
    results = yield from generators.execute(pgconn)
    _raise_failure(pgconn, results)
    if results[-1].status != pq.ExecStatus.COPY_IN:
        raise psycopg.OperationalError("the server did not ask for the rows of a COPY")
    view = memoryview(data)
    for place in range(0, len(view), 1 << 18):
        while pgconn.put_copy_data(view[place : place + (1 << 18)]) == 0:
            yield psycopg.waiting.Wait.W
    while pgconn.put_copy_end() == 0:
        yield psycopg.waiting.Wait.W
    results = yield from generators.execute(pgconn)
    _raise_failure(pgconn, results)


def _raise_failure(pgconn: Any, results: list[Any]) -> None:
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")


def _row_parameters(batch: Batch) -> dict[str, Any]:
    """Parameters of `write_rows` but for the steps: one list per column."""
    columns: dict[str, list[Any]] = {}
    tables = {
        "a": (batch.attempts, _ATTEMPT_FIELDS),
        "g": (batch.groups, _GROUP_FIELDS),
        "r": (batch.runs, _RUN_FIELDS),
        "v": ([mark for mark in batch.marks if not mark.of_group], _MARK_FIELDS),
        "w": ([mark for mark in batch.marks if mark.of_group], _MARK_FIELDS),
    }
    for letter, (rows, fields) in tables.items():
        for place, field in enumerate(fields):
            columns[f"{letter}{place}"] = [getattr(row, field) for row in cast(list[Any], rows)]
    memos = batch.memos
    columns["m0"] = [memo.key for memo in memos]
    columns["m1"] = [memo.step.function for memo in memos]
    columns["m2"] = [memo.step.output for memo in memos]
    columns["m3"] = [UUID(bytes=memo.step.run_id) for memo in memos]
    columns["m4"] = [memo.lifetime_s for memo in memos]
    return columns


_ATTEMPT_FIELDS = (
    "run_id",
    "step_id",
    "attempt",
    "started_at",
    "completed_at",
    "error",
    "process_id",
    "retry_at",
)
_GROUP_FIELDS = (
    "run_id",
    "path",
    "id",
    "kind",
    "size",
    "strategy",
    "group_limit",
    "parent_step_id",
    "decision",
    "decided_index",
    "cached",
    "succeeded",
    "failed",
    "started_at",
    "completed_at",
    "wall_s",
    "steps_s",
    "longest_s",
    "call_number",
    "completed_number",
)
_RUN_FIELDS = ("run_id", "epoch", "status", "output", "error", "wake_at")
_MARK_FIELDS = ("run_id", "path", "number")
