"""A worker's fenced connection: commits batches, each in one transaction behind the fence.

Three forms, by size: a step or run that stands alone by a statement of its own; up to `UNNEST_MOST`
steps, or several with up to `UNNEST_BYTES`, by one prepared INSERT over arrays; above that by
binary COPY with its BEGIN, fence and COMMIT in one message. Never more than five statements. After
a connection is lost while a commit is under way nobody knows its outcome: the batch is sent again
in the form over arrays, which changes nothing that is there already, and what was there is read
back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Iterator
from typing import Any
from uuid import UUID

import psycopg
from psycopg import generators, pq

from kagzi import faultpoints
from kagzi._core import STEP_COLUMNS, Step, StoredStep, copy_rows, row_bytes
from kagzi.errors import LeaseLost
from kagzi.store.checkpoints import ContentRefused
from kagzi.store.connections import Connector, cancellations, heed_cancellation, is_outage
from kagzi.store.direct import DirectConnection
from kagzi.store.forms import (
    Values,
    group_values,
    is_relaxed,
    make_statements,
    rows_values,
    run_values,
    step_values,
    steps_values,
)
from kagzi.store.history import History
from kagzi.store.queries import load_queries
from kagzi.store.rows import Batch
from kagzi.store.sealing import sealed_steps
from kagzi.store.statements import raise_failure, read_counts

logger = logging.getLogger("kagzi.store")

UNNEST_MOST = 64
UNNEST_BYTES = 512 << 10
PIECE_BYTES = 256 << 10
COPY_HEADER_BYTES = 19
COPY_TRAILER_BYTES = 2
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
FENCE_SHUT = "KZ001"


class FencedConnection:
    """Commits batches for one worker over one connection that it keeps up.

    Args:
        connector: Makes connections.
        worker_id: Whose fence guards every write.
        history: Of the server that its runs were loaded from.
    """

    def __init__(
        self, connector: Connector, worker_id: UUID, history: History | None = None
    ) -> None:
        self._connector = connector
        self._worker_id = worker_id
        self._direct = DirectConnection(connector, f"kagzi:{worker_id}", history)
        self._queries = load_queries(connector.schema)
        columns = ", ".join(STEP_COLUMNS)
        schema = connector.quoted_schema
        # The simple protocol, which takes no parameters: all parts are names and an id of our own.
        self._copy_start = (
            f"SELECT {schema}.hold_fence('{worker_id}'); "  # noqa: S608
            f"COPY {schema}.step_runs ({columns}) FROM STDIN (FORMAT binary)"
        ).encode()
        self._statements = make_statements(self._queries)
        self.statements = 0

    async def write(self, batch: Batch) -> list[tuple[Step, StoredStep]]:
        """Commit a batch, however often the connection is lost meanwhile.

        Returns:
            The steps that were stored before, with what is stored.

        Raises:
            LeaseLost: The fence is shut, or the server was replaced.
            ContentRefused: Postgres refuses something in the batch for good.
        """
        careful = False
        failures, before = 0, cancellations()
        while True:
            try:
                connection = await self._direct.open()
                if faultpoints.reach is not None:
                    faultpoints.reach("batch.before")
                stored = await self._send(connection, batch, careful)
                if faultpoints.reach is not None:
                    faultpoints.reach("batch.after")
                return stored
            except psycopg.errors.UniqueViolation:
                if careful:
                    raise
                careful = True
                await self._rollback()
            except psycopg.Error as error:
                heed_cancellation(before)
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
        await self._direct.close()

    # --- one transaction --------------------------------------------------------------------

    async def _send(
        self, connection: psycopg.AsyncConnection[Any], batch: Batch, careful: bool
    ) -> list[tuple[Step, StoredStep]]:
        steps = batch.steps
        if await self._write_alone(batch):
            return []
        if not careful and _is_for_copy(batch):
            alone = batch.only_steps
            if faultpoints.reach is not None:
                faultpoints.reach("copy.before")
            await self._copy(connection, steps, commit=alone)
            if not alone:
                if faultpoints.reach is not None:
                    faultpoints.reach("copy.after")
                await self._write_rows(connection, batch, [])
                await self._say(connection, "COMMIT")
            return []
        if batch.removes:
            await self._say(connection, "BEGIN")
        inserted = await self._write_rows(connection, batch, steps)
        if batch.removes:
            await self._remove(connection, batch)
            await self._say(connection, "COMMIT")
        if inserted < len(steps):
            return await self._read_back(connection, steps)
        return []

    def _sealed(self, steps: list[Step]) -> list[Step]:
        sealer = self._connector.sealer
        return steps if sealer is None else sealed_steps(steps, sealer)

    async def _write_alone(self, batch: Batch) -> bool:
        """Write what stands alone. False: it does not, or there is more to it than a new row."""
        if batch.only_steps and len(batch.steps) == 1 and not is_relaxed(batch.steps):
            result = await self._execute("write_step", step_values(*self._sealed(batch.steps)))
            return result.ntuples == 1
        if batch.is_one_run:
            values = run_values(batch.runs[0], self._connector.sealer)
            return (await self._execute("write_run", values)).ntuples == 1
        return False

    async def _write_rows(
        self, connection: psycopg.AsyncConnection[Any], batch: Batch, steps: list[Step]
    ) -> int:
        """Write these steps and all else that the batch holds; how many steps were inserted."""
        values = steps_values(self._sealed(steps))
        if batch.only_steps:
            name = "write_steps"
            values["relaxed"] = b"\1" if is_relaxed(steps) else b"\0"
        elif batch.is_one_group:
            name = "write_group"
            values.update(group_values(batch.groups[0]))
        else:
            name = "write_rows"
            values.update(rows_values(batch, self._connector.sealer))
        fence, inserted, released = read_counts(await self._execute(name, values))
        if fence == 0:
            raise LeaseLost(f"the lease of worker {self._worker_id} was ended by another worker")
        if released < len(batch.runs):
            await self._check_released(connection, batch)
        return inserted

    async def _execute(self, name: str, values: Values) -> pq.abc.PGresult:
        self.statements += 1
        values["worker_id"] = self._worker_id.bytes
        return await self._direct.execute(self._statements[name], values)

    async def _check_released(self, connection: psycopg.AsyncConnection[Any], batch: Batch) -> None:
        """Runs not released now were released by a commit whose answer was lost, or taken."""
        parameters = {"run_ids": [row.run_id for row in batch.runs]}
        cursor = await connection.execute(self._queries["read_runs_back"], parameters)
        stored = {row[0]: row for row in await cursor.fetchall()}
        for row in batch.runs:
            found = stored.get(row.run_id)
            if found is None or found[1] != row.epoch:
                row.refused = True
                logger.warning(
                    "run %s was taken over or deleted before its %s could be recorded",
                    row.run_id,
                    row.status,
                )

    async def _remove(self, connection: psycopg.AsyncConnection[Any], batch: Batch) -> None:
        if batch.clears:
            self.statements += 1
            parameters: dict[str, Any] = {
                "run_ids": [run_id for run_id, _ in batch.clears],
                "step_ids": [step_id for _, step_id in batch.clears],
            }
            await connection.execute(self._queries["clear_below"], parameters)
        if batch.drops:
            self.statements += 1
            parameters = {
                "run_ids": [run_id for run_id, _, _ in batch.drops],
                "paths": [path for _, path, _ in batch.drops],
                "of_groups": [of_group for _, _, of_group in batch.drops],
            }
            await connection.execute(self._queries["drop_paths"], parameters)

    async def _say(self, connection: psycopg.AsyncConnection[Any], statement: str) -> None:
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
        begin = b"BEGIN; "
        if commit and is_relaxed(steps):
            begin += b"SET LOCAL synchronous_commit = off; "
        start = begin + self._copy_start + (b"; COMMIT" if commit else b"")
        rows = _pieces(self._sealed(steps))
        await self._direct.wait(_copy_messages(connection, start, rows))

    async def _rollback(self) -> None:
        if self._direct.current is not None:
            try:
                await self._direct.current.rollback()
            except psycopg.Error:
                await self.close()


def _is_for_copy(batch: Batch) -> bool:
    """Whether the rows are many, or several that hold much: the server reads those as they come."""
    count = len(batch.steps)
    if count <= UNNEST_MOST and (count == 1 or batch.nbytes <= UNNEST_BYTES):
        return False
    return not batch.removes


def _pieces(steps: list[Step]) -> Iterator[memoryview]:
    """The rows of a COPY, built while those before them are on their way.

    Each piece begins as a stream does and ends as one: between pieces both are left out.
    """
    start, count = 0, len(steps)
    while start < count:
        end, nbytes = start, 0
        while end < count and nbytes < PIECE_BYTES:
            nbytes += row_bytes(steps[end])
            end += 1
        data = memoryview(copy_rows(steps[start:end]))
        stop = len(data) if end == count else -COPY_TRAILER_BYTES
        yield data[COPY_HEADER_BYTES if start else 0 : stop]
        start = end


def _copy_messages(
    connection: psycopg.AsyncConnection[Any], start: bytes, rows: Iterator[memoryview]
) -> Generator[Any, Any, None]:
    """Statements that end in (or go on after) a COPY, and its data: two round trips in all.

    Source: PostgreSQL manual, "Message Flow", "Simple Query" and "COPY Operations".
    """
    pgconn = connection.pgconn
    pgconn.send_query(start)
    results = yield from generators.execute(pgconn)
    raise_failure(results)
    if results[-1].status != pq.ExecStatus.COPY_IN:
        raise psycopg.OperationalError("the server did not ask for the rows of a COPY")
    if faultpoints.reach is not None:
        faultpoints.reach("copy.open")
    for place, piece in enumerate(rows):
        while place and pgconn.flush():  # or libpq would gather them all in its own buffer
            yield psycopg.waiting.Wait.W
        while pgconn.put_copy_data(piece) == 0:
            yield psycopg.waiting.Wait.W
    while pgconn.put_copy_end() == 0:
        yield psycopg.waiting.Wait.W
    results = yield from generators.execute(pgconn)
    raise_failure(results)
