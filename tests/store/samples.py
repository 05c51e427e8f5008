"""Rows for the tests of the store: steps whose bodies have returned, and others."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from kagzi._core import Step, hash_input
from kagzi.store.rows import AttemptRow, Batch, GroupRow, Mark, MemoRow, RunRow

RUN = UUID("01900000-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
ERROR = b'{"type":"builtins.ValueError","message":"no","mro":["builtins.ValueError"]}'


def settled(
    step_id: str,
    run_id: UUID = RUN,
    worker_id: UUID | None = None,
    output: bytes | None = b"1",
    error: bytes | None = None,
    group: Any = None,
    index: int = -1,
) -> Step:
    """A step whose body has returned `output`, or failed with `error`."""
    step = Step(
        None, run_id.bytes, step_id, None, "tests.echo", b"[]", hash_input("tests.echo", b"[]")
    )
    step.group, step.index = group, index
    step.worker_id = (worker_id or UUID(int=1)).bytes
    step.attempt = 1
    step.call_number = step.completed_number = 1
    step.started_us = step.completed_us = time.time_ns() // 1000
    step.status = "completed" if error is None else "failed"
    step.output, step.error = (output, None) if error is None else (None, error)
    return step


def settled_many(count: int, prefix: str = "s", **options: Any) -> list[Step]:
    return [settled(f"{prefix}/{index}", **options) for index in range(count)]


def batch_of(steps: list[Step]) -> Batch:
    batch = Batch()
    batch.add_steps(steps)
    return batch


def attempt_row(step_id: str = "s/0", number: int = 1, run_id: UUID = RUN) -> AttemptRow:
    return AttemptRow(run_id, step_id, number, NOW, NOW, ERROR, 7, None)


def group_row(path: str = "s", run_id: UUID = RUN, succeeded: int = 1, failed: int = 0) -> GroupRow:
    return GroupRow(
        run_id=run_id,
        path=path,
        id=uuid4(),
        kind="parallel",
        size=succeeded + failed,
        strategy="fail_fast",
        group_limit=None,
        parent_step_id=None,
        decision=None,
        decided_index=None,
        cached=0,
        succeeded=succeeded,
        failed=failed,
        started_at=NOW,
        completed_at=NOW,
        wall_s=0.5,
        steps_s=1.0,
        longest_s=0.25,
        call_number=1,
        completed_number=2,
    )


def memo_row(step: Step, key: bytes = b"k" * 32, lifetime_s: float | None = None) -> MemoRow:
    return MemoRow(key, step, lifetime_s)


def mark(path: str, number: int = 9, of_group: bool = False, run_id: UUID = RUN) -> Mark:
    return Mark(run_id, path, number, of_group)


def release(run_id: UUID = RUN, epoch: int = 1, status: str = "completed") -> RunRow:
    output = b"null" if status == "completed" else None
    return RunRow(run_id, epoch, status, output, ERROR if status == "failed" else None)
