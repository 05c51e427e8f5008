"""Benchmarks of what the machine gives: its cores and its memory."""

from __future__ import annotations

import os
from contextlib import closing

from kagzi.bench import work
from kagzi.bench.apart import MODULE
from kagzi.bench.catalogue import Suites
from kagzi.bench.counters import Meter, ServerCounters
from kagzi.bench.floor import PlainProcesses
from kagzi.bench.helper import Helper
from kagzi.bench.measure import Figure, Samples, below, cores
from kagzi.bench.rounds import Taken, Work
from kagzi.bench.session import Bench

SUITES = Suites()


@SUITES.add(
    "cpu",
    "16 steps that compute for 0.1 s, on all cores",
    "Floor: ProcessPoolExecutor with as many processes.",
)
async def cpu(bench: Bench) -> list[Figure]:
    size, step_s = 16, 0.1
    ideal_s = size * step_s / min(cores(), bench.processes)

    async def nothing(session: object) -> float:
        return 0.0

    steps = Work("steps", size, nothing)
    taken = Taken()
    async with bench.session() as session:
        with (
            closing(PlainProcesses(bench.processes)) as processes,
            closing(ServerCounters(bench.conninfo)) as counters,
        ):
            meter = Meter(counters, os.getpid(), session.pool_processes)
            await session.run(work.computed, bench.processes, 0.01)
            for _ in bench.rounds(full=7, quick=2):
                meter.start()
                seconds = await session.run(work.computed, size, step_s)
                taken.add(steps, seconds, meter.stop())
                taken.add_floor(steps, await processes.map(size, step_s))
    plain = taken.floor("steps")
    over = taken.seconds("steps").over(plain, size)
    return [
        taken.figure("steps", size, "x ideal", 1 / ideal_s, goal=below(1.15)),
        Figure("ProcessPoolExecutor", size, "x ideal", plain.of(size, 1 / ideal_s)),
        Figure("over the executor", size, "x", over, goal=below(1.1)),
    ]


@SUITES.add(
    "memory",
    "Memory of one large group, over what a new worker has that did next to nothing",
    "Each round in new processes. Floor: gather and COPY in a new process.",
)
async def memory(bench: Bench) -> list[Figure]:
    sizes = (10_000,) if bench.quick else (10_000, 100_000)
    coordinator, pool, plain = Samples(), Samples(), Samples()
    seconds, floors = Samples(), Samples()
    for _ in bench.rounds(full=3, quick=1):
        for size in sizes:
            ours = await _apart(bench, "memory", size)
            floor = await _apart(bench, "floor", size)
            seconds.add(size, ours["seconds"])
            floors.add(size, floor["seconds"])
            if ours["coordinator_mib"] is not None:
                coordinator.add(size, ours["coordinator_mib"])
                pool.add(size, ours["pool_mib"])
                plain.add(size, floor["coordinator_mib"])
    figures = []
    for size in sizes:
        figures.append(
            Figure(
                "group in a new worker",
                size,
                "s",
                seconds.of(size),
                goal=below(0.14) if size == 10_000 else None,
                floor=floors.of(size),
                over_floor=seconds.over(floors, size),
            )
        )
        if size in coordinator:
            goal = below(30) if size == 10_000 else None
            figures += [
                Figure("coordinator", size, "MiB", coordinator.of(size), goal=goal),
                Figure("pool processes", size, "MiB", pool.of(size)),
                Figure("the floor's", size, "MiB", plain.of(size)),
                Figure("a step, of all", size, "bytes", _per_step(coordinator, pool, size)),
            ]
    return figures


