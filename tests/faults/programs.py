"""Workflows that workers in processes of their own drive; imported by both sides."""

from __future__ import annotations

import os
from typing import Any

import kagzi
from kagzi import Context, ErrorStrategy, Retry
from tests.engine.witness import Witness


@kagzi.step
async def note(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step(retry=Retry.fixed(5, 0.0))
def second_time(folder: str, entry: str) -> int:
    """Fails once, and once more for each attempt that a crash cut off."""
    attempt = kagzi.current_step().attempt
    Witness(folder).note(entry)
    if attempt == 1:
        raise ValueError("the first attempt")
    return attempt


@kagzi.step
async def fails(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    raise ValueError(entry)


@kagzi.step
async def with_inner(ctx: Context, folder: str) -> list[str]:
    return await ctx.parallel_vec("in", [note.bind(folder, f"outer/in/{n}") for n in range(3)])


@kagzi.workflow
async def story(ctx: Context, folder: str) -> list[Any]:
    """Every kind of row: each body notes the id of its step."""
    first = await ctx.step(note, folder, "first", id="first")
    group = await ctx.parallel_vec("g", [note.bind(folder, f"g/{n}") for n in range(70)])
    won = await ctx.race("race", [note.bind(folder, "race/0")])
    again = await ctx.step(second_time, folder, "again", id="again")
    found = await ctx.parallel_vec(
        "some",
        [note.bind(folder, "some/0"), fails.bind(folder, "some/1")],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    outer = await ctx.step(with_inner, folder, id="outer")
    return [first, len(group), won.value, again, found.errors[1].message, outer]


STORY = ["first", 70, "race/0", 2, "some/1", [f"outer/in/{n}" for n in range(3)]]


@kagzi.step
async def gated(folder: str, entry: str) -> int:
    """The process that ran it, when the gate is open."""
    witness = Witness(folder)
    witness.note(f"{entry} {os.getpid()}")
    await witness.pass_gate("go")
    return os.getpid()


@kagzi.step
def gated_sync(folder: str, entry: str) -> int:
    witness = Witness(folder)
    witness.note(f"{entry} {os.getpid()}")
    witness.block_at_gate("go")
    return os.getpid()


@kagzi.workflow
async def behind_gate(ctx: Context, folder: str, size: int) -> list[int]:
    """One step that is done at once, a group at the gate, and one more."""
    await ctx.step(note, folder, "before")
    calls = [(gated_sync if n % 4 == 0 else gated).bind(folder, f"b{n}") for n in range(size)]
    found = await ctx.parallel_vec("g", calls)
    await ctx.step(note, folder, "after")
    return found


@kagzi.step(where="coordinator")
async def kill_coordinator() -> None:
    os._exit(9)


@kagzi.workflow
async def poison(ctx: Context, folder: str, how: str) -> str:
    """Brings its worker down, `how`: by its own code or by a step, until the gate is open."""
    witness = Witness(folder)
    if not witness.is_open("cured"):
        witness.note("poison")
        if how == "workflow":
            os._exit(9)
        await ctx.step(kill_coordinator)
    return "cured"


@kagzi.workflow
async def innocent(ctx: Context, folder: str, number: int) -> int:
    """Some steps in sequence."""
    for place in range(3):
        await ctx.step(note, folder, f"innocent {number}/{place}", id=f"s{place}")
    return number
