"""Schedules: one run for each tick, whoever looks; policies; what a client can do with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

import kagzi
from kagzi import CatchUp, Context, InvalidInput, Overlap, UnknownSchedule
from kagzi.store.schedules import Ticks, find_due_schedules, start_ticks
from kagzi.worker.ticker import Ticker
from tests.engine.witness import Witness
from tests.fix_engine import HOUR_S, PATIENCE_S, started, until
from tests.fix_faults import StartWorker, rows, value

MINUTE_S = 60.0
DAY_S = 24 * HOUR_S
YEAR_S = 365 * DAY_S


@kagzi.workflow
async def ticked(ctx: Context, *words: str) -> list[Any]:
    at = ctx.scheduled_at
    return [None if at is None else at.isoformat(), *words]


@kagzi.workflow
async def waits(ctx: Context, folder: str) -> None:
    await Witness(folder).pass_gate("go")


@kagzi.workflow
async def sleeps(ctx: Context) -> None:
    await ctx.sleep(100 * YEAR_S)


async def move_clock(dsn: str, to: datetime) -> None:
    """Set the store's clock; it goes on from there."""
    ahead_s = (to - datetime.now(UTC)).total_seconds()
    await rows(
        dsn,
        "CREATE OR REPLACE FUNCTION kagzi.now_at() RETURNS timestamptz LANGUAGE sql STABLE"
        " PARALLEL SAFE AS $$SELECT pg_catalog.clock_timestamp()"
        f" + interval '{ahead_s} s'$$",
    )


