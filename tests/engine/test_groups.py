"""Groups: shapes, order, limits, priorities, strategies, timeouts, races."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, GroupTimeout, ParallelResult, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- shapes and order -----------------------------------------------------------------------


@kagzi.workflow
async def shapes(ctx: Context) -> dict[str, Any]:
    pair = await ctx.parallel("pair", steps.add.bind(1, 2), steps.square.bind(3))
    wide = await ctx.parallel("wide", *(steps.square.bind(n) for n in range(12)))
    named = await ctx.parallel("named", {"a": steps.square.bind(2), "b": steps.cube.bind(2)})
    vec = await ctx.parallel_vec("vec", [steps.square.bind(n) for n in range(5)])
    mapped = await ctx.map("mapped", steps.square, iter(range(4)), key=str)
    closures = await ctx.parallel_vec("closures", [lambda: 1, lambda: 2])
    assert type(pair) is tuple
    assert type(wide) is tuple
    return {
        "pair": list(pair),
        "wide": list(wide),
        "named": named,
        "vec": vec,
        "mapped": mapped,
        "closures": closures,
    }


async def test_each_kind_of_group_gives_its_shape_in_the_order_of_its_calls(
    engine: Engine,
) -> None:
    result, handle = await engine.drive(shapes)
    assert result == {
        "pair": [3, 9],
        "wide": [n * n for n in range(12)],
        "named": {"a": 4, "b": 8},
        "vec": [0, 1, 4, 9, 16],
        "mapped": [0, 1, 4, 9],
        "closures": [1, 2],
    }
    assert list(result["named"]) == ["a", "b"]
    assert await engine.replay(handle) == result
    assert {"pair/0", "pair/1", "named/a", "mapped/3", "closures/1"} <= (
        await engine.ids(handle)
    ).keys()


@kagzi.workflow
async def last_first(ctx: Context, folder: str, size: int) -> list[str]:
    return await ctx.parallel_vec("g", [steps.relay.bind(folder, n) for n in range(size)])


async def test_results_come_in_order_when_the_last_ends_first(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(last_first, witness.folder, 10)
    await until(lambda: witness.counts["begun"] == 10)
    witness.open("10")
    assert await handle.result(PATIENCE_S) == [str(n) for n in range(10)]
    ended = [entry for entry in witness.entries if entry != "begun"]
    assert ended == [str(n) for n in reversed(range(10))]


@kagzi.workflow
async def of_size(ctx: Context, size: int) -> int:
    values = await ctx.parallel_vec("g", [steps.add.bind(n, 1) for n in range(size)])
    assert values == [n + 1 for n in range(size)]
    return len(values)


@pytest.mark.parametrize("size", [0, 1, 2, 64, 65, 513, 10_000])
async def test_groups_of_any_size_are_whole_live_and_on_replay(engine: Engine, size: int) -> None:
    result, handle = await engine.drive(of_size, size)
    assert result == size
    assert await engine.count("step_runs", handle.run_id) == size
    (group,) = (await handle.describe()).groups
    assert (group.size, group.succeeded, group.failed, group.cached) == (size, size, 0, 0)
    assert await engine.replay(handle) == size


@kagzi.workflow
async def keyed(ctx: Context, keys: list[str]) -> dict[str, str]:
    return await ctx.parallel("k", {key: steps.echo.bind(key) for key in keys})


async def test_keys_with_odd_characters_name_their_steps(engine: Engine) -> None:
    keys = ["https://a/b?c#d", "a%2Fb", "ключ", " ", "a\nb", "x" * 200]
    result, handle = await engine.drive(keyed, keys)
    assert result == {key: key for key in keys}
    ids = await engine.ids(handle)
    assert len(ids) == len(keys)
    assert "k/https:%2F%2Fa%2Fb?c%23d" in ids


# --- limits and priorities ------------------------------------------------------------------


@kagzi.workflow
async def limited(ctx: Context, folder: str, size: int, limit: int, kind: str) -> int:
    step = {"async": steps.brief, "sync": steps.brief_sync}[kind]

    async def closure(number: int) -> str:
        return await steps.brief(folder, str(number))

    calls: list[Any] = [step.bind(folder, str(n)) for n in range(size)]
    if kind == "async":
        calls += [lambda n=n: closure(n) for n in range(size, size + 5)]
    return len(await ctx.parallel_vec("g", calls, limit=limit))


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_no_more_bodies_of_a_group_are_open_than_its_limit(
    engine: Engine, witness: Witness, kind: str, limit: int
) -> None:
    await engine.run(limited, witness.folder, 20, limit, kind)
    assert 1 <= witness.most_open() <= limit


@kagzi.workflow
async def by_function(ctx: Context, folder: str) -> int:
    async def part(name: str) -> list[str]:
        return await ctx.parallel_vec(
            name, [steps.brief_limited.bind(folder, f"{name}{n}") for n in range(8)]
        )

    return sum(map(len, await asyncio.gather(part("a"), part("b"))))


async def test_the_limit_of_a_function_holds_over_all_its_groups(
    engine: Engine, witness: Witness
) -> None:
    assert await engine.run(by_function, witness.folder) == 16
    assert witness.most_open() <= 2


@kagzi.workflow
async def prioritised(ctx: Context, folder: str) -> None:
    blocker = ctx.parallel_vec(
        "hold", [steps.gated_cpu.bind(folder, f"hold{n}", "go") for n in range(2)]
    )
    await ctx.step(steps.gated, folder, "ready", "ready")
    low = ctx.parallel_vec("low", [steps.note_cpu.bind(folder, f"low{n}") for n in range(4)])
    high = ctx.parallel_vec(
        "high", [steps.note_cpu.bind(folder, f"high{n}") for n in range(4)], priority=5
    )
    top = ctx.parallel_vec("top", [steps.note_cpu.bind(folder, "top").options(priority=9)])
    await asyncio.gather(blocker, low, high, top)


async def test_higher_priority_begins_before_lower_that_came_earlier(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(prioritised, witness.folder)
    await until(lambda: len(witness.entries) == 3)  # both processes are busy computing
    witness.open("ready")
    await until(lambda: engine.worker.executor.scheduler.waiting() == 9)
    witness.open("go")
    await handle.result(PATIENCE_S)
    order = [entry for entry in witness.entries if entry[0] not in "+-"]
    first_low = next(place for place, entry in enumerate(order) if entry.startswith("low"))
    assert order.index("top") <= 1  # two processes begin side by side
    assert first_low >= 4, order


# --- strategies -----------------------------------------------------------------------------


@kagzi.workflow
async def collect(ctx: Context, folder: str) -> dict[str, Any]:
    result: ParallelResult[str] = await ctx.parallel_vec(
        "g",
        [steps.note.bind(folder, "a"), steps.fail.bind(folder, "b"), steps.note.bind(folder, "c")],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    assert not result.is_success
    assert result.first_error is not None
    try:
        result.into_result()
    except ExceptionGroup as group:
        members = [type(member).__name__ for member in group.exceptions]
    return {
        "values": result.values,
        "errors": {str(index): error.step_id for index, error in result.errors.items()},
        "first": result.first_error.is_a(steps.Flaky),
        "members": members,
    }


async def test_collect_all_runs_every_step_and_gives_what_failed_by_place(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(collect, witness.folder)
    assert result == {
        "values": ["a", None, "c"],
        "errors": {"1": "g/1"},
        "first": True,
        "members": ["StepFailed"],
    }
    assert await engine.replay(handle) == result
    assert witness.counts == {"a": 1, "b": 1, "c": 1}


@kagzi.workflow
async def collect_none(ctx: Context) -> list[int]:
    result = await ctx.parallel_vec(
        "g", [steps.square.bind(n) for n in range(3)], on_error=ErrorStrategy.COLLECT_ALL
    )
    assert result.is_success
    assert result.first_error is None
    assert result.errors == {}
    return result.into_result()


async def test_collect_all_without_failures_gives_its_values(engine: Engine) -> None:
    assert await engine.run(collect_none) == [0, 1, 4]


@kagzi.workflow
async def first_failure(ctx: Context, folder: str) -> str:
    try:
        await ctx.parallel_vec(
            "g",
            [
                steps.fail_behind.bind(folder, "slow", "late"),
                steps.fail.bind(folder, "quick"),
                steps.gated.bind(folder, "open", "never"),
            ],
        )
    except StepFailed as failure:
        return failure.step_id
    return "none"


async def test_the_first_failure_is_a_decision_that_a_replay_repeats(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(first_failure, witness.folder)
    assert result == "g/1"
    witness.open("late", "never")
    entries = witness.entries
    assert await engine.replay(handle) == "g/1"
    assert witness.entries == entries, "a decided group starts none of its other steps"
    (group,) = (await handle.describe()).groups
    assert (group.decision, group.decided_index) == ("failure", 1)


# --- timeouts -------------------------------------------------------------------------------


@kagzi.workflow
async def out_of_time(ctx: Context, folder: str) -> str:
    try:
        await ctx.parallel_vec(
            "g", [steps.gated.bind(folder, str(n), "never") for n in range(3)], timeout=0.2
        )
    except GroupTimeout as error:
        return error.path
    return "in time"


async def test_a_group_that_runs_out_of_time_is_cancelled_and_a_replay_says_so_at_once(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(out_of_time, witness.folder)
    assert result == "g"
    await until(lambda: sum(entry.startswith("!") for entry in witness.entries) == 3)
    entries = witness.entries
    assert await engine.replay(handle) == "g"
    assert witness.entries == entries


# --- races ----------------------------------------------------------------------------------


@kagzi.workflow
async def race(ctx: Context, folder: str) -> list[Any]:
    won = await ctx.race(
        "r",
        [
            steps.gated.bind(folder, "slow", "never"),
            steps.fail.bind(folder, "bad"),
            steps.gated.bind(folder, "quick", "go"),
        ],
    )
    return [won.id, won.index, won.value]


async def test_a_race_is_won_by_the_first_success_and_the_others_are_cancelled(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(race, witness.folder)
    await until(lambda: len(witness.entries) == 3)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == ["r/2", 2, "quick"]
    await until(lambda: "!slow" in witness.entries)
    witness.open("never")
    entries = witness.entries
    assert await engine.replay(handle) == ["r/2", 2, "quick"]
    assert witness.entries == entries


@kagzi.workflow
async def race_with_a_limit(ctx: Context, folder: str) -> str:
    won = await ctx.race(
        "r", {str(n): steps.note.bind(folder, str(n)) for n in range(50)}, limit=1
    )
    return won.id


async def test_a_race_with_a_limit_starts_no_further_step_once_it_is_won(
    engine: Engine, witness: Witness
) -> None:
    assert await engine.run(race_with_a_limit, witness.folder) == "r/0"
    await engine.settled()
    assert len(witness.entries) <= 2


@kagzi.workflow
async def two_races(ctx: Context, folder: str, gate: str) -> list[int]:
    """Both calls of the second race are recorded only as far as the first to end."""
    won = await ctx.race(
        "r",
        [steps.gated.bind(folder, "a", gate), steps.gated.bind(folder, "b", gate)],
    )
    return [won.index]


async def test_a_recorded_winner_stays_the_winner_when_its_decision_was_lost(
    engine: Engine, witness: Witness
) -> None:
    witness.open("go")
    result, handle = await engine.drive(two_races, witness.folder, "go")
    await engine.rows("DELETE FROM kagzi.parallel_groups WHERE run_id = %(id)s", id=handle.run_id)
    assert await engine.replay(handle) == result


# --- cancellation ---------------------------------------------------------------------------


@kagzi.workflow
async def cancels_its_group(ctx: Context, folder: str) -> str:
    group = ctx.parallel_vec("g", [steps.gated.bind(folder, str(n), "never") for n in range(3)])
    await ctx.step(steps.gated, folder, "first", "begun")
    group.cancel()
    try:
        await group
    except asyncio.CancelledError:
        return "cancelled"
    return "not"


async def test_a_group_that_its_caller_cancels_stops_its_steps(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(cancels_its_group, witness.folder)
    await until(lambda: sum(entry.startswith("+") for entry in witness.entries) == 4)
    witness.open("begun")
    assert await handle.result(PATIENCE_S) == "cancelled"
    await until(lambda: sum(entry.startswith("!") for entry in witness.entries) == 3)
    assert await engine.count("step_runs", handle.run_id) == 1
