"""What a client settles for workflows as a whole: versions, schedules, queues; and the check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from kagzi.checking import check_runs
from kagzi.definition import Workflow
from kagzi.findings import CheckReport
from kagzi.model import (
    DEFAULT_QUEUE,
    CatchUp,
    Overlap,
    QueueSummary,
    RunStatus,
    Schedule,
    VersionRecord,
)
from kagzi.scheduling import define_schedule, read_schedule, read_schedules, record_schedule
from kagzi.starting import UNCHANGED, Unchanged, check_limits, check_queue
from kagzi.store.listener import queues_channel
from kagzi.store.queues import list_queues, set_queue
from kagzi.store.schedules import delete_schedule, pause_schedule, resume_schedule
from kagzi.store.store import Store
from kagzi.versions import list_versions, named_workflow, set_default_version


class Administration:
    """The part of a client that is about no run in particular."""

    _store: Store

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
        await self._store.notify(queues_channel(self._store.connector.schema))
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
