"""Ends the lease of a worker that is gone, also where it froze within a write, and frees its runs.

A worker that freezes, or is cut off, between two messages of a transaction leaves a backend that
holds its row and obeys no timeout. Whoever waits for that row asks the server who is in the way and
ends it. Asked for are locks, not names: through a pooler a backend serves one client after the
other, and its name may be that of an earlier one.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from uuid import UUID

import psycopg

from kagzi import faultpoints
from kagzi.errors import StoreError

logger = logging.getLogger("kagzi.store")

TRIES = 5
LOCK_TIMEOUT = "500ms"
PATIENCE_S = 0.2  # with who is in the way: an ordinary write is through long before
RESCUER = "kagzi-rescue"


class Connections(Protocol):
    """What this module needs of the store."""

    queries: dict[str, str]

    def connection(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]: ...

    async def ask(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]: ...


async def rescue_from(store: Connections, worker_id: UUID, reason: str, forced: bool) -> int:
    """See `Store.rescue`."""
    lost: StoreError | None = None  # the pool may hold several connections that were cut
    for _ in range(TRIES):
        try:
            return await _try(store, worker_id, reason, forced)
        except psycopg.errors.LockNotAvailable:
            pass
        except psycopg.errors.QueryCanceled:
            pass  # meant for an earlier statement of this connection: a proxy brought it late
        except StoreError as error:
            if error.__cause__ is None:  # no connection to be had, after a long wait
                raise
            if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                lost = error
    if lost is not None:
        raise lost
    logger.warning("worker %s cannot be rescued from yet: its row is locked", worker_id)
    return 0


async def _try(store: Connections, worker_id: UUID, reason: str, forced: bool) -> int:
    queries = store.queries
    async with store.connection() as connection, connection.transaction():
        # Both for this transaction alone; the name keeps rescuers from ending each other.
        cursor = await connection.execute(
            queries["begin_rescue"].encode(), {"rescuer": RESCUER, "lock_timeout": LOCK_TIMEOUT}
        )
        row = await cursor.fetchone()
        assert row is not None, "one row"
        clearing = asyncio.create_task(_clear_the_way(store, row[0], worker_id))
        try:
            await connection.execute(
                queries["end_lease"].encode(),
                {"id": worker_id, "forced": forced, "reason": reason},
            )
        finally:
            clearing.cancel()
            await asyncio.wait([clearing])
        if faultpoints.reach is not None:
            faultpoints.reach("rescue.between")
        cursor = await connection.execute(queries["free_runs"].encode())
        return cursor.rowcount


async def _clear_the_way(store: Connections, pid: int, worker_id: UUID) -> None:
    """End the backends that this rescuer waits for, if it waits for long."""
    await asyncio.sleep(PATIENCE_S)
    try:
        ended = await store.ask("terminate_blockers", pid=pid, rescuer=RESCUER)
    except StoreError as error:
        logger.debug("nobody could be ended: %s", error)
    else:
        if ended:
            logger.warning(
                "worker %s froze within a write: %d backend(s) ended", worker_id, len(ended)
            )
