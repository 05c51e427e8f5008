"""Deletes what has been kept for long enough: finished runs with their rows, and expired memos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg

from kagzi.errors import InvalidInput
from kagzi.store.operations import tell_ends
from kagzi.store.store import Store

MOST_RUNS = 500  # of a transaction
MOST_STEPS = 10_000  # of its runs together, unless it is one
MOST_MEMOS = 2_000
MOST_TELLINGS = 10


async def delete_expired(store: Store, retain_s: float | None) -> tuple[int, bool]:
    """Delete some of what has expired. Committed on return; of all workers one does it at a time.

    Args:
        retain_s: How long a finished run is kept; None: for ever.

    Returns:
        Runs deleted, and whether there may be more of anything to delete.

    Source: sql/retention.sql.
    """
    async with store.connection() as connection, connection.transaction():
        parameters = {"schema": store.connector.schema, "retain_s": retain_s}
        cursor = await connection.execute(store.queries["lock_retention"].encode(), parameters)
        if (await cursor.fetchone()) != (True,):
            return 0, False
        deleted, more = 0, False
        if retain_s is not None:
            cursor = await connection.execute(
                store.queries["find_expired_runs"].encode(), {**parameters, "most": MOST_RUNS}
            )
            expired = await cursor.fetchall()
            chosen = _within_bounds(expired)
            deleted = await _delete(connection, store, chosen) if chosen else 0
            more = deleted > 0 and (len(expired) == MOST_RUNS or len(chosen) < len(expired))
        cursor = await connection.execute(
            store.queries["delete_expired_memos"].encode(), {"most": MOST_MEMOS}
        )
        return deleted, more or cursor.rowcount == MOST_MEMOS


def _within_bounds(expired: Sequence[tuple[UUID, int]]) -> list[UUID]:
    """As many of them, from the first on, as have no more checkpoints than one transaction may."""
    chosen: list[UUID] = []
    steps = 0
    for run_id, size in expired:
        steps += size
        if chosen and steps > MOST_STEPS:
            break
        chosen.append(run_id)
    return chosen


async def delete_run(store: Store, run_id: UUID, name: str) -> None:
    """Delete one finished run. Committed on return.

    Raises:
        InvalidInput: It is not finished, or the run that started it is not.
        UnknownRun: It is not there.

    Source: sql/retention.sql, read_ties, delete_runs.
    """
    for _ in range(MOST_TELLINGS):  # nobody can hear of its end when it is gone
        if not await tell_ends(store):
            break
    async with store.locked_run(run_id) as (connection, status, _error):
        if not status.is_terminal:
            raise InvalidInput(
                f"run {name!r} is {status.value}: only a finished run can be deleted"
            )
        cursor = await connection.execute(store.queries["read_ties"].encode(), {"id": run_id})
        if await cursor.fetchone() != (True, False):
            raise InvalidInput(
                f"run {name!r} is the child of one that goes on, which may ask for its result "
                "again: it can be deleted when that one has ended"
            )
        await _delete(connection, store, [run_id])


async def _delete(
    connection: psycopg.AsyncConnection[Any], store: Store, run_ids: list[UUID]
) -> int:
    cursor = await connection.execute(store.queries["delete_runs"].encode(), {"run_ids": run_ids})
    return cursor.rowcount
