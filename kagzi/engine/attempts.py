"""What becomes of an attempt that failed: another one after a while, or a failed step."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from kagzi import faultpoints
from kagzi._core import Step
from kagzi.codec.failures import read_failure
from kagzi.retry import Retry
from kagzi.store.checkpoints import CheckpointWriter
from kagzi.store.recorded import StoredAttempts
from kagzi.store.rows import AttemptRow, at_us


class AttemptHome(Protocol):
    """What this module needs of a run."""

    run_id: UUID
    writer: CheckpointWriter
    attempts: dict[str, StoredAttempts]

    def store_now(self) -> datetime: ...

    def retry_later(self, step: Step, delay_s: float) -> None: ...

    def stop_below(self, step: Step, again: bool, then: Callable[[], None]) -> None: ...


def policy_of(step: Step) -> Retry:
    choices = step.extra
    if choices is not None and choices.retry is not None:
        return choices.retry  # type: ignore[no-any-return]
    return step.definition.retry  # type: ignore[no-any-return]


def number_attempt(step: Step, attempts: dict[str, StoredAttempts], now: datetime) -> float:
    """Set the number that the step's next attempt has; seconds until it is due."""
    state = attempts.get(step.id)
    if state is None:
        step.attempt = 1
        return 0.0
    step.attempt = state.counted + 1
    if state.retry_at is None:
        return 0.0
    return (state.retry_at - now).total_seconds()


def attempt_failed(
    step: Step,
    error: bytes,
    wanted: bool,
    started_us: int,
    completed_us: int,
    process_id: int,
) -> None:
    """Record a failed attempt; then retry the step, or fail it.

    Args:
        wanted: Whether the step's own policy wants this error retried. A policy given to the call
            decides by the error's type.
    """
    home: AttemptHome = step.run
    state = home.attempts.setdefault(step.id, StoredAttempts(0, 0, None))
    state.counted += 1
    state.last += 1
    policy = policy_of(step)
    if policy is not step.definition.retry:
        wanted = policy.wants_named(read_failure(error, step.id, state.counted))
    again = wanted and state.counted < policy.max_attempts
    delay_s = policy.delay_s(state.counted, random.random()) if again else 0.0
    state.retry_at = home.store_now() + timedelta(seconds=delay_s) if again else None
    row = AttemptRow(
        home.run_id,
        step.id,
        state.last,
        at_us(started_us or completed_us),
        at_us(completed_us),
        error,
        process_id,
        state.retry_at,
    )

    def record() -> None:
        if step.group.closed:
            return
        if faultpoints.reach is not None:
            faultpoints.reach("retry.decided")
        home.writer.put_attempt(row)
        if again:
            home.writer.after_commit(lambda: home.retry_later(step, delay_s))
            return
        step.status, step.output, step.error = "failed", None, error
        step.attempt = state.counted
        step.started_us, step.completed_us = started_us or completed_us, completed_us
        step.process_id = process_id
        step.group.accept_failure(step)

    if step.definition.wants_context or not step.definition.in_pool:  # it may have inner work
        home.stop_below(step, again, record)
    else:
        record()
