"""What the commands print of runs for people: tables, and a picture of the steps in time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kagzi.command.plain import BY_MEMO
from kagzi.command.timeline import STATUS_STYLES, Bar, Row, rows_of, span_of
from kagzi.handle import RunHandle
from kagzi.model import GroupRecord, RunDetails, RunSummary, StepRecord

PIPED_WIDTH = 140
WHOLE_ID_CHARS = 48  # of a run; a longer one is folded
WIDE = 132  # a terminal from which on every column of a table has room
MOST_ATTEMPTS = 20


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


def clip(text: str, most: int) -> str:
    """Its end, where it is too long: names differ there."""
    shown = clean(text)
    return shown if len(shown) <= most else f"…{shown[len(shown) - most + 1 :]}"


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


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        right: Of numbers.
        spare: Left out where there is no room for it.
        whole: Never folded.
        least, most: Of its width.
    """

    name: str
    right: bool = False
    spare: bool = False
    whole: bool = False
    least: int | None = None
    most: int | None = None


class Columns:
    """A table that leaves out its spare columns on a narrow terminal."""

    def __init__(self, console: Console, title: str | None, *columns: Column) -> None:
        self._wide = console.width >= WIDE
        self._columns = columns
        self.table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="dim",
            box=SIMPLE_HEAD,
            padding=(0, 1 if self._wide else 0, 0, 1),
        )
        for column in columns:
            if self._wide or not column.spare:
                self.table.add_column(
                    column.name,
                    justify="right" if column.right else "left",
                    no_wrap=column.right or column.whole,
                    overflow="fold",
                    min_width=column.least,
                    max_width=column.most,
                )

    def add(self, *cells: RenderableType) -> None:
        """A row, of all columns."""
        pairs = zip(self._columns, cells, strict=True)
        self.table.add_row(*(cell for column, cell in pairs if self._wide or not column.spare))


def styled(status: str) -> Text:
    return Text(status, style=STATUS_STYLES.get(status, ""))


