"""Reports by the clock: a schedule that two workers serve, and each tick has one run.

Shows: client.schedule, the tick that a run is for, a time zone, a pause, and deletion of runs.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

import kagzi
from kagzi import Context


@kagzi.step
async def count_sales(region: str, until: datetime) -> int:
    return len(region) * until.second


@kagzi.workflow
async def report(ctx: Context, region: str) -> str:
    until = ctx.scheduled_at
    assert until is not None, "a schedule starts these runs"
    return f"{region} until {until:%H:%M:%S}: {await ctx.step(count_sales, region, until)} sold"


async def ticks(client: kagzi.Client, count: int) -> None:
    """Wait until a schedule has started so many runs."""
    while (await client.schedules())[0].runs < count:  # noqa: ASYNC110 - others change it
        await asyncio.sleep(0.05)


async def main() -> None:
    async with kagzi.connect() as client:
        for run in await client.runs(workflow=report.name, status="completed"):
            await client.delete(run.id)  # of an earlier time that this was run
        made = await client.schedule(
            report, "* * * * * *", "north", id="each second", timezone="Europe/Berlin"
        )
        async with client.worker(processes=0), client.worker(processes=0):
            await ticks(client, made.runs + 3)
            await client.pause_schedule("each second")
            runs = await client.runs(workflow=report.name)
            for run in reversed(runs):
                print(f"{run.id}: {await (await client.get(run.run_id)).result(timeout=10)}")
        seconds = {run.id for run in runs}
        print(f"{len(runs)} runs for {len(seconds)} ticks, by two workers")
        await client.unschedule("each second")

        # 2:30 is skipped there in March (it ticks at 3:00 then) and comes twice in October (once).
        nightly = await client.schedule(
            report, "30 2 * * *", "south", id="nightly", timezone="Europe/Berlin", overlap="skip"
        )
        print(f"nightly ticks next at {nightly.next_at}")
        await client.unschedule("nightly")


if __name__ == "__main__":
    asyncio.run(main())
