"""Bodies that start steps and groups: what they leave open, retries, cancellation, permits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, Retry, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import HOUR_S, PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def run_body(
    ctx: Context, where: str, body: kagzi.StepFunction[..., Any, Any, Any], *args: Any
) -> Any:
    """The body in the pool, or the same function as a closure in the worker's own process."""
    if where == "pool":
        return await ctx.step(body, *args)
    return await ctx.step(body.__wrapped__, *args, retry=body.definition.retry)  # type: ignore[attr-defined]


WHERE = pytest.mark.parametrize("where", ["pool", "coordinator"])


# --- what a body leaves open ----------------------------------------------------------------


@kagzi.step
async def leaves_work_open(ctx: Context, folder: str, fails: bool) -> str:
    witness = Witness(folder)
    ctx.parallel_vec(
        "g", [steps.gated.bind(folder, "begun", "never"), steps.note.bind(folder, "n")]
    )
    ctx.step(steps.gated, folder, "alone", "never")
    ctx.parallel_vec("late", [steps.gated.bind(folder, f"{n}", "never") for n in range(3)], limit=1)
    await witness.pass_gate("leave")
    if fails:
        raise steps.Flaky("left")
    return "left"


@kagzi.workflow
async def body_that_leaves_work_open(ctx: Context, folder: str, where: str, fails: bool) -> str:
    try:
        found: str = await run_body(ctx, where, leaves_work_open, folder, fails)
    except StepFailed as error:
        found = error.message
    await ctx.step(steps.gated, folder, "end", "end")
    return found


@WHERE
@pytest.mark.parametrize("fails", [False, True])
async def test_work_that_a_body_leaves_open_is_cancelled_when_it_ends(
    engine: Engine, witness: Witness, where: str, fails: bool
) -> None:
    handle = await engine.start(body_that_leaves_work_open, witness.folder, where, fails)
    await until(lambda: {"+begun", "+alone", "+0", "n"} <= set(witness.entries))
    witness.open("leave")
    await until(lambda: {"!begun", "!alone", "!0"} <= set(witness.entries))
    await until(lambda: "+end" in witness.entries)
    assert await handle.status() == "running", "that was not the end of the run"
    assert "+1" not in witness.entries, "nothing more of it was started"
    witness.open("end")
    assert await handle.result(PATIENCE_S) == "left"


# --- retries of bodies ----------------------------------------------------------------------


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def fails_beside_open_work(ctx: Context, folder: str) -> list[str]:
    attempt = kagzi.current_step().attempt
    witness = Witness(folder)
    witness.note(f"attempt {attempt}")
    group = ctx.parallel_vec(
        "g", [steps.slow_to_leave.bind(folder, "open", "on"), steps.note.bind(folder, "kept")]
    )
    await witness.pass_gate(f"attempt {attempt}")
    if attempt == 1:
        raise steps.Flaky("first")
    return await group


@kagzi.workflow
async def retried_beside_open_work(ctx: Context, folder: str, where: str) -> list[str]:
    found: list[str] = await run_body(ctx, where, fails_beside_open_work, folder)
    return found


@WHERE
async def test_inner_work_in_flight_ends_before_the_next_attempt_begins(
    engine: Engine, witness: Witness, where: str
) -> None:
    handle = await engine.start(retried_beside_open_work, witness.folder, where)
    await until(lambda: {"+open", "kept"} <= set(witness.entries))
    await until_recorded(engine, handle, 1)
    witness.open("attempt 1")
    await until(lambda: "leaving open" in witness.entries)
    for _ in range(3):
        await engine.run(other_run)
    assert "attempt 2" not in witness.entries
    witness.open("leave")
    await until(lambda: witness.counts["+open"] == 2)
    assert witness.entries.index("!open") < witness.entries.index("attempt 2")
    witness.open("attempt 2", "on")
    assert await handle.result(PATIENCE_S) == ["open", "kept"]
    assert witness.counts["kept"] == 1, "what was committed inside is kept"


