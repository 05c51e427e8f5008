"""The steps and workflows that are timed. Importable, so that pool processes run the bodies.

A workflow gives the seconds of its body alone: without start, claim and completion.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from uuid import UUID

from kagzi.context import Context
from kagzi.registry import step, workflow

passes: defaultdict[UUID, list[float]] = defaultdict(list)
"""Seconds of the body each time that a run was driven; its worker must be in this process."""


PAGE_BYTES = 100_000


class DriveAgain(Exception):
    """Ends a run as failed, so that a retry drives it again over its checkpoints."""


@step
async def nothing(index: int) -> int:
    return index


@step
async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


@step(memo="global")
async def remembered(key: str, index: int) -> int:
    return index


@step(cpu=True)
def compute(cpu_s: float) -> float:
    return burn(cpu_s)


def burn(cpu_s: float) -> float:
    """Keep one core busy for so many seconds of its time, however many others want it."""
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        sum(range(1000))
    return cpu_s


@workflow
async def one_after_the_other(ctx: Context, size: int, seconds: float) -> float:
    began = time.perf_counter()
    for _ in range(size):
        await ctx.step(pause, seconds)
    return time.perf_counter() - began


@workflow
async def together(ctx: Context, size: int, seconds: float) -> float:
    began = time.perf_counter()
    await ctx.parallel_vec("together", [pause.bind(seconds) for _ in range(size)])
    return time.perf_counter() - began


@workflow
async def nothings_in_sequence(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    for index in range(size):
        await ctx.step(nothing, index)
    return time.perf_counter() - began


@workflow
async def nothings(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    await ctx.parallel_vec("nothings", [nothing.bind(index) for index in range(size)])
    return time.perf_counter() - began


@step
async def payload(nbytes: int) -> str:
    return "0" * nbytes


@workflow
async def payloads(ctx: Context, size: int, nbytes: int) -> float:
    began = time.perf_counter()
    await ctx.parallel_vec("payloads", [payload.bind(nbytes) for _ in range(size)])
    return time.perf_counter() - began


@step
async def page(index: int) -> str:
    return "0" * PAGE_BYTES


@workflow
async def pages_listed(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    pages = await ctx.parallel_vec("pages", [page.bind(index) for index in range(size)])
    assert len(pages) == size
    return time.perf_counter() - began


@workflow
async def pages_completed(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    async for _ in ctx.as_completed("pages", [page.bind(index) for index in range(size)]):
        pass
    return time.perf_counter() - began


@workflow
async def pages_streamed(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    async for _ in ctx.map("pages", page, (index for index in range(size))):
        pass
    return time.perf_counter() - began


@workflow
async def resumed(ctx: Context, size: int, at_once: int) -> None:
    """Steps in groups of so many; of one: without groups."""
    began = time.perf_counter()
    for start in range(0, size, at_once):
        if at_once == 1:
            await ctx.step(nothing, start)
        else:
            await ctx.parallel_vec("part", [nothing.bind(index) for index in range(at_once)])
    passes[ctx.run_id].append(time.perf_counter() - began)
    raise DriveAgain


@workflow
async def of_steps(ctx: Context, steps: int) -> int:
    for index in range(steps):
        await ctx.step(nothing, index)
    return steps


@workflow
async def streamed(ctx: Context, size: int) -> float:
    began = time.perf_counter()
    async for _ in ctx.map("streamed", nothing, (index for index in range(size))):
        pass
    return time.perf_counter() - began


@workflow
async def remembered_together(ctx: Context, key: str, size: int) -> float:
    began = time.perf_counter()
    await ctx.parallel_vec("memos", [remembered.bind(key, index) for index in range(size)])
    return time.perf_counter() - began


@workflow
async def driven_again(ctx: Context, size: int, seconds: float, in_group: bool) -> None:
    began = time.perf_counter()
    if in_group:
        await ctx.parallel_vec("group", [pause.bind(seconds) for _ in range(size)])
    else:
        for _ in range(size):
            await ctx.step(pause, seconds)
    passes[ctx.run_id].append(time.perf_counter() - began)
    raise DriveAgain


@workflow
async def raced(ctx: Context, size: int, winner_s: float, loser_s: float) -> float:
    began = time.perf_counter()
    calls = [pause.bind(loser_s) for _ in range(size - 1)]
    await ctx.race("race", [*calls, pause.bind(winner_s)])
    return time.perf_counter() - began


@workflow
async def computed(ctx: Context, size: int, cpu_s: float) -> float:
    began = time.perf_counter()
    await ctx.parallel_vec("cpu", [compute.bind(cpu_s) for _ in range(size)])
    return time.perf_counter() - began
