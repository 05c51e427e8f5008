"""Durable time: pauses, parked runs, blocks with a deadline, results in order of completion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

import kagzi
from kagzi import Context, InvalidInput, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_db import Databases
from tests.fix_engine import HOUR_S, PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAY_S = 24 * HOUR_S


@pytest_asyncio.fixture(loop_scope="module")
async def clocked(databases: Databases) -> AsyncIterator[Engine]:
    """An engine whose store's clock can be moved, and whose worker follows it at once."""
    name = databases.clone()
    async with started(databases.dsn_of(name), processes=0, heartbeat_s=0.02) as engine:
        yield engine
        assert engine.worker.lost is None
    databases.retire(name)


async def parked(engine: Engine, handle: kagzi.RunHandle[Any]) -> datetime:
    """Wait until the run sleeps and nothing of it is held; when it is to wake."""

    async def is_parked() -> bool:
        return await handle.status() == "sleeping"

    await until(is_parked)
    await until(lambda: handle.run_id not in engine.worker.runs)
    return (await handle.describe()).summary.wake_at


# --- pauses ---------------------------------------------------------------------------------


@kagzi.workflow
async def pauses(ctx: Context, folder: str, seconds: float) -> str:
    await ctx.step(steps.note, folder, "before")
    await ctx.sleep(seconds)
    return await ctx.step(steps.note, folder, "after")


