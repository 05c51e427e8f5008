"""Rounds: our work and the floor's take turns, and what each takes is written down."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from kagzi.bench.counters import Cost, Meter, ServerCounters, typical
from kagzi.bench.floor import PlainScript
from kagzi.bench.measure import Figure, Limit, Samples
from kagzi.bench.session import Bench, Session
from kagzi.errors import StoreUnavailable


@dataclass(frozen=True, slots=True)
class Work:
    """Something to measure.

    Attributes:
        name: Of its figure.
        size: Steps, or runs.
        ours: Does it; seconds.
        floor: Does what can be compared, without promises; seconds.
        every: Only in each so many-th round: large work says as much in fewer.
    """

    name: str
    size: int
    ours: Callable[[Session], Awaitable[float]]
    floor: Callable[[PlainScript], Awaitable[float]] | None = None
    every: int = 1

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.size


class Taken:
    """What the rounds of several works took."""

    def __init__(self) -> None:
        self._seconds: dict[str, Samples] = {}
        self._floors: dict[str, Samples] = {}
        self._costs: dict[tuple[str, int], list[Cost]] = {}
        self._counted: dict[tuple[str, int], Cost] = {}

    def add(self, work: Work, seconds: float, cost: Cost) -> None:
        self._seconds.setdefault(work.name, Samples()).add(work.size, seconds)
        self._costs.setdefault(work.key, []).append(cost)

    def add_floor(self, work: Work, seconds: float) -> None:
        self._floors.setdefault(work.name, Samples()).add(work.size, seconds)

    def add_counted(self, work: Work, statements: int, round_trips: int) -> None:
        self._counted[work.key] = Cost(statements, round_trips)

    def seconds(self, name: str) -> Samples:
        return self._seconds[name]

    def floor(self, name: str) -> Samples:
        return self._floors[name]

    def cost(self, name: str, size: int) -> Cost:
        cost, counted = typical(self._costs[name, size]), self._counted.get((name, size), Cost())
        return replace(cost, statements=counted.statements, round_trips=counted.round_trips)

    def figure(
        self,
        name: str,
        size: int,
        unit: str,
        scale: float = 1.0,
        threshold: Limit | None = None,
        goal: Limit | None = None,
        less: float = 0.0,
    ) -> Figure:
        """Seconds of a work in another unit, with its floor and its cost.

        Args:
            less: Seconds that it takes in any case, such as those of a winner.
        """
        samples = [(seconds - less) * scale for seconds in self.seconds(name).of(size)]
        floor: list[float] = []
        if name in self._floors and size in self._floors[name]:
            floor = [(seconds - less) * scale for seconds in self._floors[name].of(size)]
        return Figure(
            name,
            size,
            unit,
            samples,
            threshold,
            goal,
            floor,
            [ours / theirs for ours, theirs in zip(samples, floor, strict=True)] if floor else (),
            self.cost(name, size),
        )


async def take(
    bench: Bench, works: Sequence[Work], full: int, quick: int, processes: int | None = None
) -> Taken:
    """Measure works in turns; then once more behind a tap that counts their statements."""
    taken = Taken()
    async with bench.session(processes=processes) as session:
        with (
            closing(PlainScript(bench.conninfo, bench.schema)) as plain,
            closing(ServerCounters(bench.conninfo)) as counters,
        ):
            meter = Meter(counters, os.getpid(), session.pool_processes)
            for work in works:  # once, so that pages and buffers are there
                if work.every == 1 and work.floor is not None:
                    await work.floor(plain)
            for turn in bench.rounds(full, quick):
                for work in works:
                    if turn % work.every:
                        continue
                    meter.start()
                    seconds = await work.ours(session)
                    taken.add(work, seconds, meter.stop())
                    if work.floor is not None:
                        taken.add_floor(work, await work.floor(plain))
    with suppress(StoreUnavailable):  # a server that is reached by TLS alone cannot be tapped
        async with bench.counted_session(processes) as (session, tap):
            for work in works:
                before = await tap.settled()
                await work.ours(session)
                spent = await tap.settled() - before
                taken.add_counted(work, spent.statements, spent.round_trips)
    return taken