@kagzi.workflow
async def other_run(ctx: Context) -> int:
    return await ctx.step(steps.square, 2)


async def until_recorded(engine: Engine, handle: kagzi.RunHandle[Any], count: int) -> None:
    async def recorded() -> bool:
        return await engine.count("step_runs", handle.run_id) >= count

    await until(recorded)


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def handles_then_fails(ctx: Context, folder: str) -> list[str]:
    """What it does after an inner failure depends on that failure; then the body itself fails."""
    witness = Witness(folder)
    kept = await ctx.step(steps.note, folder, "before", name="before")
    try:
        found = await ctx.step(steps.unless, folder, "inner", "mended", name="inner")
    except StepFailed:
        found = "fallback"
    stored = await ctx.step(steps.note, folder, f"store {found}", name="store")
    some = await ctx.map("some", steps.echo, [found, found])
    if kagzi.current_step().attempt == 1:
        witness.open("mended")
        raise steps.Flaky("once")
    return [kept, found, stored, *some]


@kagzi.workflow
async def retried_after_handling(ctx: Context, folder: str, where: str) -> list[str]:
    found: list[str] = await run_body(ctx, where, handles_then_fails, folder)
    return found


@WHERE
async def test_what_a_body_did_after_a_failure_it_handled_runs_again_with_its_next_attempt(
    engine: Engine, witness: Witness, where: str
) -> None:
    """The inner failure is removed, so what followed from it cannot be kept either."""
    result, handle = await engine.drive(retried_after_handling, witness.folder, where)
    assert result == ["before", "inner", "store inner", "inner", "inner"]
    assert witness.counts == {"before": 1, "inner": 2, "store fallback": 1, "store inner": 1}
    assert await engine.replay(handle) == result


@kagzi.step(retry=Retry.fixed(2, 0.0))
async def collects_then_fails(ctx: Context, folder: str) -> list[Any]:
    calls = [steps.note.bind(folder, f"fine {n}") for n in range(5)]
    calls.append(steps.unless.bind(folder, "bad", "mended"))
    result = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    if not result.is_success:
        Witness(folder).open("mended")
        raise steps.Flaky("some failed")
    won = await ctx.race("r", [steps.note.bind(folder, "raced")])
    return [*result.values, won.value]


@kagzi.workflow
async def retried_after_collecting(ctx: Context, folder: str, where: str) -> list[Any]:
    found: list[Any] = await run_body(ctx, where, collects_then_fails, folder)
    return found


@WHERE
async def test_the_next_attempt_of_a_body_runs_only_the_failed_steps_of_its_group_again(
    engine: Engine, witness: Witness, where: str
) -> None:
    result, handle = await engine.drive(retried_after_collecting, witness.folder, where)
    assert result == [*(f"fine {n}" for n in range(5)), "bad", "raced"]
    assert witness.counts == {**{f"fine {n}": 1 for n in range(5)}, "bad": 2, "raced": 1}
    statuses = {step.status for step in (await handle.describe()).steps}
    assert statuses == {"completed"}
    assert await engine.replay(handle) == result


@kagzi.step(retry=Retry.fixed(2, 0.0))
async def times_out_inside(ctx: Context, folder: str) -> list[str]:
    calls = [steps.note.bind(folder, "quick"), steps.slow_start.bind(folder, "slow", "on")]
    try:
        return await ctx.parallel_vec("g", calls, timeout=HOUR_S)
    except kagzi.GroupTimeout:
        Witness(folder).open("on")
        raise


@kagzi.workflow
async def retried_after_timeout(ctx: Context, folder: str, where: str) -> list[str]:
    found: list[str] = await run_body(ctx, where, times_out_inside, folder)
    return found


