"""Many runs: one by one on an idle worker, or at once."""

from __future__ import annotations

import asyncio
import statistics
import time

from kagzi.bench import work
from kagzi.bench.session import TIMEOUT_S
from kagzi.client import Client

BETWEEN_S = 0.005
AT_ONCE = 500


def percentile(samples: list[float], percent: int) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


async def one_by_one(client: Client, count: int) -> list[float]:
    """Seconds from each start to its result; the worker is idle before each."""
    seconds = []
    for _ in range(count):
        await asyncio.sleep(BETWEEN_S)
        began = time.perf_counter()
        handle = await client.start(work.of_steps, 1)
        await handle.result(timeout=TIMEOUT_S)
        seconds.append(time.perf_counter() - began)
    return seconds


async def all_at_once(client: Client, count: int, steps: int) -> float:
    """Seconds from the first start to the last result; at most `AT_ONCE` starts under way."""
    waits: list[asyncio.Task[int]] = []
    left = iter(range(count))

    async def start_some() -> None:
        for _ in left:
            handle = await client.start(work.of_steps, steps)
            waits.append(asyncio.create_task(handle.result(timeout=TIMEOUT_S)))

    began = time.perf_counter()
    await asyncio.gather(*(start_some() for _ in range(min(count, AT_ONCE))))
    await asyncio.gather(*waits)
    return time.perf_counter() - began
