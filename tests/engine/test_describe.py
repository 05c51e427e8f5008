"""What a client is told of a run."""

from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

import kagzi
from kagzi import Context


@kagzi.step(retry=kagzi.Retry.fixed(2, delay=0))
async def succeed_second() -> int:
    if kagzi.current_step().attempt == 1:
        raise ValueError("not yet")
    return 1


@kagzi.workflow
async def one_group(ctx: Context) -> list[int]:
    return await ctx.parallel_vec("group", [succeed_second.bind()])


async def test_times_are_utc_whatever_the_servers_zone(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'").format(name))
    async with kagzi.connect(dsn) as client, client.worker(processes=0):
        handle = await client.start(one_group)
        await handle.result(timeout=30)

        run = await handle.describe()

    records = [*run.steps, *run.groups, *run.attempts]
    times = [time for record in records for time in (record.started_at, record.completed_at)]
    times += [run.summary.created_at, run.summary.started_at, run.summary.completed_at]
    assert len(times) == 9
    assert {time.utcoffset() for time in times if time is not None} == {timedelta(0)}


async def test_unknown_status_is_refused_with_the_known_ones(dsn: str) -> None:
    async with kagzi.connect(dsn) as client:
        with pytest.raises(kagzi.InvalidInput, match="none of pending, running"):
            await client.runs(status="done")
        with pytest.raises(kagzi.InvalidInput, match="limit"):
            await client.runs(limit=0)


async def test_context_without_annotation_is_explained(dsn: str) -> None:
    @kagzi.step(where="coordinator")
    async def forgets(ctx, n: int) -> int:  # type: ignore[no-untyped-def]
        return n

    @kagzi.workflow(name="forgetful")
    async def forgetful(ctx: Context) -> int:
        return await ctx.step(forgets, 3)

    async with kagzi.connect(dsn) as client, client.worker(processes=0):
        with pytest.raises(kagzi.InvalidArguments, match="annotate it as `ctx: Context`"):
            await (await client.start(forgetful)).result(timeout=30)


async def test_list_given_to_parallel_is_led_to_parallel_vec(dsn: str) -> None:
    @kagzi.workflow(name="confused")
    async def confused(ctx: Context) -> None:
        await ctx.parallel("group", [succeed_second.bind()])

    async with kagzi.connect(dsn) as client, client.worker(processes=0):
        with pytest.raises(kagzi.InvalidDefinition, match="parallel_vec"):
            await (await client.start(confused)).result(timeout=30)


async def test_result_that_is_late_says_how_the_run_stands(dsn: str) -> None:
    async with kagzi.connect(dsn) as client:
        handle = await client.start(one_group, id="nobody's")
        with pytest.raises(TimeoutError, match=r"\"nobody's\" is pending after 0\.05 s.*worker"):
            await handle.result(timeout=0.05)