@SUITES.add(
    "stream",
    "Steps through one map over a generator, its results handed on in order",
    "In a new process; memory over what a new worker has. Floor: gather over 1,000 coroutines and "
    "one COPY, as often as it takes.",
)
async def stream(bench: Bench) -> list[Figure]:
    sizes = (10_000, 100_000) if bench.quick else (100_000, 1_000_000)
    taken: dict[int, dict[str, float]] = {}
    floors: dict[int, float] = {}
    for _ in bench.rounds(full=1, quick=1):
        for size in sizes:
            taken[size] = await _apart(bench, "streamed", size)
            floors[size] = (await _apart(bench, "floor_streamed", size))["seconds"]
    figures = []
    for size in sizes:
        goal, seconds, floor = below(20), taken[size]["seconds"], floors[size]
        figures.append(
            Figure(
                "streamed",
                size,
                "s",
                [seconds],
                goal=goal if size == 1_000_000 else None,
                floor=[floor],
                over_floor=[seconds / floor],
            )
        )
        figures.append(Figure("a step", size, "µs/step", [seconds / size * 1e6]))
    few, many = (taken[size]["coordinator_mib"] for size in sizes)
    if few is not None:
        figures += [
            Figure("coordinator", size, "MiB", [taken[size]["coordinator_mib"]]) for size in sizes
        ]
        growth = [many / max(few, 1.0)]
        figures.append(Figure("memory, over a tenth", sizes[1], "x", growth, goal=below(1.5)))
    return figures


@SUITES.add(
    "large",
    "Results of 100 kB each through one group, as a list and one by one",
    "Each in new processes; memory over what a new worker has.",
)
async def large(bench: Bench) -> list[Figure]:
    size = 500 if bench.quick else 10_000
    added_mib = size * work.PAGE_BYTES / (1 << 20)
    ways = (
        ("as a list", "pages_listed", added_mib * 1.3 + 100),
        ("as completed", "pages_completed", 150),
        ("mapped, one by one", "pages_streamed", 150),
    )
    figures = []
    for _ in bench.rounds(full=1, quick=1):
        for name, task, most_mib in ways:
            taken = await _apart(bench, task, size)
            rate = size * work.PAGE_BYTES / 1e6 / taken["seconds"]
            figures += [
                Figure(name, size, "µs/step", [taken["seconds"] / size * 1e6]),
                Figure(f"{name}, throughput", size, "MB/s", [rate]),
            ]
            if taken["coordinator_mib"] is not None:
                figures += [
                    Figure(
                        f"{name}, coordinator",
                        size,
                        "MiB",
                        [taken["coordinator_mib"]],
                        goal=below(most_mib),
                    ),
                    Figure(
                        f"{name}, pool processes",
                        size,
                        "MiB",
                        [taken["pool_mib"]],
                        goal=below(150 * bench.processes),
                    ),
                ]
    return figures


@SUITES.add(
    "resume",
    "A run with many checkpoints, over all of which it is resumed",
    "In a new process: from the end of its retry to its next end, and of that its body.",
)
async def resume(bench: Bench) -> list[Figure]:
    size, single = (10_000, 1_000) if bench.quick else (100_000, 10_000)
    shapes = (
        ("one group", size, size),
        ("groups of 1,000", size, 1_000),
        ("step by step", single, 1),
    )
    figures = []
    for _ in bench.rounds(full=1, quick=1):
        for name, count, at_once in shapes:
            async with Helper(
                MODULE, conninfo=bench.conninfo, schema=bench.schema, processes=bench.processes
            ) as helper:
                whole, body = await helper.do("resume", count, at_once)
            goal = below(1.0) if count == 100_000 else None
            figures += [
                Figure(name, count, "s", [whole]),
                Figure(f"{name}, its body", count, "s", [body], goal=goal),
            ]
    return figures


async def _apart(bench: Bench, task: str, size: int) -> dict[str, float]:
    async with Helper(
        MODULE, conninfo=bench.conninfo, schema=bench.schema, processes=bench.processes
    ) as helper:
        taken: dict[str, float] = await helper.do(task, size)
    return taken


def _per_step(coordinator: Samples, pool: Samples, size: int) -> list[float]:
    pairs = zip(coordinator.of(size), pool.of(size), strict=True)
    return [(own + others) * (1 << 20) / size for own, others in pairs]
