"""Queues: their limits, and claims from those that have a line of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from kagzi.model import QueueSummary
from kagzi.store.recorded import ClaimedRun, Claims
from kagzi.store.store import Store


async def claim_apart(
    store: Store,
    worker_id: UUID,
    names: Sequence[tuple[str, str]],
    most: int,
    suspects: int,
    served: Sequence[str] | None,
) -> Claims:
    """Give up to `most` due runs to a worker, from queues with a line of their own.

    Committed on return. A queue with limits that another worker claims from at this moment is
    skipped.

    Args:
        served: Queues to claim from; None: all.

    Source: sql/queues.sql, claim_apart.
    """
    rows = await store.rows(
        "claim_apart",
        worker_id=worker_id,
        served=None if served is None else list(served),
        names=[name for name, _ in names],
        versions=[version for _, version in names],
        most=most,
        suspects=suspects,
    )
    claims = await store.load_recorded(ClaimedRun(*row[:-1]) for row in rows if row[0] is not None)
    claims.again_s = next((row[-1] for row in rows if row[0] is None), None)
    return claims


async def any_queues(store: Store, served: Sequence[str] | None) -> bool:
    """Whether `claim_apart` has anything to look at."""
    listed = None if served is None else list(served)
    return bool((await store.ask("any_queues", served=listed))[0][0])


async def declare_queues(store: Store, names: Sequence[str]) -> None:
    """Give queues lines of their own, which a worker that serves only these finds quickly."""
    await store.ask("declare_queues", names=list(names))


async def set_queue(store: Store, name: str, changes: dict[str, Any]) -> QueueSummary:
    """Change some of a queue's limits. Claims that begin after the return know them.

    Args:
        changes: Of `concurrency`, `concurrency_per_key`, `rate` and `paused`; None: no limit.

    Source: sql/queues.sql, set_queue.
    """
    rate = changes.get("rate") or (None, None)
    await store.ask(
        "set_queue",
        queue=name,
        sets=list(changes),
        concurrency=changes.get("concurrency"),
        concurrency_per_key=changes.get("concurrency_per_key"),
        rate_starts=rate[0],
        rate_window_s=rate[1],
        paused=changes.get("paused"),
    )
    return (await list_queues(store, name))[0]


async def list_queues(store: Store, name: str | None = None) -> list[QueueSummary]:
    """Queues that have limits or unfinished runs, by name; or the one of this name."""
    return [_summary(*row) for row in await store.ask("list_queues", queue=name)]


def _summary(
    name: str,
    concurrency: int | None,
    concurrency_per_key: int | None,
    rate_starts: int | None,
    rate_window_s: float | None,
    paused: bool,
    *counts: int,
) -> QueueSummary:
    rate = None
    if rate_starts is not None and rate_window_s is not None:
        rate = rate_starts, rate_window_s
    return QueueSummary(name, concurrency, concurrency_per_key, rate, paused, *counts)
