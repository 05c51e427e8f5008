"""What was measured, as tables and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kagzi.bench.against import OURS, Compared
from kagzi.bench.charts import number
from kagzi.bench.measure import Figure, Limit
from kagzi.bench.suites import SUITES

Results = Mapping[str, list[Figure]]


def table_of(name: str, figures: list[Figure]) -> Table:
    """One benchmark: median, quartiles, and what was asked."""
    suite = SUITES[name]
    table = Table(
        title=f"[bold]{name}[/]  {suite.title}",
        caption=suite.note or None,
        title_justify="left",
        caption_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    with_floor = any(figure.over_floor for figure in figures)
    table.add_column("")
    for heading in ("steps", "median"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("", "quartiles"):
        table.add_column(heading, no_wrap=True)
    if with_floor:
        table.add_column("floor", justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    for heading in ("threshold", "goal"):
        table.add_column(heading, no_wrap=True)
    for place, figure in enumerate(figures):
        low, high = figure.quartiles
        table.add_row(
            figure.name,
            "" if figure.size is None else f"{figure.size:,}",
            number(figure.median),
            figure.unit,
            f"{number(low)} to {number(high)}" if len(figure.samples) > 1 else "",
            *(_floor_of(figure) if with_floor else ()),
            _verdict(figure.threshold, figure.median, "ok", "missed", "bold red"),
            _verdict(figure.goal, figure.median, "reached", "not yet", "yellow"),
            end_section=place + 1 < len(figures) and figures[place + 1].size != figure.size,
        )
    return table


def _floor_of(figure: Figure) -> tuple[str, str]:
    """The floor in the same unit, and how many times it ours took."""
    if not figure.over_floor:
        return "", ""
    return number(statistics.median(figure.floor)), number(statistics.median(figure.over_floor))


COST_COLUMNS: dict[str, tuple[str, float]] = {
    "statements": ("statements", 1),
    "round_trips": ("trips", 1),
    "commits": ("commits", 1),
    "wal_bytes": ("WAL kB", 1e-3),
    "coordinator_s": ("CPU ms", 1e3),
    "pool_s": ("of pool", 1e3),
    "server_s": ("of server", 1e3),
    "peak_mib": ("MiB", 1),
    "pool_peak_mib": ("of pool", 1),
}
"""Of a `Cost`: its heading and the factor on it."""


def cost_table_of(figures: list[Figure]) -> Table | None:
    """What a round of each work took besides time; None where that was not measured."""
    rows = [(figure, figure.cost) for figure in figures if figure.cost is not None]
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", min_width=16)
    for heading in ("steps", *(heading for heading, _ in COST_COLUMNS.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure, cost in rows:
        known = cost.as_dict()
        table.add_row(
            figure.name,
            "" if figure.size is None else f"{figure.size:,}",
            *(
                count(known[name] * scale) if name in known else ""
                for name, (_, scale) in COST_COLUMNS.items()
            ),
        )
    return table


def count(value: float) -> str:
    """A whole number without digits behind its point."""
    return f"{value:,.0f}" if value == int(value) else number(value)


def comparison_of(compared: Sequence[Compared]) -> Table:
    """Contests down, sides across: medians, and behind them how many times ours."""
    sides = list(dict.fromkeys(side for one in compared for side in one.samples))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right", no_wrap=True)
    for one in compared:
        cells = []
        for side in sides:
            if side not in one.samples:
                cells.append("")
            elif side == OURS:
                cells.append(number(one.figure(side).median))
            else:
                over = number(statistics.median(one.over_ours(side)))
                cells.append(f"{number(one.figure(side).median)} ({over} x)")
        table.add_row(one.contest.title, one.contest.unit, *cells)
    return table


def _verdict(limit: Limit | None, value: float, good: str, bad: str, style: str) -> Text:
    if limit is None:
        return Text()
    holds = limit.holds(value)
    return Text.assemble(f"{limit} ", (good, "green") if holds else (bad, style))


def print_surroundings(console: Console, surroundings: Mapping[str, Any]) -> None:
    server = surroundings["postgres"]
    console.print(
        f"kagzi {surroundings['kagzi']}, {surroundings['python']}, {surroundings['cores']} cores "
        f"(load {surroundings['load']:.1f}), PostgreSQL {server['server_version']}, "
        f"fsync {server['fsync']}, synchronous_commit {server['synchronous_commit']}",
        highlight=False,
    )


def print_verdict(console: Console, results: Results) -> None:
    missed = missed_of(results)
    asked = sum(figure.threshold is not None for figures in results.values() for figure in figures)
    if missed:
        console.print(f"[bold red]{len(missed)} of {asked} thresholds missed:[/]", *missed)
    elif asked:
        console.print(f"[green]All {asked} thresholds of the specification are kept.[/]")


def print_regressions(console: Console, lines: list[str]) -> None:
    if lines:
        console.print(
            f"[bold red]{len(lines)} counts are above those committed:[/]", *lines, sep="\n"
        )
    else:
        console.print("[green]No count is above those committed.[/]")


def missed_of(results: Results) -> list[str]:
    """Names of the figures that miss the specification's thresholds."""
    return [
        f"{name}: {figure.name}" + ("" if figure.size is None else f" ({figure.size} steps)")
        for name, figures in results.items()
        for figure in figures
        if not figure.ok
    ]


def as_json(
    surroundings: Mapping[str, Any],
    results: Results,
    quick: bool,
    compared: Sequence[Compared] = (),
) -> bytes:
    """All figures with their samples."""
    return orjson.dumps(
        {
            "surroundings": surroundings,
            "quick": quick,
            "ok": not missed_of(results),
            "benchmarks": {
                name: {
                    "title": SUITES[name].title,
                    "note": SUITES[name].note,
                    "figures": [figure.as_dict() for figure in figures],
                }
                for name, figures in results.items()
            },
            "compared": {one.contest.name: one.as_dict() for one in compared},
        },
        option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
    )
