"""The demo's steps and workflows. Pool processes and second workers import this module."""

from __future__ import annotations

import asyncio
import os
import platform
import time
import tokenize
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import kagzi
from kagzi import Context, ErrorStrategy, ParallelResult, Retry
from kagzi.demo.sources import Measures, SourceFile, find_sources, measure_source

GROUP = "measure"
LARGEST = 40
WORKER_VARIABLE = "KAGZI_DEMO_WORKER"


@dataclass(frozen=True, slots=True)
class Report:
    """What an analysis finds.

    Attributes:
        python: Which Python's parser it was.
        measures: Of each file that it can parse.
        unparsable: Name of each other file to the parser's message.
        counted_by: The implementation that won the race.
        counted_lines: Of the largest files, by the winner.
    """

    python: str
    measures: list[Measures]
    unparsable: dict[str, str]
    counted_by: str = ""
    counted_lines: int = 0

    @property
    def files(self) -> int:
        return len(self.measures) + len(self.unparsable)


@kagzi.step(retry=Retry.fixed(3, 0.2, on=ConnectionError))
async def ask_version() -> str:
    """The version of this Python. Fails at its first attempt, on purpose."""
    if kagzi.current_step().attempt == 1:
        raise ConnectionError("the first attempt of this step fails on purpose")
    return f"{platform.python_implementation()} {platform.python_version()}"


@kagzi.step
def list_sources(folder: str, full: bool) -> list[SourceFile]:
    return find_sources(folder, full)


@kagzi.step
async def count_by_bytes(paths: list[str]) -> int:
    """Lines of these files: newlines are counted."""
    lines = 0
    for path in paths:
        lines += (await asyncio.to_thread(Path(path).read_bytes)).count(b"\n")
    return lines


@kagzi.step
async def count_by_tokens(paths: list[str]) -> int:
    """Lines of these files: each is taken apart into tokens. The slower way."""
    lines = 0
    for path in paths:
        lines += await asyncio.to_thread(_last_line, path)
    return lines


def _last_line(path: str) -> int:
    with open(path, "rb") as file:
        return max(token.end[0] for token in tokenize.tokenize(file.readline)) - 1


@kagzi.step(cpu=True, memo="global", memo_ttl=timedelta(days=1))
def measure(source: SourceFile, tour: str) -> Measures:
    """Measure a file.

    Args:
        tour: The same in the runs of one demonstration, so that it finds its own memos only.
    """
    return measure_source(source)


@kagzi.step(cpu=True)
def measure_before_witness(source: SourceFile, witness: str, pause_s: float) -> Measures:
    """Measure a file, and first append to `witness` which step began in whose pool process."""
    worker = os.environ.get(WORKER_VARIABLE, "?")
    line = f"{worker} {kagzi.current_step().step_id}\n"
    file = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())  # one write: bodies in other processes append as well
    finally:
        os.close(file)
    time.sleep(pause_s)
    return measure_source(source)


@kagzi.workflow
async def analyse(ctx: Context, folder: str, full: bool, tour: str) -> Report:
    """Measure every Python file below a folder."""
    python = await ctx.step(ask_version)
    sources = await ctx.step(list_sources, folder, full)
    by_size = sorted(sources, key=lambda source: source.size_bytes, reverse=True)
    largest = [source.path for source in by_size[:LARGEST]]
    counted = await ctx.race(
        "count", {"bytes": count_by_bytes.bind(largest), "tokens": count_by_tokens.bind(largest)}
    )
    measured = await ctx.parallel_vec(
        GROUP,
        [measure.bind(source, tour) for source in sources],
        keys=[source.name for source in sources],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    report = _report(python, sources, measured)
    return replace(report, counted_by=counted.id.rpartition("/")[2], counted_lines=counted.value)


@kagzi.workflow
async def analyse_before_witness(
    ctx: Context, folder: str, full: bool, witness: str, pause_s: float
) -> Report:
    """The same; every body that measures says so in a file, whatever becomes of its result."""
    python = await ctx.step(ask_version)
    sources = await ctx.step(list_sources, folder, full)
    measured = await ctx.parallel_vec(
        GROUP,
        [measure_before_witness.bind(source, witness, pause_s) for source in sources],
        keys=[source.name for source in sources],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    return _report(python, sources, measured)


def _report(python: str, sources: list[SourceFile], measured: ParallelResult[Measures]) -> Report:
    return Report(
        python,
        [value for value in measured.values if value is not None],
        {
            sources[index].name: f"{error.type.rpartition('.')[2]}: {error.message}"
            for index, error in measured.errors.items()
        },
    )
