"""The statements by which a batch is written, and their parameters.

Arrays, and parts of a statement that have nothing to do, take longer than a row itself. So there
are statements for what stands alone (a step, or a run that is let go of), for the end of a group,
for steps, and one for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from kagzi._core import (
    STEP_COLUMN_OIDS,
    STEP_FIELD_OIDS,
    Step,
    step_fields,
    unnest_arrays,
)
from kagzi.payloads import Sealer
from kagzi.store.rows import Batch, GroupRow, MemoRow, RunRow
from kagzi.store.statements import (
    BOOL_OID,
    BYTES,
    ELEMENT_OIDS,
    FLOATS,
    INTS,
    TEXTS,
    TIMES,
    UUID_OID,
    UUIDS,
    Statement,
    binary_array,
    binary_value,
)

Values = dict[str, bytes | None]

_Columns = tuple[tuple[str, int], ...]

_ATTEMPT_COLUMNS: _Columns = (
    ("run_id", UUIDS),
    ("step_id", TEXTS),
    ("attempt", INTS),
    ("started_at", TIMES),
    ("completed_at", TIMES),
    ("error", BYTES),
    ("process_id", INTS),
    ("retry_at", TIMES),
)
_GROUP_COLUMNS: _Columns = (
    ("run_id", UUIDS),
    ("path", TEXTS),
    ("id", UUIDS),
    ("kind", TEXTS),
    ("size", INTS),
    ("strategy", TEXTS),
    ("group_limit", INTS),
    ("parent_step_id", TEXTS),
    ("decision", TEXTS),
    ("decided_index", INTS),
    ("cached", INTS),
    ("succeeded", INTS),
    ("failed", INTS),
    ("started_at", TIMES),
    ("completed_at", TIMES),
    ("wall_s", FLOATS),
    ("steps_s", FLOATS),
    ("longest_s", FLOATS),
    ("call_number", INTS),
    ("completed_number", INTS),
)
_RUN_COLUMNS: _Columns = (
    ("run_id", UUIDS),
    ("epoch", INTS),
    ("status", TEXTS),
    ("output", BYTES),
    ("error", BYTES),
    ("wake_at", TIMES),
    ("news", INTS),
)
_MARK_COLUMNS: _Columns = (("run_id", UUIDS), ("path", TEXTS), ("number", INTS))
_MEMO_COLUMNS: _Columns = (
    ("key", BYTES),
    ("function", TEXTS),
    ("output", BYTES),
    ("run_id", UUIDS),
    ("lifetime_s", FLOATS),
)


_STEP_NAMES = tuple(f"s{place}" for place in range(len(STEP_FIELD_OIDS)))
_RUN_NAMES = tuple(f"r{place}" for place in range(len(_RUN_COLUMNS)))
_GROUP_NAMES = tuple(f"g{place}" for place in range(len(_GROUP_COLUMNS)))


def make_statements(queries: dict[str, str]) -> dict[str, Statement]:
    """By name: `write_step`, `write_run`, `write_steps`, `write_group`, `write_rows`."""
    one_step = dict(zip(_STEP_NAMES, STEP_FIELD_OIDS, strict=True))
    one_run = {
        name: ELEMENT_OIDS[oid] for name, (_, oid) in zip(_RUN_NAMES, _RUN_COLUMNS, strict=True)
    }
    one_group = dict(zip(_STEP_NAMES, STEP_COLUMN_OIDS, strict=True))
    one_group.update(
        {
            name: ELEMENT_OIDS[oid]
            for name, (_, oid) in zip(_GROUP_NAMES, _GROUP_COLUMNS, strict=True)
        }
    )
    many = {"relaxed": BOOL_OID, **dict(zip(_STEP_NAMES, STEP_COLUMN_OIDS, strict=True))}
    for letter, columns in (
        ("a", _ATTEMPT_COLUMNS),
        ("g", _GROUP_COLUMNS),
        ("r", _RUN_COLUMNS),
        ("v", _MARK_COLUMNS),
        ("w", _MARK_COLUMNS),
        ("m", _MEMO_COLUMNS),
    ):
        many.update({f"{letter}{place}": oid for place, (_, oid) in enumerate(columns)})
    types = {
        "write_step": one_step,
        "write_run": one_run,
        "write_steps": many,
        "write_group": one_group,
        "write_rows": many,
    }
    return {
        name: Statement(name, queries[name], {"worker_id": UUID_OID, **oids})
        for name, oids in types.items()
    }


def step_values(step: Step) -> Values:
    """Parameters of `write_step`."""
    return dict(zip(_STEP_NAMES, step_fields(step), strict=True))


def run_values(row: RunRow, sealer: Sealer | None) -> Values:
    """Parameters of `write_run`."""
    return _row_values(_RUN_NAMES, _RUN_COLUMNS, row, sealer)


def group_values(row: GroupRow) -> Values:
    """Parameters of `write_group` but for the steps."""
    return _row_values(_GROUP_NAMES, _GROUP_COLUMNS, row, None)


def _row_values(
    names: tuple[str, ...], columns: _Columns, row: Any, sealer: Sealer | None
) -> Values:
    values: Values = {}
    for name, (column, oid) in zip(names, columns, strict=True):
        value = getattr(row, column)
        if oid == BYTES and value is not None and sealer is not None:
            value = sealer.seal(value)
        values[name] = binary_value(ELEMENT_OIDS[oid], value)
    return values


def steps_values(steps: Sequence[Step]) -> Values:
    """Parameters of `write_steps`, and those of `write_group` and `write_rows` that are steps."""
    return dict(zip(_STEP_NAMES, unnest_arrays(steps), strict=True))


def rows_values(batch: Batch, sealer: Sealer | None) -> Values:
    """Parameters of `write_rows` but for the steps: one array per column."""
    values: Values = {}
    marks = batch.marks
    # Runs that computed one key at once: ON CONFLICT must not meet it twice, and the first stays.
    memos = {memo.key: memo for memo in reversed(batch.memos)}
    tables: tuple[tuple[str, list[Any], _Columns], ...] = (
        ("a", batch.attempts, _ATTEMPT_COLUMNS),
        ("g", batch.groups, _GROUP_COLUMNS),
        ("r", batch.runs, _RUN_COLUMNS),
        ("v", [mark for mark in marks if not mark.of_group], _MARK_COLUMNS),
        ("w", [mark for mark in marks if mark.of_group], _MARK_COLUMNS),
        ("m", [_memo_columns(memo) for memo in memos.values()], _MEMO_COLUMNS),
    )
    for letter, rows, columns in tables:
        for place, (column, oid) in enumerate(columns):
            column_values = [getattr(row, column) for row in rows]
            if sealer is not None and oid == BYTES:
                change = sealer.codec.digest if column == "key" else sealer.seal
                column_values = [None if one is None else change(one) for one in column_values]
            values[f"{letter}{place}"] = binary_array(oid, column_values)
    return values


def _memo_columns(memo: MemoRow) -> Any:
    step = memo.step
    return SimpleNamespace(
        key=memo.key,
        function=step.function,
        output=step.output,
        run_id=UUID(bytes=step.run_id),
        lifetime_s=memo.lifetime_s,
    )


def is_relaxed(steps: Sequence[Step]) -> bool:
    """Whether every one of these may be lost with the server."""
    definition = steps[0].definition if steps else None
    if definition is None or not definition.relaxed:
        return False
    return all(step.definition is not None and step.definition.relaxed for step in steps)
