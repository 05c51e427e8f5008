"""The report as one HTML file: no script, no network, charts drawn inline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from statistics import median
from typing import Any

from kagzi.bench import charts
from kagzi.bench.against import OURS, Compared
from kagzi.bench.charts import number
from kagzi.bench.measure import Figure
from kagzi.bench.report import COST_COLUMNS, Results, count, missed_of
from kagzi.bench.suites import SUITES

_STYLE = """
:root { --ink:#1b2430; --soft:#5b6776; --page:#ffffff; --card:#f6f7f9; --rule:#dfe3e8;
  --kagzi:#2563eb; --floor:#7b8794; --goal:#c2410c; --good:#15803d; --bad:#b91c1c;
  --coordinator:#2563eb; --pool:#0d9488; --server:#d97706;
  --dbos:#b45309; --absurd:#7c3aed; --plain:#64748b; --fifth:#be185d; --inside:#ffffff }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ee; --soft:#98a3b1; --page:#12161c;
  --card:#1a2028; --rule:#2d3641; --kagzi:#6ea0ff; --floor:#93a0b0; --goal:#fb923c;
  --good:#4ade80; --bad:#f87171; --coordinator:#5b8def; --pool:#2bb3a3; --server:#d98a2b;
  --dbos:#f0a54a; --absurd:#b197fc; --plain:#93a0b0; --fifth:#f472b6;
  --inside:#0b0e12 } }
* { box-sizing:border-box }
body { margin:0 auto; padding:2.5rem 1.5rem 4rem; max-width:66rem; color:var(--ink);
  background:var(--page); font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif }
h1 { font-size:1.7rem; margin:0 0 .3rem } h2 { font-size:1.2rem; margin:0 0 .2rem }
h3 { font-size:.95rem; margin:1.4rem 0 .3rem } p { margin:.2rem 0 .8rem; color:var(--soft) }
nav { display:flex; flex-wrap:wrap; gap:.3rem 1rem; margin:1rem 0 2rem }
a { color:var(--kagzi); text-decoration:none } a:hover { text-decoration:underline }
section { margin:0 0 1.6rem; padding:1.2rem 1.4rem; background:var(--card);
  border:1px solid var(--rule); border-radius:8px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.87rem; font-variant-numeric:tabular-nums }
th,td { padding:.28rem .42rem; text-align:right; white-space:nowrap;
  border-bottom:1px solid var(--rule) }
th { color:var(--soft); font-weight:600 } th:first-child,td:first-child { text-align:left }
td.text,th.text { text-align:left } tr.next td { border-top:2px solid var(--rule) }
.good { color:var(--good) } .bad { color:var(--bad) } .open { color:var(--goal) }
.soft { color:var(--soft) }
summary { cursor:pointer; color:var(--soft); margin:.8rem 0 .4rem; font-size:.9rem }
svg { width:100%; height:auto; display:block; margin:.3rem 0 }
svg text { font:12px system-ui,"Segoe UI","DejaVu Sans",sans-serif; fill:var(--ink) }
svg .tick { fill:var(--soft); font-size:11px } svg .inside { fill:var(--inside); font-size:11px }
svg .grid { stroke:var(--rule); stroke-width:1 }
svg .whisker { stroke:var(--ink); stroke-width:1.2; fill:none; opacity:.65 }
svg .mark { stroke-width:2.5 } svg .mark.floor { stroke:var(--floor) }
svg .mark.goal { stroke:var(--goal); stroke-dasharray:3 2 }
svg .line { fill:none; stroke-width:2 } svg .name { font-weight:600 }
svg .bar { opacity:.9 }
.part-coordinator { fill:var(--coordinator) } .part-pool { fill:var(--pool) }
.part-server { fill:var(--server) }
.legend { display:flex; flex-wrap:wrap; gap:.2rem 1.2rem; font-size:.83rem; color:var(--soft) }
.legend i { display:inline-block; width:.9em; height:.9em; margin-right:.4em; border-radius:2px;
  vertical-align:-.1em }
.legend i.floor { background:var(--floor); width:.25em }
.legend i.goal { width:0; border-left:3px dashed var(--goal) }
.legend i.part-coordinator { background:var(--coordinator) }
.legend i.part-pool { background:var(--pool) } .legend i.part-server { background:var(--server) }
""" + "".join(
    f"svg .bar.side-{side}, svg .dot.side-{side}, svg .name.side-{side} {{ fill:var(--{side}) }}"
    f"svg .line.side-{side} {{ stroke:var(--{side}) }}"
    for side in ("kagzi", "floor", "dbos", "absurd", "plain", "fifth")
) + "svg .line.side-floor { stroke-dasharray:5 4 }"  # fmt: skip

MOST_BARS = 24


def page_of(
    surroundings: Mapping[str, Any],
    results: Results,
    quick: bool,
    compared: Sequence[Compared] = (),
) -> str:
    """The whole file."""
    sections = [_section(name, figures) for name, figures in results.items()]
    if compared:
        sections.append(("against", "Against others", _comparison(surroundings, compared)))
    goals = [
        (name, figure)
        for name, figures in results.items()
        for figure in figures
        if figure.goal is not None
    ]
    overview = [("goals", "Against our goals", _goals(goals))] if goals else []
    whole = [*overview, *sections]
    links = "".join(f'<a href="#{escape(key)}">{escape(title)}</a>' for key, title, _ in whole)
    body = "".join(
        f'<section id="{escape(key)}"><h2>{escape(title)}</h2>{html}</section>'
        for key, title, html in whole
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>kagzi benchmarks</title><style>{_STYLE}</style></head><body>"
        f"<h1>kagzi benchmarks</h1>{_header(surroundings, results, quick)}"
        f"<nav>{links}</nav>{body}</body></html>\n"
    )


def _header(surroundings: Mapping[str, Any], results: Results, quick: bool) -> str:
    server = surroundings["postgres"]
    facts = (
        f"{surroundings['at']} · kagzi {surroundings['kagzi']} · {surroundings['python']} · "
        f"{surroundings['cores']} cores, load {surroundings['load']:.1f} · "
        f"PostgreSQL {server['server_version']}, fsync {server['fsync']}, "
        f"synchronous_commit {server['synchronous_commit']} · {surroundings['platform']}"
    )
    figures = [figure for suite in results.values() for figure in suite]
    asked = sum(figure.threshold is not None for figure in figures)
    missed = missed_of(results)
    verdict = (
        f'<b class="bad">{len(missed)} of {asked} thresholds missed:'
        f" {escape(', '.join(missed))}</b>"
        if missed
        else f'<b class="good">All {asked} thresholds of the specification are kept.</b>'
    )
    rounds = "Few rounds (--quick): spreads say little. " if quick else ""
    return (
        f"<p>{escape(facts)}</p><p>{verdict if asked else ''} {rounds}Medians over rounds "
        "in which what is compared took turns; whiskers are quartiles. The floor is the same work "
        "by a plain script that promises nothing.</p>"
    )


def _goals(goals: Sequence[tuple[str, Figure]]) -> str:
    rows = []
    for name, figure in goals:
        assert figure.goal is not None, "only such were chosen"
        reached = figure.goal.holds(figure.median)
        word = (
            '<span class="good">reached</span>' if reached else '<span class="open">not yet</span>'
        )
        link = f'<a href="#{escape(name)}">{escape(name)}</a>'
        title, size, value, unit, *rest = _cells(figure)
        rows.append([link, title, size, value, unit, escape(str(figure.goal)), word, *rest])
    heads = ["benchmark", "figure", "size", "median", "", "goal", ""]
    return _table([*heads, "quartiles", "floor", "ratio"], rows, text=(0, 1, 4, 6))


def _section(name: str, figures: Sequence[Figure]) -> tuple[str, str, str]:
    suite = SUITES[name]
    parts = [f"<p>{escape(suite.title)}. {escape(suite.note)}</p>"]
    if name == "counts":
        parts.append(_counts_table(figures))
        return name, name, "".join(parts)
    parts += [_chart(unit, list(group)) for unit, group in _by_unit(figures)]
    parts.append(_cpu(figures))
    rows = [[*_cells(figure), *_verdicts(figure)] for figure in figures]
    heads = ["figure", "size", "median", "", "quartiles", "floor", "ratio", "threshold", "goal"]
    table = _table(heads, rows, text=(0, 3))
    parts.append(f"<details><summary>All figures</summary>{table}</details>")
    costs = [figure for figure in figures if figure.cost is not None]
    if costs:
        table = _cost_table(costs)
        parts.append(f"<details><summary>What a round cost</summary>{table}</details>")
    return name, name, "".join(parts)


def _comparison(surroundings: Mapping[str, Any], compared: Sequence[Compared]) -> str:
    peers = "; ".join(surroundings.get("peers", ()))
    parts = [
        f"<p>The same work on each side in turns, on one server. {escape(peers)}. asyncio stores "
        "nothing; the floor stores rows and promises nothing else.</p>"
    ]
    sides = list(dict.fromkeys(side for one in compared for side in one.samples))
    rows = []
    for one in compared:
        cells = []
        for side in sides:
            if side not in one.samples:
                cells.append("")
                continue
            value = f"<b>{number(one.figure(side).median)}</b>"
            over = "" if side == OURS else f" ({number(median(one.over_ours(side)))} ×)"  # noqa: RUF001
            cells.append(f'{value}<span class="soft">{over}</span>')
        rows.append([escape(one.contest.title), escape(one.contest.unit), *cells])
    parts.append(_table(["work", "", *sides], rows, text=(0, 1)))
    for one in compared:
        bars = []
        for side in one.samples:
            figure = one.figure(side)
            look = f"side-{side if side in ('kagzi', 'floor', 'dbos', 'absurd') else 'plain'}"
            bars.append(charts.Bar(side, figure.median, *figure.quartiles, look=look))
        title = f"{escape(one.contest.title)}, {escape(one.contest.unit)}"
        parts.append(f"<h3>{title}</h3>{charts.bars(bars, one.contest.unit)}")
    costs = [
        replace(one.figure(side), name=f"{one.contest.title}: {side}")
        for one in compared
        for side in one.samples
    ]
    table = _cost_table([figure for figure in costs if figure.cost is not None])
    parts.append(f"<details><summary>What a round cost</summary>{table}</details>")
    return "".join(parts)


def _by_unit(figures: Sequence[Figure]) -> Iterable[tuple[str, Iterable[Figure]]]:
    order = list(dict.fromkeys(figure.unit for figure in figures))
    ranked = sorted(figures, key=lambda figure: order.index(figure.unit))
    return groupby(ranked, key=lambda figure: figure.unit)


def _chart(unit: str, figures: list[Figure]) -> str:
    """Lines over sizes for what has three or more of them, bars for the rest."""
    named: dict[str, list[Figure]] = {}
    for figure in figures:
        named.setdefault(figure.name, []).append(figure)
    series, rest, floors = [], [], []
    for name, group in named.items():
        sizes = {figure.size for figure in group}
        if len(sizes) >= 3 and None not in sizes and all(f.median > 0 for f in group):
            series.append(charts.Line(name, [_point(f, f.samples) for f in group]))
            if all(figure.floor and min(figure.floor) > 0 for figure in group):
                floors.append([_point(figure, figure.floor) for figure in group])
        else:
            rest += group
    parts = []
    if series:
        if floors:
            series.append(charts.Line("floor", max(floors, key=len), "side-floor"))
        looks = ("side-kagzi", "side-absurd", "side-dbos", "side-fifth", "side-plain")
        ours = [line for line in series if line.look != "side-floor"]
        for line, look in zip(ours, looks * len(ours), strict=False):
            series[series.index(line)] = charts.Line(line.name, line.points, look)
        parts.append(f"<h3>{_heading(unit)}, by size</h3>{charts.lines(series, 'size', unit)}")
    if rest:
        rows = [_bar(figure) for figure in rest[:MOST_BARS]]
        legend = [
            ("floor", "floor", any(row.floor is not None for row in rows)),
            ("goal", "goal", any(row.goal is not None for row in rows)),
        ]
        parts.append(f"<h3>{_heading(unit)}</h3>{charts.bars(rows, unit)}{_legend(legend)}")
    return "".join(parts)


def _heading(unit: str) -> str:
    return {"x": "Ratios", "": "Counts"}.get(unit, escape(unit))


def _point(figure: Figure, samples: Sequence[float]) -> tuple[float, float, float, float]:
    low, high = Figure("", None, "", samples).quartiles
    return float(figure.size or 0), median(samples), max(low, 1e-9), max(high, 1e-9)


def _bar(figure: Figure) -> charts.Bar:
    size = "" if figure.size is None else f" · {figure.size:,}"
    return charts.Bar(
        f"{figure.name}{size}",
        figure.median,
        *figure.quartiles,
        median(figure.floor) if figure.floor else None,
        None if figure.goal is None else figure.goal.value,
    )


def _cpu(figures: Sequence[Figure]) -> str:
    """Where processor time goes."""
    rows = []
    for figure in figures:
        known = {} if figure.cost is None else figure.cost.as_dict()
        pieces = [
            (part, known[f"{part}_s"] * 1e3)
            for part in ("coordinator", "pool", "server")
            if f"{part}_s" in known
        ]
        if pieces:
            size = "" if figure.size is None else f" · {figure.size:,}"
            rows.append((f"{figure.name}{size}", pieces))
    if not rows:
        return ""
    legend = [(f"part-{part}", part, True) for part in ("coordinator", "pool", "server")]
    return f"<h3>Processor time of a round, ms</h3>{charts.stacks(rows, 'ms')}{_legend(legend)}"


def _legend(entries: Iterable[tuple[str, str, bool]]) -> str:
    shown = "".join(
        f'<span><i class="{look}"></i>{word}</span>' for look, word, yes in entries if yes
    )
    return f'<div class="legend">{shown}</div>' if shown else ""


def _cells(figure: Figure) -> list[str]:
    low, high = figure.quartiles
    spread = f"{number(low)} to {number(high)}" if len(figure.samples) > 1 else ""
    return [
        escape(figure.name),
        "" if figure.size is None else f"{figure.size:,}",
        f"<b>{number(figure.median)}</b>",
        escape(figure.unit),
        spread,
        number(median(figure.floor)) if figure.floor else "",
        f"{number(median(figure.over_floor))} ×" if figure.over_floor else "",  # noqa: RUF001
    ]


def _verdicts(figure: Figure) -> list[str]:
    cells = []
    for limit, bad in ((figure.threshold, "bad"), (figure.goal, "open")):
        if limit is None:
            cells.append("")
        else:
            look = "good" if limit.holds(figure.median) else bad
            cells.append(f'<span class="{look}">{escape(str(limit))}</span>')
    return cells


def _cost_table(figures: Sequence[Figure]) -> str:
    rows = []
    for figure in figures:
        assert figure.cost is not None, "only such were chosen"
        known = figure.cost.as_dict()
        values = [
            count(known[name] * scale) if name in known else ""
            for name, (_, scale) in COST_COLUMNS.items()
        ]
        size = "" if figure.size is None else f"{figure.size:,}"
        rows.append([escape(figure.name), size, *values])
    return _table(["figure", "size", *(head for head, _ in COST_COLUMNS.values())], rows)


def _counts_table(figures: Sequence[Figure]) -> str:
    """Scenarios down, counters across."""
    table: dict[str, dict[str, float]] = {}
    for figure in figures:
        scenario, _, counter = figure.name.rpartition(": ")
        table.setdefault(scenario, {})[counter] = figure.median
    counters = list(next(iter(table.values()), {}))
    rows = [
        [escape(scenario), *(f"{values[counter]:,.0f}" for counter in counters)]
        for scenario, values in table.items()
    ]
    return _table(["run", *counters], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    def cell(tag: str, place: int, value: str) -> str:
        look = ' class="text"' if place in text else ""
        return f"<{tag}{look}>{value}</{tag}>"

    head = "".join(cell("th", place, escape(value)) for place, value in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(cell("td", place, value) for place, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
