"""What a program holds: connects, starts runs, waits for them, describes and retries them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar
from uuid import UUID

import psycopg

from kagzi.checking import check_runs
from kagzi.codec.failures import kagzi_error_from
from kagzi.definition import Workflow
from kagzi.errors import InvalidInput, RunFailed, RunWasCancelled
from kagzi.findings import CheckReport
from kagzi.handle import UNTYPED, RunHandle
from kagzi.model import (
    DEFAULT_QUEUE,
    CatchUp,
    Overlap,
    QueueSummary,
    RunDetails,
    RunStatus,
    RunSummary,
    Schedule,
    VersionRecord,
    WorkerSummary,
    check_count,
    check_duration_s,
)
from kagzi.operations import Operations
from kagzi.payloads import PayloadCodec, check_codec
from kagzi.pool.child import refuse_import
from kagzi.retrying import retry_run
from kagzi.scheduling import define_schedule, read_schedule, read_schedules, record_schedule
from kagzi.starting import (
    UNCHANGED,
    Unchanged,
    check_limits,
    check_priority,
    check_queue,
    new_run,
    prepare_many,
)
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
from kagzi.store.queues import list_queues, set_queue
from kagzi.store.retention import delete_run
from kagzi.store.rows import RunRow
from kagzi.store.schedules import delete_schedule, pause_schedule, resume_schedule
from kagzi.store.starts import Guests, Starts, insert_runs, insert_runs_within
from kagzi.store.store import StartedRun, Store
from kagzi.store.workers import list_workers
from kagzi.versions import (
    default_workflow,
    list_versions,
    named_workflow,
    set_default_version,
)
from kagzi.waiting import Waiting
from kagzi.worker import Keeper, Worker

T = TypeVar("T")


class Client(Operations):
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
        self._notifying: asyncio.Task[None] | None = None
        self._to_notify: set[str] = set()  # channels

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
        self._waiting = Waiting(self._store, self._is_held)
        self._desk = Desk(self._store, lambda: [worker.incarnation for worker in self._workers])
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
        if self._notifying is not None:
            await asyncio.gather(self._notifying, return_exceptions=True)
        await self._store.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    @property
    def data_folder(self) -> str | None:
        """Where the embedded server keeps its data; None with a server of your own."""
        return None if self._server is None else str(self._server.data_folder)

    # --- runs -------------------------------------------------------------------------------

    async def start(
        self,
        workflow: Workflow[..., T] | str,
        /,
        *args: Any,
        id: str | None = None,  # noqa: A002 - the public option has this name
        priority: int = 0,
        version: str | None = None,
        queue: str = DEFAULT_QUEUE,
        key: str | None = None,
        connection: psycopg.AsyncConnection[Any] | None = None,
        **kwargs: Any,
    ) -> RunHandle[T]:
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
        return self._handles(found, [started])[0]

    async def start_many(
        self,
        workflow: Workflow[..., T] | str,
        /,
        inputs: Iterable[tuple[Any, ...]],
        *,
        ids: Sequence[str] | None = None,
        priority: int = 0,
        version: str | None = None,
        queue: str = DEFAULT_QUEUE,
        keys: Sequence[str | None] | str | None = None,
        connection: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[RunHandle[T]]:
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

    # --- versions ---------------------------------------------------------------------------

    async def versions(
        self, workflow: Workflow[..., Any] | str | None = None
    ) -> list[VersionRecord]:
        """The versions of a workflow, or of all: registered here, with runs, or a default.

        Sorted by workflow and version, as texts. Counts every run of them.
        """
        return await list_versions(self._store, workflow)

    async def set_default_version(
        self, workflow: Workflow[..., Any] | str, version: str | None
    ) -> None:
        """Choose the version that new runs get from now on, whoever starts them. Durable on return.

        It holds for every `start` without `version=`, by name or with the function itself: so a
        new version can be deployed everywhere first, then switched to, and back. Runs that are
        there already keep their version.

        Args:
            workflow: A workflow, or its name.
            version: None: no default, so the code of whoever starts a run decides again.

        Raises:
            UnknownWorkflow: No such workflow or version, neither registered here nor with a run.
        """
        await set_default_version(self._store, workflow, version)

    # --- schedules --------------------------------------------------------------------------

    async def schedule(
        self,
        workflow: Workflow[..., Any] | str,
        cron: str,
        /,
        *args: Any,
        id: str,  # noqa: A002 - the public option has this name
        timezone: str = "UTC",
        catch_up: CatchUp | str = CatchUp.LAST,
        overlap: Overlap | str = Overlap.ALLOW,
        queue: str = DEFAULT_QUEUE,
        key: str | None = None,
        priority: int = 0,
        version: str | None = None,
        **kwargs: Any,
    ) -> Schedule:
        """Let runs of a workflow start by the clock, one for each tick. Durable on return.

        The run of a tick has the id `<id>@<tick in UTC>`, and `ctx.scheduled_at` is its tick. Any
        worker starts it, whichever workflows it serves.

        Args:
            cron: Minute, hour, day of month, month and day of week, as in `30 2 * * MON-FRI`; six
                fields begin with seconds; or @hourly, @daily, @weekly, @monthly, @yearly.
            id: Names the schedule. A known id changes that schedule; nothing if it is equal.
            timezone: Whose clock: a name of the tz database. A time of day that the clock skips in
                spring ticks when the skipped hour has passed; of one that it shows twice the first
                ticks. `*` in the minutes or hours follows the time that really passes.
            catch_up: Of ticks that come more than a minute late, because no worker was there, runs
                the "last", or "all" of them, or "none".
            overlap: When an earlier run of the schedule is not finished: "allow" another beside it,
                "skip" the tick, or "cancel" the earlier run.
            queue, key, priority: Of its runs, as `start` takes them.
            version: Of the workflow. Default: the one that `set_default_version` has chosen when a
                tick comes; if none was chosen, that of the workflow given.

        Raises:
            InvalidInput: The expression, the time zone or a policy cannot be read, or no day like
                that ever comes.
            UnknownWorkflow, CodecError, InvalidArguments: As `start`.
        """
        wanted = define_schedule(
            named_workflow(workflow, version),
            cron,
            args,
            kwargs,
            schedule_id=id,
            timezone=timezone,
            catch_up=catch_up,
            overlap=overlap,
            queue=queue,
            key=key,
            priority=priority,
            pinned=version is not None,
        )
        return await record_schedule(self._store, wanted)

    async def schedules(self) -> list[Schedule]:
        """All schedules, by id."""
        return await read_schedules(self._store)

    async def unschedule(self, id: str) -> None:  # noqa: A002 - as above
        """Remove a schedule; runs that it has started go on. Raises `UnknownSchedule`."""
        await delete_schedule(self._store, id)

    async def pause_schedule(self, id: str) -> Schedule:  # noqa: A002 - as above
        """Let it tick no more until `resume_schedule`. Raises `UnknownSchedule`."""
        await pause_schedule(self._store, id)
        return await read_schedule(self._store, id)

    async def resume_schedule(self, id: str) -> Schedule:  # noqa: A002 - as above
        """Let it tick again, from now on. Raises `UnknownSchedule`."""
        await resume_schedule(self._store, id)
        return await read_schedule(self._store, id)

    # --- queues -----------------------------------------------------------------------------

    async def set_queue(
        self,
        name: str,
        *,
        concurrency: int | Unchanged | None = UNCHANGED,
        concurrency_per_key: int | Unchanged | None = UNCHANGED,
        rate: tuple[int, float | timedelta] | Unchanged | None = UNCHANGED,
        paused: bool | Unchanged = UNCHANGED,
    ) -> QueueSummary:
        """Set limits of a queue over all workers. What is not given stays; None takes a limit away.

        Claims that begin after the return know them. Runs that are held already go on, and count.

        Args:
            concurrency: Most runs that are held at once. A run that sleeps is not held.
            concurrency_per_key: The same, of runs that were started with one `key`.
            rate: (n, seconds): at most n runs are started in any time of that length. Only the
                first start of a run counts.
            paused: No run of it begins or goes on; those that are held end first.
        """
        changes = check_limits(concurrency, concurrency_per_key, rate, paused)
        summary = await set_queue(self._store, check_queue(name), changes)
        await self._store.notify(queues_channel(self._schema))
        return summary

    async def queues(self) -> list[QueueSummary]:
        """Queues with limits, or with runs that are not finished."""
        return await list_queues(self._store)

    async def check(
        self,
        *,
        status: RunStatus | str | Iterable[RunStatus | str] | None = None,
        workflow: Workflow[..., Any] | str | None = None,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> CheckReport:
        """Replay recorded runs against the code of this process; tell which would break, and where.

        Changes nothing: reads in read-only transactions, runs no step, waits for no timer. A run
        that has not ended is fine when its code goes on behind what is recorded; one that has
        completed must return the same, over the same steps. Workflow functions run in a thread.

        Args:
            status: Only runs that stand so; one status or several.
            workflow: Only runs of this workflow, of any version.
            limit: At most so many, the newest.
            progress: Told now and then: runs checked, and how many there are.
        """
        return await check_runs(self._store, status, workflow, limit, progress)

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
            self._to_notify.add(due_channel(self._schema))
            if self._notifying is None:
                self._notifying = asyncio.get_running_loop().create_task(self._notify())

    def _tell(self) -> None:
        """Runs were changed from outside: wake whoever holds, drives or awaits them."""
        for worker in self._workers:
            worker.hear()
            worker.wake()
        self._waiting.heard()
        self._to_notify |= {channel(self._schema) for channel in (due_channel, news_channel)}
        if self._notifying is None:
            self._notifying = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        try:
            await asyncio.sleep(0)
            while self._to_notify:
                channels, self._to_notify = self._to_notify, set()
                for channel in sorted(channels):
                    await self._store.notify(channel)
        finally:
            self._notifying = None

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

    async def _wait(self, run_id: UUID, name: str, timeout: float | None) -> bytes:
        seconds = None if timeout is None else check_duration_s("timeout", timeout)
        if not self._workers:
            self._listener.start()
        try:
            async with asyncio.timeout(seconds):
                status, output, error = await self._waiting.end_of(run_id)
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
