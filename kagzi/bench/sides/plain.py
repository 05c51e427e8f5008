"""Plain asyncio and ProcessPoolExecutor, which promise nothing: nothing is stored.

With `stored` the floor: the same, and its rows in one COPY or in INSERTs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from typing import Any

import uvloop

MODULE = "kagzi.bench.sides.plain"


def main() -> None:
    # Processes of the executor import this file again, and have no use for these.
    from kagzi.bench.floor import PlainProcesses, PlainScript
    from kagzi.bench.helper import keep_answers_apart, serve, settings

    async def plain() -> None:
        given = settings()
        with ExitStack() as stack:
            if given["stored"]:
                script = PlainScript(given["conninfo"], given["schema"])
                await serve(stored_tasks(stack.enter_context(closing(script))))
            else:
                processes = stack.enter_context(closing(PlainProcesses(given["processes"])))
                await serve({**tasks(), "cpu": processes.map})

    keep_answers_apart()
    uvloop.run(plain())


def stored_tasks(script: Any) -> dict[str, Callable[..., Awaitable[Any]]]:
    return {
        "group": script.group,
        "pauses": lambda size, seconds: script.group(size, seconds),
        "sequence": script.rows,
        "replay": script.decoded,
        "race": lambda size, winner_s, loser_s: script.group(1, winner_s),
        # What a run cannot do without: that it was started, its step's result, its own.
        "latency": lambda count: _times(count, lambda: script.rows(3)),
        "runs": lambda count, steps: script.group(count * steps),
    }


def tasks() -> dict[str, Callable[..., Awaitable[Any]]]:
    return {
        "group": _group,
        "pauses": _pauses,
        "sequence": _sequence,
        "race": _race,
        "latency": lambda count: _times(count, lambda: _sequence(1)),
        "runs": _runs,
    }


async def _nothing(index: int) -> int:
    return index


async def _group(size: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_nothing(index) for index in range(size)))
    return time.perf_counter() - began


async def _pauses(size: int, seconds: float) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(asyncio.sleep(seconds) for _ in range(size)))
    return time.perf_counter() - began


async def _sequence(size: int) -> float:
    began = time.perf_counter()
    for index in range(size):
        await asyncio.create_task(_nothing(index))
    return time.perf_counter() - began


async def _race(size: int, winner_s: float, loser_s: float) -> float:
    began = time.perf_counter()
    waits = [loser_s] * (size - 1) + [winner_s]
    racers = [asyncio.create_task(asyncio.sleep(seconds)) for seconds in waits]
    _, losers = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
    for loser in losers:
        loser.cancel()
    return time.perf_counter() - began


async def _runs(count: int, steps: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_sequence(steps) for _ in range(count)))
    return time.perf_counter() - began


async def _times(count: int, run: Callable[[], Awaitable[float]]) -> list[float]:
    return [await run() for _ in range(count)]


if __name__ == "__main__":
    main()
