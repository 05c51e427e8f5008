"""What a program holds: connects, starts runs, waits for them, describes and retries them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, overload
from uuid import UUID

import psycopg

from kagzi.administration import Administration
from kagzi.codec.failures import kagzi_error_from
from kagzi.definition import Workflow
from kagzi.errors import InvalidInput, RunFailed, RunWasCancelled
from kagzi.handle import UNTYPED, RunHandle
from kagzi.model import (
    DEFAULT_QUEUE,
    RunDetails,
    RunStatus,
    RunSummary,
    WorkerSummary,
    check_count,
    check_duration_s,
)
from kagzi.operations import Operations
from kagzi.payloads import PayloadCodec, check_codec
from kagzi.pool.child import refuse_import
from kagzi.retrying import retry_run
from kagzi.starting import (
    check_priority,
    check_queue,
    new_run,
    prepare_many,
)
from kagzi.store.announcer import Announcer
from kagzi.store.connections import Connector
from kagzi.store.desk import Desk
from kagzi.store.embedded import EmbeddedServer, attach
from kagzi.store.listener import (
    Listener,
    done_channel,
    due_channel,
    news_channel,
    queues_channel,
)
from kagzi.store.migrate import migrate, verify
from kagzi.store.payload_keys import check_keys
from kagzi.store.retention import delete_run
from kagzi.store.rows import RunRow
from kagzi.store.starts import Guests, Starts, insert_runs, insert_runs_within
from kagzi.store.store import StartedRun, Store
from kagzi.store.workers import list_workers
from kagzi.versions import (
    default_workflow,
    named_workflow,
)
from kagzi.waiting import Waiting
from kagzi.worker import Keeper, Worker

T = TypeVar("T")


class Client(Operations, Administration):
    """A connection to kagzi's store. Made by `connect`; use it as an async context manager."""

    def __init__(
        self,
        dsn: str | None,
        schema: str,
        migrate_schema: bool,
        data_folder: Any,
        payload_codec: PayloadCodec | None = None,
    ) -> None:
        self._payload_codec = payload_codec
        self._dsn = dsn
        self._schema = schema
        self._migrate = migrate_schema
        self._data_folder = data_folder
        self._server: EmbeddedServer | None = None
        self._store: Store = None  # type: ignore[assignment]
        self._listener: Listener = None  # type: ignore[assignment]
        self._guests: Guests = None  # type: ignore[assignment]
        self._workers: list[Keeper] = []
        self._waiting: Waiting = None  # type: ignore[assignment]
        self._desk: Desk = None  # type: ignore[assignment]
        self._announcer: Announcer = None  # type: ignore[assignment]

    async def __aenter__(self) -> Client:
        refuse_import()
        dsn = self._dsn or os.environ.get("DATABASE_URL") or None
        if dsn is None:
            self._server = await asyncio.to_thread(attach, self._data_folder)
            dsn = self._server.dsn
        try:
            codec = check_codec(self._payload_codec)
            connector = Connector(dsn, self._schema, codec)
            await connector.check_server()
            prepare = migrate if self._migrate else verify
            await asyncio.to_thread(prepare, connector.conninfo(), self._schema)
            self._store = Store(connector)
            await self._store.open()
            try:
                await check_keys(self._store)
            except BaseException:
                await self._store.close()
                raise
        except BaseException:
            if self._server is not None:
                await asyncio.to_thread(self._server.close)
            raise
        self._guests = Guests(self._store)
        self._announcer = Announcer(self._store)
        self._waiting = Waiting(self._store, self._is_held)
        self._desk = Desk(
            self._store, lambda: [worker.incarnation.claiming for worker in self._workers]
        )
        names = (due_channel, done_channel, news_channel, queues_channel)
        self._listener = Listener(connector, [name(self._schema) for name in names], self._heard)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._desk.close()
        await self._waiting.close()
        await self._listener.close()
        await self._announcer.close()
        await self._store.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    @property
    def data_folder(self) -> str | None:
        """Where the embedded server keeps its data; None with a server of your own."""
        return None if self._server is None else str(self._server.data_folder)

    @property
    def dsn(self) -> str:
        """What this client is connected to, its password included: not for logs."""
        return self._store.connector.conninfo()

    # --- runs -------------------------------------------------------------------------------

    @overload
    async def start(
        self,
        workflow: Workflow[..., T],
        /,
        *args: Any,
        id: str | None = ...,
        priority: int = ...,
        version: str | None = ...,
        queue: str = ...,
        key: str | None = ...,
        connection: psycopg.AsyncConnection[Any] | None = ...,
        **kwargs: Any,
    ) -> RunHandle[T]: ...
    @overload
    async def start(
        self,
        workflow: str,
        /,
        *args: Any,
        id: str | None = ...,
        priority: int = ...,
        version: str | None = ...,
        queue: str = ...,
        key: str | None = ...,
        connection: psycopg.AsyncConnection[Any] | None = ...,
        **kwargs: Any,
    ) -> RunHandle[Any]: ...
    async def start(
        self,
        workflow: Workflow[..., Any] | str,
        /,
        *args: Any,
        id: str | None = None,  # noqa: A002 - the public option has this name
        priority: int = 0,
        version: str | None = None,
        queue: str = DEFAULT_QUEUE,
        key: str | None = None,
        connection: psycopg.AsyncConnection[Any] | None = None,
        **kwargs: Any,
    ) -> RunHandle[Any]:
        """Start a run, or find the one with this id. Durable on return.

        Args:
            workflow: A registered workflow, or its name.
            id: An idempotency key, unique per workflow. Default: a new one.
            priority: Higher is claimed first, among the runs of one queue.
            queue: Where the run waits: see `set_queue`.
            key: What the queue's limit per key counts by, such as a customer.
            connection: Start within the transaction that is open on it: the run exists when, and
                only if, that is committed. Wait for its result after that.
            version: Of the workflow. Default: the one that `set_default_version` chose; if none
                was chosen, that of the workflow given, and for a name the one registered last.

        Raises:
            RunConflict: The id belongs to a run with another input.
            UnknownWorkflow: No workflow of that name is registered here.
            CodecError, InvalidInput: Arguments that cannot be stored, or do not fit.
        """
        found, pinned = named_workflow(workflow, version), version is not None
        check_priority(priority)
        check_queue(queue)
        run = new_run(found.arguments.encode(args, kwargs), id, key)
        told = self._waiting.told if self._listener.hears else None
        started = None
        if connection is not None:
            if not pinned:
                found = await default_workflow(self._store, found)
                run.payload = found.arguments.encode(args, kwargs)
            starts = Starts(found.name, found.version, priority, queue, [run])
            return self._handles(found, await self._insert_within(connection, starts))[0]
        while started is None:
            started = await self._desk.start(
                run, found.name, found.version, priority, queue, pinned
            )
            if started is None:  # another version is the default
                found, pinned = await default_workflow(self._store, found), True
                run.payload = found.arguments.encode(args, kwargs)
        if started.is_new and not started.is_held:
            self._announce()
        handle = self._handles(found, [started])[0]
        handle._told = told if started.is_new else None
        return handle

    @overload
    async def start_many(
        self,
        workflow: Workflow[..., T],
        /,
        inputs: Iterable[tuple[Any, ...]],
        *,
        ids: Sequence[str] | None = ...,
        priority: int = ...,
        version: str | None = ...,
        queue: str = ...,
        keys: Sequence[str | None] | str | None = ...,
        connection: psycopg.AsyncConnection[Any] | None = ...,
    ) -> list[RunHandle[T]]: ...
    @overload
    async def start_many(
        self,
        workflow: str,
        /,
        inputs: Iterable[tuple[Any, ...]],
        *,
        ids: Sequence[str] | None = ...,
        priority: int = ...,
        version: str | None = ...,
        queue: str = ...,
        keys: Sequence[str | None] | str | None = ...,
        connection: psycopg.AsyncConnection[Any] | None = ...,
    ) -> list[RunHandle[Any]]: ...
    async def start_many(
        self,
        workflow: Workflow[..., Any] | str,
        /,
        inputs: Iterable[tuple[Any, ...]],
        *,
        ids: Sequence[str] | None = None,
        priority: int = 0,
        version: str | None = None,
        queue: str = DEFAULT_QUEUE,
        keys: Sequence[str | None] | str | None = None,
        connection: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[RunHandle[Any]]:
        """Start many runs of a workflow in one write: all of them, or none. Durable on return.

        Args:
            inputs: The positional arguments of each run, as a tuple.
            ids: One for each input; a known id, or one given twice, is the same run.
            keys: One for each input, or one for all.

        See `start` for the others.

        Returns:
            Handles in the order of the inputs.

        Raises:
            RunConflict: An id belongs to a run with another input; the first such is named.
            CodecError, InvalidInput: The place of the input that is wrong is named.
        """
        found = named_workflow(workflow, version)
        if version is None:
            found = await default_workflow(self._store, found)
        starts, places = prepare_many(found, inputs, ids, keys, queue=queue, priority=priority)
        if connection is not None:
            started = await self._insert_within(connection, starts)
        else:
            started = await insert_runs(self._store, starts) if starts.runs else []
            if any(run.is_new for run in started):
                self._announce()
        return self._handles(found, started, places)

    async def _insert_within(
        self, connection: psycopg.AsyncConnection[Any], starts: Starts
    ) -> list[StartedRun]:
        guest = await self._guests.admit(connection)
        return await insert_runs_within(guest, self._store, starts) if starts.runs else []

    def _handles(
        self, workflow: Workflow[..., T], started: list[StartedRun], places: list[int] | None = None
    ) -> list[RunHandle[T]]:
        """For each place the run that stands there: new at its first, known at the others."""
        seen: set[int] = set()
        handles = []
        for place in range(len(started)) if places is None else places:
            run, is_new = started[place], started[place].is_new and place not in seen
            seen.add(place)
            handles.append(
                RunHandle[T](self, run.run_id, run.external_id, workflow.name, run.version, is_new)
            )
        return handles

    async def get(self, run: UUID | str) -> RunHandle[Any]:
        """The handle of a run by its id. Raises `UnknownRun`."""
        found = await self._store.find_run(run)
        return RunHandle(
            self, found.run_id, found.external_id, found.workflow, found.version, False
        )

    async def describe(self, run: UUID | str | RunHandle[Any]) -> RunDetails:
        """A run with its steps, groups and failed attempts. Raises `UnknownRun`."""
        run_id = await self._run_id(run)
        summary, payload, steps, groups, attempts = await self._store.describe_run(run_id)
        return RunDetails(summary, UNTYPED.decode(payload), steps, groups, attempts)

    async def runs(
        self,
        *,
        status: RunStatus | str | None = None,
        workflow: str | None = None,
        queue: str | None = None,
        limit: int = 50,
    ) -> list[RunSummary]:
        """The newest runs first."""
        if status is not None and status not in tuple(RunStatus):
            raise InvalidInput(f"status {status!r} is none of {', '.join(RunStatus)}")
        wanted = None if status is None else RunStatus(status).value
        return await self._store.list_runs(wanted, workflow, check_count("limit", limit), queue)

    async def retry(
        self, run: UUID | str | RunHandle[Any], *, steps: list[str] | None = None
    ) -> RunHandle[Any]:
        """Make a failed run go on: failed steps run again, committed ones do not.

        Cleared are the failures in the cause of the run's error, and what was called after they
        became visible. Failures that the workflow handled stay, unless named.

        Args:
            steps: Ids of failed steps to run again as well.

        Raises:
            InvalidInput: The run has not failed, or a step named has not.
            UnknownRun, UnknownStep: No such run or step.
        """
        handle = run if isinstance(run, RunHandle) else await self.get(run)
        await retry_run(self._store, handle.run_id, handle.id, steps or [])
        self._announce()
        return handle

    async def delete(self, run: UUID | str | RunHandle[Any]) -> None:
        """Delete a finished run with all that belongs to it. Its id is free again.

        Raises:
            InvalidInput: The run is not finished, or is the child of one that is not.
            UnknownRun: No such run.
        """
        handle = run if isinstance(run, RunHandle) else await self.get(run)
        await delete_run(self._store, handle.run_id, handle.id)

    # --- workers ----------------------------------------------------------------------------

    @asynccontextmanager
    async def worker(
        self,
        *,
        processes: int | None = None,
        concurrency: int = 1000,
        lease_s: float = 30.0,
        heartbeat_s: float = 10.0,
        poll_s: float = 1.0,
        max_crashes: int = 5,
        queues: Sequence[str] | None = None,
        retain_s: float | timedelta | None = None,
        modules: tuple[str, ...] = (),
        drain_s: float = 0.0,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> AsyncIterator[Keeper]:
        """A worker inside this program, for as long as the block lasts.

        When it loses its lease, because the program was paused or the database was away for
        longer than that, it stops its runs and begins anew, as another incarnation.

        Args:
            processes: Pool processes; default one per processor; 0 runs all bodies here.
            max_crashes: A run that so many workers in a row did not survive is ended as failed,
                with `RunCrashed`. From the second time on a worker holds one such run at a time,
                so that others do not suffer.
            queues: Serve only these, as `("emails", "default")`. Default: all.
            retain_s: Delete runs that ended so long ago, of all workflows, with all that belongs
                to them. Their ids are free again. Default: keep them for ever.
            drain_s: On leaving, wait so long for the runs that are held; then they are given back.
            health_port: Tell over HTTP how this worker is, at `/healthz` of this port (0: any free
                one, `worker.health.port`) on `health_host`: 200 or 503, with the figures as JSON.

        See `Worker` for the others.
        """

        def make() -> Worker:
            return Worker(
                self._store,
                processes=processes,
                concurrency=concurrency,
                lease_s=lease_s,
                heartbeat_s=heartbeat_s,
                poll_s=poll_s,
                max_crashes=max_crashes,
                queues=queues,
                retain_s=retain_s,
                modules=modules,
                run_left=self._run_left,
            )

        worker = Keeper(make, health_port, health_host)
        await worker.open()
        self._workers.append(worker)
        self._listener.start()
        try:
            yield worker
        finally:
            self._workers.remove(worker)
            await worker.close(drain_s)

    async def workers(self, *, everyone: bool = False) -> list[WorkerSummary]:
        """Workers that have not ended, the newest first.

        Args:
            everyone: Also those that have; they are kept for a day.
        """
        return await list_workers(self._store, everyone)

    # --- waiting ----------------------------------------------------------------------------

    def _handle(
        self, run_id: UUID, external_id: str, workflow: str, version: str
    ) -> RunHandle[Any]:
        return RunHandle(self, run_id, external_id, workflow, version, True)

    async def _run_id(self, run: UUID | str | RunHandle[Any]) -> UUID:
        if isinstance(run, RunHandle):
            return run.run_id
        return (await self._store.find_run(run)).run_id

    def _announce(self) -> None:
        """A run is due: wake the workers here, or tell those elsewhere."""
        for worker in self._workers:
            worker.wake()
        if not self._workers:
            self._announcer.say(due_channel)

    def _tell(self) -> None:
        """Runs were changed from outside: wake whoever holds, drives or awaits them."""
        for worker in self._workers:
            worker.hear()
            worker.wake()
        self._waiting.heard()
        self._announcer.say(due_channel, news_channel)

    def _heard(self, channel: str) -> None:
        if channel == due_channel(self._schema):
            for worker in self._workers:
                worker.wake()
        elif channel == queues_channel(self._schema):
            for worker in self._workers:
                worker.look_at_queues()
        elif channel == news_channel(self._schema):
            for worker in self._workers:
                worker.hear()
            self._waiting.heard()
        else:
            self._waiting.heard()

    def _is_held(self, run_id: UUID) -> bool:
        return any(run_id in worker.runs for worker in self._workers)

    def _run_left(self, row: RunRow) -> None:
        status = RunStatus(row.status)
        if status in (RunStatus.COMPLETED, RunStatus.FAILED):
            self._waiting.ended(row.run_id, (status, row.output, row.error))
        elif status.is_terminal:
            self._waiting.heard()  # the cancel may have been taken back in the last moment

    async def _looks(self, run_id: UUID) -> AsyncGenerator[bool, None]:
        """Whether the run has ended, each time that something may have happened to it."""
        if not self._workers:
            self._listener.start()
        async with aclosing(self._waiting.wakes()) as wakes:
            async for _ in wakes:
                status, _output, _error = await self._store.read_status(run_id)
                yield status.is_terminal
                if status.is_terminal:
                    return

    async def _wait(
        self, run_id: UUID, name: str, timeout: float | None, told: int | None = None
    ) -> bytes:
        """`told`: the run had not ended when so much had been told."""
        seconds = None if timeout is None else check_duration_s("timeout", timeout)
        if not self._workers:
            self._listener.start()
        try:
            async with asyncio.timeout(seconds):
                going = self._listener.hears and told == self._waiting.told
                status, output, error = await self._waiting.end_of(run_id, going)
        except TimeoutError:
            status, output, error = await self._store.read_status(run_id)
            if not status.is_terminal:
                waits = status is RunStatus.PENDING
                hint = "; does a worker serve its workflow?" if waits else ""
                raise TimeoutError(
                    f"run {name!r} is {status.value} after {seconds:g} s{hint}"
                ) from None
        if status is RunStatus.COMPLETED:
            assert output is not None, "a completed run has an output"
            return output
        if status is RunStatus.CANCELLED:
            raise RunWasCancelled(f"run {name!r} was cancelled")
        assert error is not None, "a failed run says why"
        failure: RunFailed = kagzi_error_from(error, name)
        if failure.traceback:
            failure.add_note(f"Recorded in run {name!r}:\n{failure.traceback.rstrip()}")
        raise failure


def connect(
    dsn: str | None = None,
    *,
    schema: str = "kagzi",
    migrate: bool = True,
    data_folder: Any = None,
    payload_codec: PayloadCodec | None = None,
) -> Client:
    """A client, as an async context manager.

    Args:
        dsn: Connection string; default the environment's DATABASE_URL, else an embedded server.
        schema: Where kagzi's tables are, or will be.
        migrate: Bring the schema up to date on entry; else only check it.
        data_folder: Of the embedded server; default one per user.
        payload_codec: What inputs, outputs and errors are encrypted with, such as `AesGcm`. Every
            program that uses the schema gives it. Default: what the environment's
            KAGZI_PAYLOAD_CODEC names as module:name; else payloads are stored as they are.

    Raises, on entry:
        InvalidDsn, StoreUnavailable, StoreForbidden, ServerTooOld, SchemaTooNew, SchemaMissing,
        PostgresNotFound.
        PayloadKeyError: Payloads there are encrypted, and their key is not here.
    """
    return Client(dsn, schema, migrate, data_folder, payload_codec)


def run(
    workflow: Workflow[..., T],
    /,
    *args: Any,
    id: str | None = None,  # noqa: A002 - the public option has this name
    processes: int | None = None,
    dsn: str | None = None,
    **kwargs: Any,
) -> T:
    """Start a run, drive it with a worker of its own, and return its result. Blocks.

    Raises:
        RuntimeError: Called where an event loop runs; use `connect` there.
        RunFailed and what `Client.start` raises.
    """
    import uvloop

    refuse_import()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError(
            "kagzi.run() blocks, and an event loop runs here (a notebook has one): use "
            "`async with kagzi.connect() as client, client.worker():` and `await` instead"
        )

    async def main() -> T:
        async with connect(dsn) as client, client.worker(processes=processes):
            handle = await client.start(workflow, *args, id=id, **kwargs)
            return await handle.result()

    return uvloop.run(main())