def moment(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


async def ticks_of(dsn: str, schedule_id: str) -> list[str]:
    """Ticks of its runs."""
    query = "SELECT scheduled_at FROM kagzi.workflow_runs WHERE schedule_id = %(id)s ORDER BY 1"
    return [f"{at:%m-%d %H:%M}" for (at,) in await rows(dsn, query, id=schedule_id)]


async def next_at(client: kagzi.Client, schedule_id: str) -> datetime | None:
    return next(one for one in await client.schedules() if one.id == schedule_id).next_at


@asynccontextmanager
async def client_at(dsn: str, at: str) -> AsyncIterator[kagzi.Client]:
    """A client whose store's clock stands at a moment, more or less."""
    await move_clock(dsn, moment(at))
    async with kagzi.connect(dsn, migrate=False) as client:
        yield client


def nothing() -> None: ...


async def look(client: kagzi.Client) -> None:
    """What a worker does about schedules, until nothing is due."""

    ticker = Ticker(client._store, 1.0, nothing)
    while not await ticker.turn():
        pass


# --- one run for each tick ------------------------------------------------------------------


async def test_each_tick_starts_one_run_that_knows_its_tick(dsn: str) -> None:
    await move_clock(dsn, moment("2026-03-01T00:00:30"))
    async with started(dsn, processes=0, poll_s=0.02) as engine:
        made = await engine.client.schedule(ticked, "*/10 * * * *", "a", "b", id="tens")
        assert (made.next_at, made.last_at, made.runs) == (moment("2026-03-01T00:10:00"), None, 0)
        for minute in (10, 20):
            await move_clock(dsn, moment(f"2026-03-01T00:{minute}:01"))
            run_id = f"tens@2026-03-01T00:{minute}:00Z"

            async def is_there(run_id: str = run_id) -> bool:
                return bool(await rows(dsn, _OF_ID, id=run_id))

            await until(is_there)
            handle = await engine.client.get(run_id)
            result = await handle.result(PATIENCE_S)
            assert result == [f"2026-03-01T00:{minute}:00+00:00", "a", "b"]
        assert await ticks_of(dsn, "tens") == ["03-01 00:10", "03-01 00:20"]
        (known,) = await engine.client.schedules()
        assert (known.runs, known.last_run_id) == (2, "tens@2026-03-01T00:20:00Z")
        assert known.next_at == moment("2026-03-01T00:30:00")


_OF_ID = "SELECT 1 FROM kagzi.workflow_runs WHERE external_id = %(id)s"


async def test_a_run_that_no_schedule_started_has_no_tick(dsn: str) -> None:
    async with started(dsn, processes=0) as engine:
        assert await engine.run(ticked) == [None]


async def test_a_fork_of_a_run_has_its_tick_and_does_not_belong_to_the_schedule(dsn: str) -> None:
    await move_clock(dsn, moment("2026-03-01T00:00:30"))
    async with started(dsn, processes=0, poll_s=0.02) as engine:
        await engine.client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        handle = await until(lambda: found(engine.client, "s@2026-03-01T00:01:00Z"))
        await handle.result(PATIENCE_S)
        fork = await engine.client.fork(handle, id="again")
        assert await fork.result(PATIENCE_S) == ["2026-03-01T00:01:00+00:00"]
        assert await ticks_of(dsn, "s") == ["03-01 00:01"]


async def test_a_ticker_looks_again_when_the_next_tick_comes_and_not_a_poll_later(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        ticker = Ticker(client._store, 3600.0, nothing)
        assert await ticker.turn() == 3600
        await client.schedule(ticked, "* * * * *", id="s")
        assert 0 < await ticker.turn() <= 30
        await move_clock(dsn, moment("2026-03-01T00:01:20"))
        assert 0 < await ticker.turn() <= 40
        assert await ticks_of(dsn, "s") == ["03-01 00:01"]


async def test_more_schedules_than_one_statement_takes_are_all_served(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await rows(
            dsn,
            """INSERT INTO kagzi.schedules (id, workflow, version, pinned, cron, timezone, catch_up,
                overlap, next_at, input)
            SELECT id || n, workflow, version, pinned, cron, timezone, catch_up, overlap, next_at,
                input FROM kagzi.schedules, generate_series(1, 1199) n""",
        )
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        await look(client)
        assert await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs") == 1200


async def test_four_workers_start_one_run_for_each_tick(dsn: str) -> None:
    """Every minute of five hours, of three schedules, the clock moved under all four at once."""
    start = moment("2026-03-01T00:00:30")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_at(dsn, "2026-03-01T00:00:30"))
        for number in range(3):
            await client.schedule(ticked, "* * * * *", id=f"s{number}", catch_up="all")
        for _ in range(4):
            other = await stack.enter_async_context(kagzi.connect(dsn, migrate=False))
            await stack.enter_async_context(other.worker(processes=0, poll_s=0.01))
        for minutes in (1, 2, 3, 10, 30, 60, 61, 62, 120, 300):
            end = start + timedelta(minutes=minutes)
            await move_clock(dsn, end)

            async def all_there(minutes: int = minutes) -> bool:
                counts = await rows(
                    dsn, "SELECT count(*) FROM kagzi.workflow_runs GROUP BY schedule_id"
                )
                return sorted(counts) == [(minutes,)] * 3

            await until(all_there)
        query = (
            "SELECT count(*), count(DISTINCT (schedule_id, scheduled_at)) FROM kagzi.workflow_runs"
        )
        assert await rows(dsn, query) == [(900, 900)]
        assert {one.runs for one in await client.schedules()} == {300}


async def test_ticks_read_twice_are_started_once(dsn: str) -> None:
    """Two workers have read the same; one of them was frozen meanwhile."""
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        (due,) = await find_due_schedules(client._store, 0, [])
        ticks = [Ticks(due, [due.next_at], due.next_at + timedelta(minutes=1))]
        assert await start_ticks(client._store, ticks) == (1, 1)
        assert await start_ticks(client._store, ticks) == (0, 0)
        await move_clock(dsn, moment("2026-03-01T00:02:10"))
        await look(client)
        assert await start_ticks(client._store, ticks) == (0, 0)
        assert await ticks_of(dsn, "s") == ["03-01 00:01", "03-01 00:02"]
        assert await next_at(client, "s") == moment("2026-03-01T00:03:00")


async def test_a_schedule_that_another_transaction_holds_is_left_to_it(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        for name in ("held", "free"):
            await client.schedule(ticked, "* * * * *", id=name)
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        async with await psycopg.AsyncConnection.connect(dsn) as holder:
            await holder.execute("SELECT 1 FROM kagzi.schedules WHERE id = 'held' FOR UPDATE")
            await look(client)  # does not wait
            assert await ticks_of(dsn, "held") == []
            assert await ticks_of(dsn, "free") == ["03-01 00:01"]
            await holder.rollback()
        await look(client)
        assert await ticks_of(dsn, "held") == ["03-01 00:01"]


async def test_a_worker_killed_while_it_starts_a_run_leaves_none_and_another_starts_it(
    dsn: str, start_worker: StartWorker
) -> None:
    """A trigger holds the statement up between the run's insert and the schedule's update."""
    await rows(
        dsn,
        """CREATE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN new; END $$;
        CREATE TRIGGER waits BEFORE UPDATE ON kagzi.schedules FOR EACH ROW
        EXECUTE FUNCTION wait_for_test()""",
    )
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as gate:
            await gate.execute("SELECT pg_advisory_lock(4711)")
            worker = start_worker(dsn)
            await move_clock(dsn, moment("2026-03-01T00:01:10"))
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            await until(lambda: value(dsn, waiting))
            worker.kill()
            backend = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted"
            await until(lambda: value(dsn, backend))  # it does not see that its client is gone
            assert await ticks_of(dsn, "s") == []
        await look(client)
        await look(client)
        assert await ticks_of(dsn, "s") == ["03-01 00:01"]


async def test_a_worker_starts_runs_of_workflows_that_it_does_not_know(
    dsn: str, start_worker: StartWorker
) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        start_worker(dsn)  # which serves other workflows
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        await until(lambda: ticks_of(dsn, "s"))
        assert await (await client.get("s@2026-03-01T00:01:00Z")).status() == "pending"


async def test_a_schedule_that_this_host_cannot_read_does_not_hold_up_the_others(
    dsn: str, warnings_of_kagzi: Any
) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        for name in ("a", "b"):
            await client.schedule(ticked, "* * * * *", id=name)
        await rows(dsn, "UPDATE kagzi.schedules SET timezone = 'Mars/Base' WHERE id = 'a'")
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        ticker = Ticker(client._store, 1.0, nothing)
        for _ in range(3):
            assert await ticker.turn() > 0
        assert await ticks_of(dsn, "b") == ["03-01 00:01"]
        assert await ticks_of(dsn, "a") == []
        (warning,) = warnings_of_kagzi()
        assert "'Mars/Base'" in warning


# --- missed ticks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [
        ("last", ["03-01 05:00"]),
        ("all", [f"03-01 0{hour}:00" for hour in range(1, 6)]),
        ("none", []),
    ],
)
async def test_ticks_that_no_worker_came_to_run_by_policy(
    catch_up: str, expected: list[str], dsn: str
) -> None:
    async with client_at(dsn, "2026-03-01T00:30:00") as client:
        await client.schedule(ticked, "@hourly", id="s", catch_up=catch_up)
        await move_clock(dsn, moment("2026-03-01T05:30:00"))
        await look(client)
        assert await ticks_of(dsn, "s") == expected
        await look(client)
        assert await ticks_of(dsn, "s") == expected
        await move_clock(dsn, moment("2026-03-01T06:00:01"))
        await look(client)
        assert await ticks_of(dsn, "s") == [*expected, "03-01 06:00"]


async def test_catching_up_on_a_year_takes_many_small_transactions(dsn: str) -> None:
    async with client_at(dsn, "2026-01-01T00:30:00") as client:
        await client.schedule(ticked, "@hourly", id="s", catch_up=CatchUp.ALL)
        await move_clock(dsn, moment("2027-01-01T00:30:00"))
        await look(client)
        runs = "SELECT count(*) FROM kagzi.workflow_runs"
        assert await value(dsn, runs) == 365 * 24
        by_transaction = "SELECT count(*) FROM kagzi.workflow_runs GROUP BY xmin::text"
        assert max(await rows(dsn, by_transaction)) <= (500,)


async def test_a_year_without_a_worker_costs_the_default_policy_one_run(dsn: str) -> None:
    async with client_at(dsn, "2026-01-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2027-01-01T00:00:30"))
        await look(client)
        assert await ticks_of(dsn, "s") == ["01-01 00:00"]