@WHERE
async def test_a_group_that_ran_out_of_time_is_opened_again_by_the_next_attempt(
    engine: Engine, witness: Witness, where: str
) -> None:
    handle = await engine.start(retried_after_timeout, witness.folder, where)
    await engine.stored(handle, 1)
    await until(lambda: "+slow" in witness.entries)
    await engine.expire(handle)
    result = await engine.outcome(handle)
    assert result == ["quick", "slow"]
    assert witness.counts == {"quick": 1, "+slow": 2, "!slow": 1, "-slow": 1}
    assert await engine.replay(handle) == result


@kagzi.workflow
async def retried_by_a_person(ctx: Context, folder: str, where: str) -> list[Any]:
    if where == "pool":
        return await ctx.step(collects_then_fails.bind(folder), retry=Retry.none())
    return await ctx.step(collects_then_fails.__wrapped__, folder)


@WHERE
async def test_a_persons_retry_does_the_same_for_a_body_that_failed_for_good(
    engine: Engine, witness: Witness, where: str
) -> None:
    handle = await engine.start(retried_by_a_person, witness.folder, where)
    assert isinstance(await engine.outcome(handle), StepFailed)
    await engine.client.retry(handle)
    outcome = await engine.outcome(handle)
    # The body raised an error of its own: what failed inside is not in its cause, and stays.
    assert isinstance(outcome, StepFailed)
    inner = next(
        s.id for s in (await handle.describe()).steps if s.status == "failed" and "/" in s.id
    )
    await engine.client.retry(handle, steps=[inner])
    assert await handle.result(PATIENCE_S) == [*(f"fine {n}" for n in range(5)), "bad", "raced"]
    assert witness.counts == {**{f"fine {n}": 1 for n in range(5)}, "bad": 2, "raced": 1}


# --- cancellation ---------------------------------------------------------------------------


@kagzi.step
async def cancels_inner_work(ctx: Context, folder: str) -> list[str]:
    found = []
    group = ctx.parallel_vec("g", [steps.gated.bind(folder, f"g{n}", "never") for n in range(3)])
    alone = ctx.step(steps.gated, folder, "alone", "never")
    witness = Witness(folder)
    await witness.pass_gate("cancel")
    for future in (group, alone):
        future.cancel()
        try:
            await future
        except asyncio.CancelledError:
            found.append("cancelled")
    return [*found, await ctx.step(steps.note, folder, "after")]


@kagzi.workflow
async def cancelling_body(ctx: Context, folder: str, where: str) -> list[str]:
    found: list[str] = await run_body(ctx, where, cancels_inner_work, folder)
    return found


@WHERE
async def test_a_body_may_cancel_its_inner_work(
    engine: Engine, witness: Witness, where: str
) -> None:
    handle = await engine.start(cancelling_body, witness.folder, where)
    await until(lambda: len(witness.entries) == 4)
    witness.open("cancel")
    assert await handle.result(PATIENCE_S) == ["cancelled", "cancelled", "after"]
    await until(lambda: sum(entry.startswith("!") for entry in witness.entries) == 4)


# --- permits --------------------------------------------------------------------------------


@kagzi.step(cpu=True)
async def computes_and_descends(ctx: Context, depth: int) -> int:
    if depth == 0:
        return 0
    below = await ctx.parallel_vec("d", [computes_and_descends.bind(depth - 1) for _ in range(2)])
    return sum(below) + 1


@kagzi.workflow
async def computing_nest(ctx: Context, depth: int) -> int:
    return await ctx.step(computes_and_descends, depth)


async def test_bodies_that_compute_nest_deeper_than_there_are_processes(engine: Engine) -> None:
    result, handle = await engine.drive(computing_nest, 5)
    assert result == 31
    assert len(await engine.ids(handle)) == 63


@kagzi.step
async def open_with_inner(ctx: Context, number: int) -> int:
    (found,) = await ctx.parallel("i", steps.square.bind(number))
    return found


@kagzi.workflow
async def wide_nest(ctx: Context, width: int) -> int:
    found = await ctx.map("outer", open_with_inner, range(width))
    return sum(found)


