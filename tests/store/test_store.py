"""Claims, rescue, starts and memos on a real Postgres, also from several connections at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kagzi.errors import RunConflict, StoreUnavailable, UnknownRun
from kagzi.ids import uuid7
from kagzi.model import RunStatus
from kagzi.store import rescue
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.operations import publish_value, read_values
from kagzi.store.queries import load_queries
from kagzi.store.store import Store
from tests.fix_engine import until
from tests.fix_faults import rows, value
from tests.store.samples import attempt_row, batch_of, group_row, memo_row, settled, settled_many

NAMES = [("w", "1")]


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    made = Store(Connector(dsn))
    await made.open()
    yield made
    await made.close()


async def registered(store: Store, lease_s: float = 60.0) -> UUID:
    worker_id = uuid7()
    await store.register_worker(worker_id, "host", "boot", 1, "then", {}, lease_s)
    return worker_id


async def add_run(
    store: Store, name: str, workflow: str = "w", version: str = "1", priority: int = 0
) -> UUID:
    run_id = uuid7()
    await store.insert_run(run_id, name, workflow, version, priority, b"[]")
    return run_id


async def claimed_names(
    store: Store, worker_id: UUID, most: int = 100, names: list[tuple[str, str]] = NAMES
) -> list[str]:
    return [run.external_id for run in await store.claim_runs(worker_id, names, most)]


async def set_clock(dsn: str, seconds: float) -> None:
    """Move the store's clock."""
    await rows(
        dsn,
        "CREATE OR REPLACE FUNCTION kagzi.now_at() RETURNS timestamptz LANGUAGE sql STABLE AS"
        f" 'SELECT pg_catalog.clock_timestamp() + interval ''{seconds:g} seconds'''",
    )


