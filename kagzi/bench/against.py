"""Comparison with peers: the same work on each side, taking turns in one run on one server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata, util
from statistics import median
from typing import Any

from kagzi.bench import apart
from kagzi.bench.counters import Cost, Meter, ServerCounters, typical
from kagzi.bench.helper import Helper, HelperFailed
from kagzi.bench.measure import Figure, cores
from kagzi.bench.session import Bench
from kagzi.bench.sides import absurd_side, dbos_side, plain
from kagzi.bench.tap import Tap


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody else's library.

    Attributes:
        needs: Importable name and distribution of each thing to install.
        install: What to type.
    """

    module: str
    needs: Mapping[str, str]
    install: str

    def missing(self) -> list[str]:
        return [name for name in self.needs if util.find_spec(name) is None]

    def versions(self) -> str:
        return ", ".join(f"{name} {metadata.version(name)}" for name in self.needs.values())


PEERS = {
    "dbos": Peer(dbos_side.MODULE, {"dbos": "dbos"}, "pip install dbos==3.4.0"),
    "absurd": Peer(
        absurd_side.MODULE,
        {"absurd_sdk": "absurd-sdk", "absurdctl": "absurdctl"},
        "pip install absurd-sdk==0.5.1 absurdctl==0.5.1",
    ),
}
OURS, FLOOR, PLAIN = "kagzi", "floor", "asyncio"


@dataclass(frozen=True, slots=True)
class Contest:
    """Work that all sides know; less is better.

    Attributes:
        task: Of `kagzi.bench.sides`.
        scale: From seconds to the unit.
        less_s: Seconds that it takes in any case.
        rounds: Most of them; what takes peers long is measured less often.
        by_default: Whether it is run when none is named.
    """

    name: str
    title: str
    task: str
    args: tuple[Any, ...]
    unit: str
    scale: float
    less_s: float = 0.0
    rounds: int = 100
    by_default: bool = True


CPU_S = 0.1
CONTESTS = (
    Contest("group_100", "group of 100 steps that do nothing", "group", (100,), "µs/step", 1e4),
    Contest("group_1000", "group of 1,000", "group", (1000,), "µs/step", 1e3, rounds=5),
    Contest("pauses", "20 steps of 50 ms in a group", "pauses", (20, 0.05), "ms", 1e3),
    Contest("sequence", "steps one after the other", "sequence", (100,), "ms/step", 10.0),
    Contest("replay", "replay of 100 checkpointed steps", "replay", (100,), "µs/step", 1e4),
    Contest(
        "race", "race of 10, over its winner's 10 ms", "race", (10, 0.01, 1.0), "ms", 1e3, 0.01
    ),
    Contest("latency", "run of one step on an idle worker", "latency", (30,), "ms", 1e3),
    Contest("runs_of_one", "500 runs of one step at once", "runs", (500, 1), "ms/run", 2.0),
    Contest("runs_of_ten", "100 runs of ten steps at once", "runs", (100, 10), "ms/step", 1.0),
    Contest("cpu", "16 steps that compute for 0.1 s", "cpu", (16, CPU_S), "s", 1.0, rounds=3),
    Contest(
        "group_10000",
        "group of 10,000",
        "group",
        (10_000,),
        "µs/step",
        100.0,
        rounds=1,
        by_default=False,
    ),
)


@dataclass(slots=True)
class Compared:
    """What each side took for one contest, in its unit, round by round; and what it cost."""

    contest: Contest
    samples: dict[str, list[float]] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    counted: dict[str, Cost] = field(default_factory=dict)

    def add(self, side: str, seconds: float | list[float], cost: Cost | None) -> None:
        contest = self.contest
        many = seconds if isinstance(seconds, list) else [seconds]
        values = [(value - contest.less_s) * contest.scale for value in many]
        self.samples.setdefault(side, []).append(median(values))
        if isinstance(seconds, list):
            self.worst[side] = max(self.worst.get(side, 0.0), *values)
        if cost is not None:
            self.costs.setdefault(side, []).append(cost)

    def figure(self, side: str) -> Figure:
        """With the cost; `over_floor` holds quotients to ours here."""
        cost = typical(self.costs[side]) if side in self.costs else None
        if cost is not None and side in self.counted:
            counted = self.counted[side]
            cost = replace(cost, statements=counted.statements, round_trips=counted.round_trips)
        return Figure(side, None, self.contest.unit, self.samples[side], cost=cost)

    def over_ours(self, side: str) -> list[float]:
        """Quotients to ours, round by round."""
        pairs = zip(self.samples[side], self.samples[OURS], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.contest.title,
            "unit": self.contest.unit,
            "sides": {
                side: {
                    **self.figure(side).as_dict(),
                    "over_ours": median(self.over_ours(side)),
                    "worst": self.worst.get(side),
                }
                for side in self.samples
            },
        }


async def compare(
    bench: Bench, peers: Sequence[str], contests: Sequence[Contest]
) -> list[Compared]:
    """Every side does every contest, in turns; then once behind a tap that counts.

    Raises:
        HelperFailed: A side could not be started, or failed at its work.
    """
    compared = [Compared(contest) for contest in contests]
    async with AsyncExitStack() as stack:
        counters = stack.enter_context(closing(ServerCounters(bench.conninfo)))
        sides: dict[str, Helper] = {}
        meters: dict[str, Meter] = {}
        for name in (OURS, FLOOR, PLAIN, *peers):
            helper = await stack.enter_async_context(_start(bench, name, bench.conninfo))
            pool = await helper.do("pids") if name == OURS else []
            sides[name] = helper
            meters[name] = Meter(counters, helper.pid, lambda pool=pool: pool)  # type: ignore[misc]
        order = list(sides)
        for turn in bench.rounds(full=7, quick=2):
            for one in compared:
                if turn >= one.contest.rounds:
                    continue
                for name in order:
                    meters[name].start()
                    seconds = await _do(sides[name], one.contest)
                    cost = meters[name].stop()
                    if seconds is not None:
                        one.add(name, seconds, None if name == PLAIN else cost)
            order = [*order[1:], order[0]]
    for name in (OURS, *peers):
        await _count(bench, name, compared)
    return compared


async def _count(bench: Bench, name: str, compared: Sequence[Compared]) -> None:
    """Statements and round trips of each contest: a number of its own, not worth many rounds."""
    with closing(Tap(bench.conninfo)) as tap, suppress(HelperFailed):
        async with _start(bench, name, tap.conninfo) as helper:
            for one in compared:
                if one.contest.rounds > 1:
                    await tap.settled()
                    before = tap.traffic()
                    await _do(helper, one.contest)
                    spent = tap.traffic() - before
                    one.counted[name] = Cost(spent.statements, spent.round_trips)


async def _do(helper: Helper, contest: Contest) -> float | list[float] | None:
    if contest.task not in helper.tasks:
        return None
    seconds: float | list[float] = await helper.do(contest.task, *contest.args)
    return seconds


def _start(bench: Bench, name: str, conninfo: str) -> Helper:
    modules = {OURS: apart.MODULE, FLOOR: plain.MODULE, PLAIN: plain.MODULE}
    module = modules.get(name) or PEERS[name].module
    return Helper(
        module,
        conninfo=conninfo,
        schema=bench.schema,
        processes=bench.processes or cores(),
        stored=name == FLOOR,
    )
