"""End to end: a client, a worker with its pool, a real Postgres.

Ratios to the same work measured beside it, and counts: neither drifts with the machine's day. The
figures are those of `python -m kagzi.bench`, taken from its quick runs.
"""

import os
from contextlib import ExitStack
from typing import Any

import uvloop

from kagzi.bench.measure import cores
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
    return {(figure.name, figure.size): figure.median for figure in figures}


# Each class has a `setup_cache` of its own, since asv tells them apart by their line: it measures
# once for all figures of the class.


def figure(name: str, size: int | None, unit: str) -> Any:
    def track(self: object, figures: Figures) -> float:
        return figures[name, size]

    track.unit = unit  # type: ignore[attr-defined]
    return track


class Floor:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("floor")

    track_group_of_100_over_floor = figure("group over floor", 100, "x")
    track_group_of_1000_over_floor = figure("group over floor", 1000, "x")


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
    track_cached_step = figure("cached", 100, "us/step")


class Race:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("race")

    track_over_the_winner_of_10 = figure("over the winner", 10, "ms")


class Coordination:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("coordination")

    track_step_of_1000_over_one_of_100 = figure("a step, over one of 100", 1000, "x")


class Sequence:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("sequence")

    track_step_over_insert = figure("over the INSERT", 100, "x")


class Cpu:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("cpu")

    track_16_steps_over_executor = figure("over the executor", 16, "x")


class Counts:
    timeout = 300

    def setup_cache(self) -> Figures:
        return measured("counts")

    track_transactions_of_group_of_10 = figure("write transactions", 10, "transactions")
    track_transactions_of_group_of_1000 = figure("write transactions", 1000, "transactions")
    track_batches_of_group_of_1000 = figure("batches", 1000, "batches")
    track_statements_of_group_of_1000 = figure("statements", 1000, "statements")
    track_wal_of_group_of_1000 = figure("WAL", 1000, "bytes/step")
