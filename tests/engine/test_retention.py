"""Finished runs are deleted after a time, whole and a little at a time; so are expired memos."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import kagzi
from kagzi import Context, InvalidInput, Retry, UnknownRun
from kagzi.cli import main
from kagzi.store.connections import Connector
from kagzi.store.queries import load_queries
from kagzi.store.retention import MOST_RUNS, MOST_STEPS, Expiry
from kagzi.store.store import Store
from tests.fix_engine import PATIENCE_S, Engine, started, until
from tests.fix_faults import orphans, rows, value

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S
RUNS = "SELECT count(*) FROM kagzi.workflow_runs"


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    made = Store(Connector(dsn))
    await made.open()
    yield made
    await made.close()


async def add_runs(
    dsn: str, count: int, status: str = "completed", *, ended_s: float = WEEK_S, steps: int = 0
) -> None:
    """Many runs at once, that ended so long ago, with checkpoints."""
    ended = status in ("completed", "failed", "cancelled")
    await rows(
        dsn,
        """INSERT INTO kagzi.workflow_runs
            (id, external_id, workflow, version, status, input, completed_at)
        SELECT gen_random_uuid(), gen_random_uuid(), 'w', '1', %(status)s, '[]',
            CASE WHEN %(ended)s THEN kagzi.now_at() - make_interval(secs => %(ended_s)s) END
        FROM generate_series(1, %(count)s)""",
        status=status,
        ended=ended,
        ended_s=ended_s,
        count=count,
    )
    await rows(
        dsn,
        """INSERT INTO kagzi.step_runs (run_id, step_id, function, status, input_hash, attempts,
            started_at, completed_at, call_number, completed_number, worker_id, process_id)
        SELECT r.id, n::text, 'f', 'completed', '', 1, now(), now(), n, n, gen_random_uuid(), 0
        FROM kagzi.workflow_runs r, generate_series(1, %(steps)s) n
        WHERE r.workflow = 'w' ON CONFLICT DO NOTHING""",
        steps=steps,
    )


async def delete_expired(store: Store, retain_s: float | None) -> tuple[int, bool]:
    """Some of it, from the oldest on."""
    return await Expiry(store, retain_s).delete_some()


# --- after a time ---------------------------------------------------------------------------


@kagzi.step(retry=Retry.fixed(2, 0.01))
async def at_second(n: int) -> int:
    if kagzi.current_step().attempt == 1:
        raise ConnectionError
    return n


@kagzi.workflow
async def leaves_rows(ctx: Context) -> int:
    await ctx.map("group", at_second, range(3))
    return await ctx.step(at_second, 1)


@kagzi.workflow
async def fails(ctx: Context) -> None:
    raise ValueError("no")


@kagzi.workflow
async def sleeps(ctx: Context) -> None:
    await ctx.step(at_second, 1)
    await ctx.sleep(timedelta(days=5000))


TABLES = ("workflow_runs", "step_runs", "step_attempts", "parallel_groups")


async def test_a_worker_deletes_whole_runs_that_ended_long_enough_ago_and_no_others(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kagzi.worker.janitor.LONG_REST", 0.0)
    async with started(dsn, processes=0, poll_s=0.02, retain_s=WEEK_S) as engine:
        old = await engine.start(leaves_rows, id="old")
        bad = await engine.start(fails, id="bad")
        asleep = await engine.start(sleeps, id="asleep")
        await old.result(PATIENCE_S)
        await engine.outcome(bad)
        await until(lambda: is_asleep(asleep))
        assert all([await engine.count(table) for table in TABLES])
        await engine.move_clock(WEEK_S - 3600)
        young = await engine.start(leaves_rows, id="young")
        await young.result(PATIENCE_S)
        await engine.move_clock(WEEK_S + 60)
        await until(lambda: is_gone(engine, old))
        await until(lambda: is_gone(engine, bad))
        assert await orphans(dsn) == []
        assert [run.id for run in await engine.client.runs()] == ["young", "asleep"]
        assert len((await young.describe()).steps) == 4
        assert len((await asleep.describe()).steps) == 2
        with pytest.raises(UnknownRun):
            await old.result(PATIENCE_S)
        await engine.move_clock(2 * WEEK_S + 120)
        await until(lambda: is_gone(engine, young))
        assert [run.id for run in await engine.client.runs()] == ["asleep"]


async def is_asleep(handle: kagzi.RunHandle[Any]) -> bool:
    return await handle.status() == "sleeping"


async def is_gone(engine: Engine, handle: kagzi.RunHandle[Any]) -> bool:
    query = "SELECT 1 FROM kagzi.workflow_runs WHERE id = %(id)s"
    return not await engine.rows(query, id=handle.run_id)


async def test_runs_are_kept_for_ever_unless_said_otherwise(store: Store, dsn: str) -> None:
    await add_runs(dsn, 3, ended_s=100 * 365 * DAY_S)
    assert await delete_expired(store, None) == (0, False)
    assert await value(dsn, RUNS) == 3


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_a_run_that_ended_any_way_is_deleted(store: Store, dsn: str, status: str) -> None:
    await add_runs(dsn, 2, status, steps=3)
    assert await delete_expired(store, DAY_S) == (2, False)
    assert await value(dsn, RUNS) == await value(dsn, "SELECT count(*) FROM kagzi.step_runs") == 0


@pytest.mark.parametrize("status", ["pending", "sleeping", "paused"])
async def test_a_run_that_has_not_ended_stays_however_old(
    store: Store, dsn: str, status: str
) -> None:
    await add_runs(dsn, 2, status)
    assert await delete_expired(store, 0.001) == (0, False)
    assert await value(dsn, RUNS) == 2


async def test_a_transaction_deletes_so_many_runs_and_the_oldest_first(
    store: Store, dsn: str
) -> None:
    await add_runs(dsn, MOST_RUNS, ended_s=3 * WEEK_S)
    await add_runs(dsn, MOST_RUNS + 7, ended_s=2 * WEEK_S)
    assert await delete_expired(store, WEEK_S) == (MOST_RUNS, True)
    oldest = "SELECT min(completed_at) > now() - interval '20 days' FROM kagzi.workflow_runs"
    assert await value(dsn, oldest)
    assert await delete_expired(store, WEEK_S) == (MOST_RUNS, True)
    assert await delete_expired(store, WEEK_S) == (7, False)


async def test_a_transaction_deletes_so_many_checkpoints_unless_they_are_of_one_run(
    store: Store, dsn: str
) -> None:
    await add_runs(dsn, 3, ended_s=3 * WEEK_S, steps=MOST_STEPS * 2 // 5)
    assert await delete_expired(store, WEEK_S) == (2, True)
    assert await delete_expired(store, WEEK_S) == (1, False)
    await add_runs(dsn, 2, steps=MOST_STEPS + 1)
    assert await delete_expired(store, DAY_S) == (1, True)
    assert await delete_expired(store, DAY_S) == (1, False)
    assert await orphans(dsn) == []


async def test_runs_that_may_not_go_yet_do_not_hold_up_those_behind_them(
    store: Store, dsn: str
) -> None:
    """Twelve hundred children of a run that goes on, then some that nobody needs."""
    await add_runs(dsn, 1200, ended_s=3 * WEEK_S)
    await add_runs(dsn, 1, "sleeping")
    await rows(
        dsn,
        """UPDATE kagzi.workflow_runs SET parent_run_id =
            (SELECT id FROM kagzi.workflow_runs WHERE status = 'sleeping')
        WHERE status = 'completed'""",
    )
    await add_runs(dsn, 7, ended_s=2 * WEEK_S)
    expiry = Expiry(store, WEEK_S)
    found = [await expiry.delete_some() for _ in range(4)]
    assert found == [(0, True), (0, True), (7, False), (0, True)]
    assert await value(dsn, RUNS) == 1201
    await rows(dsn, "UPDATE kagzi.workflow_runs SET parent_run_id = NULL")
    await expiry.delete_some()
    await expiry.delete_some()
    assert (await expiry.delete_some())[0] == 500, "it begins again with the oldest"


async def test_runs_of_many_checkpoints_are_all_deleted(store: Store, dsn: str) -> None:
    await add_runs(dsn, 30, steps=MOST_STEPS // 4)
    expiry = Expiry(store, DAY_S)
    sizes = []
    while (found := await expiry.delete_some())[0]:
        sizes.append(found[0])
    assert sum(sizes) == 30
    assert max(sizes) == 4
    assert await orphans(dsn) == []


async def test_many_transactions_follow_each_other_until_nothing_is_left(dsn: str) -> None:
    await add_runs(dsn, 3 * MOST_RUNS)
    async with started(dsn, processes=0, poll_s=60.0, retain_s=DAY_S):

        async def none_left() -> bool:
            return await value(dsn, RUNS) == 0

        await until(none_left)  # long before the next look


async def test_one_worker_deletes_at_a_time(store: Store, dsn: str) -> None:
    await add_runs(dsn, 1)
    lock = load_queries("kagzi")["lock_retention"].encode()
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute(lock, {"schema": "kagzi"})
        assert await delete_expired(store, DAY_S) == (0, False)
    assert await delete_expired(store, DAY_S) == (1, False)


async def test_a_run_that_somebody_has_locked_is_left_and_not_waited_for(
    store: Store, dsn: str
) -> None:
    await add_runs(dsn, 2, "failed", steps=1)
    async with await psycopg.AsyncConnection.connect(dsn) as person:
        await person.execute("SELECT 1 FROM kagzi.workflow_runs LIMIT 1 FOR UPDATE")
        assert await delete_expired(store, DAY_S) == (1, False)
        await person.rollback()
    assert await orphans(dsn) == []
    assert await delete_expired(store, DAY_S) == (1, False)


async def test_a_run_that_is_retried_meanwhile_stays(dsn: str) -> None:
    """The deletion sees the run as failed, waits for nothing, and finds it pending."""
    async with kagzi.connect(dsn, migrate=False) as client:
        await add_runs(dsn, 1, "failed")
        (failed,) = await client.runs()
        query = "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL"
        await rows(dsn, query)
        deletion = load_queries("kagzi")["delete_runs"]
        assert await rows(dsn, deletion, run_ids=[failed.run_id]) == []
        assert [run.status for run in await client.runs()] == ["pending"]


async def test_a_child_stays_as_long_as_its_parent_goes_on(store: Store, dsn: str) -> None:
    await add_runs(dsn, 1, "sleeping")
    await rows(
        dsn,
        """INSERT INTO kagzi.workflow_runs (id, external_id, workflow, version, status, input,
            completed_at, parent_run_id, parent_step_id)
        SELECT gen_random_uuid(), 'child', 'w', '1', 'completed', '[]',
            now() - interval '1 year', id, 'child' FROM kagzi.workflow_runs""",
    )
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await delete_expired(store, DAY_S) == (0, False)
        with pytest.raises(InvalidInput, match="'child' is the child of one that goes on"):
            await client.delete("child")
        await rows(
            dsn,
            """UPDATE kagzi.workflow_runs SET status = 'completed', completed_at = now()
            WHERE external_id <> 'child'""",
        )
        assert await delete_expired(store, DAY_S) == (1, False)
        assert len(await client.runs()) == 1


async def test_a_run_stays_until_all_have_heard_of_its_end(store: Store, dsn: str) -> None:
    await add_runs(dsn, 1)
    await rows(dsn, "UPDATE kagzi.workflow_runs SET told = false")
    assert await delete_expired(store, DAY_S) == (0, False)
    await rows(dsn, "UPDATE kagzi.workflow_runs SET told = true")
    assert await delete_expired(store, DAY_S) == (1, False)


async def test_expired_memos_are_deleted_also_where_runs_are_kept(store: Store, dsn: str) -> None:
    await rows(
        dsn,
        """INSERT INTO kagzi.memos (key, function, output, run_id, expires_at)
        SELECT n::text::bytea, 'f', '1', gen_random_uuid(),
            CASE n WHEN 1 THEN NULL WHEN 2 THEN now() + interval '1 day'
                ELSE now() - interval '1 s' END
        FROM generate_series(1, 5) n""",
    )
    assert await delete_expired(store, None) == (0, False)
    keys = await rows(dsn, "SELECT key FROM kagzi.memos ORDER BY key")
    assert keys == [(b"1",), (b"2",)]


async def test_every_table_of_rows_of_runs_is_in_the_list_of_what_is_deleted(dsn: str) -> None:
    """A new table with a `run_id` belongs into `delete_runs`, or among the exceptions here."""
    exceptions = {"memos"}  # whose run_id only tells where a result came from
    query = """SELECT table_name FROM information_schema.columns
        WHERE table_schema = 'kagzi' AND column_name = 'run_id'"""
    tables = {name for (name,) in await rows(dsn, query)} - exceptions
    listed = set(re.findall(r"DELETE FROM \{schema\}\.(\w+)", statement("delete_runs")))
    assert listed - {"workflow_runs"} == tables


def statement(name: str) -> str:
    return load_queries("kagzi")[name].replace('"kagzi"', "{schema}")


@pytest.mark.parametrize("retain_s", [0, -1, float("inf"), float("nan"), "a week", True, 1e12])
async def test_a_time_that_means_nothing_is_refused(dsn: str, retain_s: Any) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        with pytest.raises(InvalidInput, match="retain_s"):
            async with client.worker(processes=0, retain_s=retain_s):
                pass


# --- by hand --------------------------------------------------------------------------------


async def test_delete_removes_one_finished_run_and_frees_its_id(dsn: str) -> None:
    async with started(dsn, processes=0) as engine:
        handles = [await engine.start(leaves_rows, id=name) for name in ("one", "two")]
        for handle in handles:
            await handle.result(PATIENCE_S)
        await engine.client.delete("one")
        assert [run.id for run in await engine.client.runs()] == ["two"]
        assert await orphans(dsn) == []
        assert len((await handles[1].describe()).steps) == 4
        again = await engine.start(leaves_rows, id="one")
        assert again.is_new
        await again.result(PATIENCE_S)
        await engine.client.delete(again)
        await engine.client.delete(handles[1].run_id)
        assert [await engine.count(table) for table in TABLES] == [0] * 4


async def test_delete_refuses_a_run_that_is_not_finished_or_not_there(dsn: str) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(leaves_rows, id="new")
        with pytest.raises(InvalidInput, match="'new' is pending"):
            await client.delete(handle)
        assert len(await client.runs()) == 1
        with pytest.raises(UnknownRun, match="'none'"):
            await client.delete("none")


def test_delete_on_the_command_line_tells_what_went(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*words: str) -> Any:
        return CliRunner().invoke(main, words, prog_name="kagzi")

    flow = ("run", "tests.engine.cli_flows:doubled", "--input", "[[1]]", "--processes", "0")
    for name in ("a", "b", "c"):
        assert command(*flow, "--id", name).exit_code == 0
    assert command("delete", "a").stdout == "run 'a' is deleted\n"
    assert command("delete", "b", "c", "--json").stdout == '{"deleted":["b","c"]}\n'
    assert command("delete", "c").exit_code == 4
    assert command("runs", "--json").stdout == "[]\n"


@pytest.mark.parametrize("days", ["0", "-1", "nan", "a week", "inf"])
def test_days_that_mean_nothing_are_refused_on_the_command_line(
    dsn: str, days: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ("worker", "tests.engine.cli_flows", "--processes", "0", "--retain-days", days)
    assert CliRunner().invoke(main, words, prog_name="kagzi").exit_code == 2
