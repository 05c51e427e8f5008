"""What the commands print of runs: tables and a picture for people, plain data for programs."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kagzi.client import RunHandle
from kagzi.errors import StepFailed
from kagzi.model import (
    AttemptRecord,
    GroupRecord,
    RunDetails,
    RunSummary,
    StepRecord,
)
from kagzi.timeline import STATUS_STYLES, Bar, Row, rows_of, span_of

PIPED_WIDTH = 140
BY_MEMO = -1  # the process id of a step that an earlier run's result answered


def make_console(stderr: bool = False) -> Console:
    """For a terminal as wide as it is; for a pipe or file wide enough for its tables."""
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal and console.width < PIPED_WIDTH:
        console.width = PIPED_WIDTH
    return console


def clean(text: str, most: int = 2_000) -> str:
    """On one line, with nothing that a terminal would obey."""
    shown = " ".join(text[:most].split())
    return "".join(character if character.isprintable() else "�" for character in shown)


def seconds(value: float) -> str:
    """Three digits or so: `30 µs`, `12 ms`, `1.25 s`, `3 m 20 s`."""
    if value < 0.00095:
        return f"{value * 1e6:.0f} µs"
    if value < 0.0995:
        return f"{value * 1e3:.{1 if value < 0.00995 else 0}f} ms"
    if value < 100:
        return f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours else f"{minutes} m {rest} s"


_LOOKS: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "title_justify": "left",
    "title_style": "bold",
    "header_style": "dim",
}


def make_table(*columns: str, right: Container[str] = (), title: str | None = None) -> Table:
    """A table; the columns in `right` are numbers."""
    table = Table(title=title, **_LOOKS)
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=justify == "right")
    return table


def _styled(status: str) -> Text:
    return Text(status, style=STATUS_STYLES.get(status, ""))


# --- the list -------------------------------------------------------------------------------


def print_runs(runs: Sequence[RunSummary]) -> None:
    console = make_console()
    if not runs:
        console.print("no runs")
        return
    columns = ("run", "workflow", "status", "created", "took", "error")
    table = make_table(*columns, right={"took"})
    for run in runs:
        table.add_row(
            Text(clean(run.id)),
            Text(clean(run.workflow)),
            _styled(run.status),
            f"{run.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
            _took(run),
            Text(clean(run.error or "", 200)),
        )
    console.print(table)


def _took(run: RunSummary) -> str:
    if run.started_at is None:
        return ""
    until = run.completed_at or datetime.now(UTC)
    return seconds(max(0.0, (until - run.started_at).total_seconds()))


# --- one run --------------------------------------------------------------------------------


def print_run(details: RunDetails, everything: bool = False) -> None:
    console = make_console()
    console.print(_head(details))
    if details.groups:
        console.print(_groups(details))
    if details.steps:
        console.print(_timeline(details, everything))
    if details.attempts:
        console.print(_attempts(details.attempts, details, everything))
    if not (details.steps or details.groups or details.attempts):
        console.print("no step has a checkpoint yet")


def _head(details: RunDetails) -> RenderableType:
    run = details.summary
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    failed = sum(step.status == "failed" for step in details.steps)
    memos = sum(step.process_id == BY_MEMO for step in details.steps)
    counts = f"{len(details.steps) - failed:,} completed, {failed:,} failed"
    if memos:
        counts += f"; {memos:,} answered by memos of earlier runs"
    rows: list[tuple[str, RenderableType]] = [
        ("run", Text(clean(run.id), style="bold")),
        ("workflow", Text(f"{clean(run.workflow)}  version {clean(run.version)}")),
        ("status", _styled(run.status)),
        ("created", f"{run.created_at.astimezone():%Y-%m-%d %H:%M:%S %Z}"),
        ("took", _took(run)),
        ("steps", counts),
        ("input", Text(clean(orjson.dumps(details.input).decode(), 300), overflow="ellipsis")),
    ]
    if str(run.run_id) != run.id:
        rows.insert(1, ("run_id", Text(str(run.run_id))))
    if run.status == "sleeping":
        rows.insert(4, ("wakes", f"{run.wake_at.astimezone():%Y-%m-%d %H:%M:%S %Z}"))
    if run.error:
        rows.append(("error", Text(clean(run.error), style="red")))
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _groups(details: RunDetails) -> RenderableType:
    numbers = {"steps", "ok", "failed", "replayed", "wall", "sum", "speed-up", "longest"}
    table = make_table(
        *("group", "kind", "steps", "ok", "failed", "replayed", "wall", "sum", "speed-up"),
        *("longest", "decision"),
        title="Groups",
        right=numbers,
    )
    for group in details.groups:
        table.add_row(
            Text(clean(group.path), overflow="fold"),
            group.kind,
            f"{group.size:,}",
            f"{group.succeeded:,}",
            Text(f"{group.failed:,}", style="red" if group.failed else ""),
            f"{group.cached:,}",
            seconds(group.wall_s),
            seconds(group.steps_s),
            f"{group.speedup:.1f}x",
            seconds(group.longest_s),
            _decision(group),
        )
    return table


def _decision(group: GroupRecord) -> str:
    if group.decision is None:
        return ""
    if group.decided_index is None:
        return group.decision
    return f"{group.decision}: {group.decided_index}"


def _timeline(details: RunDetails, everything: bool) -> RenderableType:
    whole = span_of(details)
    length = seconds((whole[1] - whole[0]).total_seconds())
    table = Table(title="Steps", expand=True, **_LOOKS)
    table.add_column("step or group", overflow="fold", max_width=40)
    table.add_column("status", no_wrap=True)
    table.add_column("attempts", justify="right", no_wrap=True)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("process", no_wrap=True)
    table.add_column(f"0 to {length}", ratio=1, min_width=24)
    for row in rows_of(details, everything):
        label = Text("  " * row.depth + clean(row.label))
        if row.step is not None:
            _add_step(table, label, row, row.step, whole)
        elif row.spans:
            _add_group(table, label, row, whole)
        else:
            label.stylize("dim")
            table.add_row(label)
    return table


def _add_step(
    table: Table, label: Text, row: Row, step: StepRecord, whole: tuple[datetime, datetime]
) -> None:
    table.add_row(
        label,
        _styled(step.status),
        str(step.attempts),
        f"+{seconds((step.started_at - whole[0]).total_seconds())}",
        seconds(step.duration_s),
        _place(step),
        Bar(row.spans, whole, STATUS_STYLES.get(step.status, "")),
    )


def _add_group(table: Table, label: Text, row: Row, whole: tuple[datetime, datetime]) -> None:
    group, members = row.group, row.members
    start, end = min(s for s, _ in row.spans), max(e for _, e in row.spans)
    remarks = [f"{len(members):,} steps"]
    if group is not None:
        start, end = min(start, group.started_at), max(end, group.completed_at)
        if len(members) < group.size:
            remarks = [f"{len(members):,} of {group.size:,} steps"]
        remarks.append(f"{group.speedup:.1f}x")
    label.stylize("bold")
    label.append(f"  ({', '.join(remarks)})", style="dim")
    failed = sum(step.status == "failed" for step in members)
    status = _styled("open" if group is None else "completed")
    if failed:
        status = Text(f"{failed:,} failed", style="red")
    at = f"+{seconds((start - whole[0]).total_seconds())}"
    took = seconds((end - start).total_seconds())
    table.add_row(label, status, "", at, took, "", Bar(row.spans, whole, "bold blue"))


def _place(step: StepRecord) -> str:
    if step.process_id == BY_MEMO:
        return "memo"
    return str(step.process_id) if step.process_id else "coordinator"


def _attempts(
    attempts: Sequence[AttemptRecord], details: RunDetails, everything: bool
) -> RenderableType:
    start = span_of(details)[0]
    most = len(attempts) if everything else 20
    table = make_table(
        *("step", "attempt", "at", "took", "error", "next at"),
        title="Failed attempts",
        right={"attempt", "at", "took", "next at"},
    )
    for one in attempts[:most]:
        error = f"{one.error.type.removeprefix('builtins.')}: {one.error.message}"
        then = "" if one.retry_at is None else seconds((one.retry_at - start).total_seconds())
        table.add_row(
            Text(clean(one.step_id), overflow="fold"),
            str(one.attempt),
            f"+{seconds((one.started_at - start).total_seconds())}",
            seconds((one.completed_at - one.started_at).total_seconds()),
            Text(clean(error, 200)),
            f"+{then}" if then else "never",
        )
    if len(attempts) > most:
        table.caption = f"{len(attempts) - most:,} more; --all shows them"
    return table


# --- data -----------------------------------------------------------------------------------


def summary_data(run: RunSummary) -> dict[str, Any]:
    return {
        "id": run.id,
        "run_id": run.run_id,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status.value,
        "priority": run.priority,
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


# --- progress -------------------------------------------------------------------------------


class StepCounter:
    """How many steps of a run are done, on a terminal's standard error; elsewhere nothing."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting")

    def __enter__(self) -> StepCounter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, run: RunHandle[Any], completed: int, failed: int) -> None:
        text = f"run {clean(run.id)}: {completed:,} steps done"
        if failed:
            text += f", {failed:,} failed"
        self._progress.update(self._task, description=text)
