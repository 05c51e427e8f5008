"""Workflows that more than one process of a test knows."""

from __future__ import annotations

import kagzi
from kagzi import Context
from tests.engine import steps


@kagzi.workflow
async def halves(ctx: Context, folder: str, size: int) -> list[str]:
    """A group whose first half is done at once; the second waits at the gate `second`."""
    first = await ctx.step(steps.note, folder, "before")
    group = await ctx.parallel_vec(
        "parts",
        [
            steps.note.bind(folder, f"part {index}")
            if index < size // 2
            else steps.gated.bind(folder, f"part {index}", "second")
            for index in range(size)
        ],
    )
    last = await ctx.step(steps.note, folder, "after")
    return [first, *group, last]


@kagzi.workflow
async def one_note(ctx: Context, folder: str, entry: str) -> str:
    return await ctx.step(steps.note, folder, entry)


@kagzi.workflow
async def counted_attempts(ctx: Context, folder: str) -> int:
    """A step that fails twice; between its attempts the process may go."""
    return await ctx.step(steps.third_time, folder, "try")


@kagzi.workflow
async def flaky_then_gate(ctx: Context, folder: str) -> tuple[int, str]:
    """An attempt that counts, then one that is cut off, then as many as are left."""
    attempt = await ctx.step(steps.fails_then_waits, folder)
    return attempt, await ctx.step(steps.note, folder, "after")


@kagzi.workflow
async def long_story(ctx: Context, folder: str, size: int) -> list[str]:
    """Steps of every kind, each noting that it ran: in sequence, in groups, within bodies."""
    found = []
    for index in range(size):
        found.append(await ctx.step(steps.note, folder, f"single {index}"))
        found += await ctx.parallel_vec(
            "group",
            [
                (steps.note, steps.note_sync, steps.note_cpu)[n % 3].bind(folder, f"{index}.{n}")
                for n in range(12)
            ],
        )
        found += await ctx.step(steps.noting_body, folder, f"{index}")
    return found
