"""Deletes what has been kept for long enough: finished runs with their rows, and expired memos."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg

from kagzi.errors import InvalidInput
from kagzi.store.operations import tell_ends
from kagzi.store.store import Store

LEAST_RUNS, MOST_RUNS = 8, 500  # looked at in one transaction
MOST_STEPS = 10_000  # of those it deletes, unless it is one
MOST_MEMOS = 2_000
MOST_TELLINGS = 10

Place = tuple[datetime, UUID]
FIRST: Place = (datetime.min.replace(tzinfo=UTC), UUID(int=0))


class Expiry:
    """Deletes what has expired, some of it at each call. Of all workers one does it at a time.

    It goes through the finished runs from the oldest on, and begins again when it has come to the
    end: runs that may not go yet, though they are old, are not looked at each time.

    Args:
        retain_s: How long a finished run is kept; None: for ever.
    """

    def __init__(self, store: Store, retain_s: float | None) -> None:
        self._store = store
        self._retain_s = retain_s
        self._after = FIRST
        self._size = MOST_RUNS

    async def delete_some(self) -> tuple[int, bool]:
        """Delete a part of what is left. Committed on return.

        Returns:
            Runs deleted, and whether there may be more of anything to delete.

        Source: sql/retention.sql.
        """
        store = self._store
        async with store.connection() as connection, connection.transaction():
            cursor = await connection.execute(
                store.queries["lock_retention"].encode(), {"schema": store.connector.schema}
            )
            if (await cursor.fetchone()) != (True,):
                return 0, False
            deleted, more = 0, False
            if self._retain_s is not None:
                cursor = await connection.execute(
                    store.queries["find_expired_runs"].encode(),
                    {
                        "retain_s": self._retain_s,
                        "after_at": self._after[0],
                        "after_id": self._after[1],
                        "most": self._size,
                    },
                )
                found = await cursor.fetchall()
                chosen, last = _choose(found)
                more = last is not None or len(found) == self._size
                self._after = last or (found[-1][:2] if more else FIRST)
                # To count the checkpoints of runs takes time, too.
                self._size = min(MOST_RUNS, max(LEAST_RUNS, 2 * len(chosen) if last else MOST_RUNS))
                deleted = await _delete(connection, store, chosen) if chosen else 0
            cursor = await connection.execute(
                store.queries["delete_expired_memos"].encode(), {"most": MOST_MEMOS}
            )
            return deleted, more or cursor.rowcount == MOST_MEMOS


def _choose(expired: Sequence[tuple[datetime, UUID, bool, int]]) -> tuple[list[UUID], Place | None]:
    """Those that one transaction deletes, and the last looked at if that is not the last of all."""
    chosen: list[UUID] = []
    steps, last = 0, FIRST
    for completed_at, run_id, may_go, size in expired:
        if may_go:
            steps += size
            if chosen and steps > MOST_STEPS:
                return chosen, last
            chosen.append(run_id)
        last = completed_at, run_id
    return chosen, None


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
