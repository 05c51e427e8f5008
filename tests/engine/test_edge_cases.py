"""The specification's seven edge cases, by name, each written to hold under real concurrency.

Race condition on cache insert, partial failure with fail-fast, nested parallelism, parallel with
retry, memoisation across runs, race with all failures, large-scale parallel execution.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import pytest

import kagzi
from kagzi import AllStepsFailed, Context, ErrorStrategy, Retry, RunConflict, StepFailed
from tests.engine import programs, steps
from tests.engine.witness import Witness
from tests.engine.worker_process import worker_process
from tests.fix_engine import PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- 1. race condition on cache insert ------------------------------------------------------


@kagzi.workflow
async def crowd(ctx: Context, folder: str, callers: int, ids: int) -> list[str]:
    async def caller(number: int) -> str:
        name = f"shared-{number % ids}"
        return await ctx.step(steps.gated, folder, name, "go", id=name)

    return await asyncio.gather(*(caller(number) for number in range(callers)))


async def test_race_condition_on_cache_insert_runs_one_body_for_many_callers_of_an_id(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(crowd, witness.folder, 90, 3)
    await until(lambda: len(witness.entries) == 3)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == [f"shared-{n % 3}" for n in range(90)]
    assert witness.counts == {f"{sign}shared-{n}": 1 for n in range(3) for sign in "+-"}
    assert await engine.count("step_runs", handle.run_id) == 3


async def test_race_condition_on_cache_insert_of_one_run_started_by_many_clients_at_once(
    dsn: str, witness: Witness
) -> None:
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(started(dsn, processes=1, concurrency=4))
            for _ in range(3)
        ]
        handles = await asyncio.gather(
            *(
                engine.client.start(programs.halves, witness.folder, 40, id="the-run")
                for engine in engines
                for _ in range(12)
            )
        )
        assert [handle.is_new for handle in handles].count(True) == 1
        assert len({handle.run_id for handle in handles}) == 1
        witness.open("second")
        results = await asyncio.gather(*(handle.result(PATIENCE_S) for handle in handles))
        assert results == [["before", *(f"part {n}" for n in range(40)), "after"]] * len(handles)
        assert await engines[0].count("workflow_runs") == 1
    assert set(witness.counts.values()) == {1}, "each body ran once"
    assert len(witness.entries) == 2 + 20 + 2 * 20


@kagzi.workflow
async def many_texts(ctx: Context, folder: str, size: int) -> list[str]:
    if size == 1:
        return [await ctx.step(steps.gated, folder, "0", "go", id="alone")]
    calls = [steps.gated.bind(folder, f"{index}", "go") for index in range(size)]
    return await ctx.parallel_vec("texts", calls)


@pytest.mark.parametrize("size", [1, 3, 100], ids=["single", "arrays", "copy"])
async def test_race_condition_on_cache_insert_gives_what_was_committed_first(
    engine: Engine, witness: Witness, size: int
) -> None:
    """Another's row under the same key, as after a commit whose answer was lost, is what counts."""
    handle = await engine.start(many_texts, witness.folder, size)
    await until(lambda: len(witness.entries) == size)
    await engine.rows(
        "INSERT INTO kagzi.step_runs (run_id, step_id, function, status, output, input_hash,"
        " attempts, started_at, completed_at, call_number, completed_number, worker_id, process_id)"
        " VALUES (%(id)s, %(step_id)s, 'tests.engine.steps.gated', 'completed', '\"theirs\"', '',"
        " 1, now(), now(), 1, 1, %(id)s, 0)",
        id=handle.run_id,
        step_id="alone" if size == 1 else "texts/1",
    )
    witness.open("go")
    expected = ["0", "theirs", *(str(index) for index in range(2, size))]
    expected = expected[-1:] if size == 1 else expected
    assert await handle.result(PATIENCE_S) == expected
    assert await engine.count("step_runs", handle.run_id) == size


# --- 2. partial failure with fail-fast ------------------------------------------------------


