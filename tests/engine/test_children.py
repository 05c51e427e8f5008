"""Child runs: started once, waited for without holding anything, ended with their parent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import (
    ChildFailed,
    Context,
    ErrorStrategy,
    InvalidInput,
    RunConflict,
    RunStatus,
    RunWasCancelled,
    StepFailed,
)
from tests.engine import steps
from tests.engine.test_operations import is_status
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@kagzi.workflow
async def child(ctx: Context, folder: str, name: str, gate: str = "") -> str:
    await ctx.step(steps.note, folder, f"child {name}")
    if gate:
        await ctx.step(steps.gated, folder, name, gate)
    return name.upper()


@kagzi.workflow
async def parent(ctx: Context, folder: str, gate: str = "") -> str:
    got = await ctx.run_child(child, folder, "a", gate)
    await ctx.step(steps.note, folder, f"parent {got}")
    return got


@kagzi.workflow
async def parent_of_group(ctx: Context, folder: str, count: int) -> list[str]:
    calls = [child.bind(folder, f"{index}") for index in range(count)]
    return await ctx.parallel_vec("kids", calls, limit=3)


@kagzi.workflow
async def grandparent(ctx: Context, folder: str, gate: str = "") -> str:
    return await ctx.run_child(parent, folder, gate)


@kagzi.workflow
async def starts_and_goes_on(ctx: Context, folder: str) -> list[str]:
    handle = await ctx.start_child(child, folder, "b", "go", id=f"b of {folder}")
    await ctx.step(steps.note, folder, f"started {handle.id}")
    return [await handle.result(), await handle.result()]


# --- results --------------------------------------------------------------------------------


async def test_child_runs_as_a_run_of_its_own(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(parent, witness.folder)
    assert result == "A"
    assert witness.entries == ["child a", "parent A"]
    assert await engine.ids(handle) == {"child": "child", "note": "note"}
    summaries = await engine.client.runs(workflow="child")
    mine = [one for one in summaries if one.id == f"{handle.run_id}/child"]
    assert [one.status for one in mine] == [RunStatus.COMPLETED]
    assert await engine.replay(handle) == "A"
    assert witness.counts["child a"] == 1


@pytest.mark.parametrize("count", [1, 8])
async def test_children_in_a_group_give_results_in_order(
    engine: Engine, witness: Witness, count: int
) -> None:
    result = await engine.run(parent_of_group, witness.folder, count)
    assert result == [str(index) for index in range(count)]
    assert sorted(witness.entries) == sorted(f"child {index}" for index in range(count))


async def test_started_child_has_a_handle_and_its_own_id(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(starts_and_goes_on, witness.folder)
    await until(lambda: any(e.startswith("started") for e in witness.entries))
    assert f"started b of {witness.folder}" in witness.entries
    witness.open("go")
    assert await handle.result(PATIENCE_S) == ["B", "B"]
    assert await (await engine.client.get(f"b of {witness.folder}")).result(PATIENCE_S) == "B"
    assert await engine.replay(handle) == ["B", "B"]
    assert witness.counts["child b"] == 1


async def test_parent_holds_nothing_while_it_waits(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(parent, witness.folder, "go")
    await until(lambda: is_status(handle, RunStatus.SLEEPING))
    await until(lambda: handle.run_id not in engine.worker.runs)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "A"
    assert witness.counts["child a"] == 1


async def test_workers_with_one_place_drive_a_family(dsn: str, witness: Witness) -> None:
    async with started(dsn, concurrency=1, processes=1) as engine:
        assert await engine.run(grandparent, witness.folder) == "A"
    assert witness.entries == ["child a", "parent A"]


async def test_child_is_driven_by_another_worker(dsn: str, witness: Witness) -> None:
    async with (
        started(dsn, processes=1) as first,
        started(dsn, processes=1, concurrency=1) as other,
    ):
        handle = await first.start(parent_of_group, witness.folder, 12)
        assert len(await handle.result(PATIENCE_S)) == 12
        assert other.worker.lost is None


async def test_crash_at_any_moment_starts_no_child_twice(engine: Engine, witness: Witness) -> None:
    _, handle = await engine.drive(parent_of_group, witness.folder, 3)
    for keep in (0, *await engine.numbers(handle)):
        assert await engine.replay(handle, keep) == ["0", "1", "2"]
    assert len(witness.entries) == 3


# --- failures -------------------------------------------------------------------------------


@kagzi.workflow
async def failing_child(ctx: Context, folder: str, gate: str) -> str:
    await ctx.step(steps.note, folder, "tried")
    return await ctx.step(steps.fails_until, folder, gate)


@kagzi.workflow
async def parent_of_failing(ctx: Context, folder: str, gate: str) -> str:
    return await ctx.run_child(failing_child, folder, gate)


@kagzi.workflow
async def parent_that_handles(ctx: Context, folder: str) -> list[Any]:
    calls = [failing_child.bind(folder, "never"), child.bind(folder, "ok")]
    done = await ctx.parallel_vec("kids", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return [done.values, [error.is_a(ChildFailed) for error in done.errors.values()]]


async def test_failure_of_a_child_is_a_failed_step_of_the_parent(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(parent_of_failing, witness.folder, "open")
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.is_a(ChildFailed)
    assert "Flaky" in error.message


async def test_parent_can_handle_failures_of_children(engine: Engine, witness: Witness) -> None:
    assert await engine.run(parent_that_handles, witness.folder) == [[None, "OK"], [True]]


async def test_retry_of_the_parent_lets_the_failed_child_go_on(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(parent_of_failing, witness.folder, "open")
    assert isinstance(await engine.outcome(handle), StepFailed)
    witness.open("open")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "at last"
    assert witness.counts["tried"] == 1, "the child kept its checkpoints"


# --- cancel ---------------------------------------------------------------------------------


@kagzi.workflow
async def parent_of_both(ctx: Context, folder: str) -> None:
    one = await ctx.start_child(child, folder, "ends", "go", id=f"ends {folder}")
    other = await ctx.start_child(
        child, folder, "stays", "go", id=f"stays {folder}", on_parent_cancel="abandon"
    )
    await asyncio.gather(one.result(), other.result())


async def test_cancel_of_a_parent_ends_its_children_but_for_abandoned_ones(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(parent_of_both, witness.folder)
    await until(lambda: {"+ends", "+stays"} <= set(witness.entries))
    await handle.cancel()
    with pytest.raises(RunWasCancelled):
        await handle.result(PATIENCE_S)
    ends = await engine.client.get(f"ends {witness.folder}")
    await until(lambda: is_status(ends, RunStatus.CANCELLED))
    witness.open("go")
    stays = await engine.client.get(f"stays {witness.folder}")
    assert await stays.result(PATIENCE_S) == "STAYS"


async def test_cancel_reaches_grandchildren(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(grandparent, witness.folder, "go")
    await until(lambda: "+a" in witness.entries)
    await handle.cancel()
    query = (
        "WITH RECURSIVE family AS (SELECT id, status FROM kagzi.workflow_runs WHERE id = %(id)s"
        " UNION ALL SELECT r.id, r.status FROM kagzi.workflow_runs r JOIN family f"
        " ON r.parent_run_id = f.id) SELECT status FROM family"
    )

    async def all_cancelled() -> bool:
        return await engine.rows(query, id=handle.run_id) == [("cancelled",)] * 3

    await until(all_cancelled)


@kagzi.workflow
async def race_of_children(ctx: Context, folder: str) -> str:
    won = await ctx.race("r", [child.bind(folder, "quick"), child.bind(folder, "slow", "go")])
    return won.value


async def test_children_that_lose_a_race_are_cancelled(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(race_of_children, witness.folder)
    assert result == "QUICK"

    async def loser() -> bool:
        query = "SELECT status FROM kagzi.workflow_runs WHERE parent_run_id = %(id)s ORDER BY 1"
        return await engine.rows(query, id=handle.run_id) == [("cancelled",), ("completed",)]

    await until(loser)


async def test_retry_of_a_cancelled_parent_lets_its_children_go_on(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(parent, witness.folder, "go")
    await until(lambda: "+a" in witness.entries)
    await handle.cancel()
    await until(lambda: is_status(handle, RunStatus.CANCELLED))
    witness.open("go")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "A"
    assert witness.counts["child a"] == 1


# --- bad input ------------------------------------------------------------------------------


@kagzi.workflow
async def bad_calls(ctx: Context, folder: str) -> list[str]:
    said = []
    for attempt in (
        lambda: ctx.run_child(steps.add, 1, 2),  # type: ignore[arg-type]
        lambda: ctx.run_child(child, folder, "x", on_parent_cancel="ignore"),  # type: ignore[arg-type]
        lambda: ctx.run_child(child, folder, "x", priority="high"),  # type: ignore[arg-type]
        lambda: ctx.run_child(child, folder, 3),
        lambda: ctx.run_child(child, folder, "x", id=""),
        lambda: ctx.run_child(child, folder, "x", queue=""),
        lambda: ctx.start_child(child, folder, "x", key=7),  # type: ignore[arg-type]
        lambda: ctx.parallel("g", steps.add.bind(1, 2).options(queue="q")),
    ):
        try:
            await attempt()
        except (InvalidInput, kagzi.CodecError) as error:
            said.append(type(error).__name__)
    return said


@kagzi.workflow
async def takes_a_name(ctx: Context, folder: str, name: str) -> str:
    return await ctx.run_child(child, folder, "mine", id=name)


async def test_bad_calls_are_refused_and_start_nothing(engine: Engine, witness: Witness) -> None:
    before = await engine.count("workflow_runs")
    assert len(await engine.run(bad_calls, witness.folder)) == 8
    assert await engine.count("workflow_runs") == before + 1


async def test_id_of_a_run_that_is_no_child_is_refused(engine: Engine, witness: Witness) -> None:
    name = f"taken in {witness.folder}"
    await engine.run(child, witness.folder, "other", id=name)
    handle = await engine.start(takes_a_name, witness.folder, name)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.is_a(RunConflict)
