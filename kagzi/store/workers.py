"""The life of workers, beside registration and rescue: what happened to them, and who is there.

Source: sql/workers.sql.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from kagzi.model import WorkerSummary
from kagzi.store.store import Store

KEPT_S = 86_400.0
MOST_DELETED = 200


async def add_event(store: Store, worker_id: UUID, event: str, detail: str | None = None) -> None:
    """Note something in a worker's life."""
    await store.rows("add_worker_event", id=worker_id, event=event, detail=detail)


async def absolve_runs(store: Store, run_ids: Sequence[UUID]) -> None:
    """Not count what ended while these runs were held: the store was away, they did no harm."""
    await store.rows("absolve_runs", run_ids=sorted(run_ids))


async def start_draining(store: Store, worker_id: UUID) -> None:
    """The worker claims nothing any more, and finishes what it holds."""
    await store.ask("start_draining", id=worker_id)


async def list_workers(store: Store, everyone: bool) -> list[WorkerSummary]:
    """Workers that have not ended, or all that are on record, the newest first."""
    rows = await store.ask("list_workers", everyone=everyone)
    return [_summary(*row) for row in rows]


async def delete_old_workers(store: Store) -> bool:
    """Delete some workers that ended long ago and hold nothing; whether there may be more."""
    rows = await store.ask("delete_old_workers", kept_s=KEPT_S, most=MOST_DELETED)
    return len(rows) == MOST_DELETED


def _summary(
    worker_id: UUID, host: str, pid: int, status: str, config: dict[str, object], *rest: object
) -> WorkerSummary:
    started_at, ended_at, lease_left_s, runs, event, event_at, detail = rest
    lease_s = config.get("lease_s")
    age_s = None
    if isinstance(lease_s, int | float) and isinstance(lease_left_s, float):
        age_s = max(0.0, lease_s - lease_left_s)
    queues = config.get("queues")
    return WorkerSummary(
        id=worker_id,
        host=host,
        pid=pid,
        status=status,
        started_at=started_at,  # type: ignore[arg-type]
        ended_at=ended_at,  # type: ignore[arg-type]
        heartbeat_age_s=age_s,
        lease_left_s=lease_left_s,  # type: ignore[arg-type]
        runs=runs,  # type: ignore[arg-type]
        processes=config.get("processes"),  # type: ignore[arg-type]
        concurrency=config.get("concurrency"),  # type: ignore[arg-type]
        queues=None if queues is None else tuple(queues),  # type: ignore[arg-type]
        event=event,  # type: ignore[arg-type]
        event_at=event_at,  # type: ignore[arg-type]
        event_detail=detail,  # type: ignore[arg-type]
    )