@kagzi.step
async def branch_in_pool(ctx: Context, folder: str, gate: str) -> str:
    await ctx.step(steps.note, folder, "early")
    await ctx.step(steps.gated, folder, "middle", gate)
    return await ctx.step(steps.note, folder, "late")


@kagzi.workflow
async def partly_failing(ctx: Context, folder: str, where: str) -> Any:
    async def branch_in_coordinator(ctx: Context) -> str:
        await ctx.step(steps.note, folder, "early")
        await ctx.step(steps.gated, folder, "middle", "never")
        return await ctx.step(steps.note, folder, "late")

    branch: Any = branch_in_pool.bind(folder, "never")
    if where == "coordinator":
        branch = branch_in_coordinator
    return await ctx.parallel(
        "both", branch, steps.fail_behind.bind(folder, "failure", "fail"), steps.add.bind(1, 2)
    )


@pytest.mark.parametrize("where", ["pool", "coordinator"])
async def test_partial_failure_with_fail_fast_starts_no_later_step_of_a_sibling(
    engine: Engine, witness: Witness, where: str
) -> None:
    handle = await engine.start(partly_failing, witness.folder, where)
    await until(lambda: "+middle" in witness.entries)
    await engine.stored(handle, 2)  # also the third of them is done
    witness.open("fail")
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert isinstance(error, kagzi.RunFailed)
    assert error.step_id == "both/1"
    assert error.is_a(steps.Flaky)
    await engine.settled()
    witness.open("never")  # whoever still waited there would go on to "late"
    await engine.run(programs.one_note, witness.folder, "sentinel")
    assert witness.entries == ["early", "+middle", "failure", "!middle", "sentinel"] or (
        witness.entries == ["early", "+middle", "failure", "sentinel", "!middle"]
    )

    run = await handle.describe()
    assert run.status == "failed"
    outcomes = {step.id: step.status for step in run.steps}
    name = "note" if where == "pool" else "branch_in_coordinator"
    assert outcomes == {
        f"both/0/{name}": "completed",
        "both/1": "failed",
        "both/2": "completed",
    } or (outcomes == {"both/0/note": "completed", "both/1": "failed", "both/2": "completed"})
    (group,) = [group for group in run.groups if group.path == "both"]
    assert (group.decision, group.decided_index) == ("failure", 1)
    assert (group.succeeded, group.failed) == (1, 1)

    before = witness.entries
    again = await engine.replay(handle)
    assert (type(again), str(again)) == (type(error), str(error))
    assert witness.entries == before, "a replay of the decision starts nothing"


@kagzi.workflow
async def failing_first(ctx: Context, folder: str, size: int, limit: int | None) -> Any:
    calls = [steps.fail.bind(folder, "first")]
    calls += [steps.note.bind(folder, f"other {index}") for index in range(1, size)]
    return await ctx.parallel_vec("all", calls, limit=limit)


