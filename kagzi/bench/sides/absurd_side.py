"""Absurd: a task whose steps are gathered, a worker in the client's process.

At its own pace of polling (a quarter of a second for tasks, from 50 ms up to a second for results)
latency would be that of the polls, so both are made quick here.

Source: its Python SDK's README ("Asynchronous API"), and `start_worker` and `await_task_result`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from kagzi.bench.helper import HelperFailed, keep_answers_apart, serve, settings
from kagzi.bench.sides.databases import own_database, url_of
from kagzi.bench.work import burn

MODULE = "kagzi.bench.sides.absurd_side"

POLL_S = 0.002
CONCURRENCY = 100


class DriveAgain(Exception):
    """Fails an attempt, so that the next one goes over its checkpoints."""


def main() -> None:
    keep_answers_apart()
    given = settings()
    with own_database(given["conninfo"], "kagzi_bench_absurd") as conninfo:
        url = url_of(conninfo)
        _prepare(url)
        asyncio.run(_serve(url))


def _prepare(url: str) -> None:
    """Make its schema, as its documentation says."""
    beside = Path(sys.executable).parent / "absurdctl"
    program = str(beside) if beside.exists() else shutil.which("absurdctl")
    if program is None:
        raise HelperFailed("absurdctl is not installed: pip install absurdctl")
    done = subprocess.run(
        [program, "init"],
        env={**os.environ, "ABSURD_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HelperFailed(f"absurdctl init: {done.stderr or done.stdout}")


async def _serve(url: str) -> None:
    async_absurd: Any = import_module("absurd_sdk").AsyncAbsurd
    app, client = async_absurd(url, queue_name="bench"), async_absurd(url, queue_name="bench")
    await client.create_queue("bench")
    side = _Side(app, client)
    worker = asyncio.create_task(app.start_worker(concurrency=CONCURRENCY, poll_interval=POLL_S))
    try:
        await serve(
            {
                "group": lambda size: side.run("group", size),
                "pauses": lambda size, seconds: side.run("pauses", size, seconds),
                "sequence": lambda size: side.run("sequence", size),
                "replay": side.replay,
                "race": lambda *args: side.run("race", *args),
                "latency": side.latency,
                "runs": side.runs,
                "cpu": lambda size, cpu_s: side.run("cpu", size, cpu_s),
            }
        )
    finally:
        app.stop_worker()
        await asyncio.wait_for(worker, 5)
        await client.close()
        await app.close()


class _Side:
    def __init__(self, app: Any, client: Any) -> None:
        self._client = client
        self._replayed: list[float] = []

        async def nothing() -> int:
            return 0

        def pause(seconds: float) -> Any:
            async def wait() -> None:
                await asyncio.sleep(seconds)

            return wait

        async def group(params: Any, ctx: Any) -> float:
            began = time.perf_counter()
            await asyncio.gather(*(ctx.step(f"n-{index}", nothing) for index in range(params[0])))
            return time.perf_counter() - began

        async def pauses(params: Any, ctx: Any) -> float:
            size, seconds = params
            began = time.perf_counter()
            await asyncio.gather(*(ctx.step(f"p-{i}", pause(seconds)) for i in range(size)))
            return time.perf_counter() - began

        async def sequence(params: Any, ctx: Any) -> float:
            began = time.perf_counter()
            for index in range(params[0]):
                await ctx.step(f"s-{index}", nothing)
            return time.perf_counter() - began

        async def again(params: Any, ctx: Any) -> None:
            self._replayed.append(await group(params, ctx))
            raise DriveAgain

        async def race(params: Any, ctx: Any) -> float:
            size, winner_s, loser_s = params
            began = time.perf_counter()
            waits = [loser_s] * (size - 1) + [winner_s]
            racers = [
                asyncio.ensure_future(ctx.step(f"r-{index}", pause(seconds)))
                for index, seconds in enumerate(waits)
            ]
            _, losers = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
            took = time.perf_counter() - began
            for loser in losers:
                loser.cancel()
            await asyncio.gather(*losers, return_exceptions=True)
            return took

        async def cpu(params: Any, ctx: Any) -> float:
            size, cpu_s = params

            async def compute() -> float:
                return await asyncio.to_thread(burn, cpu_s)

            began = time.perf_counter()
            await asyncio.gather(*(ctx.step(f"c-{index}", compute) for index in range(size)))
            return time.perf_counter() - began

        for task in (group, pauses, sequence, again, race, cpu):
            app.register_task(name=task.__name__)(task)

    async def run(self, task: str, *params: Any, **options: Any) -> Any:
        spawned = await self._client.spawn(task, list(params), queue="bench", **options)
        return await self._result(spawned["task_id"])

    async def _result(self, task_id: str) -> Any:
        while True:
            found = await self._client.fetch_task_result(task_id, "bench")
            if found.state in ("completed", "failed", "cancelled"):
                return found.result
            await asyncio.sleep(POLL_S)

    async def replay(self, size: int) -> float:
        done = len(self._replayed)
        retries = {"kind": "fixed", "base_seconds": 0}
        await self.run("again", size, max_attempts=2, retry_strategy=retries)
        assert len(self._replayed) == done + 2, "the body ran twice"
        return self._replayed[-1]

    async def latency(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            await asyncio.sleep(0.005)
            began = time.perf_counter()
            await self.run("sequence", 1)
            seconds.append(time.perf_counter() - began)
        return seconds

    async def runs(self, count: int, steps: int) -> float:
        began = time.perf_counter()
        spawned = [
            await self._client.spawn("sequence", [steps], queue="bench") for _ in range(count)
        ]
        for run in spawned:
            await self._result(run["task_id"])
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
