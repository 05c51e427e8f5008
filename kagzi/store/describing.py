"""Rows as the records that a person sees."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from kagzi.codec.failures import read_failure
from kagzi.model import AttemptRecord, RunStatus, RunSummary, StepRecord


def run_summary(
    run_id: UUID,
    external_id: str,
    workflow: str,
    version: str,
    status: str,
    priority: int,
    created_at: datetime,
    started_at: datetime | None,
    completed_at: datetime | None,
    wake_at: datetime,
    error: bytes | None,
    queue: str,
    queue_key: str,
) -> RunSummary:
    failure = None if error is None else read_failure(error, "", 0)
    return RunSummary(
        external_id,
        run_id,
        workflow,
        version,
        RunStatus(status),
        priority,
        created_at,
        started_at,
        completed_at,
        wake_at,
        None if failure is None else f"{failure.type}: {failure.message}",
        queue,
        queue_key or None,
    )


def step_record(
    step_id: str,
    function: str,
    status: str,
    attempts: int,
    started_at: datetime,
    completed_at: datetime,
    group_path: str | None,
    parent_step_id: str | None,
    process_id: int,
    error: bytes | None,
    output_bytes: int,
    group_id: UUID | None,
) -> StepRecord:
    if group_path is None and group_id is not None:
        group_path = step_id.rpartition("/")[0]  # the group is not closed yet
    return StepRecord(
        step_id,
        function,
        status,
        attempts,
        started_at,
        completed_at,
        group_path,
        parent_step_id,
        process_id,
        None if error is None else read_failure(error, step_id, attempts),
        output_bytes,
    )


def attempt_record(
    step_id: str,
    attempt: int,
    started_at: datetime,
    completed_at: datetime,
    error: bytes,
    process_id: int,
    retry_at: datetime | None,
) -> AttemptRecord:
    failure = read_failure(error, step_id, attempt)
    return AttemptRecord(step_id, attempt, started_at, completed_at, failure, process_id, retry_at)
