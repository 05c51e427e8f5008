"""Runs as plain data, for `--json`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kagzi.errors import StepFailed
from kagzi.model import AttemptRecord, GroupRecord, RunDetails, RunSummary, StepRecord

BY_MEMO = -1  # the process id of a step that an earlier run's result answered


def summary_data(run: RunSummary) -> dict[str, Any]:
    return {
        "id": run.id,
        "run_id": run.run_id,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status.value,
        "priority": run.priority,
        "queue": run.queue,
        "key": run.key,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "wake_at": run.wake_at,
        "error": run.error,
    }


def details_data(details: RunDetails) -> dict[str, Any]:
    return {
        **summary_data(details.summary),
        "input": details.input,
        "steps": [_step_data(step) for step in details.steps],
        "groups": [_group_data(group) for group in details.groups],
        "attempts": [_attempt_data(attempt) for attempt in details.attempts],
    }


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _step_data(step: StepRecord) -> dict[str, Any]:
    return {
        **_fields(step),
        "duration_s": step.duration_s,
        "from_memo": step.process_id == BY_MEMO,
        "error": None if step.error is None else _error_data(step.error),
    }


def _group_data(group: GroupRecord) -> dict[str, Any]:
    return {**_fields(group), "speedup": group.speedup}


def _attempt_data(attempt: AttemptRecord) -> dict[str, Any]:
    return {**_fields(attempt), "error": _error_data(attempt.error)}


def _error_data(error: StepFailed) -> dict[str, Any]:
    return {"type": error.type, "message": error.message, "traceback": error.traceback}
