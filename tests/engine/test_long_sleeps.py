"""Sleeps of years: the store's clock decides when they end, and nothing is held until then."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest

import kagzi
from kagzi import Context, InvalidInput
from tests.fix_engine import PATIENCE_S, started, until
from tests.fix_faults import value

YEAR_S = 365.25 * 86_400
OPTIONS: dict[str, Any] = {"processes": 0, "heartbeat_s": 0.02, "lease_s": 1e9, "poll_s": 0.02}


@kagzi.workflow
async def one_sleep(ctx: Context, years: float) -> str:
    await ctx.sleep(timedelta(days=365.25 * years))
    return "awake"


@kagzi.workflow
async def sleeps_in_turn(ctx: Context, count: int) -> list[datetime]:
    woke = []
    for _ in range(count):
        await ctx.sleep(YEAR_S)
        woke.append(await ctx.now())
    return woke


@kagzi.workflow
async def sleeps_beside_each_other(ctx: Context) -> list[int]:
    async def branch(years: int) -> int:
        await ctx.sleep(years * YEAR_S)
        return years

    return await asyncio.gather(branch(30), branch(10), branch(20))


@kagzi.workflow
async def sleeps_within_a_block(ctx: Context, sleep: int, limit: int) -> str:
    try:
        async with ctx.timeout(timedelta(days=365.25 * limit)):
            await ctx.sleep(sleep * YEAR_S)
    except TimeoutError:
        return "timeout"
    return "awake"


@kagzi.workflow
async def until_a_moment(ctx: Context, at: datetime) -> bool:
    await ctx.sleep_until(at)
    return await ctx.now() >= at


async def asleep(handle: kagzi.RunHandle[Any]) -> datetime | None:
    """When it is to wake, if it is parked."""
    summary = (await handle.describe()).summary
    return summary.wake_at if summary.status == "sleeping" else None


@pytest.mark.parametrize("years", [1, 40, 900])
async def test_a_sleep_of_years_ends_after_so_many_years_on_whichever_worker(
    dsn: str, years: int
) -> None:
    async with started(dsn, **OPTIONS) as engine:
        handle = await engine.start(one_sleep, years)
        wake_at = await until(lambda: asleep(handle))
        passed = wake_at - datetime.now(UTC)
        assert abs(passed - timedelta(days=365.25 * years)) < timedelta(minutes=1)
        await engine.settled()
        await engine.move_clock((years - 0.1) * YEAR_S)
        run_id = handle.run_id
    async with started(dsn, **OPTIONS) as engine:
        again = await engine.client.get(run_id)
        await engine.settled()
        assert await again.status() == "sleeping"
        await engine.move_clock(years * YEAR_S)
        assert await again.result(PATIENCE_S) == "awake"


async def test_sleeps_of_years_in_turn_are_counted_from_the_end_of_the_last(dsn: str) -> None:
    async with started(dsn, **OPTIONS) as engine:
        handle = await engine.start(sleeps_in_turn, 4)
        began = datetime.now(UTC)
        for number in range(1, 5):
            wake_at = await until(lambda: asleep(handle))
            assert abs(wake_at - began - timedelta(days=365.25 * number)) < timedelta(
                minutes=number
            )
            await engine.move_clock(number * YEAR_S + 30 * number)

            async def woke(number: int = number) -> bool:
                return (await handle.progress())[0] >= 2 * number

            await until(woke)
        for number, woke_at in enumerate(await handle.result(PATIENCE_S), 1):
            passed = woke_at - began
            assert abs(passed - timedelta(days=365.25 * number)) < timedelta(minutes=2 * number)


async def test_of_sleeps_beside_each_other_the_run_wakes_for_the_first(dsn: str) -> None:
    async with started(dsn, **OPTIONS) as engine:
        handle = await engine.start(sleeps_beside_each_other)
        for years in (10, 20, 30):

            async def to_wake(years: int = years) -> bool:
                wake_at = await asleep(handle)
                left = timedelta(days=365.25 * years)
                return wake_at is not None and abs(wake_at - datetime.now(UTC) - left) < left / 100

            await until(to_wake)
            await engine.move_clock(years * YEAR_S + 60)
        assert await handle.result(PATIENCE_S) == [30, 10, 20]


@pytest.mark.parametrize(("sleep", "limit", "outcome"), [(5, 10, "awake"), (10, 5, "timeout")])
async def test_a_block_of_years_ends_a_sleep_of_more_years(
    dsn: str, sleep: int, limit: int, outcome: str
) -> None:
    async with started(dsn, **OPTIONS) as engine:
        handle = await engine.start(sleeps_within_a_block, sleep, limit)
        wake_at = await until(lambda: asleep(handle))
        assert abs(wake_at - datetime.now(UTC) - timedelta(days=365.25 * 5)) < timedelta(minutes=1)
        await engine.move_clock(5 * YEAR_S + 60)
        assert await handle.result(PATIENCE_S) == outcome


async def test_a_sleep_may_end_in_any_year_up_to_9000_and_none_after(dsn: str) -> None:
    async with started(dsn, **OPTIONS) as engine:
        at = datetime(8999, 12, 31, tzinfo=UTC)
        handle = await engine.start(until_a_moment, at)
        assert await until(lambda: asleep(handle)) == at
        await engine.move_clock((at - datetime.now(UTC)).total_seconds() + 60)
        assert await handle.result(PATIENCE_S) is True
        for too_far in (8000, 1e6):
            error = await engine.outcome(await engine.start(one_sleep, too_far))
            assert isinstance(error, InvalidInput)
            assert "9000" in str(error)


async def test_many_sleepers_hold_no_place_no_task_no_timer_and_no_connection(dsn: str) -> None:
    """With room for three runs at a time, sixty sleep at once."""
    async with started(dsn, **{**OPTIONS, "concurrency": 3}) as engine:
        await engine.settled()
        process = psutil.Process()
        tasks, files = len(asyncio.all_tasks()), process.num_fds()
        backends = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        connections = await value(dsn, backends)
        handles = [await engine.start(one_sleep, 40) for _ in range(60)]

        async def all_asleep() -> bool:
            query = "SELECT count(*) FROM kagzi.workflow_runs WHERE status = 'sleeping'"
            return await value(dsn, query) == 60

        async def few_backends() -> bool:
            return bool(await value(dsn, backends) < connections + 20)

        await until(all_asleep)
        await engine.settled()
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 2)
        await until(lambda: process.num_fds() < files + 20)
        await until(few_backends)
        await engine.move_clock(40 * YEAR_S)
        for handle in handles:
            assert await handle.result(2 * PATIENCE_S) == "awake"