async def test_more_bodies_wait_for_inner_groups_than_the_pool_has_room_for(engine: Engine) -> None:
    width = 2_300
    assert await engine.run(wide_nest, width) == sum(n * n for n in range(width))


@kagzi.step(limit=2)
async def limited_body(ctx: Context, folder: str, name: str, depth: int) -> int:
    witness = Witness(folder)
    witness.note(f"+{name}")
    witness.note(f"-{name}")
    below: tuple[int, ...] = ()
    if depth:
        calls = [limited_body.bind(folder, f"{name}.{n}", depth - 1) for n in range(3)]
        below = await ctx.parallel("d", *calls)
    witness.note(f"+{name}")
    witness.note(f"-{name}")
    return sum(below) + 1


@kagzi.workflow
async def limited_recursion(ctx: Context, folder: str) -> list[int]:
    calls = [limited_body.bind(folder, f"{n}", 2) for n in range(3)]
    return await ctx.parallel_vec("top", calls, limit=1)


async def test_limits_of_function_and_groups_together_do_not_deadlock(
    engine: Engine, witness: Witness
) -> None:
    assert await engine.run(limited_recursion, witness.folder) == [13] * 3


# --- depth ----------------------------------------------------------------------------------


@kagzi.step
async def descends_for_ever(ctx: Context, folder: str) -> None:
    Witness(folder).note("body")
    await ctx.parallel("d", descends_for_ever.bind(folder))


@kagzi.workflow
async def endless_descent(ctx: Context, folder: str) -> None:
    await ctx.parallel("d", descends_for_ever.bind(folder))


async def test_a_descent_without_an_end_is_refused_at_the_limit(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(endless_descent, witness.folder)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert "does a step start itself without an end?" in str(error)
    deepest = max(await engine.ids(handle), key=len)
    assert deepest == "/".join(["d/0"] * 16)
    assert witness.counts["body"] == 16


@kagzi.step
async def descends_alone(ctx: Context, depth: int) -> int:
    return 1 + (await ctx.step(descends_alone, depth - 1) if depth else 0)


@kagzi.workflow
async def single_descent(ctx: Context, depth: int) -> int:
    return await ctx.step(descends_alone, depth)


async def test_single_steps_nest_until_their_id_is_too_long(engine: Engine) -> None:
    assert await engine.run(single_descent, 30) == 31
    handle = await engine.start(single_descent, 80)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    steps_there = (await handle.describe()).steps
    deepest = max((step for step in steps_there if step.error), key=lambda step: len(step.id))
    assert deepest.error is not None
    assert "at most 1000" in deepest.error.message


# --- what bodies may not do -----------------------------------------------------------------


@kagzi.step
async def sleeps_inside(ctx: Context) -> None:
    await ctx.sleep(0.01)


@kagzi.step
async def times_inside(ctx: Context) -> None:
    async with ctx.timeout(1):
        pass


@kagzi.step
async def streams_inside(ctx: Context) -> None:
    async for _ in ctx.as_completed("s", [steps.echo.bind(1)]):
        pass


@kagzi.step
async def steals_inside(ctx: Context) -> None:
    """Uses its Context from a thread, where no task of the body runs."""
    await asyncio.to_thread(ctx.step, steps.echo, 1)


FORBIDDEN = {
    "sleep": (sleeps_inside, "asyncio.sleep"),
    "timeout": (times_inside, "asyncio.timeout"),
    "stream": (streams_inside, "workflow code"),
    "thread": (steals_inside, "runs elsewhere"),
}


@kagzi.workflow
async def forbidden(ctx: Context, what: str) -> None:
    await ctx.step(FORBIDDEN[what][0])


@pytest.mark.parametrize("what", FORBIDDEN)
async def test_what_belongs_into_workflow_code_is_refused_inside_a_body(
    engine: Engine, what: str
) -> None:
    handle = await engine.start(forbidden, what)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert FORBIDDEN[what][1] in error.message
    assert len(await engine.ids(handle)) == 1
