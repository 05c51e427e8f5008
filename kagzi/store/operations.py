"""What people and other runs do to a run from outside: requests, events, children, values.

Each change touches one run and may be sent twice, so a lost answer is simply asked for again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID, uuid4

from kagzi.errors import RunConflict, RunEnded, RunSuspended, UnknownRun
from kagzi.model import RunStatus
from kagzi.store.store import Store

Change = Literal["cancel", "pause", "resume"]
ChildPolicy = Literal["cancel", "abandon"]

FIRST_ID = UUID(int=0)
PAGE = 500


async def change_run(store: Store, run_id: UUID, change: Change) -> RunStatus:
    """Cancel, pause or resume a run: at once if nobody holds it, else by a request to its worker.

    Returns:
        Its status now. Running: its worker is still to hear of it.

    Raises:
        UnknownRun: No such run.

    Source: sql/operations.sql, cancel_run, pause_run, resume_run.
    """
    changed = await store.ask(f"{change}_run", id=run_id)
    if not changed:
        return (await store.read_status(run_id))[0]
    status = changed[0][0]
    return RunStatus.RUNNING if status == "cancel" else RunStatus(status)


async def select_runs(
    store: Store,
    statuses: Iterable[str],
    workflow: str | None = None,
    before: datetime | None = None,
) -> AsyncIterator[list[UUID]]:
    """Ids of matching runs in pages, the oldest first."""
    wanted, after = list(statuses), FIRST_ID
    while True:
        rows = await store.ask(
            "select_runs",
            after=after,
            statuses=wanted,
            workflow=workflow,
            before=before,
            most=PAGE,
        )
        if rows:
            yield [row[0] for row in rows]
            after = rows[-1][0]
        if len(rows) < PAGE:
            return


async def tell_ends(store: Store) -> bool:
    """Let parents, and the children of cancelled runs, hear of ends. Whether there were any.

    Repeated by every worker until all are told, so it may stop anywhere.

    Source: sql/operations.sql, find_untold and what follows it.
    """
    untold = await store.ask("find_untold")
    for parent in {row[1] for row in untold if row[1] is not None}:
        await store.ask("tell_run", id=parent)
    for run_id, _parent, status, _at in untold:
        if status == "cancelled":
            for (child,) in await store.ask("open_children", id=run_id):
                await change_run(store, child, "cancel")
    if untold:
        await store.ask("set_told", ids=[row[0] for row in untold], at=[row[3] for row in untold])
    return bool(untold)


async def read_news(store: Store, worker_id: UUID) -> list[tuple[UUID, str | None, int]]:
    """Held runs with a request or news: (run id, request, how much news)."""
    return await store.ask("read_news", worker_id=worker_id)


# --- events ---------------------------------------------------------------------------------


async def send_event(store: Store, run_id: UUID, topic: str, value: bytes, key: str | None) -> bool:
    """Add an event for a run; False if one with this key was there already. Committed on return.

    Raises:
        RunEnded: The run has ended, and will hear nothing any more.
        UnknownRun: No such run.
    """
    rows = await store.ask(
        "send_event", id=run_id, topic=topic, value=value, key=key or f"kagzi:{uuid4()}"
    )
    found, added = rows[0]
    if not found:
        status = (await store.read_status(run_id))[0]
        raise RunEnded(
            f"run {run_id} is {status.value}: nothing can be sent to it any more; "
            "one that failed or was cancelled goes on after a retry"
        )
    return bool(added)


async def load_events(store: Store, run_id: UUID) -> tuple[int, list[tuple[int, str, bytes]]]:
    """How much news a run has, and its events (number, topic, value) as part of that."""
    rows = await store.ask("load_events", id=run_id)
    if not rows:
        raise UnknownRun(f"run {run_id} was deleted")
    return rows[0][0], [(row[1], row[2], row[3]) for row in rows if row[1] is not None]


# --- children -------------------------------------------------------------------------------


async def insert_child(
    store: Store,
    *,
    child_id: UUID,
    external_id: str,
    workflow: str,
    version: str,
    payload: bytes,
    priority: int | None,
    queue: str,
    queue_key: str,
    policy: ChildPolicy,
    worker_id: UUID,
    parent_id: UUID,
    epoch: int,
    step_id: str,
) -> bool:
    """Add a child run while its parent is held; False if it is there already. Committed on return.

    Raises:
        RunConflict: The external id belongs to a run that is not this child.
        RunSuspended: The parent is not this worker's any more.

    Source: sql/operations.sql, insert_child.
    """
    rows = await store.ask(
        "insert_child",
        id=child_id,
        external_id=external_id,
        workflow=workflow,
        version=version,
        input=payload,
        priority=priority,
        queue=queue,
        queue_key=queue_key,
        on_parent_cancel=policy,
        worker_id=worker_id,
        parent_run_id=parent_id,
        epoch=epoch,
        parent_step_id=step_id,
    )
    held, added = rows[0]
    if not held:
        raise RunSuspended
    if not added and not await store.ask("read_status", id=child_id):
        raise RunConflict(
            f"run {external_id!r} of {workflow!r} exists and is no child of this step; "
            "give the child another id"
        )
    return bool(added)


async def read_ends(
    store: Store, run_ids: Sequence[UUID], everyone: bool = False
) -> list[tuple[UUID, RunStatus, bytes | None, bytes | None]]:
    """Those of these runs that have ended: (id, status, output, error).

    `everyone`: the others, too; those that were deleted are left out.
    """
    rows = await store.ask("read_ends", ids=list(run_ids), everyone=everyone)
    return [(row[0], RunStatus(row[1]), row[2], row[3]) for row in rows]


async def spare_children(store: Store, run_id: UUID) -> None:
    """A cancelled run is to go on: let everybody hear of its end first, and take back the rest."""
    while await tell_ends(store):
        pass
    for (child,) in await store.ask("children_to_cancel", id=run_id):
        await store.ask("take_back_cancel", id=child)


# --- values ---------------------------------------------------------------------------------


async def publish_value(
    store: Store, run_id: UUID, worker_id: UUID, epoch: int, key: str, value: bytes, number: int
) -> None:
    """Set what clients see under a key; older numbers change nothing. Committed on return."""
    await store.ask(
        "publish_value",
        run_id=run_id,
        worker_id=worker_id,
        epoch=epoch,
        key=key,
        value=value,
        number=number,
    )


async def read_values(store: Store, run_id: UUID, after: int = -1) -> list[tuple[str, bytes, int]]:
    """(key, value, number) of what was published after a number."""
    return await store.ask("read_values", run_id=run_id, after=after)
