"""A soak: several workers, runs of every kind all the time, and faults at random moments."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults import oracle
from tests.faults.subjects import PROGRAMS
from tests.faults.trial import Actor, Plan, Report, Server, Trial, WorkerActor
from tests.faults.victims import VICTIMS

AT_ONCE = 24  # runs under way


class Soak(Trial):
    """One long trial without a point: faults come when they come.

    Attributes:
        struck: Faults by kind.
    """

    def __init__(self, server: Server, seed: int, workers: int, seconds: float) -> None:
        plan = Plan(seed, "all", "any", "any", processes=1, workers=workers)
        super().__init__(server, plan)
        self._seconds = seconds
        self._programs: dict[str, str] = {}
        self.keys = []
        self.struck: Counter[str] = Counter()
        self._clients: list[tuple[Actor, dict[str, Any]]] = []
        self._told: set[str] = set()  # keys of the runs whose end a client has noted
        self._read_to = 0

    async def _act(self) -> None:
        for _ in range(self.plan.workers):
            await self.start_worker()
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            self._start_more()
            await asyncio.sleep(self.chance.random() * 1.5)
            await self._strike_somebody()
            while len([one for one in self.workers if one.is_alive]) < self.plan.workers:
                await self.start_worker()
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        await self.start_worker()
        await self._until(self._is_over, 120)

    def _start_more(self) -> None:
        """Clients that were killed are followed by others that do the same; and there are new."""
        alive = []
        for client, spec in self._clients:
            if client.is_alive:
                alive.append((client, spec))
            elif "Traceback" in client.said or not self._is_done(spec):
                alive.append((Actor(self, spec), spec))
        self._clients = alive
        while sum(len(spec["keys"]) for _, spec in self._clients) < AT_ONCE:
            program = self.chance.choice(list(PROGRAMS))
            keys = [f"r{len(self._programs) + n}" for n in range(4)]
            self._programs |= dict.fromkeys(keys, program)
            spec = {
                "kind": "client",
                "dsn": self.dsn,
                "log": str(self.folder / f"client-{keys[0]}.log"),
                "folder": str(self.folder),
                "program": program,
                "keys": keys,
            }
            self._clients.append((Actor(self, spec), spec))

    def _is_done(self, spec: dict[str, Any]) -> bool:
        """Whether each of its runs has told its client of the end.

        Reads on from where it was: all of the file takes half a second in the end, in which this
        loop serves no proxy, and workers lose their leases.
        """
        path = self.folder / "witness"
        if path.exists():
            with path.open() as witness:
                witness.seek(self._read_to)
                for line in witness:
                    if not line.endswith("\n"):
                        break
                    self._read_to += len(line.encode())
                    if line.startswith("result "):
                        self._told.add(line.split(" ", 2)[1])
        return all(key in self._told for key in spec["keys"])

    async def _strike_somebody(self) -> None:
        alive = [one for one in self.workers if one.is_alive and not self._is_stopped(one)]
        kinds = (
            [*VICTIMS] if self.chance.random() < 0.3 else [k for k in VICTIMS if k != "postmaster"]
        )
        kind = self.chance.choice(kinds)
        if not alive:
            return
        actor = self.chance.choice(alive)
        if kind == "client":
            client = self.chance.choice(self._clients)[0]
            if client.is_alive:
                client.kill()
                self._count(kind, actor)
        elif await VICTIMS[kind](self, actor):
            self._count(kind, actor)

    def _count(self, kind: str, actor: WorkerActor) -> None:
        self.struck[kind] += 1
        self.note_fault(kind, actor)

    def _is_stopped(self, actor: WorkerActor) -> bool:
        return Path(f"/proc/{actor.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    async def _is_over(self) -> bool:
        self._revive()
        if any(client.is_alive for client, _ in self._clients):
            return False
        return await super()._is_over()

    def _revive(self) -> None:
        for place, (client, spec) in enumerate(self._clients):
            if not client.is_alive and not self._is_done(spec):
                self._clients[place] = Actor(self, spec), spec

    def _judge(self) -> oracle.Verdict:
        return self._judge_all(self._programs)


def soak(server: Server, seed: int, workers: int, minutes: float) -> tuple[Report, Counter[str]]:
    """One of so many minutes; what came of it, and the faults by kind."""
    random.seed(seed)
    made = Soak(server, seed, workers, minutes * 60)
    return asyncio.run(made.run()), made.struck
