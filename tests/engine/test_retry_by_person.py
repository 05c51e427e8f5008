"""`client.retry` beyond single steps: races, groups, branches, bodies, and after replays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import AllStepsFailed, Context, ErrorStrategy, Retry, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import HOUR_S, PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@kagzi.workflow
async def cleans_up(ctx: Context, folder: str) -> str:
    """Called after the failure was seen: a step, a group, a sleep, and a block with a deadline."""
    await ctx.step(steps.note, folder, "before")
    try:
        return await ctx.step(steps.unless, folder, "work", "mended")
    except StepFailed:
        await ctx.step(steps.note, folder, "cleanup")
        await ctx.map("undo", steps.echo, [1, 2])
        await ctx.sleep(0)
        async with ctx.timeout(60):
            await ctx.now()
        raise


@pytest.mark.parametrize("replays", [0, 1, 3])
async def test_what_followed_a_failure_is_cleared_also_when_the_run_was_replayed_meanwhile(
    engine: Engine, witness: Witness, replays: int
) -> None:
    handle = await engine.start(cleans_up, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    for _ in range(replays):
        assert isinstance(await engine.replay(handle), StepFailed)
    witness.open("mended")
    await engine.client.retry(handle)
    assert list(await engine.ids(handle)) in (["note"], ["note", "unless"])
    assert await handle.result(PATIENCE_S) == "work"
    assert list(await engine.ids(handle)) == ["note", "unless"]
    assert witness.counts == {"before": 1, "work": 2, "cleanup": 1}


async def test_what_followed_a_failure_is_cleared_when_it_was_seen_only_on_replay(
    engine: Engine, witness: Witness
) -> None:
    """A crash between the commit of the failure and the moment at which the workflow saw it."""
    handle = await engine.start(cleans_up, witness.folder)
    await engine.outcome(handle)
    rows = await engine.rows(
        "SELECT completed_number FROM kagzi.step_runs WHERE run_id = %(id)s AND status = 'failed'",
        id=handle.run_id,
    )
    await engine.rows(
        "UPDATE kagzi.step_runs SET visible_number = NULL WHERE run_id = %(id)s", id=handle.run_id
    )
    assert isinstance(await engine.replay(handle, rows[0][0]), StepFailed)
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "work"
    assert list(await engine.ids(handle)) == ["note", "unless"]


@kagzi.workflow
async def group_then_cleanup(ctx: Context, folder: str, kind: str) -> Any:
    calls = [steps.unless.bind(folder, f"{n}", f"mended{n % 2}") for n in range(4)]
    try:
        if kind == "race":
            return (await ctx.race("g", calls)).index
        if kind == "collect":
            return (
                await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
            ).into_result()
        if kind == "stream":
            return sorted([one.value async for one in ctx.as_completed("g", calls)])
        return await ctx.parallel_vec("g", calls, limit=1)
    except Exception:
        await ctx.step(steps.note, folder, "cleanup")
        raise


@pytest.mark.parametrize("kind", ["race", "collect", "fail fast", "stream"])
async def test_a_failed_group_of_any_kind_goes_on_and_what_followed_it_is_cleared(
    engine: Engine, witness: Witness, kind: str
) -> None:
    witness.open("mended1")
    if kind == "race":
        witness.shut("mended1")
    handle = await engine.start(group_then_cleanup, witness.folder, kind)
    error = await engine.outcome(handle)
    assert isinstance(error, kagzi.RunFailed)
    if kind == "race":
        assert isinstance(error, AllStepsFailed)
    before = witness.counts
    kept = [
        row[0]
        for row in await engine.rows(
            "SELECT step_id FROM kagzi.step_runs WHERE run_id = %(id)s AND status = 'completed'"
            " AND step_id LIKE 'g/%%'",
            id=handle.run_id,
        )
    ]
    witness.open("mended0", "mended1")
    await engine.client.retry(handle)
    result = await handle.result(PATIENCE_S)
    assert result in range(4) if kind == "race" else result == ["0", "1", "2", "3"]
    assert "note" not in await engine.ids(handle), "the cleanup is not part of this history"
    for step_id in kept:
        name = step_id.removeprefix("g/")
        assert witness.counts[name] == before[name], "what was committed did not run again"
    assert await engine.replay(handle) == result


@kagzi.workflow
async def branches(ctx: Context, folder: str, kind: str) -> list[str]:
    async def branch(name: str) -> list[str]:
        """Branch b fails first; the failure leaves it when branch a has done all that it does."""
        witness = Witness(folder)
        first = await ctx.step(steps.note, folder, f"{name}1")
        if name == "a":
            await witness.pass_gate("b has failed")
        try:
            second = await ctx.step(steps.unless, folder, f"{name}2", f"mended-{name}")
        except StepFailed:
            witness.open("b has failed")
            await witness.pass_gate("a is done")
            raise
        third = await ctx.step(steps.note, folder, f"{name}3")
        if name == "a":
            witness.open("a is done")
        return [first, second, third]

    if kind == "gather":
        found = await asyncio.gather(branch("a"), branch("b"))
    else:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(branch(name)) for name in "ab"]
        found = [task.result() for task in made]
    return [entry for one in found for entry in one]


@pytest.mark.parametrize("kind", ["gather", "TaskGroup"])
async def test_a_failed_branch_goes_on_and_another_keeps_what_it_did(
    engine: Engine, witness: Witness, kind: str
) -> None:
    witness.open("mended-a")
    handle = await engine.start(branches, witness.folder, kind)
    await engine.outcome(handle)
    assert witness.counts == {"a1": 1, "a2": 1, "a3": 1, "b1": 1, "b2": 1}
    witness.open("mended-b")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == ["a1", "a2", "a3", "b1", "b2", "b3"]
    assert witness.counts == {"a1": 1, "a2": 1, "a3": 1, "b1": 1, "b2": 2, "b3": 1}


@kagzi.step
async def fails_deep_down(ctx: Context, folder: str, depth: int) -> list[str]:
    kept = await ctx.step(steps.note, folder, f"note {depth}")
    if depth:
        calls = [fails_deep_down.bind(folder, depth - 1)]
        return [kept, *(await ctx.parallel("deeper", *calls))[0]]
    return [kept, await ctx.step(steps.unless, folder, "bottom", "mended")]


@kagzi.workflow
async def deep_failure(ctx: Context, folder: str) -> list[str]:
    await ctx.step(steps.note, folder, "first")
    return await ctx.step(fails_deep_down, folder, 3)


async def test_a_failure_deep_down_runs_again_with_the_bodies_around_it_and_nothing_else(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(deep_failure, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == [*(f"note {n}" for n in (3, 2, 1, 0)), "bottom"]
    notes = {f"note {n}": 1 for n in range(4)}
    assert witness.counts == {"first": 1, **notes, "bottom": 2}


@kagzi.step
async def out_of_time_inside(ctx: Context, folder: str) -> list[str]:
    calls = [steps.note.bind(folder, "quick"), steps.slow_start.bind(folder, "slow", "on")]
    return await ctx.parallel_vec("g", calls, timeout=HOUR_S)


@kagzi.workflow
async def timeout_in_a_body(ctx: Context, folder: str) -> list[str]:
    return await ctx.step(out_of_time_inside, folder)


async def test_a_group_that_ran_out_of_time_inside_a_body_is_opened_again(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(timeout_in_a_body, witness.folder)
    await engine.stored(handle, 1)
    await until(lambda: "+slow" in witness.entries)
    await engine.expire(handle)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.is_a(kagzi.GroupTimeout)
    witness.open("on")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == ["quick", "slow"]
    assert witness.counts == {"quick": 1, "+slow": 2, "!slow": 1, "-slow": 1}


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def always_counts(folder: str) -> int:
    attempt = kagzi.current_step().attempt
    witness = Witness(folder)
    witness.note(f"attempt {attempt}")
    if not witness.is_open("mended"):
        raise steps.Flaky(f"attempt {attempt}")
    return attempt


@kagzi.workflow
async def out_of_attempts(ctx: Context, folder: str) -> int:
    return await ctx.step(always_counts, folder)


async def test_a_retried_step_has_all_its_attempts_again_and_the_old_ones_stay_on_record(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(out_of_attempts, witness.folder)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.attempts == 3
    await engine.client.retry(handle)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.attempts == 3
    assert witness.entries == [f"attempt {n}" for n in (1, 2, 3, 1, 2, 3)]
    recorded = [attempt.attempt for attempt in (await handle.describe()).attempts]
    assert recorded == [1, 2, 3, 4, 5, 6]
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == 1


@kagzi.workflow
async def fails_by_itself(ctx: Context, folder: str) -> str:
    first = await ctx.step(steps.note, folder, "first")
    if not Witness(folder).is_open("mended"):
        raise ValueError("a mistake in the workflow")
    return first


async def test_a_run_that_failed_by_its_own_error_goes_on_after_mending(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(fails_by_itself, witness.folder)
    error = await engine.outcome(handle)
    assert isinstance(error, kagzi.RunFailed)
    assert "a mistake in the workflow" in str(error)
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "first"
    assert witness.entries == ["first"]


@kagzi.workflow
async def all_of_a_thousand(ctx: Context, folder: str, size: int) -> int:
    calls = [steps.unless.bind(folder, f"{n}", "mended") for n in range(size)]
    result = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return len(result.into_result())


async def test_a_retry_of_a_group_that_failed_whole_runs_all_of_it_again(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(all_of_a_thousand, witness.folder, 1_000)
    assert isinstance(await engine.outcome(handle), kagzi.RunFailed)
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == 1_000
    assert set(witness.counts.values()) == {2}
