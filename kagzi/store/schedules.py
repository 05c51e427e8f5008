"""Schedules in the store: a client's changes, and the ticks that workers turn into runs.

Where a schedule's ticks lie is `kagzi.cron`'s business; here they are written. Reading what is due
locks nothing. Starting its runs is one statement, in which the schedule must stand as it was read:
of any number of workers one starts the run of a tick, and one that froze on the way holds up
nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from kagzi.cron import Cron, cron_of
from kagzi.errors import InvalidInput, UnknownSchedule
from kagzi.ids import uuid7
from kagzi.model import CatchUp, Overlap, scheduled_run_id
from kagzi.store.store import Store

MOST_SCHEDULES = 500
_DEFINED = (
    *("id", "workflow", "version", "pinned", "cron", "timezone"),
    *("catch_up", "overlap", "queue", "queue_key", "priority", "input"),
)


@dataclass(slots=True, frozen=True)
class ScheduleDefinition:
    """What a client says of a schedule."""

    id: str
    workflow: str
    version: str
    pinned: bool
    cron: str
    timezone: str
    catch_up: str
    overlap: str
    queue: str
    queue_key: str
    priority: int
    input: bytes


@dataclass(slots=True, frozen=True)
class StoredSchedule:
    """A row of the table; see `model.Schedule`."""

    id: str
    workflow: str
    version: str
    cron: str
    timezone: str
    catch_up: str
    overlap: str
    queue: str
    queue_key: str
    priority: int
    input: bytes
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    runs: int
    skipped: int
    created_at: datetime


@dataclass(slots=True, frozen=True)
class DueSchedule:
    """What a worker has to know of a schedule whose next tick comes soon.

    Attributes:
        revision: Rises with each change by a client.
        now: The store's time when it was read.
    """

    id: str
    revision: int
    cron: str
    timezone: str
    catch_up: CatchUp
    overlap: Overlap
    next_at: datetime
    now: datetime


@dataclass(slots=True, frozen=True)
class Ticks:
    """Ticks of a schedule that start runs, and the one after them."""

    schedule: DueSchedule
    ticks: Sequence[datetime]
    later_at: datetime | None


# --- a client's changes ---------------------------------------------------------------------


async def save_schedule(store: Store, wanted: ScheduleDefinition) -> None:
    """Add a schedule, or change the one that has its id; nothing if it is as wanted.

    With another expression or time zone its ticks begin anew, after the present and after the last
    that has a run.

    Raises:
        InvalidInput: It would never tick.

    Source: sql/schedules.sql, lock_schedule, add_schedule, change_schedule.
    """
    cron = cron_of(wanted.cron, wanted.timezone)
    values = {name: getattr(wanted, name) for name in _DEFINED}
    while True:
        (now,) = (await store.ask("read_now"))[0]
        async with store.connection() as connection, connection.transaction():
            cursor = await connection.execute(
                store.queries["lock_schedule"].encode(), {"id": wanted.id}
            )
            row = await cursor.fetchone()
            if row is None:
                cursor = await connection.execute(
                    store.queries["add_schedule"].encode(),
                    {**values, "next_at": _first_tick(cron, now, None)},
                )
                if await cursor.fetchone() is not None:
                    return
                continue  # somebody else has added it meanwhile
            *known, _paused, last_at, now = row
            if known == [values[name] for name in _DEFINED[1:]]:
                return
            ticks_anew = known[3:5] != [wanted.cron, wanted.timezone]
            await connection.execute(
                store.queries["change_schedule"].encode(),
                {**values, "next_at": _first_tick(cron, now, last_at) if ticks_anew else None},
            )
            return


async def pause_schedule(store: Store, schedule_id: str) -> None:
    """Let it tick no more until it is resumed.

    Raises:
        UnknownSchedule: No schedule has this id.

    Source: sql/schedules.sql, pause_schedule.
    """
    if not await store.ask("pause_schedule", id=schedule_id):
        raise _unknown(schedule_id)


async def resume_schedule(store: Store, schedule_id: str) -> None:
    """Let it tick again, from now on: the ticks of the pause are gone.

    Raises:
        UnknownSchedule: No schedule has this id.

    Source: sql/schedules.sql, resume_schedule.
    """
    await store.ask("read_now")  # lost connections are replaced
    async with store.connection() as connection, connection.transaction():
        cursor = await connection.execute(
            store.queries["lock_schedule"].encode(), {"id": schedule_id}
        )
        row = await cursor.fetchone()
        if row is None:
            raise _unknown(schedule_id)
        cron, timezone = row[3:5]
        paused, _last_at, now = row[-3:]
        if paused:
            next_at = _first_tick(cron_of(cron, timezone), now, None)
            await connection.execute(
                store.queries["resume_schedule"].encode(), {"id": schedule_id, "next_at": next_at}
            )


async def delete_schedule(store: Store, schedule_id: str) -> None:
    """Forget it; its runs stay.

    Raises:
        UnknownSchedule: No schedule has this id.

    Source: sql/schedules.sql, delete_schedule.
    """
    if not await store.rows("delete_schedule", id=schedule_id):
        raise _unknown(schedule_id)


async def list_schedules(store: Store, schedule_id: str | None = None) -> list[StoredSchedule]:
    """All of them by id, or the one of this id.

    Source: sql/schedules.sql, list_schedules.
    """
    rows = await store.ask("list_schedules", id=schedule_id)
    return [StoredSchedule(*row) for row in rows]


def _first_tick(cron: Cron, now: datetime, last_at: datetime | None) -> datetime:
    tick = cron.next_after(now if last_at is None else max(now, last_at))
    if tick is None:
        raise InvalidInput(
            f"cron expression {cron.expression!r} names no day that comes; nothing was recorded"
        )
    return tick


def _unknown(schedule_id: str) -> UnknownSchedule:
    return UnknownSchedule(
        f"no schedule has the id {schedule_id!r}; `kagzi schedules` lists those there are"
    )


# --- ticks ----------------------------------------------------------------------------------


async def find_due_schedules(
    store: Store, within_s: float, except_ids: Sequence[str]
) -> list[DueSchedule]:
    """Schedules that tick within some seconds, the earliest first. Locks nothing.

    Source: sql/schedules.sql, find_due_schedules.
    """
    rows = await store.ask(
        "find_due_schedules",
        within_s=within_s,
        except_ids=list(except_ids),
        most=MOST_SCHEDULES,
    )
    return [
        DueSchedule(
            schedule_id, revision, cron, timezone, CatchUp(catch_up), Overlap(overlap), next_at, now
        )
        for schedule_id, revision, cron, timezone, catch_up, overlap, next_at, now in rows
    ]


async def start_ticks(store: Store, due: Sequence[Ticks]) -> tuple[int, int]:
    """Start the runs of these ticks and move their schedules on; committed together on return.

    A schedule that was changed, or moved on by another worker, since it was read is left alone.

    Returns:
        Schedules moved on, and runs started.

    Source: sql/schedules.sql, start_ticks.
    """
    ticks = [(one.schedule.id, tick) for one in due for tick in one.ticks]
    moved = await store.rows(
        "start_ticks",
        ids=[one.schedule.id for one in due],
        revisions=[one.schedule.revision for one in due],
        next_ats=[one.schedule.next_at for one in due],
        later_ats=[one.later_at for one in due],
        tick_ids=[schedule_id for schedule_id, _ in ticks],
        run_ids=[uuid7() for _ in ticks],
        external_ids=[scheduled_run_id(schedule_id, tick) for schedule_id, tick in ticks],
        ticks=[tick for _, tick in ticks],
    )
    return len(moved), sum(started for _, started in moved)


async def find_overlapped(store: Store) -> list[UUID]:
    """Unfinished runs that a newer run of their schedule cancels.

    Source: sql/schedules.sql, find_overlapped.
    """
    return [run_id for (run_id,) in await store.ask("find_overlapped")]
