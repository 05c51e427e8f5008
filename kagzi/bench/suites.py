"""The benchmarks: what each measures, and what the specification and we ask of it.

What is compared takes turns within a round, and quotients are taken round by round: on a machine
that others use, they hold where times do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import uuid4

from kagzi.bench import work
from kagzi.bench.floor import PlainProcesses, PlainScript
from kagzi.bench.measure import Figure, Samples, ServerCounters, at_least, below, cores
from kagzi.bench.session import Bench

Measure = Callable[[Bench], Coroutine[Any, Any, list[Figure]]]


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark.

    Attributes:
        name: What it is selected by.
        title: What it shows, in a line.
        measure: Does it.
        note: What a reader of the figures must know.
    """

    name: str
    title: str
    measure: Measure
    note: str = ""


SUITES: dict[str, Suite] = {}


def suite(name: str, title: str, note: str = "") -> Callable[[Measure], Measure]:
    def add(measure: Measure) -> Measure:
        SUITES[name] = Suite(name, title, measure, note)
        return measure

    return add


@suite("parallel_vs_sequential", "Steps that wait 50 ms: in one group, and one after the other")
async def parallel_vs_sequential(bench: Bench) -> list[Figure]:
    sizes, step_s = (3, 5, 10, 20), 0.05
    sequential, parallel = Samples(), Samples()
    async with bench.session() as session:
        for _ in bench.rounds(full=5, quick=2):
            for size in sizes:
                sequential.add(size, await session.run(work.one_after_the_other, size, step_s))
                parallel.add(size, await session.run(work.together, size, step_s))
    figures = []
    for size in sizes:
        goal = at_least(18) if size == 20 else None
        figures += [
            Figure("sequential", size, "ms", sequential.of(size, 1e3)),
            Figure("parallel", size, "ms", parallel.of(size, 1e3)),
            Figure("throughput", size, "steps/s", [size / s for s in parallel.of(size)]),
            Figure("speed-up", size, "x", sequential.over(parallel, size), at_least(2), goal),
        ]
    return figures


@suite("memoisation", "Steps of 5 ms: first run, and the same run again over its checkpoints")
async def memoisation(bench: Bench) -> list[Figure]:
    sizes, step_s = (10, 50, 100), 0.005
    first, again, grouped = Samples(), Samples(), Samples()
    memo_first, memo_again = Samples(), Samples()
    async with bench.session() as session:
        for _ in bench.rounds(full=5, quick=2):
            for size in sizes:
                worked, *cached = await session.drive_again(4, size, step_s, False)
                for seconds in cached:
                    first.add(size, worked)
                    again.add(size, seconds)
                for seconds in (await session.drive_again(4, size, step_s, True))[1:]:
                    grouped.add(size, seconds)
                key = str(uuid4())
                memo_first.add(size, await session.run(work.remembered_together, key, size))
                memo_again.add(size, await session.run(work.remembered_together, key, size))
    figures = []
    for size in sizes:
        goal = below(20) if size == 100 else None
        per_step = 1e6 / size
        figures += [
            Figure("first", size, "µs/step", first.of(size, per_step)),
            Figure("cached", size, "µs/step", again.of(size, per_step), below(5000), goal),
            Figure("cached, as a group", size, "µs/step", grouped.of(size, per_step), below(5000)),
            Figure("first over cached", size, "x", first.over(again, size), at_least(10)),
            Figure("memos, first", size, "µs/step", memo_first.of(size, per_step)),
            Figure(
                "memos, another run", size, "µs/step", memo_again.of(size, per_step), below(5000)
            ),
        ]
    return figures


@suite("race", "A race whose winner takes 10 ms and whose losers would take a second")
async def race(bench: Bench) -> list[Figure]:
    sizes, winner_s, loser_s = (3, 5, 10), 0.01, 1.0
    races, groups, inserts = Samples(), Samples(), Samples()
    async with bench.session() as session:
        with closing(PlainScript(bench.conninfo, bench.schema)) as plain:
            await session.run(work.raced, max(sizes), winner_s, loser_s)
            for _ in bench.rounds(full=20, quick=4):
                for size in sizes:
                    seconds = await session.run(work.raced, size, winner_s, loser_s)
                    races.add(size, seconds - winner_s)
                    seconds = await session.run(work.together, size, winner_s)
                    groups.add(size, seconds - winner_s)
                # A server that was idle for as long answers later than a busy one.
                await asyncio.sleep(winner_s)
                inserts.add(1, await plain.row())
    figures = []
    for size in sizes:
        goal = below(4) if size == 10 else None
        figures += [
            Figure("over the winner", size, "ms", races.of(size, 1e3), below(10), goal),
            Figure("the same as a group", size, "ms", groups.of(size, 1e3)),
        ]
    least, most = min(sizes), max(sizes)
    growth = [
        (large - small) * 1e3 / (most - least)
        for small, large in zip(races.of(least), races.of(most), strict=True)
    ]
    return [
        *figures,
        Figure("growth per step", None, "ms", growth),
        Figure("one INSERT after 10 ms", None, "ms", inserts.of(1, 1e3)),
    ]


