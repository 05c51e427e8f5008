"""`kagzi demo`: an analysis, the same start again, and a new run that finds the first's memos."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from kagzi.client import Client
from kagzi.command.plain import BY_MEMO
from kagzi.command.show import Column, Columns, clean, seconds
from kagzi.demo.steps import GROUP, Report, analyse
from kagzi.demo.telling import MODULE, Bar, Teller, choose_sources
from kagzi.ids import uuid7
from kagzi.model import RunDetails

SLOWEST = 10
SHOWN = ("lines", "functions", "branches")
STEPS_BESIDE = 3  # checkpoints of a run that measure no file: version, list, winner of the race


async def show_tour(
    client: Client,
    *,
    place: str,
    folder: str | None,
    full: bool,
    processes: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Run the demonstration; what it showed, as data. `holds`: every promise that it looked at."""
    teller = Teller(quiet)
    chosen, sources = choose_sources(folder, full)
    tour = uuid7().hex[-10:]
    run_id = f"demo-{tour}"
    teller.title(f"Analysing {len(sources):,} Python files in {chosen}")
    teller.fact("runs are in", place)
    async with client.worker(processes=processes, modules=(MODULE,)) as worker:
        total = len(sources) + STEPS_BESIDE
        started = time.perf_counter()
        handle = await client.start(analyse, chosen, full, tour, id=run_id)
        async with Bar(teller, handle, total, "measuring"):
            report = await handle.result()
        took_s = time.perf_counter() - started

        started = time.perf_counter()
        known = await client.start(analyse, chosen, full, tour, id=run_id)
        known_report = await known.result()
        known_s = time.perf_counter() - started

        started = time.perf_counter()
        again = await client.start(analyse, chosen, full, tour, id=f"{run_id}-again")
        async with Bar(teller, again, total, "once more"):
            again_report = await again.result()
        again_s = time.perf_counter() - started

        details, again_details = await handle.describe(), await again.describe()
        count = worker.incarnation.processes
    group = next(group for group in details.groups if group.path == GROUP)
    cached = sum(step.process_id == BY_MEMO for step in again_details.steps)
    told = {
        "run": run_id,
        "python": report.python,
        "folder": chosen,
        "files": report.files,
        **{name: sum(counts) for name, counts in _counts(report).items()},
        "processes": count,
        "seconds": took_s,
        "speedup": group.speedup,
        "failed_attempts": len([a for a in details.attempts if a.step_id == "ask_version"]),
        "race_won_by": report.counted_by,
        "unparsable": report.unparsable,
        "same_id": {"is_new": known.is_new, "seconds": known_s},
        "again": {"run": again.id, "cached_steps": cached, "seconds": again_s},
        "slowest": _slowest(details, report),
    }
    told["holds"] = (
        not known.is_new
        and known_report == report
        and _but_race(again_report) == _but_race(report)
        and cached == report.files - len(report.unparsable)
        and told["failed_attempts"] == 1
    )
    _tell(teller, details, report, told)
    return told


def _but_race(report: Report) -> Report:
    """Which implementation wins is up to the day."""
    return replace(report, counted_by="", counted_lines=0)


def _counts(report: Report) -> dict[str, list[int]]:
    names = ("lines", "functions", "classes", "branches")
    return {name: [getattr(one, name) for one in report.measures] for name in names}


def _slowest(details: RunDetails, report: Report) -> list[dict[str, Any]]:
    """The files whose steps took longest, with what was counted in them."""
    measures = {f"{GROUP}/{one.name}": asdict(one) for one in report.measures}
    steps = [step for step in details.steps if step.id in measures]
    steps.sort(key=lambda step: step.duration_s, reverse=True)
    return [{**measures[step.id], "seconds": step.duration_s} for step in steps[:SLOWEST]]


def _tell(teller: Teller, details: RunDetails, report: Report, told: dict[str, Any]) -> None:
    group = next(group for group in details.groups if group.path == GROUP)
    teller.fact(
        "measured",
        f"{report.files:,} files by {report.python}'s parser in {seconds(told['seconds'])}: "
        + ", ".join(f"{sum(counts):,} {name}" for name, counts in _counts(report).items()),
    )
    teller.fact(
        "speed-up",
        f"{group.speedup:.2f}x: {seconds(group.steps_s)} of work in {seconds(group.wall_s)} "
        f"by {told['processes']} pool process(es)",
        "bold green",
    )
    for attempt in details.attempts:
        if attempt.step_id == "ask_version":
            teller.fact(
                "retry", f"{attempt.step_id} failed ({attempt.error.message}) and was tried again"
            )
    race = next(group for group in details.groups if group.path == "count")
    teller.fact(
        "race",
        f"counting the lines of the largest files by {report.counted_by} won in "
        f"{seconds(race.wall_s)} ({report.counted_lines:,} lines); the other way was stopped",
    )
    count = len(report.unparsable)
    first = next((f"{name}: {error}" for name, error in report.unparsable.items()), "")
    teller.fact(
        "unparsable",
        f"{count} of {report.files:,}, and the group went on; the first is {first}"
        if first
        else f"none: this Python parses all {report.files:,} files",
    )
    teller.fact(
        "the same id",
        f"gave the first run's result in {seconds(told['same_id']['seconds'])}; no body ran",
    )
    again = told["again"]
    rest = report.files - again["cached_steps"]
    teller.fact(
        "a new run",
        f"{again['cached_steps']:,} of {report.files:,} files cached (memo='global'), "
        f"done in {seconds(again['seconds'])}"
        + (f"; {rest} failures are not kept, and ran again" if rest else ""),
        "bold green",
    )
    slowest = Columns(
        teller.console,
        None,
        Column("slowest files"),
        Column("took", right=True),
        *(Column(name, right=True) for name in SHOWN),
    )
    for slow in told["slowest"]:
        counts = (f"{slow[name]:,}" for name in SHOWN)
        slowest.add(clean(slow["name"]), seconds(slow["seconds"]), *counts)
    teller.console.print(slowest.table)
    if not told["holds"]:
        teller.verdict(False, "not all of this is as it should be")
    teller.fact("look at it", f"kagzi show {told['run']}")
