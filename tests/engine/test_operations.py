"""What people do to runs from outside: cancel, pause, resume, in bulk; on held runs and others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio

import kagzi
from kagzi import Client, Context, InvalidInput, RunStatus, RunWasCancelled, UnknownRun, faultpoints
from kagzi.store.queries import load_queries
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, started, until
from tests.fix_faults import rows

pytestmark = pytest.mark.asyncio(loop_scope="module")

CANCELLED, PAUSED, PENDING = RunStatus.CANCELLED, RunStatus.PAUSED, RunStatus.PENDING


@pytest_asyncio.fixture(loop_scope="module")
async def client(dsn: str) -> AsyncIterator[Client]:
    """A client of a database that no worker serves."""
    async with kagzi.connect(dsn, migrate=False) as made:
        yield made


@kagzi.workflow
async def gated(ctx: Context, folder: str) -> list[str]:
    witness = Witness(folder)
    try:
        first = await ctx.step(steps.note, folder, "first")
        second = await ctx.step(steps.gated, folder, "second", "go")
        return [first, second]
    finally:
        witness.note("left")


@kagzi.workflow
async def wide(ctx: Context, folder: str) -> list[str]:
    calls = [steps.gated.bind(folder, f"{index}", "go") for index in range(6)]
    return await ctx.parallel_vec("g", calls)


@kagzi.workflow
async def sleepy(ctx: Context, folder: str) -> str:
    await ctx.sleep(timedelta(days=400))
    return await ctx.step(steps.note, folder, "awake")


# --- cancel ---------------------------------------------------------------------------------


async def test_cancel_of_a_held_run_stops_its_bodies_and_lets_the_workflow_clean_up(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(gated, witness.folder)
    await until(lambda: "+second" in witness.entries)
    assert await engine.client.cancel(handle) in (RunStatus.RUNNING, CANCELLED)
    with pytest.raises(RunWasCancelled):
        await handle.result(PATIENCE_S)
    assert await handle.status() is CANCELLED
    await until(lambda: "left" in witness.entries)
    witness.open("go")
    details = await handle.describe()
    assert [step.id for step in details.steps] == ["note"], "the cancelled step left no result"
    assert details.summary.completed_at is not None


async def test_cancel_of_a_group_ends_every_body(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(wide, witness.folder)
    await until(lambda: len(witness.entries) == 6)
    await handle.cancel()
    with pytest.raises(RunWasCancelled):
        await handle.result(PATIENCE_S)
    await engine.settled()
    assert await engine.count("step_runs", handle.run_id) == 0


async def test_cancel_of_a_sleeping_run_is_done_at_once(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(sleepy, witness.folder)
    await until(lambda: is_status(handle, RunStatus.SLEEPING))
    assert await engine.client.cancel(handle.id) is CANCELLED
    with pytest.raises(RunWasCancelled):
        await handle.result(PATIENCE_S)


async def is_status(handle: kagzi.RunHandle[Any], *statuses: RunStatus) -> bool:
    return await handle.status() in statuses


async def test_cancel_of_a_run_that_nobody_holds_is_done_at_once_and_nothing_runs(
    client: Client, dsn: str, witness: Witness
) -> None:
    handle = await client.start(gated, witness.folder)
    assert await client.cancel(handle.id) is CANCELLED
    assert await client.cancel(handle.id) is CANCELLED, "again changes nothing"
    async with started(dsn) as engine:
        other = await engine.start(gated, witness.folder)
        witness.open("go")
        await other.result(PATIENCE_S)
    assert await handle.status() is CANCELLED
    assert witness.counts["first"] == 1


async def test_cancel_of_a_finished_run_leaves_it_as_it_is(
    engine: Engine, witness: Witness
) -> None:
    witness.open("go")
    result, handle = await engine.drive(gated, witness.folder)
    for change in (engine.client.cancel, engine.client.pause, engine.client.resume):
        assert await change(handle.id) is RunStatus.COMPLETED
    assert await handle.result(PATIENCE_S) == result == ["first", "second"]


async def test_cancelled_run_goes_on_where_it_was_after_a_retry(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(gated, witness.folder)
    await until(lambda: "+second" in witness.entries)
    await handle.cancel()
    await until(lambda: is_status(handle, CANCELLED))
    witness.open("go")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == ["first", "second"]
    assert witness.counts["first"] == 1


async def test_request_that_comes_as_the_run_is_given_back_is_not_lost(
    dsn: str, witness: Witness
) -> None:
    """Asked of a worker that leaves before it hears: the release carries it out."""
    async with started(dsn, poll_s=3600.0) as engine:
        handle = await engine.start(gated, witness.folder)
        other = await engine.start(gated, witness.folder)
        await until(lambda: witness.counts["+second"] == 2)
        for request, run in (("cancel", handle), ("pause", other)):
            await rows(
                dsn,
                "UPDATE kagzi.workflow_runs SET request = %(request)s WHERE id = %(id)s",
                request=request,
                id=run.run_id,
            )
    async with kagzi.connect(dsn, migrate=False) as client:
        assert (await client.describe(handle.run_id)).status is CANCELLED
        assert (await client.describe(other.run_id)).status is PAUSED


async def test_requests_are_heard_by_polling_alone(dsn: str, witness: Witness) -> None:
    async with started(dsn, poll_s=0.05) as engine:
        handle = await engine.start(gated, witness.folder)
        await until(lambda: "+second" in witness.entries)
        await rows(dsn, "UPDATE kagzi.workflow_runs SET request = 'cancel', news = news + 1")
        await until(lambda: is_status(handle, CANCELLED))


async def test_unknown_run_is_refused(engine: Engine) -> None:
    for change in (engine.client.cancel, engine.client.pause, engine.client.resume):
        with pytest.raises(UnknownRun, match="nobody"):
            await change("nobody")


# --- pause and resume -----------------------------------------------------------------------


async def test_paused_run_stops_and_goes_on_from_its_checkpoints(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(gated, witness.folder)
    await until(lambda: "+second" in witness.entries)
    await engine.client.pause(handle)
    await until(lambda: is_status(handle, PAUSED))
    witness.open("go")
    engine.worker.wake()
    await until(lambda: handle.run_id not in engine.worker.runs)
    await engine.client.resume(handle)
    assert await handle.result(PATIENCE_S) == ["first", "second"]
    assert witness.counts["first"] == 1
    assert witness.counts["+second"] == 2, "what was under way ran again"
    details = await handle.describe()
    assert [step.attempts for step in details.steps] == [1, 1], "and that is no attempt"


async def test_paused_run_is_not_claimed_until_it_is_resumed(
    client: Client, dsn: str, witness: Witness
) -> None:
    witness.open("go")
    handle = await client.start(gated, witness.folder)
    assert await client.pause(handle) is PAUSED
    async with started(dsn) as engine:
        await (await engine.start(gated, witness.folder)).result(PATIENCE_S)
        assert await handle.status() is PAUSED
        assert await engine.client.resume(handle.id) is PENDING
        assert await handle.result(PATIENCE_S) == ["first", "second"]


@pytest.mark.parametrize(
    ("asked", "taken_back"), [("pause", "resume_run"), ("cancel", "take_back_cancel")]
)
async def test_request_that_is_taken_back_after_its_worker_heard_of_it_has_no_effect(
    engine: Engine,
    witness: Witness,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    taken_back: str,
) -> None:
    """The worker has decided to let the run go, and has not written so yet."""
    handle = await engine.start(gated, witness.folder)
    await until(lambda: "+second" in witness.entries)
    left: list[str] = []

    def take_back(point: str) -> None:
        if point == "run.leaves" and not left:
            left.append(point)
            with psycopg.connect(engine.dsn, autocommit=True) as connection:
                statement = load_queries("kagzi")[taken_back].encode()
                connection.execute(statement, {"id": handle.run_id})

    monkeypatch.setattr(faultpoints, "reach", take_back)
    await getattr(engine.client, asked)(handle)
    await until(lambda: left)
    witness.open("go")
    assert len(await handle.result(PATIENCE_S)) == 2


async def test_pause_moves_no_timer(engine: Engine, dsn: str, witness: Witness) -> None:
    handle = await engine.start(sleepy, witness.folder)
    await until(lambda: is_status(handle, RunStatus.SLEEPING))
    due = await engine.rows(
        "SELECT wake_at FROM kagzi.workflow_runs WHERE id = %(id)s", id=handle.run_id
    )
    assert await engine.client.pause(handle) is PAUSED
    assert await engine.client.resume(handle) in (PENDING, RunStatus.RUNNING)
    await until(lambda: is_status(handle, RunStatus.SLEEPING))
    again = await engine.rows(
        "SELECT wake_at FROM kagzi.workflow_runs WHERE id = %(id)s", id=handle.run_id
    )
    assert again == due
    await handle.cancel()


async def test_cancel_counts_more_than_a_pause_whichever_comes_first(
    client: Client, dsn: str, witness: Witness
) -> None:
    first = await client.start(gated, witness.folder)
    await client.pause(first)
    assert await client.cancel(first) is CANCELLED
    assert await client.pause(first) is CANCELLED
    assert await client.resume(first) is CANCELLED


# --- in bulk --------------------------------------------------------------------------------


async def test_bulk_forms_take_what_matches_and_nothing_else(
    client: Client, witness: Witness
) -> None:
    mine = [await client.start(gated, witness.folder) for _ in range(5)]
    other = await client.start(wide, witness.folder)
    counts: list[int] = []
    assert await client.pause_many(workflow="gated", progress=counts.append) == 5
    assert counts == [1, 2, 3, 4, 5]
    assert {await handle.status() for handle in mine} == {PAUSED}
    assert await other.status() is PENDING
    assert await client.resume_many(status="paused") == 5
    assert await client.pause_many(workflow=gated) == 5
    assert await client.resume_many(workflow=gated) == 5
    long_ago = datetime.now(UTC) - timedelta(days=1)
    assert await client.cancel_many(before=long_ago) == 0
    assert await client.cancel_many() == 6
    assert {await handle.status() for handle in [*mine, other]} == {CANCELLED}
    assert await client.retry_many(status="cancelled") == 6
    assert {await handle.status() for handle in [*mine, other]} == {PENDING}


async def test_bulk_forms_refuse_a_status_that_cannot_be_meant(client: Client) -> None:
    with pytest.raises(InvalidInput, match="completed"):
        await client.cancel_many(status="completed")
    with pytest.raises(InvalidInput, match="done"):
        await client.retry_many(status=["failed", "done"])
    with pytest.raises(InvalidInput, match="its name, got 7"):
        await client.cancel_many(workflow=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="time zone"):
        await client.pause_many(before=datetime(2026, 1, 1))


async def test_operations_in_pairs_neither_deadlock_nor_lose_each_other(
    client: Client, dsn: str, witness: Witness
) -> None:
    """A final word stands: whatever meets a cancel, the run ends cancelled."""
    handles = [await client.start(gated, witness.folder) for _ in range(40)]
    others = (client.pause, client.resume, client.cancel, client.cancel)
    changes = [
        change(handle)
        for place, handle in enumerate(handles)
        for change in (client.cancel, others[place % 4])[:: 1 if place % 8 < 4 else -1]
    ]
    await asyncio.gather(*changes, client.cancel_many(), client.pause_many())
    assert {await handle.status() for handle in handles} == {CANCELLED}
