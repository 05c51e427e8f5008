"""Programs whose step ids are golden: `tests/histories/step_ids.json` holds what they must be."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

import kagzi
from kagzi import Context
from tests.engine.steps import add, echo, fail, info_async, note, square, squares_of

PROGRAMS: dict[str, kagzi.Workflow[..., Any]] = {}


def program(function: Any) -> Any:
    made = PROGRAMS[function.__name__] = kagzi.workflow(function)
    return made


def plain_function(value: int) -> int:
    return value


class Callable:
    def __call__(self) -> int:
        return 1

    def method(self) -> int:
        return 2


@program
async def in_sequence(ctx: Context, folder: str) -> None:
    for _ in range(3):
        await ctx.step(add, 1, 2)
    await ctx.step(square, 3)
    await ctx.step(add, 1, 2, name="sum")
    await ctx.step(add.bind(1, 2), name="sum")
    await ctx.step(add, 1, 2, id="exactly this")
    await ctx.step(add, 1, 2)


@program
async def plain_callables(ctx: Context, folder: str) -> None:
    async def closure() -> int:
        return 1

    await ctx.step(closure)
    await ctx.step(lambda: 1)
    await ctx.step(lambda: 2)
    await ctx.step(plain_function, 1)
    await ctx.step(functools.partial(plain_function, 2))
    await ctx.step(Callable())
    await ctx.step(Callable().method)
    await ctx.step(closure)


@program
async def groups(ctx: Context, folder: str) -> None:
    await ctx.parallel("pages", add.bind(1, 2), square.bind(3))
    await ctx.parallel(
        "pages", {"a": add.bind(1, 2), "b/c#d%e": square.bind(3), "é ü": echo.bind(1)}
    )
    await ctx.parallel_vec("pages", [square.bind(n) for n in range(3)])
    await ctx.parallel_vec("keyed", [square.bind(n) for n in range(2)], keys=["x", "y"])
    await ctx.map("mapped", square, range(2), key=lambda n: f"item {n}")
    await ctx.map("none", square, [])
    await ctx.race("race", [echo.bind(1)])
    await ctx.race("race", {"only": echo.bind(1)})
    async for _ in ctx.as_completed("stream", [echo.bind(n) for n in range(2)]):
        pass


async def _branch(ctx: Context, name: str) -> None:
    await ctx.step(note, *name.split(":"))
    await ctx.step(echo, name)
    await ctx.map("inner", square, range(2))
    await ctx.step(echo, name)


@program
async def gathered_branches(ctx: Context, folder: str) -> None:
    await asyncio.gather(*(_branch(ctx, f"{folder}:{n}") for n in "abc"))
    await asyncio.gather(ctx.step(echo, 1), ctx.step(echo, 2), _branch(ctx, f"{folder}:d"))


@program
async def task_groups(ctx: Context, folder: str) -> None:
    async def other() -> None:
        await ctx.step(echo, 0)

    async def nest() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(other())
            tasks.create_task(other(), name="named")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_branch(ctx, f"{folder}:a"))
        tasks.create_task(other())
        tasks.create_task(_branch(ctx, f"{folder}:b"), name="second")
        tasks.create_task(nest())
        tasks.create_task(_branch(ctx, f"{folder}:c"))
        tasks.create_task(_branch(ctx, f"{folder}:d"), name="second")
    await ctx.step(echo, 1)


@program
async def tasks_sharing_a_context(ctx: Context, folder: str) -> None:
    async def branch() -> None:
        await ctx.step(echo, 1)
        await ctx.step(echo, 2)

    shared = contextvars.copy_context()
    await asyncio.gather(
        asyncio.create_task(branch(), context=shared),
        asyncio.create_task(branch(), context=shared),
    )


@program
async def tasks_of_futures(ctx: Context, folder: str) -> None:
    await asyncio.create_task(ctx.step(echo, 1))  # type: ignore[arg-type]
    await asyncio.ensure_future(ctx.step(echo, 2))
    await asyncio.shield(ctx.step(echo, 3))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ctx.step(echo, 4))  # type: ignore[arg-type]
        tasks.create_task(ctx.step(echo, 5), name="named")  # type: ignore[arg-type]
    await ctx.step(echo, 6)


@program
async def waiting_with_a_limit(ctx: Context, folder: str) -> None:
    async def two() -> None:
        await ctx.step(echo, 1)
        await ctx.step(echo, 2)

    await asyncio.wait_for(ctx.step(echo, 0), 60)
    await asyncio.wait_for(two(), 60)
    await asyncio.wait_for(two(), None)
    async with asyncio.timeout(60):
        await two()
    async with ctx.timeout(60):
        await two()

    async def branch() -> None:
        await asyncio.wait_for(two(), 60)
        await ctx.step(echo, 3)

    await asyncio.gather(branch(), branch())


@program
async def time_and_chance(ctx: Context, folder: str) -> None:
    await ctx.now()
    await ctx.random()
    await ctx.uuid4()
    await ctx.sleep(0)
    await ctx.sleep(timedelta(milliseconds=1))
    await ctx.sleep_until(await ctx.now())


@program
async def foreign_tasks(ctx: Context, folder: str) -> None:
    """Tasks of others, between ours, shift nothing."""

    async def foreign() -> None:
        await asyncio.sleep(0)

    async def ours() -> None:
        others = [asyncio.create_task(foreign()) for _ in range(3)]
        await ctx.step(echo, 1)
        await asyncio.gather(*others)
        await ctx.step(echo, 2)

    await asyncio.create_task(foreign())
    await asyncio.gather(ours(), foreign(), ours())


@kagzi.step
async def body_with_branches(ctx: Context, folder: str) -> int:
    await ctx.step(echo, 1)
    await ctx.step(echo, 2, id="exact")
    await asyncio.gather(*(_branch(ctx, f"{folder}:{n}") for n in "ab"))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_branch(ctx, f"{folder}:c"), name="named")
    await asyncio.wait_for(_branch(ctx, f"{folder}:d"), 60)
    await ctx.now()
    return await ctx.step(add, 1, 2)


@program
async def bodies(ctx: Context, folder: str) -> None:
    async def closure(ctx: Context) -> int:
        return await body_with_branches(ctx, folder)

    async def captured() -> None:
        """Uses the workflow's own Context inside a step: it is the step's there."""
        await ctx.step(echo, 1)
        await asyncio.gather(ctx.step(echo, 2), _branch(ctx, f"{folder}:x"))

    await ctx.step(body_with_branches, folder)
    await ctx.parallel("both", body_with_branches.bind(folder), closure, captured)
    await ctx.parallel("deep", {"one": squares_of.bind(2), "two": squares_of.bind(2, 1)})
    await ctx.step(closure)


@program
async def started_before_awaited(ctx: Context, folder: str) -> None:
    """Ids come from the order of the calls, whatever is awaited first."""
    first, second = ctx.step(echo, 1), ctx.step(echo, 2)
    group = ctx.map("group", square, range(2))
    third = ctx.step(echo, 3)
    await third
    await group
    await second
    await first


@program
async def failures(ctx: Context, folder: str) -> None:
    for _ in range(2):
        try:
            await ctx.step(fail, folder, "f")
        except kagzi.StepFailed:
            await ctx.step(echo, "handled")
    await ctx.parallel_vec(
        "some", [fail.bind(folder, "g"), echo.bind(1)], on_error=kagzi.ErrorStrategy.COLLECT_ALL
    )
    await ctx.step(info_async)


Awaitables = Awaitable[Any]
