"""Reads recorded runs for a check: whole, from one moment, in transactions that cannot write."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from kagzi.engine.clock import StoreClock
from kagzi.model import RunStatus
from kagzi.registry import registry
from kagzi.store.recorded import ClaimedRun, Take, load_checkpoints, take_rows
from kagzi.store.store import Store

BATCH = 25
BATCH_BYTES = 16 << 20


@dataclass(slots=True)
class RecordedRun:
    """A run with all that is recorded of it, as a worker would get it, and how it stands."""

    claimed: ClaimedRun
    status: RunStatus
    output: bytes | None
    error: bytes | None


async def count_runs(store: Store, statuses: Sequence[str] | None, workflow: str | None) -> int:
    """Source: sql/checks.sql, count_to_check."""
    found = await store.ask(
        "count_to_check", statuses=None if statuses is None else list(statuses), workflow=workflow
    )
    return int(found[0][0])


async def read_runs(
    store: Store,
    statuses: Sequence[str] | None,
    workflow: str | None,
    most: int | None,
    clock: StoreClock,
) -> AsyncIterator[list[RecordedRun]]:
    """Recorded runs in batches, the newest first; sets `clock` by the store's.

    Source: sql/checks.sql, runs_to_check; sql/checkpoints.sql, load_steps and its siblings.
    """
    parameters: dict[str, Any] = {
        "before": None,
        "statuses": None if statuses is None else list(statuses),
        "workflow": workflow,
    }
    left = most
    while left is None or left > 0:
        parameters["most"] = BATCH if left is None else min(BATCH, left)
        batch = await _read_batch(store, parameters, clock)
        if not batch:
            return
        yield batch
        parameters["before"] = batch[-1].claimed.run_id
        if left is not None:
            left -= len(batch)


async def _read_batch(
    store: Store, parameters: dict[str, Any], clock: StoreClock
) -> list[RecordedRun]:
    async with store.connection() as connection, connection.transaction():

        async def ask(name: str, take: Take | None = None, **values: Any) -> list[tuple[Any, ...]]:
            cursor = await connection.execute(
                store.queries[name].encode(), values or None, binary=take is not None
            )
            if take is not None:
                return await take_rows(cursor, take)
            return await cursor.fetchall() if cursor.description else []

        await ask("begin_check")
        asked_at = time.time()
        rows = await ask("runs_to_check", **parameters)
        batch = [_recorded(*row[:-1]) for row in rows]
        if batch:
            clock.set(rows[0][-1], asked_at, time.time())
            known = _with_code(batch)
            weights = dict(await ask("weigh_recorded", run_ids=list(known))) if known else {}
            batch = _lighter(batch, weights)
            known = _with_code(batch)
            if known:
                await load_checkpoints(ask, known, whole=True)
    return batch


def _with_code(batch: list[RecordedRun]) -> dict[UUID, ClaimedRun]:
    """Those that will be replayed: of others nothing but their names is looked at."""
    runs = (run.claimed for run in batch)
    return {run.run_id: run for run in runs if registry.has(run.workflow, run.version)}


def _lighter(batch: list[RecordedRun], nbytes: dict[UUID, int]) -> list[RecordedRun]:
    """The first runs of a batch, at least one, up to `BATCH_BYTES` of checkpoints."""
    total = 0
    for place, run in enumerate(batch):
        total += nbytes.get(run.claimed.run_id, 0)
        if place and total > BATCH_BYTES:
            return batch[:place]
    return batch


def _recorded(
    run_id: UUID,
    external_id: str,
    workflow: str,
    version: str,
    priority: int,
    epoch: int,
    payload: bytes,
    created_at: datetime,
    scheduled_at: datetime | None,
    status: str,
    output: bytes | None,
    error: bytes | None,
) -> RecordedRun:
    claimed = ClaimedRun(
        run_id=run_id,
        external_id=external_id,
        workflow=workflow,
        version=version,
        priority=priority,
        epoch=epoch,
        input=payload,
        crash_count=1,
        created_at=created_at,
        scheduled_at=scheduled_at,
    )
    return RecordedRun(claimed, RunStatus(status), output, error)
