"""Workflows that the tests of the command line name as `tests.engine.cli_flows:...`."""

from __future__ import annotations

from datetime import datetime

import kagzi
from kagzi import Context, ErrorStrategy, Retry


@kagzi.step
async def double(n: int) -> int:
    return 2 * n


@kagzi.step
async def refuse_odd(n: int) -> int:
    if n % 2:
        raise ValueError(f"{n} is odd,\nand that is not wanted")
    return n


@kagzi.step(retry=Retry.fixed(2, 0.01))
async def steady_at_second(n: int) -> int:
    if kagzi.current_step().attempt == 1:
        raise ConnectionError("[bold]not yet[/bold] \x1b[31m")
    return n


@kagzi.step
def wait_at_gate(folder: str) -> str:
    """Tells through one named pipe that it has begun, and waits for a word on another."""
    with open(f"{folder}/begun", "w") as begun:
        begun.write("begun")
    with open(f"{folder}/go") as go:
        return go.read()


@kagzi.workflow
async def doubled(ctx: Context, numbers: list[int], plus: int = 0) -> list[int]:
    first = await ctx.step(steady_at_second, plus)
    return [n + first for n in await ctx.map("doubles", double, numbers)]


@kagzi.workflow
async def only_even(ctx: Context, n: int) -> int:
    return await ctx.step(refuse_odd, n)


@kagzi.workflow
async def sorted_out(ctx: Context, numbers: list[int]) -> list[int]:
    """Failures that the workflow handles."""
    calls = [refuse_odd.bind(n) for n in numbers]
    done = await ctx.parallel_vec("numbers", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return [n for n in done.values if n is not None]


@kagzi.workflow
async def dated(ctx: Context, at: datetime, tags: set[str]) -> str:
    return f"{at:%Y-%m-%d} {','.join(sorted(tags))}"


@kagzi.workflow
async def gated(ctx: Context, folder: str) -> str:
    return await ctx.step(wait_at_gate, folder)
