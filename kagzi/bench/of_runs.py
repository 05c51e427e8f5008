"""Benchmarks of many runs: how soon one ends, and how many end in a second."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from functools import partial

from kagzi.bench.apart import MODULE
from kagzi.bench.catalogue import Suites
from kagzi.bench.counters import Meter, ServerCounters
from kagzi.bench.floor import PlainScript
from kagzi.bench.helper import Helper
from kagzi.bench.many import all_at_once, one_by_one, percentile
from kagzi.bench.measure import Figure, at_least, below
from kagzi.bench.rounds import Taken, Work, take
from kagzi.bench.session import Bench, Session
from kagzi.client import connect

SUITES = Suites()


@SUITES.add(
    "latency",
    "A run of one step on an idle worker, from its start to its result",
    "Floor: as many INSERTs with their commits as the run needs at least: three where client and "
    "worker share a process, four across processes. The floor knows no wake-up of another process.",
)
async def latency(bench: Bench) -> list[Figure]:
    count = 50 if bench.quick else 200
    rounds: dict[str, list[list[float]]] = {"same process": [], "across processes": []}

    async def here(session: Session) -> float:
        rounds["same process"].append(await one_by_one(session.client, count))
        return sum(rounds["same process"][-1])

    works = [Work("same process", count, here, partial(PlainScript.rows, count=3 * count))]
    taken = await take(bench, works, full=5, quick=2)
    rounds["same process"] = rounds["same process"][: len(taken.seconds("same process").of(count))]

    async with AsyncExitStack() as stack:
        helper = await stack.enter_async_context(_worker(bench, bench.processes))
        client = await stack.enter_async_context(connect(bench.conninfo, schema=bench.schema))
        plain = stack.enter_context(closing(PlainScript(bench.conninfo, bench.schema)))
        meter = await _meter(bench, helper, stack)
        await one_by_one(client, 5)
        across = Work("across processes", count, here, None)
        for _ in bench.rounds(full=5, quick=2):
            meter.start()
            rounds[across.name].append(await one_by_one(client, count))
            taken.add(across, sum(rounds[across.name][-1]), meter.stop())
            taken.add_floor(across, await plain.rows(4 * count))
    goals = {"same process": (1.0, 3.0), "across processes": (2.0, 4.0)}
    figures = []
    for name, samples in rounds.items():
        for percent, goal in zip((50, 99), goals[name], strict=True):
            times = [percentile(seconds, percent) * 1e3 for seconds in samples]
            figures.append(Figure(f"{name}, p{percent}", None, "ms", times, goal=below(goal)))
        figures.append(taken.figure(name, count, "ms/run", 1e3 / count))
    return figures


@SUITES.add(
    "throughput",
    "Many runs at once: 2,000 of one step, 500 of ten; one worker and two",
    "From the first start to the last result, at most 500 starts under way at a time. Two workers: "
    "this process and another, with one pool process each. Floor: gather and one COPY of as many "
    "rows as there are steps.",
)
async def throughput(bench: Bench) -> list[Figure]:
    shapes = [(2000, 1), (500, 10)]
    names = {1: "one-step runs", 10: "ten-step runs"}

    def works_for(suffix: str) -> list[Work]:
        return [
            Work(
                f"{names[steps]}, {suffix}",
                count,
                _many(count, steps),
                partial(PlainScript.group, size=count * steps),
            )
            for count, steps in shapes
        ]

    one = await take(bench, works_for("one worker"), full=5, quick=1)
    async with _worker(bench, 1):
        two = await take(bench, works_for("two workers"), full=5, quick=1, processes=1)
    return [
        *_of_runs(one, shapes, names, "one worker"),
        *_of_runs(two, shapes, names, "two workers"),
    ]


def _many(count: int, steps: int) -> Callable[[Session], Awaitable[float]]:
    async def many(session: Session) -> float:
        return await all_at_once(session.client, count, steps)

    return many


def _of_runs(
    taken: Taken, shapes: list[tuple[int, int]], names: dict[int, str], suffix: str
) -> list[Figure]:
    goals = {("one worker", 1): at_least(8000), ("one worker", 10): at_least(25_000)}
    figures = []
    for count, steps in shapes:
        name = f"{names[steps]}, {suffix}"
        rates = [count * steps / seconds for seconds in taken.seconds(name).of(count)]
        unit = "runs/s" if steps == 1 else "steps/s"
        figures += [
            taken.figure(name, count, "ms/run", 1e3 / count),
            Figure(f"{name}, rate", count, unit, rates, goal=goals.get((suffix, steps))),
        ]
    return figures


def _worker(bench: Bench, processes: int) -> Helper:
    return Helper(MODULE, conninfo=bench.conninfo, schema=bench.schema, processes=processes)


async def _meter(bench: Bench, helper: Helper, stack: AsyncExitStack) -> Meter:
    counters = stack.enter_context(closing(ServerCounters(bench.conninfo)))
    pool: list[int] = await helper.do("pids")
    return Meter(counters, helper.pid, lambda: pool)
