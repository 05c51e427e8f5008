"""The life of workers, beside registration and rescue: what happened to them, and who is there.

Source: sql/workers.sql.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from kagzi.store.store import Store


async def add_event(store: Store, worker_id: UUID, event: str, detail: str | None = None) -> None:
    """Note something in a worker's life."""
    await store.rows("add_worker_event", id=worker_id, event=event, detail=detail)


async def absolve_runs(store: Store, run_ids: Sequence[UUID]) -> None:
    """Not count what ended while these runs were held: the store was away, they did no harm."""
    await store.rows("absolve_runs", run_ids=sorted(run_ids))
