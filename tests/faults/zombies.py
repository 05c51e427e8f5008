"""Workers that are stopped with a write on its way, and go on when they are thought to be dead.

Round after round a dozen hold runs, come to a point and get SIGSTOP; when others have ended their
leases they get SIGCONT, and try to write. `python -m tests.faults --zombies 1000`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from tests.faults.trial import OPTIONS, Plan, Report, Server, Trial, WorkerActor
from tests.faults.victims import ZOMBIE, let_go_on, stop, until_lease_ended

AT_ONCE = 12
VICTIM = ZOMBIE
RESCUERS = 3
HELD = 2  # runs, of each worker
SOON_S = 0.01
ALL_S = 4.0  # the last may not come to the point: others that were not stopped yet did its runs
LATE = "after its lease was ended"
# Where to stop it, and the programs that come there. "commit.sent" is on the wire: that write is
# held there, and arrives when the lease is ended.
MOMENTS: dict[str, tuple[str, ...]] = {
    "batch.before": ("sequential", "group", "nested", "child", "retry", "paused"),
    "commit.sent": ("sequential", "group", "nested", "child", "retry"),
    "copy.open": ("group",),
    "run.leaves": ("sequential", "group", "child", "timer"),
}


class Round(Trial):
    """One trial, in which every worker of the plan is stopped once.

    Attributes:
        stopped: Those that were, until their leases were ended.
    """

    options: ClassVar[dict[str, Any]] = {**OPTIONS, "concurrency": HELD}

    def __init__(self, server: Server, plan: Plan) -> None:
        super().__init__(server, plan)
        self.stopped: list[WorkerActor] = []
        self._struck: set[WorkerActor] = set()

    async def _act(self) -> None:
        for _ in range(self.plan.workers):
            await self.start_worker(armed=True)
        first = list(self.workers)
        await self._until(lambda: asyncio.sleep(0, all("claims" in w.said for w in first)), 20)
        self.start_client()
        await self._until(lambda: asyncio.sleep(0, len(self._struck) == len(first)), ALL_S)
        for _ in range(RESCUERS):
            await self.start_worker()
        await self._until(self._is_over, self.plan.patience_s)

    async def strike(self, actor: WorkerActor) -> None:
        """Stop it here, or a moment later; what it would send on the wire waits there as long."""
        if actor in self._struck or self._ending:
            return
        self._struck.add(actor)
        self._hit = True
        if self.plan.point == "commit.sent":
            await self._haunt(actor, 0.0)
            return
        delay_s = self.chance.choice((0.0, self.chance.random() * SOON_S))
        if len(self._struck) == 1:
            delay_s = 0.0  # so that at least one has something in hand
        haunting = asyncio.ensure_future(self._haunt(actor, delay_s))
        self.later(haunting)
        if delay_s == 0.0:
            await asyncio.shield(haunting)

    async def _haunt(self, actor: WorkerActor, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        stopped = stop(self, actor)
        if await until_lease_ended(self, actor):
            self.stopped.append(actor)
            self.note_fault(VICTIM, actor, f" at {self.plan.point}")
        let_go_on(stopped)


@dataclass
class Count:
    """Of all rounds.

    Attributes:
        stopped: Workers whose leases were ended while they were stopped.
        tried: Those of them that wrote afterwards, and were refused.
        let_through: Writes that were found in the database though the lease had been ended.
    """

    stopped: int = 0
    tried: int = 0
    refused: int = 0
    let_through: int = 0

    def add(self, trial: Round) -> None:
        self.stopped += len(trial.stopped)
        self.tried += sum(one.wire.refused > 0 for one in trial.stopped)
        self.refused += trial.report.refused
        self.let_through += sum(LATE in problem for problem in trial.report.problems)

    def __str__(self) -> str:
        return (
            f"{self.stopped} workers stopped, {self.tried} of them refused, "
            f"{self.refused} writes refused, {self.let_through} let through"
        )


def plans_of_rounds(seed: int, workers: int = AT_ONCE) -> Iterator[Plan]:
    """Without end."""
    chance = random.Random(seed)
    while True:
        point = chance.choice(list(MOMENTS))
        yield Plan(
            seed=chance.getrandbits(32),
            program=chance.choice(MOMENTS[point]),
            point=point,
            victim=VICTIM,
            nth=chance.choice((1, 1, 2, 3)) if point in ("batch.before", "commit.sent") else 1,
            runs=workers * (HELD + 1),
            processes=int(chance.random() < 0.2),
            uvloop=chance.random() < 0.5,
            workers=workers,
        )


def rounds(server: Server, seed: int, zombies: int) -> Iterator[tuple[Report, Count]]:
    """As many as it takes to stop so many; what came of each, and of all so far."""
    count = Count()
    for plan in plans_of_rounds(seed):
        trial = Round(server, plan)
        report = asyncio.run(trial.run())
        count.add(trial)
        yield report, count
        if count.stopped >= zombies:
            break