# --- overlap --------------------------------------------------------------------------------


async def test_overlap_skip_starts_nothing_while_an_earlier_run_goes_on(
    dsn: str, witness: Witness
) -> None:
    await move_clock(dsn, moment("2026-03-01T00:00:30"))
    async with started(dsn, processes=0, poll_s=0.02) as engine:
        client = engine.client
        await client.schedule(waits, "* * * * *", witness.folder, id="s", overlap=Overlap.SKIP)

        async def seen() -> tuple[int, int]:
            (known,) = await client.schedules()
            return known.runs, known.skipped

        for minute, counts in ((1, (1, 0)), (2, (1, 1)), (3, (1, 2))):
            await move_clock(dsn, moment(f"2026-03-01T00:0{minute}:01"))

            async def is_so(counts: tuple[int, int] = counts) -> bool:
                return await seen() == counts

            await until(is_so)
        witness.open("go")
        await (await client.get("s@2026-03-01T00:01:00Z")).result(PATIENCE_S)
        await move_clock(dsn, moment("2026-03-01T00:04:01"))
        await until(lambda: ticks_has(dsn, 2))
        assert await ticks_of(dsn, "s") == ["03-01 00:01", "03-01 00:04"]
        assert await seen() == (2, 2)


async def ticks_has(dsn: str, size: int) -> bool:
    return len(await ticks_of(dsn, "s")) == size


