"""What a client does to runs that are under way: cancel, pause, resume, fork, send, and in bulk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, Literal, Protocol
from uuid import UUID

from kagzi.definition import Workflow
from kagzi.errors import InvalidInput, RunConflict, UnknownStep
from kagzi.handle import RunHandle
from kagzi.ids import uuid7
from kagzi.model import SEPARATOR, RunStatus, check_name
from kagzi.relations import encode_plain
from kagzi.retrying import load_calls, retry_run
from kagzi.store.operations import (
    Change,
    change_run,
    select_runs,
    send_event,
    tell_ends,
)
from kagzi.store.store import Store

Statuses = RunStatus | str | Iterable[RunStatus | str] | None

OPEN = (RunStatus.PENDING, RunStatus.RUNNING, RunStatus.SLEEPING, RunStatus.PAUSED)
# Which runs an operation on many can mean at all.
SUBJECTS: dict[str, tuple[RunStatus, ...]] = {
    "cancel": OPEN,
    "pause": (RunStatus.PENDING, RunStatus.RUNNING, RunStatus.SLEEPING),
    "resume": (RunStatus.PAUSED, RunStatus.RUNNING),
    "retry": (RunStatus.FAILED, RunStatus.CANCELLED),
}


class ForkSource(Protocol):
    """What a fork needs to know of the run that it comes from."""

    run_id: UUID
    id: str


class Operations:
    """The part of a client that changes runs which others may hold."""

    _store: Store

    async def get(self, run: UUID | str) -> RunHandle[Any]:
        """The handle of a run by its id. Raises `UnknownRun`."""
        raise NotImplementedError

    async def _run_id(self, run: UUID | str | RunHandle[Any]) -> UUID:
        raise NotImplementedError

    def _announce(self) -> None:
        """A run is due: wake the workers here, or tell those elsewhere."""
        raise NotImplementedError

    def _tell(self) -> None:
        """Runs were changed from outside: wake whoever holds, drives or awaits them."""
        raise NotImplementedError

    def _handle(
        self, run_id: UUID, external_id: str, workflow: str, version: str
    ) -> RunHandle[Any]:
        raise NotImplementedError

    async def cancel(self, run: UUID | str | RunHandle[Any]) -> RunStatus:
        """End a run, and the children that it started (unless with on_parent_cancel="abandon").

        Running steps are told; the workflow function gets `asyncio.CancelledError`. A run that has
        ended stays as it is.

        Returns:
            Its status now: CANCELLED; RUNNING while its worker is still to hear of it; or how it
            had ended.
        """
        return await self._change(run, "cancel")

    async def pause(self, run: UUID | str | RunHandle[Any]) -> RunStatus:
        """Stop a run where it is until `resume`. Steps under way are stopped and run again then."""
        return await self._change(run, "pause")

    async def resume(self, run: UUID | str | RunHandle[Any]) -> RunStatus:
        """Let a paused run go on. Its time went on meanwhile: a pause moves no timer."""
        return await self._change(run, "resume")

    async def fork(
        self,
        run: UUID | str | RunHandle[Any],
        *,
        from_step: str | None = None,
        id: str | None = None,  # noqa: A002 - the public option has this name
        version: str | None = None,
    ) -> RunHandle[Any]:
        """Start a new run that has a run's checkpoints up to a step, and goes on from there.

        Kept is what was called before the step. The step itself and what was called after it are
        made anew; in a group, the other steps' results are kept. The old run stays as it is.

        Args:
            from_step: Id of a step, or path of a group. Default: nothing is kept but the input.
            id: Of the new run. Default: a new one.
            version: Of the workflow for the new run. Default: the old run's.

        Raises:
            UnknownRun, UnknownStep: No such run or step.
            RunConflict: A run with the new id exists.
        """
        source = run if isinstance(run, RunHandle) else await self.get(run)
        made = await fork(self._store, source, from_step, id, version)
        self._announce()
        return self._handle(*made)

    async def send(
        self,
        run: UUID | str | RunHandle[Any],
        topic: str,
        value: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the public option has this name
    ) -> bool:
        """Send an event to a run, for its `ctx.wait_event(topic)`. Durable on return.

        It may come before the wait, or while the run sleeps or is paused; one wait gets it, once.

        Args:
            id: Names the event: the same id to the same run is sent once.

        Returns:
            Whether it was sent; False if an event with this id was there.

        Raises:
            RunEnded: The run has ended.
            CodecError: The value cannot be stored.
        """
        sent = await send(self._store, await self._run_id(run), topic, value, id)
        self._tell()
        return sent

    async def cancel_many(
        self,
        *,
        status: Statuses = None,
        workflow: Workflow[..., Any] | str | None = None,
        before: datetime | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Cancel every run that matches; how many.

        Args (also of `pause_many`, `resume_many` and `retry_many`):
            status: One or several; default: all that can be meant.
            workflow: It, or its full name, or the last part of that.
            before: Created before this moment.
            progress: Called with the count so far.
        """
        return await self._change_many("cancel", status, workflow, before, progress)

    async def pause_many(
        self,
        *,
        status: Statuses = None,
        workflow: Workflow[..., Any] | str | None = None,
        before: datetime | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Pause every run that matches; how many. See `cancel_many`."""
        return await self._change_many("pause", status, workflow, before, progress)

    async def resume_many(
        self,
        *,
        status: Statuses = None,
        workflow: Workflow[..., Any] | str | None = None,
        before: datetime | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Resume every paused run that matches; how many. See `cancel_many`."""
        return await self._change_many("resume", status, workflow, before, progress)

    async def retry_many(
        self,
        *,
        status: Statuses = None,
        workflow: Workflow[..., Any] | str | None = None,
        before: datetime | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Retry every failed run that matches; how many. See `cancel_many`."""
        return await self._change_many("retry", status, workflow, before, progress)

    async def _change(self, run: UUID | str | RunHandle[Any], what: Change) -> RunStatus:
        status = await change(self._store, await self._run_id(run), what)
        self._tell()
        return status

    async def _change_many(
        self,
        what: Literal["cancel", "pause", "resume", "retry"],
        status: Statuses,
        workflow: Workflow[..., Any] | str | None,
        before: datetime | None,
        progress: Callable[[int], None] | None,
    ) -> int:
        name = workflow.name if isinstance(workflow, Workflow) else workflow
        if name is not None and not isinstance(name, str):
            raise InvalidInput(f"workflow must be a workflow or its name, got {workflow!r}")

        async def act(run_id: UUID) -> None:
            if what == "retry":
                await retry_run(self._store, run_id, str(run_id), [])
            else:
                await change(self._store, run_id, what)

        try:
            return await change_many(self._store, what, act, status, name, before, progress)
        finally:
            self._tell()


async def change(store: Store, run_id: UUID, what: Change) -> RunStatus:
    """Cancel, pause or resume one run, and cancel the children of a cancelled one."""
    status = await change_run(store, run_id, what)
    if status is RunStatus.CANCELLED:
        while await tell_ends(store):
            pass
    return status


async def change_many(
    store: Store,
    what: str,
    act: Callable[[UUID], Awaitable[Any]],
    status: RunStatus | str | Iterable[RunStatus | str] | None,
    workflow: str | None,
    before: datetime | None,
    progress: Callable[[int], None] | None,
) -> int:
    """Do something to every run that matches, one after the other; to how many."""
    statuses = _statuses(what, status)
    if before is not None and before.tzinfo is None:
        raise InvalidInput(f"before needs a datetime with a time zone, got {before!r}")
    count = 0
    async for page in select_runs(store, [one.value for one in statuses], workflow, before):
        for run_id in page:
            await act(run_id)
            count += 1
            if progress is not None:
                progress(count)
    return count


def _statuses(
    what: str, status: RunStatus | str | Iterable[RunStatus | str] | None
) -> list[RunStatus]:
    possible = SUBJECTS[what]
    if status is None:
        return list(possible)
    wanted = []
    for one in [status] if isinstance(status, str) else status:
        if one not in tuple(RunStatus):
            raise InvalidInput(f"status {one!r} is none of {', '.join(RunStatus)}")
        if one not in possible:
            raise InvalidInput(
                f"a run that is {one} cannot be meant by {what!r}; possible are "
                + ", ".join(status.value for status in possible)
            )
        wanted.append(RunStatus(one))
    return wanted


async def send(store: Store, run_id: UUID, topic: str, value: Any, key: str | None) -> bool:
    """Encode and send an event. See `Client.send`."""
    check_name("topic", topic)
    if key is not None:
        check_name("event id", key, in_path=False)
    return await send_event(store, run_id, topic, encode_plain(value), key)


async def fork(
    store: Store,
    run: ForkSource,
    from_step: str | None,
    new_id: str | None,
    version: str | None,
) -> tuple[UUID, str, str, str]:
    """Copy a run up to a step. See `Client.fork`.

    Returns:
        The new run's id, its external id, workflow and version.
    """
    run_id = uuid7()
    external_id = str(run_id) if new_id is None else check_name("run id", new_id, in_path=False)
    async with store.locked_run(run.run_id) as (connection, _status, _error):
        steps, groups = await load_calls(connection, store.queries, run.run_id)
        number, dropped = _cut(run.id, from_step, steps, groups)
        ids = {"id": run.run_id, "new_id": run_id}
        cursor = await connection.execute(
            store.queries["fork_run"].encode(),
            {**ids, "external_id": external_id, "version": version},
        )
        made = await cursor.fetchone()
        if made is None:
            raise RunConflict(f"run {external_id!r} of this workflow exists; use another id")
        parts = {**ids, "number": number, "dropped": sorted(dropped)}
        await connection.execute(store.queries["fork_steps"].encode(), parts)
        await connection.execute(store.queries["fork_groups"].encode(), parts)
        await connection.execute(store.queries["fork_values"].encode(), parts)
        await connection.execute(store.queries["fork_events"].encode(), ids)
    return run_id, external_id, made[0], made[1]


def _cut(
    name: str, from_step: str | None, steps: dict[str, Any], groups: dict[str, Any]
) -> tuple[int, set[str]]:
    """Up to which call the copy goes, and what of that it leaves out.

    Everything called after the step is made anew, the step itself, and what is around it: the
    group that it belongs to is opened again, with its other steps' results kept.
    """
    if from_step is None:
        return 0, set()
    found = steps.get(from_step) or groups.get(from_step)
    members = [
        path
        for path, record in steps.items()
        if record.in_group and path.rpartition(SEPARATOR)[0] == from_step
    ]
    if found is None and not members:
        raise UnknownStep(
            f"run {name!r} has no step or group {from_step!r}; `kagzi show` lists those there are"
        )
    dropped = {from_step, *members}
    number = found.call_number if found is not None else steps[members[0]].call_number
    above = from_step.rpartition(SEPARATOR)[0]
    while above:
        dropped.add(above)
        above = above.rpartition(SEPARATOR)[0]
    return number, dropped