async def test_a_short_sleep_stays_in_memory(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(pauses, witness.folder, 0.05)
    assert result == "after"
    (epoch,) = (
        await engine.rows(
            "SELECT epoch FROM kagzi.workflow_runs WHERE id = %(id)s", id=handle.run_id
        )
    )[0]
    assert epoch == 1, "claimed once"
    sleep = next(step for step in (await handle.describe()).steps if step.id == "sleep")
    after = next(step for step in (await handle.describe()).steps if step.id == "note#2")
    assert after.started_at - sleep.started_at >= timedelta(seconds=0.04)


async def test_a_long_sleep_parks_the_run_holds_nothing_and_wakes(
    clocked: Engine, witness: Witness
) -> None:
    before = datetime.now(UTC)
    handle = await clocked.start(pauses, witness.folder, 30 * DAY_S)
    wake_at = await parked(clocked, handle)
    assert abs(wake_at - before - timedelta(days=30)) < timedelta(seconds=30)
    assert witness.entries == ["before"]
    await clocked.settled()
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    assert not any("LiveRun" in name for name in names), "no task of it is left"

    await clocked.move_clock(29 * DAY_S)
    await until_beat(clocked)
    assert await handle.status() == "sleeping"
    await clocked.move_clock(30 * DAY_S)
    assert await handle.result(PATIENCE_S) == "after"
    assert witness.entries == ["before", "after"]
    assert await clocked.replay(handle) == "after"


async def until_beat(engine: Engine) -> None:
    """Wait until the worker has heard of the store's clock, and has looked for due runs since."""
    beats = engine.worker.heartbeat.beats
    await until(lambda: engine.worker.heartbeat.beats > beats + 1)
    engine.worker.wake()
    await engine.settled()


@kagzi.workflow
async def pauses_twice(ctx: Context, folder: str) -> list[str]:
    async def branch(name: str, seconds: float) -> str:
        await ctx.sleep(seconds)
        return await ctx.step(steps.note, folder, name)

    return await asyncio.gather(branch("one", HOUR_S), branch("two", 2 * HOUR_S))


async def test_a_sleep_that_is_interrupted_ends_when_it_was_to_end(
    clocked: Engine, witness: Witness
) -> None:
    handle = await clocked.start(pauses_twice, witness.folder)
    first = await parked(clocked, handle)
    await clocked.move_clock(HOUR_S + 1)
    await until(lambda: witness.entries == ["one"])
    second = await parked(clocked, handle)
    assert abs(second - first - timedelta(seconds=HOUR_S)) < timedelta(seconds=5)
    await clocked.move_clock(2 * HOUR_S + 1)
    assert await handle.result(PATIENCE_S) == ["one", "two"]
    assert witness.entries == ["one", "two"]


@kagzi.workflow
async def pauses_beside_a_step(ctx: Context, folder: str) -> list[Any]:
    return await asyncio.gather(
        ctx.sleep(DAY_S), ctx.step(steps.gated.__wrapped__, folder, "body", "go")
    )


async def test_a_run_is_not_parked_while_a_step_of_it_runs(
    clocked: Engine, witness: Witness
) -> None:
    handle = await clocked.start(pauses_beside_a_step, witness.folder)
    await until(lambda: witness.entries == ["+body"])
    other = await clocked.start(pauses, witness.folder, DAY_S)
    await parked(clocked, other)  # which has begun later
    assert await handle.status() == "running"
    witness.open("go")
    await parked(clocked, handle)
    await clocked.move_clock(DAY_S + 1)
    assert await handle.result(PATIENCE_S) == [None, "body"]
    assert witness.counts["+body"] == 1
    await other.result(PATIENCE_S)


@kagzi.workflow
async def pauses_after_a_withdrawn_group(ctx: Context, folder: str) -> str:
    group = ctx.parallel("group", steps.gated.bind(folder, "body", "never"), timeout=HOUR_S)
    await Witness(folder).pass_gate("cancel")
    group.cancel()
    await ctx.sleep(DAY_S)
    return "awake"


async def test_a_timeout_of_a_group_that_is_gone_does_not_keep_the_run_from_parking(
    clocked: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kagzi.engine.parking.PARK_AFTER_S", 2 * HOUR_S)
    handle = await clocked.start(pauses_after_a_withdrawn_group, witness.folder)
    await until(lambda: witness.entries)
    witness.open("cancel")
    await parked(clocked, handle)  # well before that timeout
    await clocked.move_clock(DAY_S + 1)
    assert await handle.result(PATIENCE_S) == "awake"


@kagzi.workflow
async def pauses_beside_a_block(ctx: Context, folder: str) -> list[Any]:
    async def block() -> str:
        async with ctx.timeout(HOUR_S):
            found = await ctx.step(steps.note.__wrapped__, folder, "inside")
            await Witness(folder).pass_gate("leave")
        return found

    return await asyncio.gather(ctx.sleep(DAY_S), block())


async def test_a_block_that_has_ended_does_not_keep_the_run_from_parking(
    clocked: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kagzi.engine.parking.PARK_AFTER_S", 2 * HOUR_S)
    handle = await clocked.start(pauses_beside_a_block, witness.folder)
    await until(lambda: witness.entries == ["inside"])
    other = await clocked.start(pauses_until, datetime.now(UTC) + timedelta(days=1))
    await parked(clocked, other)  # so it has been looked at whether the first one can park
    witness.open("leave")
    await parked(clocked, handle)
    await clocked.move_clock(DAY_S + 1)
    assert await handle.result(PATIENCE_S) == [None, "inside"]
    assert witness.entries == ["inside"]
    assert await other.result(PATIENCE_S)


@kagzi.workflow
async def pauses_until(ctx: Context, at: datetime) -> bool:
    await ctx.sleep_until(at)
    return (await ctx.now()) >= at


@pytest.mark.parametrize("ahead_s", [-1000.0, 0.0, 0.05])
async def test_sleep_until_a_moment(engine: Engine, ahead_s: float) -> None:
    at = datetime.now(UTC) + timedelta(seconds=ahead_s)
    result, handle = await engine.drive(pauses_until, at)
    assert result is True
    assert await engine.replay(handle) is True


async def _no_zone(ctx: Context) -> None:
    await ctx.sleep_until(datetime(2026, 1, 1))


BAD_TIMES: dict[str, Any] = {
    "no zone": _no_zone,
    **{
        f"sleep {value!r}": lambda ctx, value=value: ctx.sleep(value)
        for value in (
            -1,
            float("nan"),
            float("inf"),
            None,
            "5",
            True,
            False,
            timedelta(-1),
            1e300,
            [],
        )
    },
    **{
        f"timeout {value!r}": lambda ctx, value=value: ctx.timeout(value).__aenter__()
        for value in (-1, 0, float("nan"), float("inf"), None, "5", True, timedelta(0))
    },
}


@kagzi.workflow
async def bad_time(ctx: Context, name: str) -> None:
    await BAD_TIMES[name](ctx)


@pytest.mark.parametrize("name", BAD_TIMES)
async def test_a_time_that_makes_no_sense_is_refused(engine: Engine, name: str) -> None:
    handle = await engine.start(bad_time, name)
    error = await engine.outcome(handle)
    assert isinstance(error, InvalidInput), error
    assert await engine.ids(handle) == {}


@kagzi.workflow
async def no_pause(ctx: Context) -> str:
    await ctx.sleep(0)
    await ctx.sleep(timedelta(0))
    await ctx.sleep(0.0)
    return "done"


async def test_a_sleep_of_no_time_is_allowed(engine: Engine) -> None:
    result, handle = await engine.drive(no_pause)
    assert result == "done"
    assert await engine.replay(handle) == "done"


# --- blocks with a deadline -----------------------------------------------------------------


@kagzi.workflow
async def in_time(ctx: Context, folder: str) -> list[str]:
    async with ctx.timeout(60):
        first = await ctx.step(steps.note, folder, "inside")
    return [first, await ctx.step(steps.note, folder, "outside")]


async def test_a_block_that_ends_in_time_is_not_disturbed(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(in_time, witness.folder)
    assert result == ["inside", "outside"]
    for number in [*await engine.numbers(handle), None]:
        assert await engine.replay(handle, number) == result


async def _sequence(ctx: Context, folder: str) -> None:
    await ctx.step(steps.note, folder, "early")
    await ctx.step(steps.gated, folder, "late", "never")
    await ctx.step(steps.note, folder, "later")


async def _gathered(ctx: Context, folder: str) -> None:
    async def branch(name: str, gate: str) -> None:
        await ctx.step(steps.note, folder, name)
        await ctx.step(steps.gated, folder, name, gate)
        await ctx.step(steps.note, folder, "later")

    await asyncio.gather(branch("early", "never"), branch("early too", "never"))


async def _task_group(ctx: Context, folder: str) -> None:
    async def branch(name: str) -> None:
        await ctx.step(steps.gated, folder, name, "never")
        await ctx.step(steps.note, folder, "later")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(branch("one"))
        tasks.create_task(branch("two"))


async def _wait_for(ctx: Context, folder: str) -> None:
    await asyncio.wait_for(_sequence(ctx, folder), 60)


async def _group(ctx: Context, folder: str) -> None:
    await ctx.parallel(
        "group", steps.note.bind(folder, "early"), steps.gated.bind(folder, "late", "never")
    )


async def _stream(ctx: Context, folder: str) -> None:
    calls = [steps.note.bind(folder, "early"), steps.gated.bind(folder, "late", "never")]
    async for one in ctx.as_completed("stream", calls):
        await ctx.step(steps.note, folder, f"seen {one.value}")


async def _stream_with_slow_body(ctx: Context, folder: str) -> None:
    calls = [steps.note.bind(folder, "one"), steps.note.bind(folder, "two")]
    async for one in ctx.as_completed("stream", calls):
        await ctx.step(steps.gated, folder, f"seen {one.index >= 0}", "never")


async def _sleeping(ctx: Context, folder: str) -> None:
    await ctx.sleep(2.0)
    await ctx.step(steps.note, folder, "later")


async def _inner_block(ctx: Context, folder: str) -> None:
    async with ctx.timeout(60):
        await _sequence(ctx, folder)


async def _inner_block_of_two(ctx: Context, folder: str) -> None:
    async with ctx.timeout(60):
        await ctx.step(steps.note, folder, "early")
        await ctx.step(steps.note, folder, "early too")
        await _sequence(ctx, folder)


async def _swallowing(ctx: Context, folder: str) -> None:
    try:
        await _sequence(ctx, folder)
    except StepFailed:
        await ctx.step(steps.note, folder, "never here")


async def _body(ctx: Context, folder: str) -> None:
    async def closure(ctx: Context) -> None:
        await _sequence(ctx, folder)

    await ctx.step(closure)


BLOCKS = {
    function.__name__[1:]: function
    for function in (
        _sequence,
        _gathered,
        _task_group,
        _wait_for,
        _group,
        _stream,
        _stream_with_slow_body,
        _sleeping,
        _inner_block,
        _inner_block_of_two,
        _swallowing,
        _body,
    )
}


@kagzi.workflow
async def out_of_time(ctx: Context, folder: str, name: str) -> list[str]:
    found = [await ctx.step(steps.note, folder, "before")]
    try:
        async with ctx.timeout(0.1):
            await BLOCKS[name](ctx, folder)
            found.append("came to its end")
    except TimeoutError as error:
        found.append(str(error))
    found.append(await ctx.step(steps.note, folder, "after"))
    return found


@pytest.mark.parametrize("name", BLOCKS)
async def test_a_block_that_does_not_end_in_time_is_left_live_and_on_replay(
    engine: Engine, witness: Witness, name: str
) -> None:
    handle = await engine.start(out_of_time, witness.folder, name)
    result = await handle.result(PATIENCE_S)
    said = "the block of 'timeout' did not end within 0.1 s"
    assert result == ["before", said, "after"]
    await engine.settled()
    assert "later" not in witness.entries
    assert sum(e.startswith("!") for e in witness.entries) == sum(
        e.startswith("+") for e in witness.entries
    ), "what ran was cancelled"

    entries = witness.entries
    ids = await engine.ids(handle)
    await engine.rewind(handle)
    assert await handle.result(PATIENCE_S) == result
    assert witness.entries == entries, "a replay starts nothing"
    assert await engine.ids(handle) == ids

    for number in await engine.numbers(handle):
        await engine.rewind(handle, number)
        assert await handle.result(PATIENCE_S) == result, f"after a crash at {number}"
        assert "later" not in witness.entries
    await engine.settled()


@kagzi.workflow
async def task_outlives_the_block(ctx: Context, folder: str) -> list[str]:
    async def branch() -> list[str]:
        first = await ctx.step(steps.gated, folder, "slow", "slow")
        return [first, await ctx.step(steps.note, folder, "then")]

    found = []
    try:
        async with ctx.timeout(0.1):
            task = asyncio.create_task(branch())
            await ctx.step(steps.gated, folder, "never", "never")
    except TimeoutError:
        found.append("out of time")
        Witness(folder).open("slow")
    return [*found, *await task]


async def test_a_task_that_outlives_the_block_goes_on_live_and_on_replay(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(task_outlives_the_block, witness.folder)
    result = await handle.result(PATIENCE_S)
    assert result == ["out of time", "slow", "then"]
    for number in [None, *await engine.numbers(handle)]:
        await engine.rewind(handle, number)
        assert await handle.result(PATIENCE_S) == result, f"after a crash at {number}"


@kagzi.workflow
async def long_block(ctx: Context) -> str:
    try:
        async with ctx.timeout(HOUR_S):
            await ctx.sleep(2 * HOUR_S)
    except TimeoutError:
        return "out of time"
    return "awake"


async def test_a_deadline_far_away_parks_the_run_as_a_sleep_does(clocked: Engine) -> None:
    before = datetime.now(UTC)
    handle = await clocked.start(long_block)
    wake_at = await parked(clocked, handle)
    assert abs(wake_at - before - timedelta(hours=1)) < timedelta(seconds=30)
    await clocked.move_clock(HOUR_S + 1)
    assert await handle.result(PATIENCE_S) == "out of time"
    assert await clocked.replay(handle) == "out of time"


@kagzi.workflow
async def nested_blocks(ctx: Context, folder: str, inner_s: float, outer_s: float) -> list[str]:
    found = []
    try:
        async with ctx.timeout(outer_s):
            try:
                async with ctx.timeout(inner_s):
                    await ctx.step(steps.gated, folder, "x", "never")
            except TimeoutError:
                found.append("inner")
            found.append(await ctx.step(steps.note, folder, "between"))
            await ctx.step(steps.gated, folder, "y", "never")
    except TimeoutError:
        found.append("outer")
    return found


@pytest.mark.parametrize(
    ("inner_s", "outer_s", "expected"),
    [(HOUR_S, 2 * HOUR_S, ["inner", "between", "outer"]), (2 * HOUR_S, HOUR_S, ["outer"])],
)
async def test_nested_blocks_end_each_by_its_own_deadline(
    engine: Engine, witness: Witness, inner_s: float, outer_s: float, expected: list[str]
) -> None:
    handle = await engine.start(nested_blocks, witness.folder, inner_s, outer_s)
    for name in "xy"[: len(expected)]:
        await until(lambda: f"+{name}" in witness.entries)  # noqa: B023
        await engine.expire(handle)
    assert await handle.result(PATIENCE_S) == expected
    await engine.settled()
    entries = witness.entries
    await engine.rewind(handle)
    assert await handle.result(PATIENCE_S) == expected
    assert witness.entries == entries


@kagzi.workflow
async def inner_block_that_lasts_longer(ctx: Context, folder: str) -> list[str]:
    found = []
    try:
        async with ctx.timeout(0.05):
            try:
                async with ctx.timeout(HOUR_S):
                    await ctx.step(steps.gated.__wrapped__, folder, "x", "never")
            except TimeoutError:
                found.append(await ctx.step(steps.note.__wrapped__, folder, "inner"))
    except TimeoutError:
        found.append("outer")
    return found


async def test_an_inner_block_does_not_run_out_of_time_on_a_late_replay(
    clocked: Engine, witness: Witness
) -> None:
    result, handle = await clocked.drive(inner_block_that_lasts_longer, witness.folder)
    assert result == ["outer"]
    entries = witness.entries
    await clocked.move_clock(DAY_S)
    await until_beat(clocked)
    ids = await clocked.ids(handle)
    assert await clocked.replay(handle) == ["outer"]
    assert witness.entries == entries
    assert await clocked.ids(handle) == ids, "nobody found the inner time to be up"


@kagzi.workflow
async def fails_inside(ctx: Context, folder: str) -> str:
    try:
        async with ctx.timeout(60):
            await ctx.step(steps.fail, folder, "x")
    except StepFailed as error:
        return f"{error.message}, no timeout"
    return "?"


async def test_another_error_leaves_the_block_as_it_is(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(fails_inside, witness.folder)
    assert result == "x failed, no timeout"
    assert await engine.replay(handle) == result


# --- in order of completion -----------------------------------------------------------------


@kagzi.workflow
async def streams(ctx: Context, folder: str, size: int) -> list[list[Any]]:
    calls = [steps.gated.bind(folder, f"{n}", f"{n}") for n in range(size)]
    found: list[list[Any]] = []
    async for one in ctx.as_completed("stream", calls):
        seen = await ctx.step(steps.note, folder, f"seen {one.value}")
        found.append([one.id, one.index, seen])
    return found


async def test_as_completed_gives_results_as_they_end_and_in_that_order_on_replay(
    engine: Engine, witness: Witness
) -> None:
    order = [3, 0, 4, 1, 2]
    handle = await engine.start(streams, witness.folder, 5)
    for number in order:
        witness.open(str(number))
        await until(lambda number=number: f"seen {number}" in witness.entries)  # type: ignore[misc]
    result = await handle.result(PATIENCE_S)
    assert result == [[f"stream/{n}", n, f"seen {n}"] for n in order]
    entries = len(witness.entries)
    assert await engine.replay(handle) == result
    assert len(witness.entries) == entries


@pytest.mark.parametrize("number", range(12))
async def test_as_completed_goes_on_after_a_crash_with_the_order_so_far(
    engine: Engine, witness: Witness, number: int
) -> None:
    order = [3, 0, 4, 1, 2]
    handle = await engine.start(streams, witness.folder, 5)
    for n in order:
        witness.open(str(n))
        await until(lambda n=n: f"seen {n}" in witness.entries)  # type: ignore[misc]
    result = await handle.result(PATIENCE_S)
    numbers = await engine.numbers(handle)
    keep = numbers[min(number, len(numbers) - 1)]
    rows = await engine.rows(
        "SELECT step_id FROM kagzi.step_runs WHERE run_id = %(id)s AND completed_number <= %(n)s"
        " AND step_id LIKE 'stream/%%' ORDER BY completed_number",
        id=handle.run_id,
        n=keep,
    )
    again = await engine.replay(handle, keep)
    known = [step_id for (step_id,) in rows]
    assert (
        [one[0] for one in again][: len(known)] == known == [one[0] for one in result][: len(known)]
    )
    assert sorted(map(str, again)) == sorted(map(str, result))


@kagzi.workflow
async def stream_of_sizes(ctx: Context, folder: str) -> list[int]:
    calls = [
        steps.text_behind.bind(folder, "large", 2_000_000),
        steps.text_behind.bind(folder, "small", 10),
        steps.text_behind.bind(folder, "other", 10),
    ]
    return [one.index async for one in ctx.as_completed("stream", calls)]


async def test_as_completed_gives_large_results_in_the_order_that_a_replay_will_give(
    engine: Engine, witness: Witness
) -> None:
    """A large result takes longer to write than small ones that ended after it."""
    for _ in range(5):
        for gate in ("large", "small", "other"):
            witness.shut(gate)
        handle = await engine.start(stream_of_sizes, witness.folder)
        witness.open("large", "small", "other")
        result = await handle.result(PATIENCE_S)
        assert sorted(result) == [0, 1, 2]
        assert await engine.replay(handle) == result


@kagzi.workflow
async def leaves_the_stream(ctx: Context, folder: str) -> list[str]:
    calls = [steps.gated.bind(folder, f"{n}", f"{n}") for n in range(4)]
    found = []
    stream = ctx.as_completed("stream", calls)
    async for one in stream:
        found.append(one.value)
        if len(found) == 2:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return [*found, await ctx.step(steps.note, folder, "left")]


async def test_leaving_as_completed_cancels_the_rest_and_a_replay_starts_none_of_it(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(leaves_the_stream, witness.folder)
    await until(lambda: len(witness.entries) == 4)
    witness.open("2", "1")
    result = await handle.result(PATIENCE_S)
    assert sorted(result) == ["1", "2", "left"]
    await engine.settled()
    assert witness.counts["!0"] == witness.counts["!3"] == 1
    entries = witness.entries
    assert await engine.replay(handle) == result
    assert witness.entries == entries


@kagzi.workflow
async def stream_with_failure(ctx: Context, folder: str) -> list[str]:
    found = []
    calls = [steps.note.bind(folder, "fine"), steps.fail_behind.bind(folder, "failed", "fail")]
    try:
        async for one in ctx.as_completed("stream", calls):
            found.append(one.value)
            Witness(folder).open("fail")
    except StepFailed as error:
        found.append(error.step_id)
    return found


async def test_a_failure_is_raised_at_its_place_in_the_stream(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(stream_with_failure, witness.folder)
    assert result == ["fine", "stream/1"]
    assert await engine.replay(handle) == result


@kagzi.workflow
async def empty_stream(ctx: Context) -> list[Any]:
    return [one async for one in ctx.as_completed("none", [])]


async def test_an_empty_stream_ends_at_once(engine: Engine) -> None:
    result, handle = await engine.drive(empty_stream)
    assert result == []
    assert await engine.replay(handle) == []