@pytest.mark.parametrize("status", ["pending", "sleeping", "paused"])
async def test_a_run_that_is_not_held_is_not_finished_either(dsn: str, status: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s", overlap="skip")
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        await look(client)
        await rows(dsn, "UPDATE kagzi.workflow_runs SET status = %(status)s", status=status)
        await move_clock(dsn, moment("2026-03-01T00:02:01"))
        await look(client)
        assert await ticks_of(dsn, "s") == ["03-01 00:01"]


async def test_overlap_skip_lets_one_missed_tick_run_though_all_should(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "@hourly", id="s", overlap="skip", catch_up="all")
        await move_clock(dsn, moment("2026-03-01T05:30:01"))
        await look(client)
        assert await ticks_of(dsn, "s") == ["03-01 01:00"]


async def test_overlap_cancel_ends_earlier_runs_whether_they_are_held_or_not(
    dsn: str, witness: Witness
) -> None:
    await move_clock(dsn, moment("2026-03-01T00:00:30"))
    async with started(dsn, processes=0, poll_s=0.02) as engine:
        client = engine.client
        for workflow, name in ((waits, "held"), (sleeps, "asleep"), (dated_2, "pending")):
            args = (witness.folder,) if workflow is waits else ()
            await client.schedule(workflow, "* * * * *", *args, id=name, overlap="cancel")
        # Nobody here has the code of this one.
        await rows(dsn, "UPDATE kagzi.schedules SET version = '3' WHERE id = 'pending'")
        first = "2026-03-01T00:01"
        await move_clock(dsn, moment(f"{first}:01"))
        held = await until(lambda: found(client, f"held@{first}:00Z"))
        asleep = await until(lambda: found(client, f"asleep@{first}:00Z"))
        pending = await until(lambda: found(client, f"pending@{first}:00Z"))
        await until(lambda: has_status(held, "running"))
        await until(lambda: has_status(asleep, "sleeping"))
        assert await pending.status() == "pending"
        await move_clock(dsn, moment("2026-03-01T00:02:01"))
        for handle in (held, asleep, pending):
            with pytest.raises(kagzi.RunWasCancelled):
                await handle.result(PATIENCE_S)
        newest = await until(lambda: found(client, "held@2026-03-01T00:02:00Z"))
        witness.open("go")
        await newest.result(PATIENCE_S)


async def found(client: kagzi.Client, run_id: str) -> kagzi.RunHandle[Any] | None:
    try:
        return await client.get(run_id)
    except kagzi.UnknownRun:
        return None


async def has_status(handle: kagzi.RunHandle[Any], status: str) -> bool:
    return await handle.status() == status


async def test_a_cancel_that_a_worker_left_undone_is_done_by_another(dsn: str) -> None:
    """It started the run of a tick and died before it cancelled the one before."""
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s", overlap="cancel")
        for minute in (1, 2):
            await move_clock(dsn, moment(f"2026-03-01T00:0{minute}:01"))
            (due,) = await find_due_schedules(client._store, 0, [])
            ticks = [Ticks(due, [due.next_at], due.next_at + timedelta(minutes=1))]
            assert await start_ticks(client._store, ticks) == (1, 1)
        ticker = Ticker(client._store, 1.0, nothing)
        for _ in range(10):
            await ticker.turn()
        assert [run.status for run in await client.runs()] == ["pending", "cancelled"]


async def test_a_paused_run_is_skipped_for_and_cancelled_as_any_other(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        for policy in ("skip", "cancel"):
            await client.schedule(ticked, "* * * * *", id=policy, overlap=policy)
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        await look(client)
        for policy in ("skip", "cancel"):
            await client.pause(f"{policy}@2026-03-01T00:01:00Z")
        await move_clock(dsn, moment("2026-03-01T00:02:01"))
        await look(client)
        assert {run.id: run.status.value for run in await client.runs()} == {
            "skip@2026-03-01T00:01:00Z": "paused",
            "cancel@2026-03-01T00:01:00Z": "cancelled",
            "cancel@2026-03-01T00:02:00Z": "pending",
        }


async def test_overlap_allow_starts_runs_beside_each_other(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        for minute in (1, 2):
            await move_clock(dsn, moment(f"2026-03-01T00:0{minute}:01"))
            await look(client)
        assert await ticks_of(dsn, "s") == ["03-01 00:01", "03-01 00:02"]


# --- both changes of the clock --------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "day", "expected"),
    [
        ("30 2 * * *", "2026-03-29", ["03-29 01:00"]),  # 02:30 is skipped: 03:00 there
        ("30 2 * * *", "2026-10-25", ["10-25 00:30"]),  # 02:30 comes twice
        ("0 * * * *", "2026-03-29", [f"03-29 0{hour}:00" for hour in (0, 1, 2)]),
        ("0 * * * *", "2026-10-25", [f"10-25 0{hour}:00" for hour in (0, 1, 2)]),
    ],
)
async def test_each_tick_of_a_changed_clock_has_one_run(
    cron: str, day: str, expected: list[str], dsn: str
) -> None:
    """The store's clock goes through the night in steps of ten minutes."""
    start = moment(f"{day}T00:00:00") - timedelta(minutes=10)
    async with client_at(dsn, start.replace(tzinfo=None).isoformat()) as client:
        await client.schedule(ticked, cron, id="s", timezone="Europe/Berlin", catch_up="all")
        for step in range(1, 18):
            await move_clock(dsn, start + timedelta(minutes=10 * step, seconds=5))
            await look(client)
        assert await ticks_of(dsn, "s") == expected


# --- a client's changes ---------------------------------------------------------------------


async def test_scheduling_a_known_id_again_changes_nothing_if_it_is_equal(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        options: dict[str, Any] = {"id": "s", "catch_up": "all"}
        await client.schedule(ticked, "* * * * *", "x", **options)
        await move_clock(dsn, moment("2026-03-01T00:03:30"))  # three ticks are missed
        before = await rows(dsn, "SELECT s.*, s.xmin::text FROM kagzi.schedules s")
        await client.schedule(ticked, "* * * * *", "x", **options)
        assert await rows(dsn, "SELECT s.*, s.xmin::text FROM kagzi.schedules s") == before
        await look(client)
        assert len(await ticks_of(dsn, "s")) == 3


async def test_scheduling_a_known_id_with_other_words_changes_it(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", "old", id="s", catch_up="all")
        await move_clock(dsn, moment("2026-03-01T00:02:30"))
        changed = await client.schedule(
            ticked, "* * * * *", "new", id="s", catch_up="all", overlap="skip", priority=5
        )
        assert changed.next_at == moment("2026-03-01T00:01:00"), "the ticks are the same"
        assert (changed.input, changed.overlap, changed.priority) == (["new"], Overlap.SKIP, 5)
        changed = await client.schedule(ticked, "0 12 * * *", id="s", timezone="Asia/Tokyo")
        assert changed.next_at == moment("2026-03-01T03:00:00"), "from now on"
        assert (changed.timezone, changed.catch_up) == ("Asia/Tokyo", CatchUp.LAST)
        assert len(await client.schedules()) == 1


async def test_a_changed_schedule_does_not_give_a_tick_a_second_run(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        await look(client)
        await move_clock(dsn, moment("2026-03-01T00:00:40"))  # as after a failover
        changed = await client.schedule(waits, "*/1 * * * *", "", id="s")
        assert changed.next_at == moment("2026-03-01T00:02:00")


async def test_a_change_between_reading_and_starting_wins(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", "old", id="s")
        await move_clock(dsn, moment("2026-03-01T00:01:10"))
        (due,) = await find_due_schedules(client._store, 0, [])
        await client.schedule(ticked, "* * * * *", "new", id="s")
        ticks = [Ticks(due, [due.next_at], due.next_at + timedelta(minutes=1))]
        assert await start_ticks(client._store, ticks) == (0, 0)
        await look(client)
        handle = await client.get("s@2026-03-01T00:01:00Z")
        assert (await handle.describe()).input == ["new"]


async def test_many_clients_may_schedule_one_id_at_once(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        made = await asyncio.gather(
            *(client.schedule(ticked, "* * * * *", id="s") for _ in range(12))
        )
        assert len({one.created_at for one in made}) == 1
        assert await value(dsn, "SELECT revision FROM kagzi.schedules") == 1


async def test_a_paused_schedule_does_not_tick_and_drops_the_ticks_of_its_pause(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s", catch_up="all")
        assert (await client.pause_schedule("s")).paused
        await move_clock(dsn, moment("2026-03-01T00:10:30"))
        await look(client)
        await client.schedule(ticked, "* * * * *", "other", id="s", catch_up="all")
        await look(client)
        assert await ticks_of(dsn, "s") == []
        resumed = await client.resume_schedule("s")
        assert (resumed.paused, resumed.next_at) == (False, moment("2026-03-01T00:11:00"))
        assert await client.resume_schedule("s") == resumed
        await move_clock(dsn, moment("2026-03-01T00:11:01"))
        await look(client)
        assert await ticks_of(dsn, "s") == ["03-01 00:11"]


async def test_a_resumed_schedule_ticks_from_now_on_though_its_clock_was_wrong(dsn: str) -> None:
    async with client_at(dsn, "2036-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2036-03-01T00:01:01"))
        await look(client)
        await move_clock(dsn, moment("2026-03-01T00:00:30"))
        await client.pause_schedule("s")
        resumed = await client.resume_schedule("s")
        assert resumed.next_at == moment("2026-03-01T00:01:00")


async def test_an_unscheduled_one_is_gone_and_its_runs_stay(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule(ticked, "* * * * *", id="s")
        await move_clock(dsn, moment("2026-03-01T00:01:30"))
        await look(client)
        await client.unschedule("s")
        await move_clock(dsn, moment("2026-03-01T00:05:30"))
        await look(client)
        assert await client.schedules() == []
        assert await ticks_of(dsn, "s") == ["03-01 00:01"]
        await client.schedule(ticked, "* * * * *", id="s")
        assert await next_at(client, "s") == moment("2026-03-01T00:06:00")


@pytest.mark.parametrize("name", ["unschedule", "pause_schedule", "resume_schedule"])
async def test_a_schedule_that_is_not_there_is_named(dsn: str, name: str) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        with pytest.raises(UnknownSchedule, match="'nightly'"):
            await getattr(client, name)("nightly")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cron": "61 * * * *"}, "61"),
        ({"cron": "0 0 30 2 *"}, "0 0 30 2"),
        ({"cron": "0 0 */29 2 MON#5"}, "no day that comes"),
        ({"cron": "@reboot"}, "@reboot"),
        ({"cron": 5}, "5"),
        ({"timezone": "Mars/Base"}, "Mars/Base"),
        ({"timezone": None}, "None"),
        ({"catch_up": "some"}, "some"),
        ({"overlap": None}, "None"),
        ({"priority": 2**31}, "2147483648"),
        ({"queue": ""}, "queue"),
        ({"key": 7}, "key"),
        ({"id": ""}, "schedule id"),
        ({"id": "x" * 230}, "229"),
        ({"args": ({1, 2},)}, "set"),
        ({"workflow": "nobody.knows"}, "nobody.knows"),
    ],
)
async def test_what_cannot_be_read_is_refused_and_leaves_no_row(
    dsn: str, options: dict[str, Any], named: str
) -> None:
    given = {"workflow": ticked, "cron": "@daily", "args": (), "id": "s", **options}
    positional = (given.pop("workflow"), given.pop("cron"), *given.pop("args"))
    async with kagzi.connect(dsn, migrate=False) as client:
        with pytest.raises(kagzi.KagziError, match=named) as raised:
            await client.schedule(*positional, **given)
        assert isinstance(raised.value, InvalidInput | kagzi.CodecError | kagzi.UnknownWorkflow)
        assert await client.schedules() == []


async def test_runs_wait_in_the_queue_of_their_schedule(dsn: str) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.set_queue("reports", concurrency=1)
        await client.schedule(ticked, "* * * * *", id="a", queue="reports", key="k", priority=3)
        await client.schedule(ticked, "* * * * *", id="b", queue="unlimited")
        changed = await client.schedule(ticked, "* * * * *", id="c", queue="reports")
        changed = await client.schedule(ticked, "* * * * *", id="c")
        assert (changed.queue, changed.key) == ("default", None)
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        await look(client)
        query = """SELECT schedule_id, queue, queue_key, priority, apart FROM kagzi.workflow_runs
            ORDER BY schedule_id"""
        assert await rows(dsn, query) == [
            ("a", "reports", "k", 3, True),
            ("b", "unlimited", "", 0, False),
            ("c", "default", "", 0, False),
        ]


async def test_runs_are_of_the_default_version_when_a_tick_comes_unless_one_is_named(
    dsn: str,
) -> None:
    async with client_at(dsn, "2026-03-01T00:00:30") as client:
        await client.schedule("dated", "* * * * *", id="newest")
        await client.schedule(dated_1, "* * * * *", id="named", version="1")
        await client.set_default_version("dated", "1")
        await move_clock(dsn, moment("2026-03-01T00:01:01"))
        await look(client)
        await client.set_default_version("dated", "2")
        await move_clock(dsn, moment("2026-03-01T00:02:01"))
        await look(client)
        query = "SELECT version FROM kagzi.workflow_runs WHERE schedule_id = %(id)s ORDER BY id"
        assert await rows(dsn, query, id="newest") == [("1",), ("2",)]
        assert await rows(dsn, query, id="named") == [("1",), ("1",)]


@kagzi.workflow(name="dated", version="1")
async def dated_1(ctx: Context) -> None: ...


@kagzi.workflow(name="dated", version="2")
async def dated_2(ctx: Context) -> None: ...
