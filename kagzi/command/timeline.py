"""A run as rows in time: which steps and groups there are to show, and their bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from kagzi.model import GroupRecord, RunDetails, StepRecord

_HEIGHTS, _ASCII_HEIGHTS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
MOST_MEMBERS = 6
MOST_ROWS = 200
STATUS_STYLES = {
    "completed": "green",
    "failed": "red",
    "running": "cyan",
    "sleeping": "blue",
    "paused": "magenta",
    "pending": "yellow",
    "cancelled": "dim",
    "open": "cyan",
}


@dataclass
class Row:
    """A line of the picture: a step, a group (with the bodies in it), or how many are left out.

    Attributes:
        label: What is shown, indented by `depth`.
        spans: Start and end of each body, for the bar.
        step, group: Which it is; neither: a remark.
    """

    label: str
    depth: int
    spans: Sequence[tuple[datetime, datetime]] = ()
    step: StepRecord | None = None
    group: GroupRecord | None = None
    members: Sequence[StepRecord] = field(default_factory=list)


def rows_of(details: RunDetails, everything: bool) -> list[Row]:
    """The rows in order of time, what lies within a step or group below it.

    Args:
        everything: Else of a large group only the failed and the slowest steps.
    """
    rows = _Picture(details, everything).rows()
    if not everything and len(rows) > MOST_ROWS:
        left = len(rows) - MOST_ROWS
        rows[MOST_ROWS:] = [Row(f"… {left:,} more lines; --all shows them", 0)]
    return rows


class _Picture:
    def __init__(self, details: RunDetails, everything: bool) -> None:
        self._everything = everything
        self._steps = {step.id: step for step in details.steps}
        self._groups = {group.path: group for group in details.groups}
        self._members: dict[str, list[StepRecord]] = {path: [] for path in self._groups}
        self._below: dict[str, list[tuple[datetime, str]]] = {}
        for step in details.steps:
            if step.group_path is not None:
                self._members.setdefault(step.group_path, []).append(step)
            else:
                self._put_below(step.id, step.started_at)
        for path, members in self._members.items():
            known = self._groups.get(path)
            started_at = known.started_at if known else min(step.started_at for step in members)
            self._put_below(path, started_at)

    def _put_below(self, path: str, started_at: datetime) -> None:
        self._below.setdefault(self._parent(path), []).append((started_at, path))

    def _parent(self, path: str) -> str:
        """The nearest step around a path; "" when there is none."""
        while path:
            path = path.rpartition("/")[0]
            if path in self._steps:
                return path
        return ""

    def rows(self) -> list[Row]:
        return list(self._rows_below("", 0))

    def _rows_below(self, parent: str, depth: int) -> Iterable[Row]:
        cut = len(parent) + 1 if parent else 0
        for _, path in sorted(self._below.get(parent, ())):
            if path in self._members:
                yield from self._rows_of_group(path, path[cut:], depth)
            else:
                yield from self._rows_of_step(self._steps[path], path[cut:], depth)

    def _rows_of_step(self, step: StepRecord, label: str, depth: int) -> Iterable[Row]:
        yield Row(label, depth, [(step.started_at, step.completed_at)], step=step)
        yield from self._rows_below(step.id, depth + 1)

    def _rows_of_group(self, path: str, label: str, depth: int) -> Iterable[Row]:
        members = self._members[path]
        spans = [(step.started_at, step.completed_at) for step in members]
        yield Row(label, depth, spans, group=self._groups.get(path), members=members)
        chosen = members if self._everything else _worth_showing(members)
        for step in chosen:
            yield from self._rows_of_step(step, step.id[len(path) + 1 :], depth + 1)
        left = len(members) - len(chosen)
        if left:
            yield Row(f"… {left:,} more; --all shows them", depth + 1)


def _worth_showing(members: list[StepRecord]) -> list[StepRecord]:
    if len(members) <= MOST_MEMBERS:
        return members
    by_time = sorted(members, key=lambda step: step.duration_s, reverse=True)
    failed = [step for step in by_time if step.status == "failed"]
    chosen = dict.fromkeys(step.id for step in (*failed[: MOST_MEMBERS // 2], *by_time))
    shown = set(list(chosen)[:MOST_MEMBERS])
    return [step for step in members if step.id in shown]


def span_of(details: RunDetails) -> tuple[datetime, datetime]:
    """From the first thing that is recorded to the last."""
    summary = details.summary
    starts = [summary.started_at or summary.created_at]
    ends = [summary.completed_at or starts[0]]
    for start, end in _times(details):
        starts.append(start)
        ends.append(end)
    return min(starts), max(max(ends), min(starts))


def _times(details: RunDetails) -> Iterator[tuple[datetime, datetime]]:
    for step in details.steps:
        yield step.started_at, step.completed_at
    for group in details.groups:
        yield group.started_at, group.completed_at


class Bar:
    """Spans along a time axis; the height of a column tells how many overlap there."""

    def __init__(
        self,
        spans: Sequence[tuple[datetime, datetime]],
        whole: tuple[datetime, datetime],
        style: str,
    ) -> None:
        self._start = whole[0]
        self._length_s = max((whole[1] - whole[0]).total_seconds(), 1e-6)
        self._spans = spans
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        heights = _ASCII_HEIGHTS if options.ascii_only else _HEIGHTS
        busy = self._busy(width)
        most = max(busy, default=0.0)
        if len(self._spans) < 2:
            line = "".join(heights[-1] if part > 0 else " " for part in busy)
        else:
            top = len(heights) - 1
            line = "".join(heights[min(top, -int(-part / most * top))] for part in busy)
        yield Text(line, style=self._style, no_wrap=True, end="")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)

    def _busy(self, width: int) -> list[float]:
        """Bodies that ran on average in each column."""
        busy = [0.0] * width
        for start, end in self._spans:
            first = (start - self._start).total_seconds() / self._length_s * width
            last = (end - self._start).total_seconds() / self._length_s * width
            column = min(int(first), width - 1)
            while column < width and (column < last or column == int(first)):
                share = min(last, column + 1) - max(first, column)
                busy[column] += max(share, 1e-3)
                column += 1
        return busy
