"""Groups within groups: from closures and from bodies in the pool, deeper than the pool is wide."""

from __future__ import annotations

import asyncio

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, Retry
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@kagzi.step
async def descend(ctx: Context, folder: str, depth: int) -> int:
    Witness(folder).note(f"+{depth}")
    below = 0
    if depth > 1:
        (below,) = await ctx.parallel("d", descend.bind(folder, depth - 1))
    Witness(folder).note(f"-{depth}")
    return below + 1


@kagzi.workflow
async def deep(ctx: Context, folder: str, depth: int) -> int:
    return await ctx.step(descend, folder, depth)


async def test_a_nest_deeper_than_the_pool_is_wide_comes_to_its_end(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(deep, witness.folder, 12)
    assert result == 12
    parents = {s.id: s.parent_step_id for s in (await handle.describe()).steps}
    assert parents["descend/d/0/d/0"] == "descend/d/0"
    assert parents["descend"] is None


async def test_a_nest_beyond_the_limit_is_refused_with_a_clear_error(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(deep, witness.folder, 30)
    error = await engine.outcome(handle)
    assert isinstance(error, kagzi.StepFailed)
    assert "NestingTooDeep" in str(error)
    assert "at most 16" in str(error)


@kagzi.workflow
async def deep_closures(ctx: Context, depth: int) -> int:
    async def level(left: int) -> int:
        if left == 0:
            return 0
        (below,) = await ctx.parallel("c", lambda: level(left - 1))
        return int(below) + 1

    return await level(depth)


@pytest.mark.parametrize("depth", [1, 16])
async def test_closures_nest_as_deep_as_bodies_in_the_pool(engine: Engine, depth: int) -> None:
    assert await engine.run(deep_closures, depth) == depth


async def test_closures_that_nest_beyond_the_limit_are_refused(engine: Engine) -> None:
    error = await engine.outcome(await engine.start(deep_closures, 17))
    assert "NestingTooDeep" in str(error)


@kagzi.step
async def outer_of_one(ctx: Context, folder: str, name: str) -> int:
    witness = Witness(folder)
    witness.note(f"+outer {name}")
    inner = await ctx.parallel_vec(
        "inner", [steps.brief.bind(folder, f"{name}.{n}") for n in range(3)], limit=1
    )
    witness.note(f"-outer {name}")
    return len(inner)


@kagzi.workflow
async def ones(ctx: Context, folder: str, limit: int) -> list[int]:
    return await ctx.parallel_vec(
        "outer", [outer_of_one.bind(folder, str(n)) for n in range(6)], limit=limit
    )


@pytest.mark.parametrize("limit", [1, 2])
async def test_a_limit_is_held_over_inner_waits_and_does_not_deadlock(
    engine: Engine, witness: Witness, limit: int
) -> None:
    assert await engine.run(ones, witness.folder, limit) == [3] * 6
    # A process that imports this module meanwhile may hold a permit before its body notes it.
    assert 1 <= witness.most_open("+outer", "-outer") <= limit
    for name in range(6):
        assert witness.most_open(f"+{name}.", f"-{name}.") == 1


@kagzi.step(limit=1)
async def recursive(ctx: Context, depth: int) -> int:
    if depth == 0:
        return 0
    inner = await ctx.parallel_vec("r", [recursive.bind(depth - 1) for _ in range(2)])
    return sum(inner) + 1


@kagzi.workflow
async def recursion(ctx: Context, depth: int) -> int:
    return await ctx.step(recursive, depth)


async def test_a_function_with_a_limit_of_one_may_call_itself(engine: Engine) -> None:
    assert await engine.run(recursion, 4) == 15


@kagzi.step
async def many_at_once(ctx: Context, count: int) -> list[int]:
    first, second = await asyncio.gather(
        ctx.map("a", steps.square, range(count)), ctx.map("b", steps.cube, range(count))
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ctx.step(steps.square, n)) for n in range(3)]
    return [*first, *second, *(task.result() for task in tasks)]


@kagzi.workflow
async def gathering(ctx: Context, width: int) -> list[list[int]]:
    return await ctx.parallel_vec("w", [many_at_once.bind(4) for _ in range(width)])


async def test_a_body_may_wait_for_several_groups_at_once(engine: Engine) -> None:
    expected = [0, 1, 4, 9, 0, 1, 8, 27, 0, 1, 4]
    assert await engine.run(gathering, 20) == [expected] * 20


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def outer_that_fails(ctx: Context, folder: str) -> list[str | None]:
    attempt = kagzi.current_step().attempt
    kept = await ctx.parallel_vec("kept", [steps.note.bind(folder, f"kept{n}") for n in range(3)])
    result = await ctx.parallel_vec(
        "some",
        [steps.note.bind(folder, "good"), steps.unless.bind(folder, "bad", "mended")],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    if attempt == 1:
        Witness(folder).open("mended")
        raise steps.Flaky("the outer step fails, too")
    return [*kept, *result.values]


@kagzi.workflow
async def retried(ctx: Context, folder: str) -> list[list[str | None]]:
    return await ctx.parallel_vec("outer", [outer_that_fails.bind(folder)])


async def test_a_retried_body_keeps_inner_results_and_runs_inner_failures_again(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(retried, witness.folder)
    assert result == [["kept0", "kept1", "kept2", "good", "bad"]]
    assert witness.counts == {"kept0": 1, "kept1": 1, "kept2": 1, "good": 1, "bad": 2}
    attempts = {(a.step_id, a.attempt) for a in (await handle.describe()).attempts}
    assert attempts == {("outer/0", 1), ("outer/0/some/1", 1)}, "the failures stay on record"
    statuses = {s.id: s.status for s in (await handle.describe()).steps}
    assert set(statuses.values()) == {"completed"}
    assert await engine.replay(handle) == result


@kagzi.step
async def outer_with_a_closure(ctx: Context) -> int:
    return await ctx.step(lambda: 1)  # type: ignore[no-any-return]


@kagzi.workflow
async def closure_inside(ctx: Context) -> int:
    return await ctx.step(outer_with_a_closure)


async def test_a_closure_inside_a_body_of_the_pool_is_refused_with_the_way_out(
    engine: Engine,
) -> None:
    error = await engine.outcome(await engine.start(closure_inside))
    assert isinstance(error, kagzi.StepFailed)
    assert "where='coordinator'" in str(error)