@suite("coordination", "Groups of steps that do nothing: what a durable step costs")
async def coordination(bench: Bench) -> list[Figure]:
    sizes = (10, 50, 100, 1000)
    groups = Samples()
    async with bench.session() as session:
        for _ in bench.rounds(full=25, quick=5):
            for size in sizes:
                groups.add(size, await session.run(work.nothings, size))
    figures = [
        Figure(
            "overhead",
            size,
            "µs/step",
            groups.of(size, 1e6 / size),
            below(5000),
            below(30) if size == 1000 else None,
        )
        for size in sizes
    ]
    # Linear: a step of a large group costs no more than one of a small group, half more at most.
    for small, large in pairwise(sizes):
        pairs = zip(groups.of(small, 1 / small), groups.of(large, 1 / large), strict=True)
        growth = [per_large / per_small for per_small, per_large in pairs]
        figures.append(Figure(f"a step, over one of {small}", large, "x", growth, below(1.5)))
    return figures


@suite("sequence", "Steps that do nothing one after the other, beside one INSERT and commit each")
async def sequence(bench: Bench) -> list[Figure]:
    size = 100
    steps, inserts = Samples(), Samples()
    async with bench.session() as session:
        with closing(PlainScript(bench.conninfo, bench.schema)) as plain:
            for _ in bench.rounds(full=10, quick=3):
                steps.add(size, await session.run(work.nothings_in_sequence, size))
                inserts.add(size, sum([await plain.row() for _ in range(size)]))
    return [
        Figure("one step", size, "ms", steps.of(size, 1e3 / size)),
        Figure("INSERT and commit", size, "ms", inserts.of(size, 1e3 / size)),
        Figure("over the INSERT", size, "x", steps.over(inserts, size), goal=below(1.5)),
    ]


@suite("cpu", "16 steps that compute for 0.1 s on all cores, beside ProcessPoolExecutor")
async def cpu(bench: Bench) -> list[Figure]:
    size, step_s = 16, 0.1
    ideal_s = size * step_s / min(cores(), bench.processes)
    steps, plain = Samples(), Samples()
    async with bench.session() as session:
        with closing(PlainProcesses(bench.processes)) as processes:
            await session.run(work.computed, bench.processes, 0.01)
            for _ in bench.rounds(full=5, quick=2):
                steps.add(size, await session.run(work.computed, size, step_s))
                plain.add(size, await processes.map(size, step_s))
    return [
        Figure("steps", size, "x ideal", steps.of(size, 1 / ideal_s), goal=below(1.25)),
        Figure("ProcessPoolExecutor", size, "x ideal", plain.of(size, 1 / ideal_s)),
        Figure("over the executor", size, "x", steps.over(plain, size), goal=below(1.1)),
    ]


@suite("floor", "Groups of steps that do nothing, beside gather and one COPY of as many rows")
async def floor(bench: Bench) -> list[Figure]:
    sizes = (100, 1000)
    groups, floors = Samples(), Samples()
    async with bench.session() as session:
        with closing(PlainScript(bench.conninfo, bench.schema)) as plain:
            for size in sizes:
                await plain.group(size)
            for _ in bench.rounds(full=40, quick=6):
                for size in sizes:
                    groups.add(size, await session.run(work.nothings, size))
                    floors.add(size, await plain.group(size))
    figures = []
    for size in sizes:
        goal = below(2.5) if size == 1000 else None
        figures += [
            Figure("group", size, "µs/step", groups.of(size, 1e6 / size)),
            Figure("gather and COPY", size, "µs/step", floors.of(size, 1e6 / size)),
            Figure("group over floor", size, "x", groups.over(floors, size), goal=goal),
        ]
    return figures


@suite(
    "counts",
    "What a group costs the server",
    "Write transactions: pg_current_snapshot. WAL: pg_current_wal_insert_lsn. Commits, reading "
    "ones too: pg_stat_database. Batches, statements: the checkpoint writer's own counters.",
)
async def counts(bench: Bench) -> list[Figure]:
    figures = []
    with closing(ServerCounters(bench.conninfo)) as counters:
        for size in (10, 100, 1000):
            figures += await _counts_of_groups(bench, counters, size)
        # A backend reports its commits late, but surely at its end: so whole sessions are compared.
        count, size = 50, 100
        commits = []
        for _ in bench.rounds(full=5, quick=1):
            without = await _commits_of_session(bench, counters, 0, size)
            with_groups = await _commits_of_session(bench, counters, count, size)
            commits.append((with_groups - without) / count)
    return [*figures, Figure("commits", size, "", commits)]


async def _counts_of_groups(bench: Bench, counters: ServerCounters, size: int) -> list[Figure]:
    seen: list[tuple[int, ...]] = []
    async with bench.session() as session:

        def observe() -> None:
            count = counters.count()
            seen.append((count.transactions, count.wal_bytes, session.batches, session.statements))

        work.observers.append(observe)
        try:
            for _ in bench.rounds(full=3, quick=1):
                await session.run(work.observed_groups, 8, size)
        finally:
            work.observers.remove(observe)
    spent = [
        tuple(after - before for before, after in zip(*pair, strict=True))
        for pair in zip(seen[::2], seen[1::2], strict=True)
    ]
    transactions, wal_bytes, batches, statements = zip(*spent, strict=True)
    return [
        Figure("write transactions", size, "", transactions),
        Figure("WAL", size, "bytes/step", [b / size for b in wal_bytes]),
        Figure("batches", size, "", batches),
        Figure("statements", size, "", statements),
    ]


async def _commits_of_session(bench: Bench, counters: ServerCounters, count: int, size: int) -> int:
    strangers = counters.backends()
    before = counters.commits()
    async with bench.session() as session:
        await session.run(work.observed_groups, count, size)
        ours = counters.backends() - strangers
    counters.wait_until_ended(ours)
    return counters.commits() - before
