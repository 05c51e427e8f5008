"""Spread computing over the processors.

Shows: a step declared `cpu=True`, of which each pool process runs one at a time, and the speed-up
that kagzi records for every group.
"""

from __future__ import annotations

import asyncio
import os

import kagzi
from kagzi import Context

LIMIT = 640_000
PIECE = 40_000


@kagzi.step(cpu=True)
def count_primes(start: int, stop: int) -> int:
    """Primes in [start, stop), by trial division: slow on purpose."""
    count = 0
    for number in range(max(start, 2), stop):
        divisor = 2
        while divisor * divisor <= number:
            if number % divisor == 0:
                break
            divisor += 1
        else:
            count += 1
    return count


@kagzi.workflow
async def primes_below(ctx: Context, limit: int) -> int:
    calls = [
        count_primes.bind(start, min(start + PIECE, limit)) for start in range(0, limit, PIECE)
    ]
    return sum(await ctx.parallel_vec("pieces", calls))


async def main() -> None:
    processors = os.cpu_count() or 1
    async with kagzi.connect() as client, client.worker(processes=processors):
        handle = await client.start(primes_below, LIMIT)
        print(f"{await handle.result(timeout=120)} primes below {LIMIT}")

        run = await handle.describe()
        (group,) = run.groups
        print(f"{group.size} steps on {processors} processes")
        for process_id in sorted({step.process_id for step in run.steps}):
            mine = [step for step in run.steps if step.process_id == process_id]
            print(
                f"  process {process_id}: {len(mine):2} steps,"
                f" {sum(step.duration_s for step in mine):.2f} s"
            )
        print(f"one after another {group.steps_s:.2f} s, together {group.wall_s:.2f} s")
        print(f"speed-up {group.speedup:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
