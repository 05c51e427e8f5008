"""The store: one method per transaction, over a small pool of connections.

What a worker writes of its runs goes through `checkpoints.py` and `fenced.py` instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from kagzi.elsewhere import LEAST_BYTES, Elsewhere
from kagzi.errors import RunConflict, StoreUnavailable, UnknownRun
from kagzi.model import (
    DEFAULT_QUEUE,
    AttemptRecord,
    GroupRecord,
    RunStatus,
    RunSummary,
    StepRecord,
)
from kagzi.store.connections import (
    Connector,
    cancellations,
    heed_cancellation,
    is_forbidden,
    is_outage,
    no_reset,
)
from kagzi.store.describing import attempt_record, run_summary, step_record
from kagzi.store.lane import Lane
from kagzi.store.queries import load_queries
from kagzi.store.recorded import ClaimedRun, Claims, Take, load_checkpoints, take_rows
from kagzi.store.rescue import rescue_from

MOST_CONNECTIONS = 4
POOL_TIMEOUT_S = 30.0


@dataclass(slots=True)
class StartedRun:
    """What `insert_run` found or made. `is_held`: a worker of this program has it already."""

    run_id: UUID
    external_id: str
    workflow: str
    version: str
    is_new: bool
    is_held: bool = False


class Store:
    """Everything that clients and workers ask of Postgres, except checkpoints.

    Args:
        connector: Where and how to connect.
    """

    def __init__(self, connector: Connector) -> None:
        self.connector = connector
        self.queries = load_queries(connector.schema)
        self._lane = Lane(connector, self.queries)
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            connector.conninfo(),
            kwargs=connector.options,
            min_size=1,
            max_size=MOST_CONNECTIONS - 1,  # the lane is one, too
            timeout=POOL_TIMEOUT_S,
            configure=connector.configure,
            reset=no_reset,
            open=False,
            name="kagzi",
        )

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._lane.close()
        await self._pool.close()

    def counts(self) -> dict[str, int]:
        """The connection pool's own counters."""
        return self._pool.get_stats()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection in autocommit.

        Raises:
            StoreUnavailable: None within the pool's timeout, or it was lost.
        """
        before = cancellations()
        try:
            async with self._pool.connection() as connection:
                heed_cancellation(before)
                yield connection
            heed_cancellation(before)
        except PoolTimeout as error:
            heed_cancellation(before)
            raise self.connector.unavailable(await self._why_none(error)) from None
        except psycopg.Error as error:
            heed_cancellation(before)
            if is_outage(error) or is_forbidden(error):
                raise self.connector.unavailable(error) from error
            raise

    async def _why_none(self, error: PoolTimeout) -> psycopg.Error:
        """What the server says to a new connection: the pool itself only tells that it waited."""
        try:
            await (await self.connector.connect()).close()
        except psycopg.Error as said:
            return said
        return error

    async def rows(
        self, name: str, take: Take | None = None, **parameters: Any
    ) -> list[tuple[Any, ...]]:
        """What the statement of this name gives; once, so its outcome may be unknown.

        With `take`, for many rows or large ones: given some at a time, and there is time for others
        in between.
        """
        found = await self._lane.rows(name, parameters)
        if found is not None:
            return found
        async with self.connection() as connection:
            cursor = await connection.execute(
                self.queries[name].encode(),
                parameters or None,
                prepare=True,
                binary=take is not None,  # bytes as they are, not as text of twice the length
            )
            if take is not None:
                return await take_rows(cursor, take)
            return await cursor.fetchall() if cursor.description else []

    async def ask(
        self, name: str, take: Take | None = None, **parameters: Any
    ) -> list[tuple[Any, ...]]:
        """The same for a statement that may run twice; connections lost meanwhile are replaced.

        `take` is given rows when all of them are here.
        """
        for _ in range(MOST_CONNECTIONS):
            try:
                return await self.rows(name, take, **parameters)
            except StoreUnavailable as error:
                if error.__cause__ is None:  # no connection to be had, after a long wait
                    raise
        return await self.rows(name, take, **parameters)

    # --- runs -------------------------------------------------------------------------------

    async def insert_run(
        self,
        run_id: UUID,
        external_id: str,
        workflow: str,
        version: str,
        priority: int,
        payload: bytes,
        pinned: bool = True,
        queue: str = DEFAULT_QUEUE,
        queue_key: str = "",
    ) -> StartedRun | None:
        """Add a pending run, or find the one that has its id. Committed on return.

        Args:
            pinned: The version is this one, whatever the workflow's default is. Else None is
                returned, and nothing is added, where another version is the default.

        Raises:
            RunConflict: The id belongs to a run with another input.

        Source: sql/runs.sql, insert_run, read_run_by_key.
        """
        added = await self.ask(
            "insert_run",
            id=run_id,
            external_id=external_id,
            workflow=workflow,
            version=version,
            priority=priority,
            input=payload,
            pinned=pinned,
            queue=queue,
            queue_key=queue_key,
        )
        if added:
            return StartedRun(run_id, external_id, workflow, version, True)
        rows = await self.ask("read_run_by_key", workflow=workflow, external_id=external_id)
        if not rows and not pinned:
            return None
        if not rows:  # deleted between the two statements
            return await self.insert_run(
                run_id, external_id, workflow, version, priority, payload, pinned, queue, queue_key
            )
        known_id, _, _, known_version, known_input = rows[0]
        if known_id == run_id:  # the answer to our own insert was lost
            return StartedRun(run_id, external_id, workflow, version, True)
        if known_input != payload:
            raise RunConflict(
                f"run {external_id!r} of {workflow!r} was started with another input; "
                "use another id, or the same input to get that run"
            )
        return StartedRun(known_id, external_id, workflow, known_version, False)

    async def find_run(self, run: UUID | str) -> StartedRun:
        """The run of this id, the database's or the external one.

        Raises:
            UnknownRun: None, or runs of several workflows, have it.
        """
        if isinstance(run, UUID):
            rows = await self.ask("read_run", id=run)
        else:
            rows = await self.ask("find_runs", external_id=run)
            if len(rows) > 1:
                names = ", ".join(row[2] for row in rows)
                raise UnknownRun(
                    f"runs of several workflows have the id {run!r} ({names}): use handle.run_id"
                )
            if not rows:
                try:
                    return await self.find_run(UUID(run))
                except ValueError:
                    pass
        if not rows:
            raise UnknownRun(f"no run has the id {str(run)!r}; `kagzi runs` lists those there are")
        run_id, external_id, workflow, version = rows[0][:4]
        return StartedRun(run_id, external_id, workflow, version, False)

    async def read_status(self, run_id: UUID) -> tuple[RunStatus, bytes | None, bytes | None]:
        """Status, output and error. Raises `UnknownRun`."""
        rows = await self.ask("read_status", id=run_id)
        if not rows:
            raise UnknownRun(f"run {run_id} was deleted")
        status, output, error = rows[0]
        return RunStatus(status), output, error

    async def count_steps(self, run_id: UUID) -> tuple[int, int]:
        """Checkpoints so far: (completed, failed)."""
        completed, failed = (await self.ask("count_steps", id=run_id))[0]
        return completed, failed

    async def list_runs(
        self,
        status: str | None = None,
        workflow: str | None = None,
        most: int = 50,
        queue: str | None = None,
    ) -> list[RunSummary]:
        """The newest runs first."""
        rows = await self.ask("list_runs", status=status, workflow=workflow, most=most, queue=queue)
        return [run_summary(*row) for row in rows]

    async def describe_run(
        self, run_id: UUID
    ) -> tuple[RunSummary, bytes, list[StepRecord], list[GroupRecord], list[AttemptRecord]]:
        """One run with its checkpoints, groups and failed attempts. Raises `UnknownRun`."""
        rows = await self.ask("read_run", id=run_id)
        if not rows:
            raise UnknownRun(f"no run has the id {run_id}")
        payload, _output, error, queue, queue_key = rows[0][10:]
        attempts = await self.ask("describe_attempts", id=run_id)
        groups = await self.ask("describe_groups", id=run_id)
        return (
            run_summary(*[*rows[0][:10], error, queue, queue_key]),
            payload,
            [step_record(*row) for row in await self.ask("describe_steps", id=run_id)],
            [GroupRecord(*row) for row in groups],
            [attempt_record(*row) for row in attempts],
        )

    # --- claims -----------------------------------------------------------------------------

    async def claim_runs(
        self,
        worker_id: UUID,
        names: Sequence[tuple[str, str]],
        most: int,
        suspects: int = 1,
        served: Sequence[str] | None = None,
    ) -> Claims:
        """Give up to `most` due runs to a worker, highest priority first, then earliest due.

        Only runs of the common line: see `queues.claim_apart` for the others. Runs that do not
        belong there, or not to the queues `served`, are moved to the line of their queue.

        Committed on return. Runs locked by another worker, and runs of workflows or versions not
        in `names`, are skipped. A run that has been driven before comes with its checkpoints.
        `suspects` (0 or 1) is how many may be runs that already two workers in a row did not
        survive.

        Source: sql/claims.sql, claim_runs.
        """
        rows = await self.rows(
            "claim_runs",
            worker_id=worker_id,
            names=[name for name, _ in names],
            versions=[version for _, version in names],
            most=most,
            suspects=suspects,
            served=None if served is None else list(served),
            takes_default=served is None or DEFAULT_QUEUE in served,
        )
        claims = await self.load_recorded(ClaimedRun(*row[:-1]) for row in rows if not row[-1])
        claims.moved = len(rows) - len(claims)
        return claims

    async def load_outputs(self, run_id: UUID, path: str) -> dict[str, bytes | Elsewhere]:
        """Results of a map's part by step id; of large ones only that they are there.

        Source: sql/checkpoints.sql, load_outputs.
        """
        rows: list[tuple[Any, ...]] = []
        await self.ask(
            "load_outputs", rows.extend, run_id=run_id, path=path, most_bytes=LEAST_BYTES
        )
        return {
            step_id: Elsewhere(nbytes) if output is None else output
            for step_id, output, nbytes in rows
        }

    async def fetch_outputs(self, run_id: UUID, ids: list[str]) -> list[bytes]:
        """Results of these steps, in their order. Source: sql/checkpoints.sql, fetch_outputs.

        Raises:
            UnknownRun: They are gone.
        """
        found: dict[str, bytes] = {}
        await self.ask("fetch_outputs", found.update, run_id=run_id, ids=ids)
        try:
            return [found[step_id] for step_id in ids]
        except KeyError:
            raise UnknownRun(f"run {run_id} was deleted") from None

    async def load_recorded(self, runs: Iterable[ClaimedRun]) -> Claims:
        """The runs just claimed, with what is recorded of those that were driven before.

        Source: sql/checkpoints.sql, load_steps and its siblings.
        """
        claimed = {run.run_id: run for run in runs}
        known = [run_id for run_id, run in claimed.items() if run.epoch > 1]
        if known:
            await load_checkpoints(self.ask, {run_id: claimed[run_id] for run_id in known})
        return Claims(sorted(claimed.values(), key=lambda run: (-run.priority, run.created_at)))

    async def free_strays(self, worker_id: UUID, driven: Sequence[UUID]) -> int:
        """Free what a worker holds and does not drive: claims whose answer never reached it.

        Never call it beside `claim_runs` of the same worker.

        Source: sql/claims.sql, free_strays.
        """
        return len(await self.rows("free_strays", worker_id=worker_id, run_ids=list(driven)))

    # --- memos ------------------------------------------------------------------------------

    async def find_memos(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Key to output, of those that hold."""
        sealer = self.connector.sealer
        stored = {(key if sealer is None else sealer.codec.digest(key)).hex(): key for key in keys}
        found = await self.ask("find_memos", keys=list(stored))
        return {stored[key]: output for key, output in found}

    # --- workers ----------------------------------------------------------------------------

    async def register_worker(
        self,
        worker_id: UUID,
        host: str,
        boot_id: str,
        pid: int,
        process_started: str,
        config: dict[str, Any],
        lease_s: float,
    ) -> datetime:
        """A new incarnation and its lease; returns the store's time."""
        rows = await self.rows(
            "register_worker",
            id=worker_id,
            host=host,
            boot_id=boot_id,
            pid=pid,
            process_started=process_started,
            config=orjson.dumps(config).decode(),
            lease_s=lease_s,
        )
        return rows[0][0]  # type: ignore[no-any-return]

    async def find_incarnations(self, host: str) -> list[tuple[UUID, str, int, str]]:
        """Workers of a host that are not ended: (id, boot id, pid, process start)."""
        return await self.ask("find_incarnations", host=host)

    async def find_expired(self) -> list[UUID]:
        """Workers whose lease has run out."""
        return [row[0] for row in await self.ask("find_expired")]

    async def rescue(self, worker_id: UUID, reason: str, forced: bool = False) -> int:
        """End a worker's lease, if it has run out or `forced`, and free the runs of ended workers.

        One transaction of two statements. A backend of that worker which holds its row (frozen
        within a write) is terminated first.

        Returns:
            Runs freed.

        Source: rescue.py; sql/workers.sql, end_lease, free_runs.
        """
        return await rescue_from(self, worker_id, reason, forced)

    async def notify(self, channel: str) -> None:
        """Wake whoever listens."""
        await self.ask("notify", channel=channel)

    # --- a person's changes -----------------------------------------------------------------

    @asynccontextmanager
    async def locked_run(
        self, run_id: UUID
    ) -> AsyncIterator[tuple[psycopg.AsyncConnection[Any], RunStatus, bytes | None]]:
        """A transaction that holds one run: its connection, the run's status and error."""
        async with self.connection() as connection, connection.transaction():
            cursor = await connection.execute(self.queries["lock_run"].encode(), {"id": run_id})
            row = await cursor.fetchone()
            if row is None:
                raise UnknownRun(f"no run has the id {run_id}")
            yield connection, RunStatus(row[0]), row[1]
