"""What a type checker makes of kagzi: arguments are checked, results keep their types."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

USE = """
from datetime import datetime
from functools import partial
from typing import Any, Final, assert_type

import kagzi
from kagzi import Context, ErrorStrategy, ParallelResult, Winner

ALL: Final = ErrorStrategy.COLLECT_ALL

@kagzi.step
async def title(url: str, most: int = 80) -> str: ...
@kagzi.step(cpu=True)
def measure(data: dict[str, Any]) -> bytes: ...
@kagzi.step(retry=kagzi.Retry())
async def outer(ctx: Context, size: int) -> float: ...

@kagzi.workflow
async def use(ctx: Context, size: int) -> list[str]:
    assert_type(await ctx.step(title, "a", most=3), str)
    assert_type(await ctx.step(measure, {}), bytes)
    assert_type(await ctx.step(outer, 3), float)
    assert_type(await ctx.step(title.bind("a"), id="home"), str)
    head = await ctx.parallel("head", title.bind("a"), measure.bind({}), outer.bind(1))
    assert_type(head, tuple[str, bytes, float])
    assert_type(await ctx.parallel("d", {"a": title.bind("a")}), dict[str, str])
    many = await ctx.parallel("d", {"a": title.bind("a")}, on_error=ALL)
    assert_type(many, ParallelResult[str])
    assert_type(await ctx.parallel_vec("v", [title.bind("a")], limit=3), list[str])
    every = await ctx.parallel_vec("v", [measure.bind({})], on_error=ALL)
    assert_type(every, ParallelResult[bytes])
    assert_type(every.into_result(), list[bytes])
    assert_type(await ctx.map("m", title, ["a"], key=str), list[str])
    assert_type(await ctx.map("m", outer, [1], on_error=ALL), ParallelResult[float])
    assert_type(await ctx.race("r", [title.bind("a")]), Winner[str])
    assert_type(await ctx.race("r", {"a": outer.bind(1)}), Winner[float])
    async for done in ctx.as_completed("c", [title.bind("a")]):
        assert_type(done.value, str)
    assert_type(await ctx.now(), datetime)
    await ctx.step(lambda: 3)
    await ctx.step(partial(max, 3), 4)
    return []

async def main() -> None:
    async with kagzi.connect() as client, client.worker(processes=2):
        handle = await client.start(use, 3)
        assert_type(await handle.result(), list[str])
        assert_type(await client.start("use", 3), kagzi.RunHandle[Any])
        assert_type(await client.start_many(use, [(3,)]), list[kagzi.RunHandle[list[str]]])
        assert_type(await client.start_many("use", [(3,)]), list[kagzi.RunHandle[Any]])
        await client.cancel_many(workflow=use, status="pending")

assert_type(kagzi.run(use, 3), list[str])
assert_type(measure({}), bytes)
"""

MISUSE = """
import kagzi
from kagzi import Context

@kagzi.step
async def title(url: str) -> str: ...
@kagzi.step
async def outer(ctx: Context, size: int) -> float: ...

title.bind(3)
title.bind()
title.bind("a", most=3)
outer.bind("a")
title.bind("a").options(limit="many")
"""


def checked(source: str, tmp_path: Path) -> list[str]:
    """The lines at which mypy, strict, finds fault with a program."""
    program = tmp_path / "program.py"
    program.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    command += ["--cache-dir", ROOT / ".mypy_cache", "--follow-imports", "silent"]
    command += ["--disable-error-code", "empty-body", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [line.rpartition("program.py:")[2] for line in done.stdout.splitlines()]


def test_results_keep_the_types_that_their_steps_declare(tmp_path: Path) -> None:
    assert checked(USE, tmp_path) == []


def test_arguments_that_do_not_fit_are_found(tmp_path: Path) -> None:
    faults = [line for line in checked(MISUSE, tmp_path) if " error: " in line]
    first = MISUSE.splitlines().index("title.bind(3)") + 1
    assert [int(line.partition(":")[0]) for line in faults] == list(range(first, first + 5))
