"""End to end: a client, a worker with its pool, a real Postgres.

Ratios to the same work measured beside it, and counts: neither drifts with the machine's day. The
figures are those of `python -m kagzi.bench`, taken from its quick runs.
"""

import os
from contextlib import ExitStack
from statistics import median
from typing import Any

import uvloop

from kagzi.bench.measure import cores
from kagzi.bench.of_counts import COUNTERS, SCENARIOS
from kagzi.bench.session import Bench, own_schema
from kagzi.bench.suites import SUITES
from kagzi.store import embedded

SCHEMA = "kagzi_asv"

Figures = dict[tuple[str, int | None], float]


def measured(suite: str) -> Figures:
    """Medians of one benchmark's figures by (name, size)."""
    with ExitStack() as stack:
        dsn = os.environ.get("DATABASE_URL") or stack.enter_context(embedded.attach()).dsn
        stack.enter_context(own_schema(dsn, SCHEMA))
        bench = Bench(dsn, cores(), quick=True, schema=SCHEMA)
        figures = uvloop.run(SUITES[suite].measure(bench))
    found = {(figure.name, figure.size): figure.median for figure in figures}
    for figure in figures:
        if figure.over_floor:
            found[f"{figure.name}, over floor", figure.size] = median(figure.over_floor)
    return found


# Each class has a `setup_cache` of its own, since asv tells them apart by their line: it measures
# once for all figures of the class.


def over_floor(name: str, size: int) -> Any:
    return figure(f"{name}, over floor", size, "x")


def figure(name: str, size: int | None, unit: str) -> Any:
    def track(self: object, figures: Figures) -> float:
        return figures[name, size]

    track.unit = unit  # type: ignore[attr-defined]
    return track


class Coordination:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("coordination")

    track_group_of_100_over_floor = over_floor("overhead", 100)
    track_group_of_1000_over_floor = over_floor("overhead", 1000)
    track_group_of_10000_over_floor = over_floor("overhead", 10_000)
    track_step_of_1000 = figure("overhead", 1000, "us/step")
    track_step_of_10000_over_one_of_1000 = figure("a step, over one of 1,000", 10_000, "x")


class Parallel:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("parallel_vs_sequential")

    track_speed_up_of_3_steps = figure("speed-up", 3, "x")
    track_speed_up_of_20_steps = figure("speed-up", 20, "x")


class Memoisation:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("memoisation")

    track_first_over_cached_of_100_steps = figure("first over cached", 100, "x")
    track_cached_step_of_a_group = figure("cached, as a group", 100, "us/step")


class Race:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("race")

    track_over_the_winner_of_10 = figure("over the winner", 10, "ms")
    track_over_the_winner_of_1000 = figure("over the winner", 1000, "ms")


class Sequence:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("sequence")

    track_step_over_insert = figure("over the INSERT", 100, "x")


class Latency:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("latency")

    track_p50_in_the_same_process = figure("same process, p50", None, "ms")
    track_p50_across_processes = figure("across processes, p50", None, "ms")


class Throughput:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("throughput")

    track_one_step_runs = figure("one-step runs, one worker, rate", 2000, "runs/s")
    track_ten_step_runs = figure("ten-step runs, one worker, rate", 500, "steps/s")


class Memory:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("memory")

    track_coordinator_over_10000_steps = figure("coordinator", 10_000, "MiB")


class Cpu:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("cpu")

    track_16_steps_over_executor = figure("over the executor", 16, "x")


class Counts:
    """Each counter of each scenario."""

    timeout = 300
    params = (tuple(SCENARIOS), tuple(COUNTERS))
    param_names = ("scenario", "counter")

    def setup_cache(self) -> Figures:
        return measured("counts")

    def track_counts(self, figures: Figures, scenario: str, counter: str) -> float:
        return figures[f"{scenario}: {counter}", None]