async def test_partial_failure_with_fail_fast_drops_all_that_waits_for_the_limit(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(failing_first, witness.folder, 2_000, 1)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    await engine.settled()
    assert witness.entries == ["first"]
    assert await engine.count("step_runs", handle.run_id) == 1


@kagzi.workflow
async def failing_beside_threads(ctx: Context, folder: str) -> Any:
    calls = [steps.gated_sync.bind(folder, f"{index}", "late") for index in range(4)]
    return await ctx.parallel("all", *calls, steps.fail_behind.bind(folder, "failure", "fail"))


async def test_partial_failure_with_fail_fast_waits_for_no_thread_and_drops_its_late_answer(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(failing_beside_threads, witness.folder)
    await until(lambda: len(witness.entries) == 4)
    witness.open("fail")
    assert isinstance(await engine.outcome(handle), StepFailed)
    assert witness.counts["failure"] == 1
    assert not any(entry.startswith("-") for entry in witness.entries)
    witness.open("late")
    await until(lambda: sum(entry.startswith("-") for entry in witness.entries) == 4)
    await engine.run(programs.one_note, witness.folder, "sentinel")
    assert await engine.ids(handle) == {"all/4": "fail_behind"}


# --- 3. nested parallelism ------------------------------------------------------------------


@kagzi.workflow
async def nested(ctx: Context, outer: int, inner: int) -> list[list[int]]:
    async def closure(ctx: Context) -> list[int]:
        return await ctx.map("squares", steps.square, range(inner))

    in_pool = [steps.squares_of.bind(inner) for _ in range(outer)]
    return await ctx.parallel_vec("outer", [*in_pool, closure])


async def test_nested_parallelism_completes_and_records_who_is_inside_whom(engine: Engine) -> None:
    result, handle = await engine.drive(nested, 6, 5)
    assert result == [[0, 1, 4, 9, 16]] * 7
    run = await handle.describe()
    inner = [step for step in run.steps if step.parent_step_id is not None]
    assert sorted((step.id, step.parent_step_id, step.group_path) for step in inner) == [
        (f"outer/{o}/squares/{i}", f"outer/{o}", f"outer/{o}/squares")
        for o in range(7)
        for i in range(5)
    ]
    outer = [step for step in run.steps if step.parent_step_id is None]
    assert sorted((step.id, step.group_path) for step in outer) == [
        (f"outer/{o}", "outer") for o in range(7)
    ]
    groups = await engine.rows(
        "SELECT path, parent_step_id FROM kagzi.parallel_groups WHERE run_id = %(id)s ORDER BY 1",
        id=handle.run_id,
    )
    assert groups == [("outer", None), *((f"outer/{o}/squares", f"outer/{o}") for o in range(7))]
    assert await engine.replay(handle) == result


# --- 4. parallel with retry -----------------------------------------------------------------


@kagzi.workflow
async def retrying_group(ctx: Context, folder: str, size: int) -> list[int]:
    third = [steps.third_time, steps.third_time_sync]
    return await ctx.parallel_vec(
        "all", [third[index % 2].bind(folder, f"{index}") for index in range(size)]
    )


async def test_parallel_with_retry_runs_failed_steps_again_and_counts_their_attempts(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(retrying_group, witness.folder, 8)
    assert result == [3] * 8
    assert witness.counts == {f"{index} {n}": 1 for index in range(8) for n in (1, 2, 3)}
    run = await handle.describe()
    assert {step.id: step.attempts for step in run.steps} == {f"all/{n}": 3 for n in range(8)}
    assert sorted((a.step_id, a.attempt, a.error.message) for a in run.attempts) == [
        (f"all/{index}", n, f"attempt {n} of {index}") for index in range(8) for n in (1, 2)
    ]
    assert await engine.replay(handle) == result
    assert len(witness.entries) == 24


@kagzi.workflow
async def retry_with_sibling(ctx: Context, folder: str) -> Any:
    policy = Retry(max_attempts=4, initial=0.01, factor=2.0, jitter=False)
    calls = [steps.fail.bind(folder, "flaky").options(retry=policy), steps.note.bind(folder, "ok")]
    return await ctx.parallel_vec("all", calls, on_error=ErrorStrategy.COLLECT_ALL)


@kagzi.workflow
async def retry_that_ends_in_failure(ctx: Context, folder: str) -> list[Any]:
    result = await retry_with_sibling.function(ctx, folder)
    return [result.values, [[i, e.step_id, e.attempts] for i, e in result.errors.items()]]


async def test_parallel_with_retry_backs_off_exponentially_and_gives_up_at_the_last_attempt(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(retry_that_ends_in_failure, witness.folder)
    assert result == [[None, "ok"], [[0, "all/0", 4]]]
    assert witness.counts == {"flaky": 4, "ok": 1}
    attempts = (await handle.describe()).attempts
    assert [attempt.attempt for attempt in attempts] == [1, 2, 3, 4]
    waits = [
        (attempt.retry_at - attempt.completed_at).total_seconds()
        for attempt in attempts
        if attempt.retry_at is not None
    ]
    # Counted from when the failure was recorded, by the store's clock.
    assert all(wait_s >= least_s for wait_s, least_s in zip(waits, [0.01, 0.02, 0.04], strict=True))
    for before, after in pairwise(attempts):
        assert before.retry_at is not None
        assert after.started_at >= before.retry_at


# --- 5. memoisation across runs -------------------------------------------------------------


async def test_memoisation_across_runs_of_a_worker_that_is_killed_half_way(
    dsn: str, witness: Witness
) -> None:
    size = 40
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(programs.halves, witness.folder, size, id="the-run")
        with worker_process(dsn) as first:
            await until(lambda: len(witness.entries) == 1 + size)

            async def half_is_committed() -> bool:
                return await handle.progress() == (1 + size // 2, 0)

            await until(half_is_committed)
            first.kill()
        assert await handle.status() == "running", "its worker had no time to say anything"
        witness.open("second")
        with worker_process(dsn):
            expected = ["before", *(f"part {index}" for index in range(size)), "after"]
            assert await handle.result(PATIENCE_S) == expected

            committed = ["before", *(f"part {index}" for index in range(size // 2)), "after"]
            cut_off = [f"part {index}" for index in range(size // 2, size)]
            assert witness.counts == {
                **dict.fromkeys(committed, 1),
                **{f"+{entry}": 2 for entry in cut_off},
                **{f"-{entry}": 1 for entry in cut_off},
            }
            entries = witness.entries
            again = await client.start(programs.halves, witness.folder, size, id="the-run")
            assert not again.is_new
            assert again.run_id == handle.run_id
            assert await again.result(PATIENCE_S) == expected
            with pytest.raises(RunConflict, match="another input"):
                await client.start(programs.halves, witness.folder, size + 1, id="the-run")
            assert witness.entries == entries, "nothing ran again"


# --- 6. race with all failures --------------------------------------------------------------


@kagzi.workflow
async def lost_race(ctx: Context, folder: str, size: int) -> Any:
    calls = [
        (steps.fail, steps.fail_sync)[index % 2].bind(folder, f"{index}") for index in range(size)
    ]
    return await ctx.race("mirrors", calls)


@kagzi.workflow
async def caught_lost_race(ctx: Context, folder: str, size: int) -> list[list[str]]:
    try:
        await lost_race.function(ctx, folder, size)
    except AllStepsFailed as error:
        return [[failed.step_id, failed.message] for failed in error.exceptions]
    return []


async def test_race_with_all_failures_lists_every_failure_by_step_id(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(lost_race, witness.folder, 12)
    error = await engine.outcome(handle)
    assert isinstance(error, AllStepsFailed)
    assert isinstance(error, ExceptionGroup)
    assert [failed.step_id for failed in error.exceptions] == [f"mirrors/{n}" for n in range(12)]
    for index, failed in enumerate(error.exceptions):
        assert failed.is_a(steps.Flaky)
        assert failed.message == f"{index} failed"
        assert f"'mirrors/{index}'" in str(error), "the message names each of them"
    assert witness.counts == {str(index): 1 for index in range(12)}
    again = await engine.replay(handle)
    assert str(again) == str(error)
    assert len(witness.entries) == 12


async def test_race_with_all_failures_can_be_handled_by_the_workflow(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(caught_lost_race, witness.folder, 5)
    assert result == [[f"mirrors/{index}", f"{index} failed"] for index in range(5)]
    assert await engine.replay(handle) == result
    assert len(witness.entries) == 5


# --- 7. large-scale parallel execution ------------------------------------------------------


@kagzi.workflow
async def fifty_in_reverse(ctx: Context, folder: str, size: int) -> list[str]:
    """Each step waits for the one after it: they end in the reverse order of their calls."""
    calls = [steps.relay.bind(folder, index) for index in range(size)]
    return await ctx.parallel_vec("chain", calls)


async def test_large_scale_parallel_execution_of_50_steps_keeps_their_order(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(fifty_in_reverse, witness.folder, 50)
    await until(lambda: witness.counts["begun"] == 50)
    witness.open("50")
    expected = [str(index) for index in range(50)]
    assert await handle.result(PATIENCE_S) == expected
    assert [entry for entry in witness.entries if entry != "begun"] == expected[::-1]
    assert await engine.replay(handle) == expected
    assert len(witness.entries) == 100
