"""Benchmarks of the steps of one run."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from uuid import uuid4

from kagzi.bench import work
from kagzi.bench.catalogue import Suites
from kagzi.bench.floor import PlainScript
from kagzi.bench.measure import Figure, Samples, at_least, below
from kagzi.bench.rounds import Taken, Work, take
from kagzi.bench.session import Bench, Session
from kagzi.definition import Workflow

SUITES = Suites()


def running(workflow: Workflow[..., Any], *args: Any) -> Any:
    """A run of a workflow that gives the seconds of its body."""

    async def run(session: Session) -> float:
        return float(await session.run(workflow, *args))

    return run


@SUITES.add(
    "coordination",
    "Groups of steps that do nothing: what a durable step costs",
    "Floor: gather over as many coroutines and one COPY of as many rows.",
)
async def coordination(bench: Bench) -> list[Figure]:
    sizes = (10, 50, 100, 1000, 10_000) if bench.quick else (10, 50, 100, 1000, 10_000, 100_000)
    every = {10_000: 5, 100_000: 10}
    goals = {100: below(25), 1000: below(15), 10_000: below(14)}
    works = [
        Work(
            "overhead",
            size,
            running(work.nothings, size),
            partial(PlainScript.group, size=size),
            every.get(size, 1),
        )
        for size in sizes
    ]
    taken = await take(bench, works, full=25, quick=5)
    figures = [
        taken.figure("overhead", size, "µs/step", 1e6 / size, below(5000), goals.get(size))
        for size in sizes
    ]
    # Linear: a step of a large group costs no more than one of a small group, half more at most.
    groups = taken.seconds("overhead")
    for small, large in pairwise(sizes):
        if large <= 1000:
            pairs = zip(groups.of(small, 1 / small), groups.of(large, 1 / large), strict=True)
            growth = [per_large / per_small for per_small, per_large in pairs]
            threshold = below(1.5)
        else:
            least = groups.median(1000) / 1000
            growth, threshold = [per / least for per in groups.of(large, 1 / large)], None
            small = 1000
        goal = None if threshold else below(1.5)
        name = f"a step, over one of {small:,}"
        figures.append(Figure(name, large, "x", growth, threshold, goal))
    ratios = [figure for figure in figures if figure.size == 1000 and figure.over_floor]
    return [
        *figures,
        Figure("group over floor", 1000, "x", ratios[0].over_floor, goal=below(1.6)),
    ]


@SUITES.add(
    "parallel_vs_sequential",
    "Steps that wait 50 ms: in one group, and one after the other",
    "Floor: gather over coroutines that sleep, and one COPY.",
)
async def parallel_vs_sequential(bench: Bench) -> list[Figure]:
    sizes, step_s = (3, 5, 10, 20), 0.05
    works: list[Work] = []
    for size in sizes:
        works += [
            Work("sequential", size, running(work.one_after_the_other, size, step_s)),
            Work(
                "parallel",
                size,
                running(work.together, size, step_s),
                partial(PlainScript.group, size=size, seconds=step_s),
            ),
        ]
    taken = await take(bench, works, full=5, quick=2)
    sequential, parallel = taken.seconds("sequential"), taken.seconds("parallel")
    figures = []
    for size in sizes:
        goal = at_least(19) if size == 20 else None
        figures += [
            taken.figure("sequential", size, "ms", 1e3),
            taken.figure("parallel", size, "ms", 1e3),
            Figure("throughput", size, "steps/s", [size / s for s in parallel.of(size)]),
            Figure("speed-up", size, "x", sequential.over(parallel, size), at_least(2), goal),
        ]
    return figures


@SUITES.add(
    "memoisation",
    "First run, and the same run again over its checkpoints",
    "The body alone: without claim and load. Floor: gather over as many coroutines that decode.",
)
async def memoisation(bench: Bench) -> list[Figure]:
    sizes, large, step_s = (10, 50, 100), (1000, 10_000), 0.005
    first, again, grouped = Samples(), Samples(), Samples()
    memo_first, memo_again = Samples(), Samples()

    async def replayed(session: Session, size: int) -> float:
        return (await session.drive_again(1, size, 0.0, True))[1]

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
    works = [
        Work(
            "replayed group",
            size,
            partial(replayed, size=size),
            partial(PlainScript.decoded, size=size),
        )
        for size in large
    ]
    taken = await take(bench, works, full=5, quick=1)
    figures = []
    for size in sizes:
        goal = below(5) if size == 100 else None
        per_step = 1e6 / size
        figures += [
            Figure("first", size, "µs/step", first.of(size, per_step)),
            Figure("cached", size, "µs/step", again.of(size, per_step), below(5000)),
            Figure(
                "cached, as a group", size, "µs/step", grouped.of(size, per_step), below(5000), goal
            ),
            Figure("first over cached", size, "x", first.over(again, size), at_least(10)),
            Figure("memos, first", size, "µs/step", memo_first.of(size, per_step)),
            Figure(
                "memos, another run", size, "µs/step", memo_again.of(size, per_step), below(5000)
            ),
        ]
    return figures + [
        taken.figure("replayed group", size, "µs/step", 1e6 / size, below(5000)) for size in large
    ]


@SUITES.add(
    "race",
    "A race whose winner takes 10 ms and whose losers would take a second",
    "Milliseconds over those of the winner. Floor: a coroutine that sleeps 10 ms, and an INSERT.",
)
async def race(bench: Bench) -> list[Figure]:
    sizes, winner_s, loser_s = (3, 5, 10, 100, 1000), 0.01, 1.0
    asked = (3, 5, 10)
    floor = partial(PlainScript.group, size=1, seconds=winner_s)
    works: list[Work] = []
    for size in sizes:
        works.append(
            Work("over the winner", size, running(work.raced, size, winner_s, loser_s), floor)
        )
        if size in asked:
            works.append(
                Work("the same as a group", size, running(work.together, size, winner_s), floor)
            )
    taken = await take(bench, works, full=20, quick=4)
    figures = []
    for size in sizes:
        threshold = below(10) if size in asked else None
        goal = below(2) if size in (10, 1000) else None
        figures.append(
            taken.figure("over the winner", size, "ms", 1e3, threshold, goal, less=winner_s)
        )
        if size in asked:
            figures.append(taken.figure("the same as a group", size, "ms", 1e3, less=winner_s))
    races = taken.seconds("over the winner")
    growth = [
        (large - small) * 1e3 / (max(sizes) - min(sizes))
        for small, large in zip(races.of(min(sizes)), races.of(max(sizes)), strict=True)
    ]
    return [*figures, Figure("growth per step", None, "µs", [ms * 1e3 for ms in growth])]


@SUITES.add(
    "sequence",
    "Steps that do nothing one after the other",
    "Floor: one coroutine, one INSERT and its commit, for each.",
)
async def sequence(bench: Bench) -> list[Figure]:
    size = 100
    works = [
        Work(
            "one step",
            size,
            running(work.nothings_in_sequence, size),
            partial(PlainScript.rows, count=size),
        )
    ]
    taken = await take(bench, works, full=10, quick=3)
    inserts = taken.floor("one step")
    return [
        taken.figure("one step", size, "ms", 1e3 / size, goal=below(0.45)),
        Figure("INSERT and commit", size, "ms", inserts.of(size, 1e3 / size)),
        Figure(
            "over the INSERT",
            size,
            "x",
            taken.seconds("one step").over(inserts, size),
            goal=below(1.5),
        ),
    ]


@SUITES.add(
    "payloads",
    "Groups whose steps give large results",
    "Floor: gather over coroutines that give as much, and one COPY.",
)
async def payloads(bench: Bench) -> list[Figure]:
    shapes = ((10_000, 1000, "1 kB each"), (1000, 100_000, "100 kB each"))
    works = [
        Work(
            name,
            size,
            running(work.payloads, size, nbytes),
            partial(PlainScript.group, size=size, nbytes=nbytes),
        )
        for size, nbytes, name in shapes
    ]
    taken = await take(bench, works, full=5, quick=1)
    return [figure for shape in shapes for figure in _of_payload(taken, *shape)]


def _of_payload(taken: Taken, size: int, nbytes: int, name: str) -> list[Figure]:
    seconds = taken.seconds(name).of(size)
    rates = [size * nbytes / 1e6 / s for s in seconds]
    return [
        taken.figure(name, size, "µs/step", 1e6 / size),
        Figure(f"{name}, throughput", size, "MB/s", rates),
    ]
