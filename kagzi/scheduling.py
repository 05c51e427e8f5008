"""A client's schedules: what it asks for is checked and encoded, what is recorded is decoded."""

from __future__ import annotations

from typing import Any

from kagzi.codec import codec_for
from kagzi.cron import Cron
from kagzi.definition import Workflow
from kagzi.errors import InvalidInput, UnknownSchedule
from kagzi.model import MAX_NAME_BYTES, CatchUp, Overlap, Schedule, check_name
from kagzi.store.schedules import (
    ScheduleDefinition,
    StoredSchedule,
    list_schedules,
    save_schedule,
)
from kagzi.store.store import Store

MAX_ID_BYTES = MAX_NAME_BYTES - len("@2026-11-23T02:00:00Z")
UNTYPED = codec_for(Any)


def define_schedule(
    workflow: Workflow[..., Any],
    cron: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    schedule_id: str,
    timezone: str,
    catch_up: CatchUp | str,
    overlap: Overlap | str,
    queue: str,
    key: str | None,
    priority: int,
    pinned: bool,
) -> ScheduleDefinition:
    """What to record of a schedule, if all of it can be read.

    Args:
        pinned: Its runs are of this version, whatever the workflow's default is.

    Raises:
        InvalidInput: The expression, the time zone, a policy, the id or the priority cannot be.
        CodecError, InvalidArguments: The arguments do not fit the workflow.
    """
    check_name("schedule id", schedule_id, MAX_ID_BYTES, in_path=False)
    ticking = Cron(cron, timezone)
    if catch_up not in tuple(CatchUp):
        raise InvalidInput(f"catch_up {catch_up!r} is none of {', '.join(CatchUp)}")
    if overlap not in tuple(Overlap):
        raise InvalidInput(f"overlap {overlap!r} is none of {', '.join(Overlap)}")
    if type(priority) is not int or abs(priority) > 2**31 - 1:
        raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
    return ScheduleDefinition(
        schedule_id,
        workflow.name,
        workflow.version,
        pinned,
        ticking.expression,
        ticking.timezone,
        CatchUp(catch_up).value,
        Overlap(overlap).value,
        check_name("queue", queue, in_path=False),
        "" if key is None else check_name("key", key, in_path=False),
        priority,
        workflow.arguments.encode(args, kwargs),
    )


async def record_schedule(store: Store, wanted: ScheduleDefinition) -> Schedule:
    """Add or change it; how it stands now. Committed on return."""
    while True:
        await save_schedule(store, wanted)
        try:
            return await read_schedule(store, wanted.id)
        except UnknownSchedule:
            continue  # somebody removed it meanwhile, and this one came later


async def read_schedule(store: Store, schedule_id: str) -> Schedule:
    """One schedule. Raises `UnknownSchedule`."""
    found = await list_schedules(store, schedule_id)
    if not found:
        raise UnknownSchedule(f"no schedule has the id {schedule_id!r}")
    return _schedule(found[0])


async def read_schedules(store: Store) -> list[Schedule]:
    """All of them, by id."""
    return [_schedule(stored) for stored in await list_schedules(store)]


def _schedule(stored: StoredSchedule) -> Schedule:
    return Schedule(
        stored.id,
        stored.workflow,
        stored.version,
        stored.cron,
        stored.timezone,
        CatchUp(stored.catch_up),
        Overlap(stored.overlap),
        stored.queue,
        stored.queue_key or None,
        stored.priority,
        UNTYPED.decode(stored.input),
        stored.paused,
        stored.next_at,
        stored.last_at,
        stored.runs,
        stored.skipped,
        stored.created_at,
    )
