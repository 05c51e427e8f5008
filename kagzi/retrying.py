"""A person's retry of a failed run: which checkpoints are cleared, so that steps run again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from kagzi.codec.failures import failed_steps, timed_out_groups
from kagzi.errors import InvalidInput, UnknownStep
from kagzi.model import SEPARATOR, RunStatus
from kagzi.scope import is_below
from kagzi.store.operations import spare_children
from kagzi.store.store import Store

Connection = psycopg.AsyncConnection[Any]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A step or closed group of a run, as far as a retry needs it."""

    path: str
    failed: bool
    in_group: bool
    call_number: int
    visible_number: int | None

    @property
    def scope(self) -> str:
        """Path of the scope in which it was called."""
        path = self.path.rpartition(SEPARATOR)[0]
        return path.rpartition(SEPARATOR)[0] if self.in_group else path


def plan_retry(
    steps: dict[str, CallRecord],
    groups: dict[str, CallRecord],
    causes: Iterable[str],
    timed_out: Iterable[str],
) -> tuple[set[str], set[str]]:
    """Which steps and groups to clear, given the failures that caused the run's error.

    The failures themselves, the groups and outer steps around them, and whatever was called after
    such a failure became visible, in the scope that saw it and the scopes above. And failures that
    nobody handled: not seen, or seen only after that one.
    """
    cleared_steps: set[str] = set()
    cleared_groups: set[str] = set()
    seen: list[tuple[str, int]] = []
    for path in causes:
        record = steps.get(path)
        if record is None:
            continue
        cleared_steps.add(path)
        if record.visible_number is not None:
            seen.append((record.scope, record.visible_number))
    for path in timed_out:
        record = groups.get(path)
        if record is not None:
            cleared_groups.add(path)
            if record.visible_number is not None:
                seen.append((record.scope, record.visible_number))
    for path in [*cleared_steps, *cleared_groups]:
        # The groups it is in, and the outer steps above it, as far up as the run.
        above = path.rpartition(SEPARATOR)[0]
        while above:
            if above in groups:
                cleared_groups.add(above)
            if above in steps:
                cleared_steps.add(above)
            above = above.rpartition(SEPARATOR)[0]
    failed = [record for record in steps.values() if record.failed]
    cleared_steps |= {record.path for record in failed if record.visible_number is None}
    for scope, number in seen:
        for record in failed:
            visible = record.visible_number
            if visible is not None and visible >= number and _reaches(scope, record.scope):
                cleared_steps.add(record.path)
                above = record.path.rpartition(SEPARATOR)[0]
                if record.in_group and above in groups:
                    cleared_groups.add(above)
        for records, cleared in ((steps, cleared_steps), (groups, cleared_groups)):
            for record in records.values():
                if record.call_number > number and _reaches(scope, record.scope):
                    cleared.add(record.path)
    return cleared_steps, cleared_groups


def _reaches(scope: str, own: str) -> bool:
    return own == scope or is_below(own, scope) or is_below(scope, own)


def outer_steps(steps: Iterable[str], groups: Iterable[str]) -> set[str]:
    """Paths that have others below them."""
    found: set[str] = set()
    for path in [*steps, *groups]:
        above = path.rpartition(SEPARATOR)[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition(SEPARATOR)[0]
    return found


async def load_calls(
    connection: Connection, queries: dict[str, str], run_id: UUID
) -> tuple[dict[str, CallRecord], dict[str, CallRecord]]:
    """Steps and groups of a run by path, without their values."""
    parameters = {"id": run_id}
    cursor = await connection.execute(queries["load_calls"].encode(), parameters)
    steps = {
        row[0]: CallRecord(row[0], row[1] == "failed", *row[2:]) for row in await cursor.fetchall()
    }
    cursor = await connection.execute(queries["load_group_calls"].encode(), parameters)
    groups = {
        path: CallRecord(path, bool(decision or failed), False, call_number, visible_number)
        for path, decision, failed, call_number, visible_number in await cursor.fetchall()
    }
    return steps, groups


async def retry_run(store: Store, run_id: UUID, name: str, named: list[str]) -> None:
    """Clear and restart, the children in whose failure it failed too, in one transaction.

    See `Client.retry`.
    """
    if (await store.read_status(run_id))[0] is RunStatus.CANCELLED:
        await spare_children(store, run_id)
    async with store.locked_run(run_id) as (connection, status, error):
        if status not in (RunStatus.FAILED, RunStatus.CANCELLED):
            raise InvalidInput(
                f"run {name!r} is {status.value}; only a failed or cancelled run can be retried"
            )
        todo = [(run_id, error, name, named)]
        while todo:
            await _restart(connection, store.queries, *todo[-1])
            parent_id = todo.pop()[0]
            cursor = await connection.execute(
                store.queries["failed_children"].encode(), {"id": parent_id}
            )
            todo += [
                (child_id, why, str(child_id), []) for child_id, why in await cursor.fetchall()
            ]


async def _restart(
    connection: Connection,
    queries: dict[str, str],
    run_id: UUID,
    error: bytes | None,
    name: str,
    named: list[str],
) -> None:
    parameters = {"id": run_id}
    steps, groups = await load_calls(connection, queries, run_id)
    for path in named:
        if path not in steps:
            raise UnknownStep(f"run {name!r} has no step {path!r}")
        if not steps[path].failed:
            raise InvalidInput(f"step {path!r} of run {name!r} has not failed")
    causes = dict.fromkeys([*(failed_steps(error) if error else ()), *named])
    timed_out = dict.fromkeys(timed_out_groups(error) if error else ())
    outer = outer_steps(steps, groups)
    unread = outer & causes.keys()
    while unread:  # what failed within an outer step is in that step's own error
        cursor = await connection.execute(
            queries["load_errors"].encode(), {"id": run_id, "step_ids": sorted(unread)}
        )
        read = causes.keys() & outer
        for (inner_error,) in await cursor.fetchall():
            causes.update(dict.fromkeys(failed_steps(inner_error)))
            timed_out.update(dict.fromkeys(timed_out_groups(inner_error)))
        unread = (outer & causes.keys()) - read
    step_ids, paths = plan_retry(steps, groups, causes, timed_out)
    ids = {"id": run_id, "step_ids": sorted(step_ids)}
    await connection.execute(queries["delete_steps"].encode(), ids)
    await connection.execute(
        queries["delete_groups"].encode(), {"id": run_id, "paths": sorted(paths)}
    )
    await connection.execute(queries["retire_attempts"].encode(), ids)
    await connection.execute(queries["restart_run"].encode(), parameters)
