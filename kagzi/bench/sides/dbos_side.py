"""DBOS: steps as coroutines, started in a fixed order and gathered, as its documentation advises.

Source: docs.dbos.dev, "Workflows" (coroutine steps run concurrently under `asyncio.gather` when
they are started in a deterministic order), "Contexts" (`start_workflow_async`, `asyncio_wait`,
`fork_workflow_async`).
"""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from typing import Any

from kagzi.bench.helper import keep_answers_apart, serve, settings
from kagzi.bench.sides.databases import own_database, url_of
from kagzi.bench.work import burn

MODULE = "kagzi.bench.sides.dbos_side"

replayed: list[float] = []


def main() -> None:
    keep_answers_apart()
    given = settings()
    with own_database(given["conninfo"], "kagzi_bench_dbos") as conninfo:
        asyncio.run(_serve(url_of(conninfo)))


async def _serve(url: str) -> None:
    library = import_module("dbos")
    dbos: Any = library.DBOS
    config = {"name": "kagzi-bench", "system_database_url": url, "log_level": "ERROR"}
    dbos(config=config)
    side = _Side(dbos)
    dbos.launch()
    try:
        await serve(
            {
                "group": lambda size: side.run(side.group, size),
                "pauses": lambda size, seconds: side.run(side.pauses, size, seconds),
                "sequence": lambda size: side.run(side.sequence, size),
                "replay": side.replay,
                "race": lambda *args: side.run(side.race, *args),
                "latency": side.latency,
                "runs": side.runs,
                "cpu": lambda size, cpu_s: side.run(side.cpu, size, cpu_s),
            }
        )
    finally:
        dbos.destroy()


class _Side:
    """Its workflows; each gives the seconds of its body."""

    def __init__(self, dbos: Any) -> None:
        self._dbos = dbos

        async def nothing(index: int) -> int:
            return index

        async def pause(seconds: float) -> None:
            await asyncio.sleep(seconds)

        def compute(cpu_s: float) -> float:
            return burn(cpu_s)

        def step(function: Any) -> Any:
            return dbos.step(name=function.__name__)(function)

        def workflow(function: Any) -> Any:
            return dbos.workflow(name=function.__name__)(function)

        nothing_step, pause_step, compute_step = step(nothing), step(pause), step(compute)

        async def group(size: int) -> float:
            began = time.perf_counter()
            steps = [asyncio.create_task(nothing_step(index)) for index in range(size)]
            await asyncio.gather(*steps, return_exceptions=True)
            took = time.perf_counter() - began
            replayed.append(took)
            return took

        async def pauses(size: int, seconds: float) -> float:
            began = time.perf_counter()
            steps = [asyncio.create_task(pause_step(seconds)) for _ in range(size)]
            await asyncio.gather(*steps, return_exceptions=True)
            return time.perf_counter() - began

        async def sequence(size: int) -> float:
            began = time.perf_counter()
            for index in range(size):
                await nothing_step(index)
            return time.perf_counter() - began

        async def race(size: int, winner_s: float, loser_s: float) -> float:
            began = time.perf_counter()
            waits = [loser_s] * (size - 1) + [winner_s]
            racers = [asyncio.create_task(pause_step(seconds)) for seconds in waits]
            _, losers = await dbos.asyncio_wait(racers, return_when=asyncio.FIRST_COMPLETED)
            took = time.perf_counter() - began
            for loser in losers:
                loser.cancel()
            await asyncio.gather(*losers, return_exceptions=True)
            return took

        async def cpu(size: int, cpu_s: float) -> float:
            began = time.perf_counter()
            steps = [
                asyncio.create_task(dbos.run_step_async({"name": "compute"}, compute_step, cpu_s))
                for _ in range(size)
            ]
            await asyncio.gather(*steps)
            return time.perf_counter() - began

        self.group, self.pauses, self.sequence = map(workflow, (group, pauses, sequence))
        self.race, self.cpu = map(workflow, (race, cpu))

    async def run(self, workflow: Any, *args: Any) -> float:
        handle = await self._dbos.start_workflow_async(workflow, *args)
        return float(await handle.get_result())

    async def replay(self, size: int) -> float:
        """A fork behind its last step has all checkpoints of the first run."""
        handle = await self._dbos.start_workflow_async(self.group, size)
        await handle.get_result()
        done = len(replayed)
        forked = await self._dbos.fork_workflow_async(handle.get_workflow_id(), size + 1)
        await forked.get_result(polling_interval_sec=0.02)
        assert len(replayed) > done, "the fork ran the body again"
        return replayed[-1]

    async def latency(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            await asyncio.sleep(0.005)
            began = time.perf_counter()
            await self.run(self.sequence, 1)
            seconds.append(time.perf_counter() - began)
        return seconds

    async def runs(self, count: int, steps: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(self.run(self.sequence, steps) for _ in range(count)))
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
