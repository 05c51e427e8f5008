"""Change a workflow while runs of it are under way: a careless way, and two that hurt no run.

Shows: a check of recorded runs against new code, ctx.patched, versions side by side, and a default
for new runs. `DEPLOYED` stands for what of the code has been deployed; yours is in the repository.
"""

from __future__ import annotations

import asyncio
import logging

import kagzi
from kagzi import Context

DEPLOYED = "at first"


@kagzi.step
async def reserve(number: str) -> str:
    return f"{number} reserved"


@kagzi.step
async def pack(number: str) -> str:
    return "packed"


@kagzi.step
async def wrap(number: str) -> str:
    return "wrapped as a gift"


@kagzi.step
async def ship(number: str) -> str:
    return "shipped"


@kagzi.workflow(name="order", version="1")
async def order_1(ctx: Context, number: str) -> list[str]:
    done = [await ctx.step(reserve, number)]
    if DEPLOYED == "carelessly" or (DEPLOYED == "with a patch" and ctx.patched("gifts")):
        done.append(await ctx.step(wrap, number))
    else:
        done.append(await ctx.step(pack, number))
    await ctx.publish("waits for", "payment")
    await ctx.wait_event("paid")
    return [*done, await ctx.step(ship, number)]


@kagzi.workflow(name="order", version="2")
async def order_2(ctx: Context, number: str) -> list[str]:
    """Larger changes: another function. Runs of version 1 do not meet it."""
    done = await ctx.parallel("all at once", reserve.bind(number), wrap.bind(number))
    await ctx.wait_event("paid")
    return [*done, await ctx.step(ship, number)]


async def check(client: kagzi.Client) -> None:
    report = await client.check(workflow="order")
    verdict = "no run would break" if report.is_success else "would break:"
    print(f"checked {DEPLOYED}: {verdict}")
    for run in report.broken:
        print(f"  {run.id}: {run.message}")


async def main() -> None:
    global DEPLOYED
    async with kagzi.connect() as client:
        async with client.worker(processes=0):
            old = await client.start("order", "A-1", id="A-1", version="1")
            async for _ in old.follow():
                break  # it waits for its payment
        # The worker is stopped, as for a deployment. What would become of A-1?
        for change in ("carelessly", "with a patch"):
            DEPLOYED = change
            await check(client)
        async with client.worker(processes=0):
            new = await client.start("order", "A-2", id="A-2", version="1")
            for handle in (old, new):
                await client.send(handle, "paid")
                print(f"{handle.id}: {', '.join(await handle.result(timeout=60))}")

            # Version 2 is deployed everywhere, and used when somebody says so.
            for version in ("1", "2"):
                await client.set_default_version("order", version)
                last = await client.start(order_2, f"B-{version}", id=f"B-{version}")
                await client.send(last, "paid")
                print(f"{last.id}: {', '.join(await last.result(timeout=60))}")
        for record in await client.versions("order"):
            mark = " (default)" if record.is_default else ""
            print(f"version {record.version}{mark}: {record.unfinished} unfinished")


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(main())
