"""Retries by policy, by crash, and by a person."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, InvalidInput, Retry, StepFailed, UnknownStep
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- policies -------------------------------------------------------------------------------


@kagzi.step(retry=Retry.fixed(4, 0.0, on=steps.Flaky))
async def picky(folder: str, kind: str) -> str:
    Witness(folder).note(kind)
    raise {"flaky": steps.Flaky, "fatal": steps.Fatal, "other": ValueError}[kind](kind)


def is_not_fatal(error: BaseException) -> bool:
    return not isinstance(error, steps.Fatal)


@kagzi.step(retry=Retry.fixed(4, 0.0, on=is_not_fatal))
async def judged(folder: str, kind: str) -> str:
    Witness(folder).note(kind)
    raise {"flaky": steps.Flaky, "fatal": steps.Fatal, "other": ValueError}[kind](kind)


@kagzi.workflow
async def tries(ctx: Context, folder: str, step: str, kind: str) -> int:
    try:
        await ctx.step({"picky": picky, "judged": judged}[step], folder, kind)
    except StepFailed as failure:
        return failure.attempts
    return 0


@pytest.mark.parametrize(
    ("step", "kind", "attempts"),
    [
        ("picky", "flaky", 4),
        ("picky", "fatal", 4),
        ("picky", "other", 1),
        ("judged", "flaky", 4),
        ("judged", "fatal", 1),
        ("judged", "other", 4),
    ],
)
async def test_a_predicate_says_which_errors_are_worth_another_attempt(
    engine: Engine, witness: Witness, step: str, kind: str, attempts: int
) -> None:
    result, handle = await engine.drive(tries, witness.folder, step, kind)
    assert result == attempts
    assert len(witness.entries) == attempts
    recorded = (await handle.describe()).attempts
    assert [attempt.attempt for attempt in recorded] == list(range(1, attempts + 1))
    assert await engine.replay(handle) == attempts
    assert len(witness.entries) == attempts


@kagzi.workflow
async def one_waits(ctx: Context, folder: str) -> list[Any]:
    slow = steps.unless.bind(folder, "retrying", "on").options(retry=Retry.fixed(1000, 0.05))
    quick = [steps.note.bind(folder, f"quick{n}") for n in range(6)]
    return await ctx.parallel_vec("g", [slow, *quick], limit=1)


async def test_a_retrying_step_does_not_hold_up_its_siblings(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(one_waits, witness.folder)
    await until(lambda: sum(entry.startswith("quick") for entry in witness.entries) == 6)
    witness.open("on")
    assert (await handle.result(PATIENCE_S))[0] == "retrying"


@kagzi.step(retry=Retry.fixed(2, 3600.0))
async def much_later(folder: str) -> str:
    Witness(folder).note("attempt")
    raise steps.Flaky("not yet")


@kagzi.workflow
async def waits_long(ctx: Context, folder: str) -> str:
    return await ctx.step(much_later, folder)


async def test_a_long_delay_parks_the_run(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(waits_long, witness.folder)

    async def parked() -> bool:
        return await handle.status() == "sleeping"

    await until(parked)
    assert witness.entries == ["attempt"]
    (attempt,) = (await handle.describe()).attempts
    assert attempt.retry_at is not None
    await engine.rows(
        "UPDATE kagzi.step_attempts SET retry_at = now() WHERE run_id = %(id)s", id=handle.run_id
    )
    await engine.rows(
        "UPDATE kagzi.workflow_runs SET wake_at = now() WHERE id = %(id)s", id=handle.run_id
    )
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.attempts == 2
    assert witness.entries == ["attempt"] * 2


# --- a person's retry -----------------------------------------------------------------------


@kagzi.step
async def item(folder: str, number: int) -> int:
    witness = Witness(folder)
    witness.note(str(number))
    if number % 27 == 0 and not witness.is_open("mended"):
        raise steps.Flaky(f"item {number}")
    return number


@kagzi.workflow
async def batch(ctx: Context, folder: str, size: int) -> int:
    result = await ctx.parallel_vec(
        "items", [item.bind(folder, n) for n in range(size)], on_error=ErrorStrategy.COLLECT_ALL
    )
    return sum(result.into_result())


async def test_a_retry_runs_the_37_failed_steps_of_1000_again_and_no_other(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(batch, witness.folder, 999)
    error = await engine.outcome(handle)
    assert isinstance(error, kagzi.RunFailed)
    assert "37 of 999 steps failed" in str(error)
    assert len(witness.entries) == 999
    witness.open("mended")
    await engine.client.retry(handle.id)
    assert await handle.result(PATIENCE_S) == sum(range(999))
    counts = witness.counts
    assert {n for n in range(999) if counts[str(n)] == 2} == set(range(0, 999, 27))
    assert len(witness.entries) == 999 + 37
    details = await handle.describe()
    assert len(details.attempts) == 37, "what failed before stays on record"
    assert details.groups[0].cached == 962


@kagzi.workflow
async def handles_one(ctx: Context, folder: str) -> str:
    try:
        await ctx.step(steps.unless, folder, "handled", "mended", id="handled")
        branch = "plain"
    except StepFailed:
        branch = await ctx.step(steps.note, folder, "fallback", id="fallback")
    await ctx.step(steps.unless, folder, "fatal", "mended", id="fatal")
    return branch


async def test_a_failure_that_the_workflow_handled_keeps_its_branch(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(handles_one, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "fallback"
    assert witness.counts == {"handled": 1, "fallback": 1, "fatal": 2}


async def test_a_handled_failure_runs_again_when_it_is_named(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(handles_one, witness.folder)
    await engine.outcome(handle)
    witness.open("mended")
    await engine.client.retry(handle, steps=["handled"])
    assert await handle.result(PATIENCE_S) == "plain"
    assert witness.counts == {"handled": 2, "fallback": 1, "fatal": 2}


@kagzi.workflow
async def cleans_up(ctx: Context, folder: str) -> str:
    await ctx.step(steps.note, folder, "before", id="before")
    try:
        return await ctx.step(steps.unless, folder, "work", "mended", id="work")
    except StepFailed:
        await ctx.step(steps.note, folder, "cleanup", id="cleanup")
        raise


async def test_what_was_called_after_the_failure_was_seen_is_cleared(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(cleans_up, witness.folder)
    await engine.outcome(handle)
    assert (await engine.ids(handle)).keys() == {"before", "work", "cleanup"}
    await engine.client.retry(handle)
    await engine.outcome(handle)
    assert witness.counts == {"before": 1, "work": 2, "cleanup": 2}
    witness.open("mended")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "work"
    assert (await engine.ids(handle)).keys() == {"before", "work"}


@kagzi.workflow
async def fails_in_a_nest(ctx: Context, folder: str) -> list[list[str]]:
    return await ctx.parallel_vec("outer", [nest.bind(folder, n) for n in range(2)])


@kagzi.step
async def nest(ctx: Context, folder: str, number: int) -> list[str]:
    return await ctx.parallel_vec(
        "inner",
        [
            steps.note.bind(folder, f"{number}.note"),
            steps.unless.bind(folder, f"{number}.unless", f"mended{number}"),
        ],
        limit=1,
    )


async def test_a_retry_after_an_inner_failure_keeps_the_inner_results(
    engine: Engine, witness: Witness
) -> None:
    witness.open("mended1")
    handle = await engine.start(fails_in_a_nest, witness.folder)
    await engine.outcome(handle)
    witness.open("mended0")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == [[f"{n}.note", f"{n}.unless"] for n in range(2)]
    assert witness.counts["0.note"] == 1
    assert witness.counts["0.unless"] == 2


async def test_only_what_failed_can_be_retried(engine: Engine, witness: Witness) -> None:
    witness.open("mended")
    handle = await engine.start(cleans_up, witness.folder)
    await handle.result(PATIENCE_S)
    with pytest.raises(InvalidInput, match="completed"):
        await engine.client.retry(handle)
    witness.shut("mended")
    broken = await engine.start(batch, witness.folder, 1)
    await engine.outcome(broken)
    with pytest.raises(UnknownStep, match="nowhere"):
        await engine.client.retry(broken, steps=["nowhere"])
    with pytest.raises(kagzi.UnknownRun, match="no-such-run"):
        await engine.client.retry("no-such-run")


# --- memos ----------------------------------------------------------------------------------


@kagzi.step(memo="global", memo_version="1")
async def costly(folder: str, number: int) -> int:
    Witness(folder).note(str(number))
    return number * number


@kagzi.step(memo="workflow")
async def costly_here(folder: str, number: int) -> int:
    Witness(folder).note(str(number))
    return number


@kagzi.step(memo="global", memo_ttl=0.001)
async def costly_briefly(folder: str, number: int) -> int:
    Witness(folder).note(str(number))
    return number


@kagzi.workflow
async def saves(ctx: Context, folder: str, kind: str) -> list[int]:
    step = {"global": costly, "workflow": costly_here, "brief": costly_briefly}[kind]
    return await ctx.parallel_vec("g", [step.bind(folder, n) for n in range(20)])


@kagzi.workflow
async def saves_elsewhere(ctx: Context, folder: str) -> list[int]:
    return await ctx.parallel_vec("g", [costly_here.bind(folder, n) for n in range(20)])


async def test_a_memo_answers_other_runs_and_is_their_own_checkpoint(
    engine: Engine, witness: Witness
) -> None:
    first, _ = await engine.drive(saves, witness.folder, "global")
    second, handle = await engine.drive(saves, witness.folder, "global")
    assert first == second == [n * n for n in range(20)]
    assert len(witness.entries) == 20
    details = await handle.describe()
    assert {step.process_id for step in details.steps} == {-1}
    assert details.groups[0].cached == 20
    await engine.rows("DELETE FROM kagzi.memos")
    assert await engine.replay(handle) == second
    assert len(witness.entries) == 20


async def test_a_memo_of_a_workflow_does_not_answer_another(
    engine: Engine, witness: Witness
) -> None:
    await engine.run(saves, witness.folder, "workflow")
    await engine.run(saves, witness.folder, "workflow")
    assert len(witness.entries) == 20
    await engine.run(saves_elsewhere, witness.folder)
    assert len(witness.entries) == 40


async def test_a_memo_that_has_run_out_answers_nobody(engine: Engine, witness: Witness) -> None:
    await engine.run(saves, witness.folder, "brief")

    async def run_out() -> bool:
        query = "SELECT count(*) FROM kagzi.memos WHERE expires_at > kagzi.now_at()"
        return (await engine.rows(query))[0][0] == 0

    await until(run_out)
    await engine.run(saves, witness.folder, "brief")
    assert len(witness.entries) == 40


async def test_two_runs_may_compute_one_memo_at_once(engine: Engine, witness: Witness) -> None:
    handles = [await engine.start(saves, witness.folder, "global") for _ in range(5)]
    results = await asyncio.gather(*(handle.result(PATIENCE_S) for handle in handles))
    assert results == [[n * n for n in range(20)]] * 5
    assert 20 <= len(witness.entries) <= 100
