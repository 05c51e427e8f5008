"""Parallel groups: every kind and shape, limits, priorities, failures, timeouts, races."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

import kagzi
from kagzi import (
    AllStepsFailed,
    Context,
    ErrorStrategy,
    GroupTimeout,
    InvalidInput,
    InvalidName,
    ParallelResult,
    Retry,
    StepFailed,
    StepTimeout,
)
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import HOUR_S, PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

COLLECT_ALL = ErrorStrategy.COLLECT_ALL


async def replays(engine: Engine, workflow: Any, *args: Any) -> Any:
    """The result of a new run, checked to be the same on replay."""
    result, handle = await engine.drive(workflow, *args)
    assert await engine.replay(handle) == result
    return result


# --- shapes ---------------------------------------------------------------------------------


@kagzi.workflow
async def all_widths(ctx: Context) -> list[int]:
    wrong = []
    for width in range(13):
        found = await ctx.parallel("wide", *(steps.square.bind(n) for n in range(width)))
        if found != tuple(n * n for n in range(width)):
            wrong.append(width)
    return wrong


async def test_parallel_of_any_width_gives_a_tuple_in_order(engine: Engine) -> None:
    assert await replays(engine, all_widths) == []


@kagzi.workflow
async def all_shapes(ctx: Context, folder: str) -> dict[str, Any]:
    async def closure() -> int:
        return 7

    square = steps.square.bind
    mixed = (square(2), closure, lambda: 8, steps.cube.bind(2), steps.echo.bind("x"))
    collected = await ctx.parallel(
        "collected", {"good": square(1), "bad": steps.fail.bind(folder, "b")}, on_error=COLLECT_ALL
    )
    race = await ctx.race("race", {"only": square(9)})
    return {
        "no calls": list(await ctx.parallel("g")),
        "no keys": await ctx.parallel("g", {}),
        "empty list": await ctx.parallel_vec("g", []),
        "empty map": await ctx.map("g", steps.square, []),
        "empty collected": (await ctx.map("g", steps.square, [], on_error=COLLECT_ALL)).values,
        "one": list(await ctx.parallel("g", square(3))),
        "one of a list": await ctx.parallel_vec("g", [square(4)]),
        "keys": await ctx.parallel("g", {"b": square(5), "a": closure}),
        "generator": await ctx.parallel_vec("g", (square(n) for n in range(4))),
        "named": await ctx.parallel_vec("g", [square(1), square(2)], keys=("x", "y")),
        "map": await ctx.map("g", steps.square, iter(range(3)), key=str),
        "map of a closure": await ctx.map("g", lambda x: [x], "abc"),
        "mixed": list(await ctx.parallel("g", *mixed)),
        "collected": [collected.values, list(collected.errors), list(collected.keys or ())],
        "race": [race.id, race.index, race.value],
    }


async def test_every_kind_and_shape_of_a_group(engine: Engine, witness: Witness) -> None:
    assert await replays(engine, all_shapes, witness.folder) == {
        "no calls": [],
        "no keys": {},
        "empty list": [],
        "empty map": [],
        "empty collected": [],
        "one": [9],
        "one of a list": [16],
        "keys": {"b": 25, "a": 7},
        "generator": [0, 1, 4, 9],
        "named": [1, 4],
        "map": [0, 1, 4],
        "map of a closure": [["a"], ["b"], ["c"]],
        "mixed": [4, 7, 8, 8, "x"],
        "collected": [[1, None], [1], ["good", "bad"]],
        "race": ["race/only", 0, 81],
    }


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


ODD_KEYS = [
    "a/b",
    "a#2",
    "a%2Fb",
    "%",
    "\n",
    "\x7f",
    "é ü",
    "\U0001f600",
    " ",
    ".",
    "\u2028",
    "'\"",
]


@kagzi.workflow
async def odd_keys(ctx: Context, keys: list[str]) -> dict[str, str]:
    return await ctx.parallel("odd", {key: steps.echo.bind(key) for key in keys})


async def test_keys_with_odd_characters_stay_apart_and_come_back_as_they_were(
    engine: Engine,
) -> None:
    result, handle = await engine.drive(odd_keys, ODD_KEYS)
    assert result == {key: key for key in ODD_KEYS}
    ids = list(await engine.ids(handle))
    assert len(ids) == len(ODD_KEYS)
    assert all(step_id.startswith("odd/") and step_id.count("/") == 1 for step_id in ids)
    assert await engine.replay(handle) == result


BAD_KEYS: dict[str, list[Any]] = {
    "twice": ["a", "a"],
    "empty": [""],
    "number": [1],
    "none": [None],
    "long": ["k" * 1000],
    "surrogate": ["\ud800"],
}


@kagzi.workflow
async def bad_keys(ctx: Context, name: str) -> Any:
    keys = BAD_KEYS[name]
    return await ctx.parallel_vec("g", [steps.echo.bind(1) for _ in keys], keys=keys)


@pytest.mark.parametrize("name", BAD_KEYS)
async def test_keys_that_cannot_name_a_step_are_refused(engine: Engine, name: str) -> None:
    handle = await engine.start(bad_keys, name)
    error = await engine.outcome(handle)
    assert isinstance(error, InvalidName), error
    assert await engine.count("step_runs", handle.run_id) == 0


BAD_GROUPS: dict[str, Any] = {
    **{
        f"limit {value!r}": lambda ctx, value=value: ctx.map("g", steps.echo, [1], limit=value)
        for value in (0, -1, 1.5, float("nan"), True, "2", 2**31)
    },
    **{
        f"priority {value!r}": lambda ctx, value=value: ctx.map(
            "g", steps.echo, [1], priority=value
        )
        for value in (1.5, None, True, 2**31, "1")
    },
    **{
        f"timeout {value!r}": lambda ctx, value=value: ctx.map("g", steps.echo, [1], timeout=value)
        for value in (0, -1, float("nan"), float("inf"), "1", True)
    },
    **{
        f"name {value!r}": lambda ctx, value=value: ctx.map(value, steps.echo, [1])
        for value in ("", " a", "a/b", "a#b", 5, "x" * 251, "\t")
    },
    "strategy": lambda ctx: ctx.map("g", steps.echo, [1], on_error="explode"),
    "keys": lambda ctx: ctx.parallel_vec("g", [steps.echo.bind(1)], keys=["a", "b"]),
    "empty race": lambda ctx: ctx.race("g", []),
    "not a call": lambda ctx: ctx.parallel("g", 5),
    "coroutine": lambda ctx: ctx.parallel("g", steps.add(1, 2)),
    "workflow": lambda ctx: ctx.parallel("g", of_size),
    "arguments": lambda ctx: ctx.parallel("g", steps.add.bind(1)),
    "call limit": lambda ctx: ctx.parallel("g", steps.add.bind(1, 2).options(limit=0)),
    "call priority": lambda ctx: ctx.parallel("g", steps.add.bind(1, 2).options(priority=2**40)),
    "call timeout": lambda ctx: ctx.parallel("g", steps.add.bind(1, 2).options(timeout=-1)),
    "call retry": lambda ctx: ctx.parallel("g", steps.add.bind(1, 2).options(retry=3)),
    "call predicate": lambda ctx: ctx.parallel(
        "g", steps.add.bind(1, 2).options(retry=Retry(on=lambda error: True))
    ),
}


@kagzi.workflow
async def bad_group(ctx: Context, name: str) -> Any:
    return await BAD_GROUPS[name](ctx)


@pytest.mark.parametrize("name", BAD_GROUPS)
async def test_a_group_that_makes_no_sense_is_refused_whole(engine: Engine, name: str) -> None:
    handle = await engine.start(bad_group, name)
    error = await engine.outcome(handle)
    assert isinstance(error, InvalidInput), repr(error)
    assert len(str(error).split()) > 4, "it says what is wrong"
    assert await engine.count("step_runs", handle.run_id) == 0
    assert await engine.count("parallel_groups", handle.run_id) == 0


@kagzi.workflow
async def one_bad_argument(ctx: Context, folder: str) -> Any:
    calls = [steps.note.bind(folder, f"{index}") for index in range(50)]
    return await ctx.parallel_vec("g", [*calls, steps.echo.bind(object())])


async def test_an_argument_that_cannot_be_stored_keeps_its_whole_group_from_starting(
    engine: Engine, witness: Witness
) -> None:
    error = await engine.outcome(await engine.start(one_bad_argument, witness.folder))
    assert isinstance(error, kagzi.CodecError)
    assert "echo()" in str(error)
    await engine.settled()
    assert witness.entries == []


# --- limits ---------------------------------------------------------------------------------


@kagzi.workflow
async def limited(ctx: Context, folder: str, kind: str, size: int, limit: int) -> int:
    witness = Witness(folder)

    async def closure(entry: str) -> str:
        return await steps.brief(folder, entry)

    def sync_closure(entry: str) -> str:
        return steps.brief_sync(folder, entry)

    kinds: dict[str, Any] = {
        "async": lambda entry: steps.brief.bind(folder, entry),
        "sync": lambda entry: steps.brief_sync.bind(folder, entry),
        "cpu": lambda entry: steps.brief_cpu.bind(folder, entry),
        "closure": lambda entry: lambda: closure(entry),
        "sync closure": lambda entry: lambda: sync_closure(entry),
    }
    makers = list(kinds.values()) if kind == "mixed" else [kinds[kind]]
    calls = [makers[index % len(makers)](f"{index}") for index in range(size)]
    found = await ctx.parallel_vec("limited", calls, limit=limit)
    assert len(found) == size
    return witness.most_open()


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("kind", ["async", "sync", "cpu", "closure", "sync closure", "mixed"])
async def test_a_limit_is_never_exceeded(
    engine: Engine, witness: Witness, kind: str, limit: int
) -> None:
    assert 1 <= await engine.run(limited, witness.folder, kind, 12, limit) <= limit


@kagzi.workflow
async def six_with_limit(ctx: Context, folder: str, limit: int) -> list[str]:
    calls = [steps.gated.bind(folder, f"{index}", "on") for index in range(6)]
    return await ctx.parallel_vec("g", calls, limit=limit)


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_a_limit_lets_as_many_begin_as_it_says(
    engine: Engine, witness: Witness, limit: int
) -> None:
    handle = await engine.start(six_with_limit, witness.folder, limit)
    await until(lambda: len(witness.entries) == min(limit, 6))
    assert engine.worker.executor.scheduler.waiting() == max(0, 6 - limit)
    witness.open("on")
    assert await handle.result(PATIENCE_S) == [str(index) for index in range(6)]


@kagzi.workflow
async def limited_function(ctx: Context, folder: str, name: str) -> list[str]:
    async def branch(group: str) -> list[str]:
        calls = [steps.brief_limited.bind(folder, f"{name} {group} {n}") for n in range(6)]
        return await ctx.parallel_vec(group, calls)

    first, second = await asyncio.gather(branch("a"), branch("b"))
    return [*first, *second, await ctx.step(steps.brief_limited, folder, f"{name} alone")]


async def test_the_limit_of_a_function_holds_over_groups_and_runs(
    engine: Engine, witness: Witness
) -> None:
    handles = [await engine.start(limited_function, witness.folder, f"run{n}") for n in range(3)]
    for handle in handles:
        assert len(await handle.result(PATIENCE_S)) == 13
    assert 1 <= witness.most_open() <= 2


@kagzi.workflow
async def limited_call(ctx: Context, folder: str) -> list[str]:
    calls = [steps.brief.bind(folder, f"{n}").options(limit=2) for n in range(12)]
    return await ctx.parallel_vec("g", calls)


async def test_a_limit_can_be_given_to_calls(engine: Engine, witness: Witness) -> None:
    assert len(await engine.run(limited_call, witness.folder)) == 12
    assert 1 <= witness.most_open() <= 2


@kagzi.workflow
async def limited_around(ctx: Context, folder: str, where: str, inner_limit: int) -> None:
    async def closure(ctx: Context, entry: str) -> list[str]:
        return await steps.open_around(ctx, folder, entry, inner_limit)

    calls: list[Any] = [steps.open_around.bind(folder, f"{n}", inner_limit) for n in range(6)]
    if where == "closures":
        calls = [functools.partial(closure, entry=f"{n}") for n in range(6)]
    await ctx.parallel_vec("outer", calls, limit=2)


@pytest.mark.parametrize("inner_limit", [1, 3])
@pytest.mark.parametrize("where", ["pool", "closures"])
async def test_a_limit_counts_bodies_that_wait_for_inner_groups(
    engine: Engine, witness: Witness, where: str, inner_limit: int
) -> None:
    await engine.run(limited_around, witness.folder, where, inner_limit)
    outer = [entry for entry in witness.entries if "inner" not in entry]
    now = most = 0
    for entry in outer:
        now += 1 if entry.startswith("+") else -1
        most = max(most, now)
    assert len(outer) == 12
    assert 1 <= most <= 2


# --- priorities -----------------------------------------------------------------------------


@kagzi.workflow
async def prioritised_calls(ctx: Context, folder: str) -> list[str]:
    calls = [
        steps.brief.bind(folder, f"{priority}{letter}").options(priority=priority)
        for letter in "ab"
        for priority in (0, 9, -5, 3)
    ]
    return await ctx.parallel_vec("g", calls, limit=1)


async def test_calls_of_a_group_begin_by_priority_then_in_order(
    engine: Engine, witness: Witness
) -> None:
    result = await engine.run(prioritised_calls, witness.folder)
    order = [f"{priority}{letter}" for letter in "ab" for priority in (0, 9, -5, 3)]
    assert result == order, "results keep the order of the calls"
    begun = [entry[1:] for entry in witness.entries if entry.startswith("+")]
    expected = ["9a", "9b", "3a", "3b", "0a", "0b", "-5a", "-5b"]
    # The first permit goes to whoever comes first.
    assert begun == expected or begun == ["0a", *(e for e in expected if e != "0a")]


@kagzi.workflow
async def prioritised_groups(ctx: Context, folder: str) -> None:
    blocker = ctx.step(steps.one_at_a_time, folder, "blocker")
    await Witness(folder).pass_gate("blocked")
    low = ctx.parallel_vec("low", [steps.one_at_a_time.bind(folder, f"low{n}") for n in range(3)])
    alone = ctx.step(steps.one_at_a_time, folder, "alone", priority=7)
    high = ctx.parallel_vec(
        "high", [steps.one_at_a_time.bind(folder, f"high{n}") for n in range(3)], priority=5
    )
    Witness(folder).open("on")
    for one in (blocker, low, alone, high):
        await one


async def test_groups_of_higher_priority_go_first(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(prioritised_groups, witness.folder)
    await until(lambda: witness.entries == ["+blocker"])
    witness.open("blocked")
    await handle.result(PATIENCE_S)
    begun = [entry[1:] for entry in witness.entries if entry.startswith("+")]
    assert begun == ["blocker", "alone", "high0", "high1", "high2", "low0", "low1", "low2"]
    assert witness.most_open() == 1


@kagzi.workflow
async def prioritised(ctx: Context, folder: str) -> None:
    blocker = ctx.step(steps.gated_cpu, folder, "hold", "go")
    await ctx.step(steps.gated, folder, "ready", "ready")
    low = ctx.parallel_vec("low", [steps.note_cpu.bind(folder, f"low{n}") for n in range(4)])
    high = ctx.parallel_vec(
        "high", [steps.note_cpu.bind(folder, f"high{n}") for n in range(4)], priority=5
    )
    top = ctx.parallel_vec("top", [steps.note_cpu.bind(folder, "top").options(priority=9)])
    await asyncio.gather(blocker, low, high, top)


async def test_higher_priority_begins_before_lower_that_came_earlier(
    dsn: str, witness: Witness
) -> None:
    async with started(dsn, processes=1) as engine:  # several begin side by side
        handle = await engine.start(prioritised, witness.folder)
        await until(lambda: len(witness.entries) == 2)  # the process is busy computing
        witness.open("ready")
        await until(lambda: engine.worker.executor.scheduler.waiting() == 9)
        witness.open("go")
        await handle.result(PATIENCE_S)
    order = [entry for entry in witness.entries if entry[0] not in "+-"]
    assert order == ["top", *(f"high{n}" for n in range(4)), *(f"low{n}" for n in range(4))]


# --- options of calls -----------------------------------------------------------------------


@kagzi.workflow
async def options_of_calls(ctx: Context, folder: str) -> list[Any]:
    result = await ctx.parallel(
        "g",
        steps.unless.bind(folder, "retried", "never").options(retry=Retry.fixed(3, 0.0)),
        steps.gated.bind(folder, "timed", "never").options(timeout=0.05),
        steps.third_time.bind(folder, "not retried").options(retry=Retry.none()),
        steps.fail.bind(folder, "other error").options(retry=Retry.fixed(3, 0.0, on=ValueError)),
        steps.fail.bind(folder, "base").options(retry=Retry.fixed(2, 0.0, on=(OSError, Exception))),
        steps.echo.bind(1),
        on_error=COLLECT_ALL,
    )
    return [[e.step_id, e.attempts, e.is_a(StepTimeout)] for e in result.errors.values()]


async def test_calls_carry_options_of_their_own(engine: Engine, witness: Witness) -> None:
    assert await replays(engine, options_of_calls, witness.folder) == [
        ["g/0", 3, False],
        ["g/1", 1, True],
        ["g/2", 1, False],
        ["g/3", 1, False],
        ["g/4", 2, False],
    ]
    counts = witness.counts
    assert (counts["retried"], counts["other error"], counts["base"]) == (3, 1, 2)


# --- failures -------------------------------------------------------------------------------


@kagzi.workflow
async def collected(ctx: Context, folder: str) -> list[Any]:
    calls = [
        steps.fail.bind(folder, f"bad {n}") if n % 3 == 1 else steps.echo.bind(n) for n in range(8)
    ]
    result: ParallelResult[Any] = await ctx.parallel_vec("g", calls, on_error=COLLECT_ALL)
    fine = await ctx.parallel_vec("fine", [steps.echo.bind(1)], on_error=COLLECT_ALL)
    assert fine.is_success
    assert fine.first_error is None
    assert fine.into_result() == [1]
    assert not result.is_success
    assert result.first_error is not None
    try:
        result.into_result()
    except* StepFailed as group:
        members = [error.step_id for error in group.exceptions]  # type: ignore[attr-defined]
    return [result.values, list(result.errors), result.first_error.step_id, members]


async def test_collect_all_gives_every_result_and_every_failure(
    engine: Engine, witness: Witness
) -> None:
    bad = [1, 4, 7]
    assert await replays(engine, collected, witness.folder) == [
        [None if n in bad else n for n in range(8)],
        bad,
        "g/1",
        [f"g/{n}" for n in bad],
    ]
    assert witness.counts == {f"bad {n}": 1 for n in bad}


@kagzi.workflow
async def first_failure(ctx: Context, folder: str, order: list[int]) -> str:
    calls = [steps.fail_behind.bind(folder, f"{n}", f"{n}") for n in range(3)]
    try:
        await ctx.parallel_vec("g", calls)
    except StepFailed as error:
        return error.step_id
    return "?"


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_the_first_failure_in_time_is_the_one_that_is_raised(
    engine: Engine, witness: Witness, first: int
) -> None:
    witness.open(str(first))
    assert await replays(engine, first_failure, witness.folder, []) == f"g/{first}"
    assert witness.entries == [str(first)]


@kagzi.workflow
async def failing_at_once(ctx: Context, folder: str) -> str:
    try:
        await ctx.parallel_vec("g", [steps.fail.bind(folder, f"{n}") for n in range(20)])
    except StepFailed as error:
        return error.step_id
    return "?"


async def test_which_of_many_failures_was_first_is_the_same_on_replay(
    engine: Engine, witness: Witness
) -> None:
    for _ in range(10):
        result, handle = await engine.drive(failing_at_once, witness.folder)
        assert await engine.replay(handle) == result
        (group,) = (await handle.describe()).groups
        assert (group.decision, f"g/{group.decided_index}") == ("failure", result)


@kagzi.workflow
async def many_waiting(ctx: Context, folder: str, size: int) -> Any:
    calls = [steps.gated.bind(folder, f"{n}", "never") for n in range(size)]
    return await ctx.parallel_vec("g", [*calls, steps.fail_behind.bind(folder, "failed", "fail")])


async def test_the_first_failure_stops_running_steps(engine: Engine, witness: Witness) -> None:
    size = 300
    handle = await engine.start(many_waiting, witness.folder, size)
    await until(lambda: len(witness.entries) == size)
    witness.open("fail")
    assert isinstance(await engine.outcome(handle), StepFailed)
    await engine.settled()
    counts = witness.counts
    assert all(counts[f"!{n}"] == 1 and counts[f"-{n}"] == 0 for n in range(size))
    assert await engine.count("step_runs", handle.run_id) == 1


# --- timeouts -------------------------------------------------------------------------------


@kagzi.workflow
async def group_out_of_time(ctx: Context, folder: str, limit: int | None) -> list[str]:
    calls = [
        steps.note.bind(folder, "quick"),
        steps.gated.bind(folder, "slow", "never"),
        steps.gated_sync.bind(folder, "blocking", "late"),
        steps.note.bind(folder, "waiting"),
    ]
    try:
        await ctx.parallel_vec("g", calls, timeout=HOUR_S, limit=limit)
    except GroupTimeout as error:
        return [error.path, await ctx.step(steps.note, folder, "after")]
    return ["?"]


@pytest.mark.parametrize("limit", [None, 1])
async def test_a_group_that_does_not_end_in_time_is_stopped(
    engine: Engine, witness: Witness, limit: int | None
) -> None:
    handle = await engine.start(group_out_of_time, witness.folder, limit)
    under_way = {"quick", "+slow"} | ({"+blocking", "waiting"} if limit is None else set())
    await until(lambda: under_way <= set(witness.entries))
    await engine.expire(handle)
    assert await handle.result(PATIENCE_S) == ["g", "after"]
    assert witness.counts["waiting"] == (limit is None)
    assert witness.counts["+blocking"] == (limit is None)
    (group,) = (await handle.describe()).groups
    assert group.decision == "timeout"
    witness.open("late")
    await engine.settled()
    await until(lambda: witness.counts["-blocking"] == (limit is None))
    entries = witness.entries
    assert "!slow" in entries
    assert await engine.replay(handle) == ["g", "after"]
    assert witness.entries == entries


@kagzi.workflow
async def done_in_time(ctx: Context, folder: str) -> Any:
    calls = [steps.note.bind(folder, "quick"), steps.slow_start.bind(folder, "slow", "never")]
    return await ctx.parallel_vec("g", calls, timeout=HOUR_S)


async def test_a_run_whose_group_ran_out_of_time_can_be_retried_and_keeps_what_was_done(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(done_in_time, witness.folder)
    await engine.stored(handle, 1)
    await until(lambda: "+slow" in witness.entries)
    await engine.expire(handle)
    error = await engine.outcome(handle)
    assert isinstance(error, GroupTimeout)
    assert isinstance(error, TimeoutError)
    witness.open("never")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == ["quick", "slow"], "it has all its time again"
    assert witness.counts == {"quick": 1, "+slow": 2, "!slow": 1, "-slow": 1}


# --- races ----------------------------------------------------------------------------------


@kagzi.workflow
async def raced(ctx: Context, folder: str, size: int) -> list[Any]:
    calls = [steps.gated.bind(folder, f"{n}", f"{n}") for n in range(size)]
    won = await ctx.race("race", calls)
    return [won.id, won.index, won.value]


async def test_a_race_gives_the_first_and_cancels_the_others(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(raced, witness.folder, 5)
    await until(lambda: len(witness.entries) == 5)
    witness.open("3")
    assert await handle.result(PATIENCE_S) == ["race/3", 3, "3"]
    await engine.settled()
    assert witness.counts["-3"] == 1
    assert all(witness.counts[f"!{n}"] == 1 for n in (0, 1, 2, 4))
    assert list(await engine.ids(handle)) == ["race/3"]
    (group,) = (await handle.describe()).groups
    assert (group.kind, group.decision, group.decided_index) == ("race", "winner", 3)
    entries = witness.entries
    assert await engine.replay(handle) == ["race/3", 3, "3"]
    assert witness.entries == entries


async def test_a_race_that_many_finish_at_once_has_one_winner_also_on_replay(
    engine: Engine, witness: Witness
) -> None:
    witness.open(*(str(n) for n in range(20)))
    for _ in range(10):
        result, handle = await engine.drive(raced, witness.folder, 20)
        assert list(await engine.ids(handle)) == [result[0]]
        assert await engine.replay(handle) == result
        for number in await engine.numbers(handle):
            again = await engine.replay(handle, number)
            # The winner's row decides, though the row of the decision itself was lost.
            assert again == result


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


@kagzi.workflow
async def race_past_failures(ctx: Context, folder: str) -> list[Any]:
    calls = [
        steps.fail.bind(folder, "0"),
        steps.fail_sync.bind(folder, "1"),
        steps.unless.bind(folder, "2", "never").options(retry=Retry.fixed(3, 0.0)),
        steps.gated.bind(folder, "3", "go"),
    ]
    won = await ctx.race("race", calls)
    return [won.index, won.value]


async def test_failures_do_not_end_a_race(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(race_past_failures, witness.folder)
    await until(lambda: witness.counts["2"] == 3)
    await until_rows(engine, handle, 3)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == [3, "3"]
    assert await engine.replay(handle) == [3, "3"]
    assert len(witness.entries) == 7


async def until_rows(engine: Engine, handle: kagzi.RunHandle[Any], count: int) -> None:
    async def there() -> bool:
        return await engine.count("step_runs", handle.run_id) == count

    await until(there)


@kagzi.workflow
async def race_of_large_results(ctx: Context, folder: str) -> list[int]:
    calls = [steps.text_behind.bind(folder, f"{n}", 400_000 + n) for n in range(3)]
    calls.append(steps.text_behind.bind(folder, "small", 5))
    won = await ctx.race("race", calls)
    return [won.index, len(won.value)]


async def test_a_race_of_large_results_has_one_winner(engine: Engine, witness: Witness) -> None:
    witness.open("0", "1", "2", "small")
    for _ in range(10):
        result, handle = await engine.drive(race_of_large_results, witness.folder)
        index, size = result
        assert size == (5 if index == 3 else 400_000 + index)
        assert await engine.replay(handle) == result


@kagzi.workflow
async def limited_race(ctx: Context, folder: str) -> int:
    calls = [steps.fail.bind(folder, "0"), *(steps.note.bind(folder, f"{n}") for n in (1, 2, 3))]
    return (await ctx.race("race", calls, limit=1)).index


async def test_a_race_with_a_limit_starts_no_more_once_it_is_won(
    engine: Engine, witness: Witness
) -> None:
    assert await replays(engine, limited_race, witness.folder) == 1
    await engine.settled()
    assert witness.entries == ["0", "1"]


@kagzi.workflow
async def race_of_everything(ctx: Context, folder: str) -> int:
    async def closure() -> None:
        await steps.gated(folder, "closure", "never")

    async def with_group(ctx: Context) -> None:
        await ctx.parallel("inner", steps.gated.bind(folder, "inner", "never"))

    won = await ctx.race(
        "race",
        [
            closure,
            with_group,
            steps.gated_sync.bind(folder, "thread", "late"),
            steps.fail_behind.bind(folder, "failed", "go"),
            steps.gated.bind(folder, "winner", "go"),
        ],
    )
    return won.index


async def test_losers_of_every_kind_are_stopped_or_their_answers_dropped(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(race_of_everything, witness.folder)
    await until(lambda: len(witness.entries) == 4)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == 4
    await until(lambda: {"!closure", "!inner"} <= set(witness.entries))
    witness.open("late")
    await until(lambda: "-thread" in witness.entries)
    await engine.settled()
    rows = set(await engine.ids(handle))
    assert rows <= {"race/3", "race/4"}
    assert "race/4" in rows


@kagzi.workflow
async def race_out_of_time(ctx: Context, folder: str) -> str:
    try:
        await ctx.race("race", [steps.gated.bind(folder, "x", "never")], timeout=HOUR_S)
    except GroupTimeout as error:
        return error.path
    return "?"


async def test_a_race_can_run_out_of_time(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(race_out_of_time, witness.folder)
    await until(lambda: "+x" in witness.entries)
    await engine.expire(handle)
    assert await engine.outcome(handle) == "race"
    assert await engine.replay(handle) == "race"
    assert witness.counts["+x"] == 1


@kagzi.workflow
async def lost_then_handled(ctx: Context, folder: str) -> list[str]:
    try:
        await ctx.race(
            "race", {"a": steps.fail.bind(folder, "a"), "b": steps.fail.bind(folder, "b")}
        )
    except AllStepsFailed as error:
        first, rest = error.split(
            lambda one: isinstance(one, StepFailed) and "a" in one.step_id[-1]
        )
        assert isinstance(first, AllStepsFailed)
        assert rest is not None
        return sorted(one.step_id for one in error.exceptions)
    return []


async def test_a_lost_race_by_keys_names_them(engine: Engine, witness: Witness) -> None:
    assert await replays(engine, lost_then_handled, witness.folder) == ["race/a", "race/b"]


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


# --- all of it, cut off anywhere ------------------------------------------------------------


@kagzi.workflow
async def everything(ctx: Context, folder: str) -> list[Any]:
    squares = await ctx.map("squares", steps.square, range(6), limit=2)
    nested = await ctx.parallel("nested", steps.squares_of.bind(3), steps.squares_of.bind(2, 1))
    some = await ctx.parallel_vec(
        "some", [steps.fail.bind(folder, "f"), steps.note.bind(folder, "n")], on_error=COLLECT_ALL
    )
    won = await ctx.race("race", [steps.gated.bind(folder, "x", "never"), steps.echo.bind("y")])
    try:
        await ctx.parallel("failing", steps.fail.bind(folder, "g"))
    except StepFailed as error:
        message = error.message
    tried = await ctx.step(steps.third_time, folder, "t")
    await ctx.sleep(0.001)
    moment = await ctx.now()
    return [squares, list(nested), some.values, won.value, message, tried, bool(moment)]


async def test_a_run_cut_off_after_any_checkpoint_ends_with_the_same_result(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(everything, witness.folder)
    assert result == [
        [n * n for n in range(6)],
        [[0, 1, 4], [0, 1]],
        [None, "n"],
        "y",
        "g failed",
        3,
        True,
    ]
    ids = await engine.ids(handle)
    numbers = await engine.numbers(handle)
    for number in numbers[::-1]:
        kept = await engine.rows(
            "SELECT step_id, output, completed_number FROM kagzi.step_runs"
            " WHERE run_id = %(id)s AND completed_number <= %(number)s ORDER BY step_id",
            id=handle.run_id,
            number=number,
        )
        assert await engine.replay(handle, number) == result, f"cut off after {number}"
        again = await engine.rows(
            "SELECT step_id, output, completed_number FROM kagzi.step_runs"
            " WHERE run_id = %(id)s ORDER BY step_id",
            id=handle.run_id,
        )
        assert set(kept) <= set(again), "what was committed did not change"
        assert await engine.ids(handle) == ids
    assert len(numbers) >= len(ids)
