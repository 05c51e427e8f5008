"""Events: whichever comes first, each goes to one wait, once; and values that runs publish."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

import kagzi
from kagzi import CodecError, Context, EventTimeout, InvalidName, RunEnded, RunStatus
from tests.engine import steps
from tests.engine.test_operations import is_status
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, started, until
from tests.fix_faults import rows

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Approval:
    by: str
    yes: bool


@kagzi.workflow
async def one_event(ctx: Context, folder: str) -> Any:
    value = await ctx.wait_event("go")
    await ctx.step(steps.note, folder, f"got {value}")
    return value


@kagzi.workflow
async def three_events(ctx: Context) -> list[Any]:
    return [await ctx.wait_event("n") for _ in range(3)]


@kagzi.workflow
async def typed_event(ctx: Context) -> Approval:
    return await ctx.wait_event("approval", type=Approval)


@kagzi.workflow
async def event_or_not(ctx: Context, seconds: float) -> str:
    try:
        return str(await ctx.wait_event("go", timeout=seconds))
    except EventTimeout as error:
        return f"none: {error}"


@kagzi.workflow
async def two_topics(ctx: Context) -> list[Any]:
    first, second = ctx.wait_event("a"), ctx.wait_event("b")
    return [await first, await second]


# --- whichever comes first ------------------------------------------------------------------


async def test_event_that_waits_for_the_run_is_there(
    engine: Engine, dsn: str, witness: Witness
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(one_event, witness.folder)
        assert await client.send(handle, "go", {"n": 1})
    async with started(dsn) as own:
        assert await (await own.client.get(handle.id)).result(PATIENCE_S) == {"n": 1}


async def test_event_that_comes_to_a_held_run_is_heard(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(one_event, witness.folder)
    await until(lambda: handle.run_id in engine.worker.runs)
    await handle.send("go", 7)
    assert await handle.result(PATIENCE_S) == 7
    assert witness.counts["got 7"] == 1


async def test_run_that_waits_for_an_event_holds_nothing_and_is_woken(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(one_event, witness.folder)
    await until(lambda: is_status(handle, RunStatus.SLEEPING))
    await until(lambda: handle.run_id not in engine.worker.runs)
    await handle.send("go", "late")
    assert await handle.result(PATIENCE_S) == "late"


async def test_event_sent_at_the_moment_of_parking_is_not_lost(engine: Engine) -> None:
    """A park that knows of less news than there is leaves the run due."""
    handles = [await engine.start(three_events) for _ in range(30)]
    for value in range(3):
        for handle in handles:
            run = engine.worker.runs.get(handle.run_id)
            if run is not None and value % 2:
                run.park(engine.worker.clock.now() + timedelta(days=9))
            sending = asyncio.ensure_future(engine.client.send(handle, "n", value))
            run = engine.worker.runs.get(handle.run_id)
            if run is not None and not run.leaving:
                run.park(engine.worker.clock.now() + timedelta(days=9))
            await sending
    for handle in handles:
        assert await handle.result(PATIENCE_S) == [0, 1, 2]


async def test_events_are_heard_by_polling_alone(dsn: str) -> None:
    async with started(dsn, poll_s=0.05) as engine:
        handle = await engine.start(three_events)
        for value in range(3):
            await rows(
                dsn,
                "WITH e AS (INSERT INTO kagzi.run_events (run_id, topic, value, sent_at)"
                " SELECT id, 'n', %(value)s, now() FROM kagzi.workflow_runs)"
                " UPDATE kagzi.workflow_runs SET news = news + 1,"
                " wake_at = CASE WHEN status = 'sleeping' THEN now() ELSE wake_at END",
                value=str(value).encode(),
            )
        assert await handle.result(PATIENCE_S) == [0, 1, 2]


# --- each once ------------------------------------------------------------------------------


async def test_events_of_a_topic_come_in_the_order_sent_each_to_one_wait(engine: Engine) -> None:
    handle = await engine.start(three_events)
    for value in ("a", "b", "c", "d"):
        await handle.send("n", value)
    assert await handle.result(PATIENCE_S) == ["a", "b", "c"]
    assert await engine.replay(handle) == ["a", "b", "c"]


async def test_event_that_a_wait_had_is_not_had_by_another_after_a_crash(engine: Engine) -> None:
    handle = await engine.start(three_events)
    for value in range(3):
        await handle.send("n", value)
    await handle.result(PATIENCE_S)
    for keep in (0, *await engine.numbers(handle)):
        assert await engine.replay(handle, keep) == [0, 1, 2]


async def test_same_event_id_is_sent_once(engine: Engine) -> None:
    handle = await engine.start(three_events)
    assert await handle.send("n", 1, id="first") is True
    assert await handle.send("n", 1, id="first") is False
    await handle.send("n", 2)
    await handle.send("n", 3)
    assert await handle.result(PATIENCE_S) == [1, 2, 3]


async def test_topics_do_not_mix(engine: Engine) -> None:
    handle = await engine.start(two_topics)
    await handle.send("b", "for b")
    await handle.send("c", "for nobody")
    await handle.send("a", "for a")
    assert await handle.result(PATIENCE_S) == ["for a", "for b"]


async def test_value_comes_typed(engine: Engine) -> None:
    handle = await engine.start(typed_event)
    await handle.send("approval", Approval("ada", True))
    assert await handle.result(PATIENCE_S) == Approval("ada", True)
    assert await engine.replay(handle) == Approval("ada", True)


async def test_value_of_another_type_fails_the_wait(engine: Engine) -> None:
    handle = await engine.start(typed_event)
    await handle.send("approval", [1, 2])
    assert isinstance(await engine.outcome(handle), CodecError)


# --- time -----------------------------------------------------------------------------------


async def test_wait_ends_when_its_time_is_up_and_stays_so(engine: Engine) -> None:
    result, handle = await engine.drive(event_or_not, 0.05)
    assert result.startswith("none: no event 'go' came within 0.05 s")
    await engine.rewind(handle)
    await engine.rows(
        "UPDATE kagzi.workflow_runs SET news = news + 1 WHERE id = %(id)s", id=handle.run_id
    )
    await engine.rows(
        "INSERT INTO kagzi.run_events (run_id, topic, value, sent_at)"
        " VALUES (%(id)s, 'go', '1', now())",
        id=handle.run_id,
    )
    assert await engine.outcome(handle) == result


async def test_time_of_a_wait_goes_on_while_the_run_sleeps(dsn: str) -> None:
    async with started(dsn, heartbeat_s=0.1) as engine:
        handle = await engine.start(event_or_not, 86_400.0)
        other = await engine.start(event_or_not, 86_400.0)
        for one in (handle, other):
            await until(lambda one=one: is_status(one, RunStatus.SLEEPING))
        await other.send("go", "in time")
        assert await other.result(PATIENCE_S) == "in time"
        await engine.move_clock(86_500)
        assert (await handle.result(PATIENCE_S)).startswith("none")


# --- bad input ------------------------------------------------------------------------------


async def test_nothing_can_be_sent_to_a_run_that_has_ended(engine: Engine) -> None:
    _, handle = await engine.drive(event_or_not, 0.01)
    before = await engine.count("run_events")
    with pytest.raises(RunEnded, match="completed"):
        await handle.send("go", 1)
    assert await engine.count("run_events") == before


async def test_bad_topics_and_values_are_refused(engine: Engine) -> None:
    handle = await engine.start(event_or_not, 0.2)
    for topic in ("", "a/b", "x" * 300):
        with pytest.raises(InvalidName):
            await handle.send(topic, 1)
    with pytest.raises(CodecError):
        await handle.send("go", float("nan"))
    with pytest.raises(CodecError):
        await handle.send("go", object())
    await handle.result(PATIENCE_S)


# --- values ---------------------------------------------------------------------------------


@kagzi.workflow
async def tells(ctx: Context, folder: str) -> int:
    for percent in (0, 50, 100):
        await ctx.publish("percent", percent)
        await ctx.step(steps.gated, folder, f"{percent}", f"at {percent}")
    await ctx.publish("report", {"pages": [1, 2]})
    return 3


async def test_clients_see_what_a_run_publishes(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(tells, witness.folder)
    await until(lambda: "+0" in witness.entries)
    assert await handle.published() == {"percent": 0}
    witness.open("at 0", "at 50", "at 100")
    assert await handle.result(PATIENCE_S) == 3
    assert await handle.published() == {"percent": 100, "report": {"pages": [1, 2]}}
    assert await engine.replay(handle) == 3
    assert await handle.published() == {"percent": 100, "report": {"pages": [1, 2]}}


async def test_clients_can_follow_what_a_run_publishes(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(tells, witness.folder)
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        async for key, value in handle.follow():
            seen.append((key, value))
            if key == "percent":
                witness.open(f"at {value}")
    assert seen == [
        ("percent", 0),
        ("percent", 50),
        ("percent", 100),
        ("report", {"pages": [1, 2]}),
    ]