@asynccontextmanager
async def transaction(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection in a transaction, rolled back at the end."""
    connection = await psycopg.AsyncConnection.connect(dsn)
    try:
        yield connection
    finally:
        await connection.rollback()
        await connection.close()


# --- starting -------------------------------------------------------------------------------


async def test_run_is_inserted_once_however_many_start_it(store: Store, dsn: str) -> None:
    for name in ("a", "b", "c"):
        started = await asyncio.gather(
            *(store.insert_run(uuid7(), name, "w", "1", 0, b"[1]") for _ in range(24))
        )
        assert sum(run.is_new for run in started) == 1
        assert len({run.run_id for run in started}) == 1
    assert await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs") == 3


async def test_start_waits_for_a_start_of_the_same_id_that_is_not_committed(
    store: Store, dsn: str
) -> None:
    insert = load_queries("kagzi")["insert_run"].encode()
    for commits in (True, False):
        name = f"run {commits}"
        known_id = uuid7()
        async with transaction(dsn) as connection:
            await connection.execute(
                insert,
                {
                    **{"id": known_id, "external_id": name, "workflow": "w", "version": "1"},
                    **{"priority": 0, "input": b"[1]", "pinned": True},
                    **{"queue": "default", "queue_key": ""},
                },
            )
            start = asyncio.ensure_future(store.insert_run(uuid7(), name, "w", "1", 0, b"[1]"))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            await until(lambda: value(dsn, waiting))  # noqa: B023
            if commits:
                await connection.commit()
            else:
                await connection.rollback()
            run = await asyncio.wait_for(start, 60)
        assert run.is_new is not commits
        assert (run.run_id == known_id) is commits


async def test_known_id_with_another_input_is_a_conflict_and_writes_nothing(
    store: Store, dsn: str
) -> None:
    await store.insert_run(uuid7(), "a", "w", "1", 0, b"[1]")
    with pytest.raises(RunConflict, match="another input"):
        await store.insert_run(uuid7(), "a", "w", "1", 0, b"[2]")
    assert await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs") == 1
    assert (await store.insert_run(uuid7(), "a", "other", "1", 0, b"[2]")).is_new


async def test_unknown_runs_are_said(store: Store) -> None:
    with pytest.raises(UnknownRun):
        await store.find_run("nothing")
    with pytest.raises(UnknownRun):
        await store.find_run(uuid7())
    with pytest.raises(UnknownRun):
        await store.read_status(uuid7())
    with pytest.raises(UnknownRun):
        await store.describe_run(uuid7())


async def test_run_is_found_by_either_id_unless_two_workflows_share_it(store: Store) -> None:
    run_id = await add_run(store, "a")
    assert (await store.find_run("a")).run_id == run_id
    assert (await store.find_run(run_id)).external_id == "a"
    assert (await store.find_run(str(run_id))).external_id == "a"
    await add_run(store, "a", workflow="other")
    with pytest.raises(UnknownRun, match="several workflows"):
        await store.find_run("a")


# --- claims ---------------------------------------------------------------------------------


async def test_claim_takes_the_highest_priority_then_the_earliest_due(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
        await add_run(store, name, priority=priority)
    await rows(
        dsn,
        "UPDATE kagzi.workflow_runs SET wake_at = wake_at - interval '1 hour'"
        " WHERE external_id IN ('c', 'd')",
    )
    got = [(await claimed_names(store, worker_id, 1))[0] for _ in range(5)]
    assert got == ["d", "b", "c", "a", "e"]
    assert await claimed_names(store, worker_id) == []


async def test_claim_leaves_what_is_not_due_or_not_known_or_not_waiting(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    for name in ("due", "late", "paused", "done", "held"):
        await add_run(store, name)
    await add_run(store, "other workflow", workflow="x")
    await add_run(store, "other version", version="2")
    await rows(
        dsn,
        """
        UPDATE kagzi.workflow_runs SET status = 'sleeping', wake_at = now() + interval '1 hour'
            WHERE external_id = 'late';
        UPDATE kagzi.workflow_runs SET status = 'paused' WHERE external_id = 'paused';
        UPDATE kagzi.workflow_runs SET status = 'failed', completed_at = now()
            WHERE external_id = 'done';
        UPDATE kagzi.workflow_runs SET status = 'running', worker_id = gen_random_uuid()
            WHERE external_id = 'held';
        """,
    )
    assert await claimed_names(store, worker_id) == ["due"]
    await set_clock(dsn, 7200)
    assert await claimed_names(store, worker_id) == ["late"]
    assert await claimed_names(store, worker_id, names=[("w", "2"), ("y", "1")]) == [
        "other version"
    ]
    assert await claimed_names(store, worker_id, names=[]) == []


async def test_claims_from_many_connections_give_each_run_to_one_worker(
    store: Store, dsn: str
) -> None:
    count = 300
    for number in range(count):
        await add_run(store, f"r{number}")
    workers = [await registered(store) for _ in range(4)]

    async def claim_all(worker_id: UUID) -> list[str]:
        got: list[str] = []
        while found := await claimed_names(store, worker_id, 7):
            got += found
        return got

    shares = await asyncio.gather(*(claim_all(worker_id) for worker_id in workers))
    everything = [name for share in shares for name in share]
    # One that looked while others held locks may have given up early; the rest is still there.
    everything += await claim_all(workers[0])
    assert len(everything) == count
    assert len(set(everything)) == count
    assert await value(dsn, "SELECT max(epoch) FROM kagzi.workflow_runs") == 1


async def test_claim_skips_a_run_that_somebody_has_locked(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    await add_run(store, "locked", priority=9)
    await add_run(store, "free")
    async with transaction(dsn) as connection:
        await connection.execute(
            "SELECT FROM kagzi.workflow_runs WHERE external_id = 'locked' FOR UPDATE"
        )
        names = await asyncio.wait_for(claimed_names(store, worker_id), 60)
        assert names == ["free"]
    assert await claimed_names(store, worker_id) == ["locked"]


async def test_worker_whose_lease_was_ended_claims_nothing(store: Store) -> None:
    worker_id = await registered(store)
    await add_run(store, "a")
    await store.rescue(worker_id, "test", forced=True)
    assert await claimed_names(store, worker_id) == []
    assert await claimed_names(store, uuid7()) == []


async def test_each_claim_raises_the_epoch_and_brings_what_is_recorded(
    store: Store, dsn: str
) -> None:
    first = await registered(store)
    run_id = await add_run(store, "a")
    run = (await store.claim_runs(first, NAMES, 1))[0]
    assert (run.epoch, run.crash_count, run.steps) == (1, 1, {})
    connection = FencedConnection(store.connector, first)
    batch = batch_of([settled("s/0", run_id), settled("s/1", run_id, error=b"{}")])
    batch.groups = [group_row("s", run_id)]
    batch.attempts = [attempt_row("t", 1, run_id), attempt_row("t", 2, run_id)]
    await connection.write(batch)
    await connection.close()
    await store.rescue(first, "test", forced=True)
    run = (await store.claim_runs(await registered(store), NAMES, 1))[0]
    assert (run.epoch, run.crash_count) == (2, 2)
    assert {name: step.status for name, step in run.steps.items()} == {
        "s/0": "completed",
        "s/1": "failed",
    }
    assert list(run.groups) == ["s"]
    assert (run.attempts["t"].counted, run.attempts["t"].last) == (2, 2)
    assert await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs") == 1


async def test_claim_is_served_by_its_index(store: Store, dsn: str) -> None:
    await rows(
        dsn,
        "INSERT INTO kagzi.workflow_runs (id, external_id, workflow, version, input, status,"
        " completed_at) SELECT gen_random_uuid(), n, 'w', '1', '', 'completed', now()"
        " FROM generate_series(1, 3000) n; ANALYZE kagzi.workflow_runs",
    )
    worker_id = await registered(store)
    async with transaction(dsn) as connection:
        query = "EXPLAIN " + load_queries("kagzi")["claim_runs"]
        cursor = await connection.execute(
            query.encode(),
            {
                "worker_id": worker_id,
                "names": ["w"],
                "versions": ["1"],
                "most": 50,
                "suspects": 1,
                "served": None,
                "takes_default": True,
            },
        )
        plan = "\n".join(row[0] for row in await cursor.fetchall())
    assert "workflow_runs_due" in plan
    assert "workflow_runs_suspect" in plan
    assert "Seq Scan on workflow_runs" not in plan


# --- leases and rescue ----------------------------------------------------------------------


async def test_rescue_leaves_a_worker_whose_lease_holds(store: Store, dsn: str) -> None:
    worker_id = await registered(store, lease_s=60)
    await add_run(store, "a")
    await claimed_names(store, worker_id)
    assert await store.find_expired() == []
    assert await store.rescue(worker_id, "test") == 0
    query = "SELECT status FROM kagzi.workers UNION ALL SELECT status FROM kagzi.workflow_runs"
    assert await rows(dsn, query) == [("active",), ("running",)]


async def test_rescue_frees_the_runs_of_an_expired_worker_once(store: Store, dsn: str) -> None:
    worker_id = await registered(store, lease_s=30)
    for name in ("a", "b"):
        await add_run(store, name)
    await claimed_names(store, worker_id)
    await set_clock(dsn, 31)
    assert await store.find_expired() == [worker_id]
    freed = await asyncio.gather(*(store.rescue(worker_id, "expired") for _ in range(4)))
    assert sum(freed) == 2
    assert await store.find_expired() == []
    assert await store.rescue(worker_id, "again") == 0
    query = "SELECT status, worker_id, epoch FROM kagzi.workflow_runs"
    assert await rows(dsn, query) == [("pending", None, 1)] * 2
    query = "SELECT event, detail FROM kagzi.worker_events ORDER BY at"
    assert await rows(dsn, query) == [("started", None), ("ended", "expired")]
    assert len(await claimed_names(store, await registered(store))) == 2


async def test_renewed_lease_is_not_ended_by_a_rescuer_that_looked_before(
    store: Store, dsn: str
) -> None:
    """The rescue checks again, under the lock of the lease."""
    worker_id = await registered(store, lease_s=30)
    await set_clock(dsn, 31)
    assert await store.find_expired() == [worker_id]
    await rows(dsn, load_queries("kagzi")["renew_lease"], id=worker_id, lease_s=30.0)
    await store.rescue(worker_id, "late")
    assert await value(dsn, "SELECT status FROM kagzi.workers") == "active"
    assert await store.find_expired() == []


async def test_renewal_after_the_end_says_so(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    await store.rescue(worker_id, "test", forced=True)
    query = load_queries("kagzi")["renew_lease"]
    assert await rows(dsn, query, id=worker_id, lease_s=30.0) == []


async def test_rescue_of_one_worker_frees_the_runs_of_every_ended_worker(
    store: Store, dsn: str
) -> None:
    """One that ended a lease and died before it freed the runs is made up for by the next."""
    died, expired = await registered(store), await registered(store)
    for worker_id in (died, expired):
        await add_run(store, str(worker_id))
        await claimed_names(store, worker_id)
    await rows(
        dsn,
        "UPDATE kagzi.workers SET status = 'ended', ended_at = now() WHERE id = %(id)s",
        id=died,
    )
    assert await store.rescue(expired, "test", forced=True) == 2
    assert await value(dsn, "SELECT count(worker_id) FROM kagzi.workflow_runs") == 0


async def test_rescue_takes_a_run_that_was_locked_at_its_next_round(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    await add_run(store, "a")
    await claimed_names(store, worker_id)
    async with transaction(dsn) as connection:
        await connection.execute("SELECT FROM kagzi.workflow_runs FOR UPDATE")
        assert await asyncio.wait_for(store.rescue(worker_id, "test", forced=True), 60) == 0
    assert await store.rescue(worker_id, "again", forced=True) == 1


async def test_claim_that_races_the_end_of_its_own_lease_leaves_no_run_behind(
    store: Store, dsn: str
) -> None:
    """Its lock on the fence makes it come before the rescue, or get nothing."""
    for trial in range(30):
        worker_id = await registered(store)
        await add_run(store, f"r{trial}")
        claim, _ = await asyncio.gather(
            store.claim_runs(worker_id, NAMES, 100),
            store.rescue(worker_id, "test", forced=True),
        )
        query = "SELECT count(*) FROM kagzi.workflow_runs WHERE worker_id = %(id)s"
        assert await value(dsn, query, id=worker_id) == 0, claim


async def test_value_that_a_worker_publishes_while_it_is_rescued_from_is_not_seen(
    store: Store, dsn: str
) -> None:
    """It waits for the rescue, and then finds the lease ended."""
    worker_id = await registered(store)
    await add_run(store, "a")
    (run,) = await store.claim_runs(worker_id, [("w", "1")], 9)
    await publish_value(store, run.run_id, worker_id, run.epoch, "k", b"1", 1)
    async with transaction(dsn) as rescuing:
        await rescuing.execute("UPDATE kagzi.workers SET status = 'ended'")
        await rescuing.execute(
            "UPDATE kagzi.workflow_runs SET status = 'pending', worker_id = NULL"
        )
        late = asyncio.ensure_future(
            publish_value(store, run.run_id, worker_id, run.epoch, "k", b"2", 2)
        )
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )

        async def waits_or_is_done() -> bool:
            return late.done() or bool(await value(dsn, waiting))

        await until(waits_or_is_done)
        await rescuing.commit()
    await asyncio.wait_for(late, 60)
    assert await read_values(store, run.run_id) == [("k", b"1", 1)]


async def test_incarnations_of_a_host_are_those_that_are_not_ended(store: Store) -> None:
    first, second = await registered(store), await registered(store)
    assert {row[0] for row in await store.find_incarnations("host")} == {first, second}
    assert await store.find_incarnations("elsewhere") == []
    await store.rescue(first, "test", forced=True)
    assert await store.find_incarnations("host") == [(second, "boot", 1, "then")]


# --- memos ----------------------------------------------------------------------------------


async def test_memo_holds_for_its_lifetime_and_the_first_one_stays(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    connection = FencedConnection(store.connector, worker_id)
    keys = {name: name.encode() * 32 for name in "fe"}  # for ever, expiring

    async def put(step_id: str, output: bytes, size: int) -> None:
        steps = settled_many(size, step_id)
        steps[0].output = output
        batch = batch_of(steps)
        batch.memos = [memo_row(steps[0], keys["f"]), memo_row(steps[0], keys["e"], 3600.0)]
        await connection.write(batch)

    await put("one", b"first", 1)
    await put("two", b"second", 100)
    found = await store.find_memos(list(keys.values()))
    assert found == {keys["f"]: b"first", keys["e"]: b"first"}
    await set_clock(dsn, 3601)
    assert await store.find_memos(list(keys.values())) == {keys["f"]: b"first"}
    await put("three", b"third", 1)
    assert await store.find_memos(list(keys.values())) == {
        keys["f"]: b"first",
        keys["e"]: b"third",
    }
    await set_clock(dsn, 3601 + 1800)
    assert len(await store.find_memos(list(keys.values()))) == 2
    assert await store.find_memos([b"unknown" * 4]) == {}
    await connection.close()


# --- looking --------------------------------------------------------------------------------


async def test_runs_are_listed_newest_first_and_by_status_and_workflow(
    store: Store, dsn: str
) -> None:
    for name in ("a", "b"):
        await add_run(store, name, workflow="shop.order")
    await add_run(store, "c", workflow="other")
    await rows(
        dsn,
        "UPDATE kagzi.workflow_runs SET status = 'completed', completed_at = now(),"
        " created_at = created_at - interval '1 day' WHERE external_id = 'b'",
    )
    assert [run.id for run in await store.list_runs()] == ["c", "a", "b"]
    assert [run.id for run in await store.list_runs(status="completed")] == ["b"]
    assert [run.id for run in await store.list_runs(workflow="order")] == ["a", "b"]
    assert [run.id for run in await store.list_runs(workflow="shop.order", most=1)] == ["a"]
    assert await store.list_runs(workflow="rder") == []


async def test_description_counts_and_orders_what_is_recorded(store: Store) -> None:
    worker_id = await registered(store)
    run_id = await add_run(store, "a")
    connection = FencedConnection(store.connector, worker_id)
    group = group_row("s", run_id)
    steps = settled_many(3, run_id=run_id)
    for place, step in enumerate(steps):
        step.group_id = group.id.bytes
        step.started_us += place * 1000
        step.completed_us = step.started_us + 500
    batch = batch_of([*reversed(steps), settled("x", run_id, error=b"{}")])
    batch.groups, batch.attempts = [group], [attempt_row("s/1", 1, run_id)]
    await connection.write(batch)
    await connection.close()
    summary, payload, found, groups, attempts = await store.describe_run(run_id)
    assert (summary.status, payload) == (RunStatus.PENDING, b"[]")
    assert [step.id for step in found if step.group_path == "s"] == ["s/0", "s/1", "s/2"]
    assert {step.id: step.status for step in found}["x"] == "failed"
    assert all(step.duration_s == pytest.approx(0.0005) for step in found if step.id != "x")
    assert [group.path for group in groups] == ["s"]
    assert [(attempt.step_id, attempt.attempt) for attempt in attempts] == [("s/1", 1)]
    assert await store.count_steps(run_id) == (3, 1)


# --- the server goes away -------------------------------------------------------------------


async def test_store_goes_on_after_its_connections_were_cut(store: Store, dsn: str) -> None:
    """Each method may fail once while the pool notices; then all is as before."""
    run_id = await add_run(store, "a")
    await rows(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )

    async def works() -> bool:
        try:
            return (await store.read_status(run_id))[0] is RunStatus.PENDING
        except StoreUnavailable:
            return False

    await until(works)


async def test_lease_is_kept_by_the_stores_clock_alone(store: Store, dsn: str) -> None:
    await set_clock(dsn, 86_400)
    now = await store.register_worker(uuid7(), "host", "boot", 1, "then", {}, 10.0)
    asked = await value(dsn, "SELECT clock_timestamp()")
    assert now - asked > timedelta(hours=23)
    assert await store.find_expired() == []
    await set_clock(dsn, 86_400 + 11)
    assert len(await store.find_expired()) == 1


# --- who is in the way of a rescue ----------------------------------------------------------


@asynccontextmanager
async def named(dsn: str, name: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection that a pooler may have given to others before: its name tells nothing."""
    dsn = make_conninfo(dsn, application_name=name)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        yield connection


async def test_rescue_ends_the_backend_that_is_in_its_way_whatever_its_name(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    await add_run(store, "a")
    await claimed_names(store, worker_id)
    async with named(dsn, f"kagzi:{worker_id}") as innocent, named(dsn, "another") as frozen:
        await frozen.execute("BEGIN")
        hold = "SELECT kagzi.hold_fence(%s)"
        await frozen.execute(hold, [worker_id])
        assert await store.rescue(worker_id, "test", forced=True) == 1
        cursor = await innocent.execute("SELECT 1")
        assert await cursor.fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            await frozen.execute("SELECT 1")


async def test_rescue_leaves_a_migration_alone_that_holds_the_table(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    async with named(dsn, "kagzi:migrate") as migrating:
        await migrating.execute("BEGIN")
        await migrating.execute("LOCK TABLE kagzi.workers IN ACCESS EXCLUSIVE MODE")
        assert await store.rescue(worker_id, "test", forced=True) == 0
        await migrating.execute("COMMIT")
    await store.rescue(worker_id, "test", forced=True)
    assert await rows(dsn, "SELECT status FROM kagzi.workers") == [("ended",)]


async def test_rescuers_do_not_end_each_other(store: Store, dsn: str) -> None:
    """One is held up for longer than the others' patience."""
    worker_id = await registered(store)
    async with named(dsn, "kagzi-rescue") as slow:
        await slow.execute("BEGIN")
        await slow.execute("SELECT FROM kagzi.worker_leases FOR UPDATE")
        going = asyncio.gather(*(store.rescue(worker_id, "test", forced=True) for _ in range(3)))

        async def tried_often() -> bool:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'kagzi-rescue'"
                " AND wait_event_type = 'Lock' AND datname = current_database()"
            )
            return bool((await rows(dsn, query))[0][0])

        await until(tried_often)
        await asyncio.sleep(rescue.PATIENCE_S * 2)
        await slow.execute("COMMIT")
        await going
    assert await rows(dsn, "SELECT status FROM kagzi.workers") == [("ended",)]