def moment(at: datetime, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """In the zone of this machine."""
    return at.astimezone().strftime(form)


# --- the list -------------------------------------------------------------------------------


def print_runs(runs: Sequence[RunSummary]) -> None:
    console = make_console()
    if not runs:
        console.print("no runs")
        return
    wide = console.width >= WIDE
    longest = max(len(run.id) for run in runs)
    listed = Columns(
        console,
        None,
        Column("run", whole=wide and longest <= WHOLE_ID_CHARS, least=min(24, longest)),
        Column("workflow", whole=True),
        Column("status", whole=True),
        Column("created", whole=True),
        Column("took", right=True),
        Column("error", spare=True, least=24),
    )
    for run in runs:
        listed.add(
            Text(clean(run.id)),
            Text(clip(run.workflow, 30) if wide else clip(run.workflow.rpartition(".")[2], 20)),
            styled(run.status),
            moment(run.created_at) if wide else _short(run.created_at),
            took(run),
            Text(clean((run.error or "").removeprefix("kagzi.errors."), 100)),
        )
    console.print(listed.table)


def _short(at: datetime) -> str:
    """The time of today, the date of other days."""
    local = at.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == datetime.now().date() else f"{local:%y-%m-%d}"


def took(run: RunSummary) -> str:
    if run.started_at is None:
        return ""
    until = run.completed_at or datetime.now(UTC)
    return seconds(max(0.0, (until - run.started_at).total_seconds()))


# --- one run --------------------------------------------------------------------------------


def print_run(details: RunDetails, everything: bool = False) -> None:
    console = make_console()
    console.print(_head(details))
    if details.groups:
        console.print(_groups(console, details))
    if details.steps:
        console.print(_timeline(console, details, everything))
    if details.attempts:
        console.print(_attempts(console, details, everything))
    if not (details.steps or details.groups or details.attempts):
        console.print("no step has a checkpoint yet")


def _head(details: RunDetails) -> RenderableType:
    run = details.summary
    failed = sum(step.status == "failed" for step in details.steps)
    memos = sum(step.process_id == BY_MEMO for step in details.steps)
    counts = f"{len(details.steps) - failed:,} completed, {failed:,} failed"
    if memos:
        counts += f"; {memos:,} answered by memos of earlier runs"
    rows: dict[str, RenderableType] = {
        "run": Text(clean(run.id), style="bold"),
        "run_id": str(run.run_id),
        "workflow": Text(f"{clean(run.workflow)}  version {clean(run.version)}"),
        "status": styled(run.status),
        "created": moment(run.created_at, "%Y-%m-%d %H:%M:%S %Z"),
        "took": took(run),
        "steps": counts,
        "input": Text(clean(orjson.dumps(details.input).decode(), 300)),
    }
    if run.status == "sleeping":
        rows["wakes"] = moment(run.wake_at, "%Y-%m-%d %H:%M:%S %Z")
    if run.error:
        rows["error"] = Text(clean(run.error), style="red")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def _groups(console: Console, details: RunDetails) -> RenderableType:
    shown = Columns(
        console,
        "Groups",
        Column("group"),
        Column("kind", spare=True),
        Column("steps", right=True),
        Column("ok", right=True),
        Column("failed", right=True),
        Column("replayed", right=True),
        Column("wall", right=True),
        Column("sum", right=True, spare=True),
        Column("speed-up", right=True),
        Column("longest", right=True, spare=True),
        Column("decision"),
    )
    for group in details.groups:
        shown.add(
            Text(clean(group.path)),
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
    return shown.table


def _decision(group: GroupRecord) -> str:
    if group.decision is None:
        return ""
    if group.decided_index is None:
        return group.decision
    return f"{group.decision}: {group.decided_index}"


def _timeline(console: Console, details: RunDetails, everything: bool) -> RenderableType:
    whole = span_of(details)
    shown = Columns(
        console,
        "Steps",
        Column("step or group", most=40 if console.width >= WIDE else 32),
        Column("status", whole=True),
        Column("attempts", right=True, spare=True),
        Column("at", right=True, spare=True),
        Column("took", right=True),
        Column("process", spare=True),
        Column(f"0 to {seconds((whole[1] - whole[0]).total_seconds())}", whole=True, least=24),
    )
    shown.table.expand = True
    shown.table.columns[-1].ratio = 1
    for row in rows_of(details, everything):
        label = Text("  " * row.depth + clean(row.label))
        if row.step is not None:
            _add_step(shown, label, row.step, whole)
        elif row.spans:
            _add_group(shown, label, row, whole)
        else:
            label.stylize("dim")
            shown.add(label, *[""] * 6)
    return shown.table


def _after(at: datetime, start: datetime) -> str:
    return f"+{seconds(max(0.0, (at - start).total_seconds()))}"


def _add_step(
    shown: Columns, label: Text, step: StepRecord, whole: tuple[datetime, datetime]
) -> None:
    status = styled(step.status)
    if step.attempts > 1:
        status.append(f" ({step.attempts})", style="yellow")
    places = {BY_MEMO: "memo", 0: "coordinator"}
    shown.add(
        label,
        status,
        str(step.attempts),
        _after(step.started_at, whole[0]),
        seconds(step.duration_s),
        places.get(step.process_id, str(step.process_id)),
        Bar([(step.started_at, step.completed_at)], whole, STATUS_STYLES.get(step.status, "")),
    )


def _add_group(shown: Columns, label: Text, row: Row, whole: tuple[datetime, datetime]) -> None:
    group, members = row.group, row.members
    start, end = min(s for s, _ in row.spans), max(e for _, e in row.spans)
    remarks = [f"{len(members):,} steps"]
    if group is not None:
        start, end = min(start, group.started_at), max(end, group.completed_at)
        if len(members) < group.size:
            remarks = [f"{len(members):,} of {group.size:,} steps"]
        remarks.append(f"{group.speedup:.1f}x")
    label.stylize("bold")
    label.append(f" ({', '.join(remarks)})", style="dim")
    failed = sum(step.status == "failed" for step in members)
    status = styled("open" if group is None else "completed")
    if failed:
        status = Text(f"{failed:,} failed", style="red")
    length = seconds((end - start).total_seconds())
    bar = Bar(row.spans, whole, "bold blue")
    shown.add(label, status, "", _after(start, whole[0]), length, "", bar)


def _attempts(console: Console, details: RunDetails, everything: bool) -> RenderableType:
    start = span_of(details)[0]
    attempts = details.attempts
    most = len(attempts) if everything else MOST_ATTEMPTS
    shown = Columns(
        console,
        "Failed attempts",
        Column("step"),
        Column("attempt", right=True),
        Column("at", right=True),
        Column("took", right=True, spare=True),
        Column("next at", right=True, spare=True),
        Column("error"),
    )
    for one in attempts[:most]:
        error = f"{one.error.type.removeprefix('builtins.')}: {one.error.message}"
        shown.add(
            Text(clean(one.step_id)),
            str(one.attempt),
            _after(one.started_at, start),
            seconds((one.completed_at - one.started_at).total_seconds()),
            "never" if one.retry_at is None else _after(one.retry_at, start),
            Text(clean(error, 200)),
        )
    if len(attempts) > most:
        shown.table.caption = f"{len(attempts) - most:,} more; --all shows them"
    return shown.table


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
