"""Workflows that leave something half-done, and some that only do much of little."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
import time

import kagzi
from kagzi import Context, Retry
from tests.engine.witness import Witness


@kagzi.step
async def quick(number: int) -> int:
    return number


@kagzi.step
def quick_sync(number: int) -> int:
    return number


@kagzi.step(retry=Retry.none())
async def breaks(number: int) -> int:
    raise ValueError(f"on purpose: {number}")


@kagzi.step
async def endless(number: int) -> int:
    await asyncio.Event().wait()
    return number


@kagzi.step
async def breaks_inside(ctx: Context, number: int) -> list[int]:
    return await ctx.parallel_vec("in", [endless.bind(number), breaks.bind(number)])


@kagzi.workflow
async def ends_badly(ctx: Context, number: int) -> None:
    """Leaves something half-done, each number in its own way; most of them fail."""
    await ctx.step(quick, number)
    way = number % 6
    if way == 0:
        await ctx.parallel_vec("g", [endless.bind(1), quick_sync.bind(2), breaks.bind(3)])
    elif way == 1:
        group = asyncio.ensure_future(ctx.parallel_vec("g", [endless.bind(n) for n in range(4)]))
        await ctx.step(quick_sync, number)
        group.cancel()
        await ctx.step(quick, -number, id="last")
    elif way == 2:
        await ctx.race("r", [endless.bind(1), quick.bind(2), endless.bind(3)])
        raise RuntimeError("the workflow itself")
    elif way == 3:
        async with ctx.timeout(0.01):
            await ctx.step(endless, number)
    elif way == 4:
        await ctx.step(breaks_inside, number)
    else:
        _forgotten = ctx.step(endless, number), ctx.parallel_vec("g", [endless.bind(1)])
        await ctx.step(breaks, number)


@kagzi.step(cpu=True)
def tidy(folder: str, processes: int, number: int) -> int:
    """Free what is free in this pool process; waits until every one is at it, so each gets one."""
    witness = Witness(folder)
    witness.note(f"tidy {os.getpid()}")
    give_back_memory()
    deadline = time.monotonic() + 8
    while len(set(witness.entries)) < processes and time.monotonic() < deadline:
        time.sleep(0.005)
    return os.getpid()


def give_back_memory() -> None:
    """Let the garbage collector run, and the operating system have what is free."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@kagzi.workflow
async def tidy_up(ctx: Context, folder: str, processes: int) -> list[int]:
    calls = [tidy.bind(folder, processes, number) for number in range(processes)]
    return await ctx.parallel_vec("tidy", calls)


@kagzi.workflow
async def many(ctx: Context, size: int) -> int:
    """Steps without end or purpose."""
    total = 0
    for n in range(4):
        total += sum(await ctx.parallel_vec(f"g{n}", [quick.bind(i) for i in range(size)]))
    total += await ctx.step(quick_sync, 1)
    return total
