"""Claims under a queue's limits, from many connections at once and from long lines."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from kagzi.ids import uuid7
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.queries import load_queries
from kagzi.store.queues import any_queues, claim_apart, declare_queues, list_queues, set_queue
from kagzi.store.recorded import Claims
from kagzi.store.rows import Batch, RunRow
from kagzi.store.store import Store
from tests.fix_faults import rows, value

NAMES = [("w", "1")]
numbers = itertools.count()


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    made = Store(Connector(dsn))
    await made.open()
    yield made
    await made.close()


async def registered(store: Store) -> UUID:
    worker_id = uuid7()
    await store.register_worker(worker_id, "host", "boot", 1, "then", {}, 60.0)
    return worker_id


async def add(store: Store, queue: str, name: str = "", key: str = "", priority: int = 0) -> UUID:
    run_id = uuid7()
    name = name or f"run {next(numbers)}"
    await store.insert_run(run_id, name, "w", "1", priority, b"[]", True, queue, key)
    return run_id


async def add_many(dsn: str, queue: str, count: int, key: str = "''", priority: str = "0") -> None:
    """`count` waiting runs in a line of their own; `key` and `priority` are expressions of n."""
    await rows(
        dsn,
        f"""
        INSERT INTO kagzi.workflow_runs (id, external_id, workflow, version, input, queue,
            queue_key, priority, apart, wake_at)
        SELECT gen_random_uuid(), '{queue} ' || n, 'w', '1', '[]', '{queue}', {key}, {priority},
            true, clock_timestamp() - interval '1 hour' + n * interval '1 microsecond'
        FROM generate_series(1, {count}) n;
        ANALYZE kagzi.workflow_runs
        """,  # noqa: S608
    )


async def claim(
    store: Store, worker_id: UUID, most: int = 100, served: list[str] | None = None, **more: Any
) -> Claims:
    return await claim_apart(store, worker_id, NAMES, most, more.get("suspects", 1), served)


async def names(store: Store, worker_id: UUID, most: int = 100) -> list[str]:
    return [run.external_id for run in await claim(store, worker_id, most)]


async def release(store: Store, worker_id: UUID, runs: Claims, status: str = "completed") -> None:
    connection = FencedConnection(store.connector, worker_id)
    batch = Batch()
    wake_at = datetime.now().astimezone() - timedelta(seconds=1)
    batch.runs = [
        RunRow(run.run_id, run.epoch, status, b"null" if status == "completed" else None, None)
        for run in runs
    ]
    for row in batch.runs:
        row.wake_at = wake_at if status != "completed" else None
    await connection.write(batch)
    await connection.close()


async def set_clock(dsn: str, seconds: float) -> None:
    await rows(
        dsn,
        "CREATE OR REPLACE FUNCTION kagzi.now_at() RETURNS timestamptz LANGUAGE sql STABLE AS"
        f" 'SELECT pg_catalog.clock_timestamp() + interval ''{seconds:g} seconds'''",
    )


async def audited(dsn: str) -> None:
    """Records each claim and release as it is committed to the table, in order."""
    await rows(
        dsn,
        """
        CREATE TABLE audit (at bigserial, queue text, queue_key text, step int);
        CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (NEW.status = 'running') <> (OLD.status = 'running') THEN
                INSERT INTO audit (queue, queue_key, step)
                VALUES (NEW.queue, NEW.queue_key,
                    CASE NEW.status WHEN 'running' THEN 1 ELSE -1 END);
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER note_claim AFTER UPDATE ON kagzi.workflow_runs
            FOR EACH ROW EXECUTE FUNCTION note_claim();
        """,
    )


# --- concurrency ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_key", [False, True])
async def test_limit_holds_over_claimers_that_race_and_is_reached(
    store: Store, dsn: str, per_key: bool
) -> None:
    limits = {"concurrency_per_key": 2} if per_key else {"concurrency": 5}
    await set_queue(store, "q", limits)
    await add_many(dsn, "q", 300, key="'k' || n % 3")
    await audited(dsn)
    workers = [await registered(store) for _ in range(4)]
    held = {worker_id: await claim(store, worker_id, 2) for worker_id in workers}
    assert sum(map(len, held.values())) == (6 if per_key else 5), "three keys, or one line"
    for worker_id, runs in held.items():
        await release(store, worker_id, runs)

    async def work(worker_id: UUID) -> int:
        done = 0
        while await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs WHERE epoch = 0"):
            runs = await claim(store, worker_id, 2)
            if runs:
                await release(store, worker_id, runs)
                done += len(runs)
        return done

    shares = await asyncio.gather(*(work(worker_id) for worker_id in workers))
    assert sum(shares) == 300 - sum(map(len, held.values()))
    by = "queue_key" if per_key else "queue"
    peak = await value(
        dsn,
        f"SELECT max(held) FROM (SELECT sum(step) OVER (PARTITION BY {by} ORDER BY at) AS held"  # noqa: S608
        " FROM audit) a",
    )
    assert peak == (2 if per_key else 5)


async def test_two_claims_at_once_are_one_behind_the_other(store: Store, dsn: str) -> None:
    """While somebody holds the queue's row another claimer leaves it, and says to look again."""
    await set_queue(store, "q", {"concurrency": 3})
    await add_many(dsn, "q", 5)
    worker_id = await registered(store)
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute("SELECT FROM kagzi.queues WHERE name = 'q' FOR NO KEY UPDATE")
        skipped = await claim(store, worker_id)
        assert (list(skipped), skipped.again_s) == ([], 0.02)
    assert len(await claim(store, worker_id)) == 3
    assert len(await claim(store, worker_id)) == 0


async def test_slot_is_free_when_its_run_ends_parks_is_given_back_or_rescued(
    store: Store, dsn: str
) -> None:
    await set_queue(store, "q", {"concurrency": 1})
    await add_many(dsn, "q", 5)
    worker_id, dead = await registered(store), await registered(store)
    for status in ("completed", "sleeping", "pending"):
        runs = await claim(store, worker_id)
        assert len(runs) == 1
        assert len(await claim(store, worker_id)) == 0
        await release(store, worker_id, runs, status)
    held = await claim(store, dead)
    assert len(held) == 1
    assert len(await claim(store, worker_id)) == 0
    await store.rescue(dead, "test", forced=True)
    assert len(await claim(store, worker_id)) == 1


async def test_runs_that_began_before_the_limit_was_set_count(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    for _ in range(6):
        await add(store, "q", key="k")
    before = await store.claim_runs(worker_id, NAMES, 4)
    assert len(before) == 4, "from the common line"
    await set_queue(store, "q", {"concurrency": 5})
    assert (await store.claim_runs(worker_id, NAMES, 100)).moved == 2
    assert len(await claim(store, worker_id)) == 1
    await set_clock(dsn, 61)
    assert len(await claim(store, worker_id)) == 0
    assert await value(dsn, "SELECT settled FROM kagzi.queues")
    assert len(await claim(store, worker_id)) == 0
    await release(store, worker_id, before)
    assert len(await claim(store, worker_id)) == 1


async def test_worker_whose_lease_was_ended_claims_nothing(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    await set_queue(store, "q", {"concurrency": 1})
    await add(store, "q")
    await store.rescue(worker_id, "test", forced=True)
    assert len(await claim(store, worker_id)) == 0


# --- order ----------------------------------------------------------------------------------


async def test_line_goes_by_priority_then_by_due_time(store: Store, dsn: str) -> None:
    for limits in ({}, {"concurrency": 3}, {"concurrency_per_key": 3}, {"rate": (3, 60.0)}):
        queue = "-".join(limits) or "none"
        await set_queue(store, queue, limits)
        worker_id = await registered(store)
        for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
            await add(store, queue, f"{queue}:{name}", "k", priority)
        await rows(
            dsn,
            "UPDATE kagzi.workflow_runs SET wake_at = wake_at - interval '1 hour'"
            " WHERE right(external_id, 1) IN ('c', 'd')",
        )
        got = [name[-1] for _ in range(3) for name in await names(store, worker_id, 1)]
        assert got == ["d", "b", "c"], queue
        await rows(dsn, "DELETE FROM kagzi.workflow_runs")


async def test_claim_leaves_what_is_not_due_not_known_or_of_a_paused_queue(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    await set_queue(store, "q", {"concurrency": 9})
    await set_queue(store, "still", {"paused": True})
    for name in ("late", "due"):
        await add(store, "q", name)
    await add(store, "still", "paused")
    await store.insert_run(uuid7(), "other version", "w", "2", 0, b"[]", True, "q")
    await rows(
        dsn,
        "UPDATE kagzi.workflow_runs SET wake_at = now() + interval '1 hour'"
        " WHERE external_id = 'late'",
    )
    assert await names(store, worker_id) == ["due"]
    await set_queue(store, "still", {"paused": False})
    assert await names(store, worker_id) == ["paused"]
    await set_clock(dsn, 7200)
    assert await names(store, worker_id) == ["late"]


async def test_ten_thousand_runs_of_one_key_do_not_hold_up_the_others(
    store: Store, dsn: str
) -> None:
    await set_queue(store, "q", {"concurrency_per_key": 2})
    await add_many(dsn, "q", 10_000, key="'busy'")
    worker_id = await registered(store)
    assert len(await claim(store, worker_id)) == 2
    for key in ("other", "third", "other", "other", ""):
        await add(store, "q", key=key)
    got = Counter[str]()
    for run in await claim(store, worker_id):
        query = "SELECT queue_key FROM kagzi.workflow_runs WHERE id = %(id)s"
        got[await value(dsn, query, id=run.run_id)] += 1
    assert got == {"other": 2, "third": 1, "": 1}


async def test_full_key_in_the_middle_is_passed_over_in_order(store: Store) -> None:
    await set_queue(store, "q", {"concurrency_per_key": 1})
    worker_id = await registered(store)
    for name, key in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("n1", ""), ("n2", ""), ("c1", "c")]:
        await add(store, "q", name, key)
    assert sorted(await names(store, worker_id, 3)) == ["a1", "b1", "n1"]
    assert sorted(await names(store, worker_id)) == ["c1", "n2"]


async def test_no_queue_starves_another(store: Store, dsn: str) -> None:
    for queue in ("a", "b", "c"):
        await declare_queues(store, [queue])
        await add_many(dsn, queue, 200)
    worker_id = await registered(store)
    got = Counter([name[0] for _ in range(60) for name in await names(store, worker_id, 1)])
    assert min(got[queue] for queue in "abc") >= 5


async def test_suspects_are_taken_one_at_a_time_here_too(store: Store, dsn: str) -> None:
    for queue, limits in (("q", {"concurrency": 9}), ("k", {"concurrency_per_key": 9})):
        await set_queue(store, queue, limits)
        worker_id = await registered(store)
        for _ in range(4):
            await add(store, queue, key="x")
        held = await claim(store, worker_id)
        await release(store, worker_id, held, "pending")
        await rows(
            dsn,
            "UPDATE kagzi.workflow_runs SET crash_count = 2 WHERE id = ANY(%(ids)s)",
            ids=[run.run_id for run in held[:3]],
        )
        assert len(await claim(store, worker_id, suspects=0)) == 1
        assert len(await claim(store, worker_id, suspects=1)) == 1
        await rows(dsn, "DELETE FROM kagzi.workflow_runs")


# --- rate -----------------------------------------------------------------------------------


async def test_no_window_ever_holds_more_first_starts_than_the_rate(store: Store, dsn: str) -> None:
    await set_queue(store, "q", {"rate": (7, 10.0)})
    await add_many(dsn, "q", 60)
    worker_id = await registered(store)
    for step in range(80):
        await set_clock(dsn, step * 1.3)
        await claim(store, worker_id, 1 + step % 4)
    starts = [row[0] for row in await rows(dsn, "SELECT started_at FROM kagzi.workflow_runs")]
    starts = sorted(at for at in starts if at is not None)
    assert len(starts) == 60, "and it is used up: 104 s at 0.7 a second"
    window = timedelta(seconds=10)
    counts = [sum(at <= other < at + window for other in starts) for at in starts]
    assert max(counts) == 7
    assert await value(dsn, "SELECT count(*) FROM kagzi.queue_starts") <= 7, "old ones are removed"


async def test_claim_says_when_the_rate_has_room_again(store: Store, dsn: str) -> None:
    await set_queue(store, "q", {"rate": (2, 3600.0)})
    await add_many(dsn, "q", 5)
    worker_id = await registered(store)
    first = await claim(store, worker_id)
    assert len(first) == 2
    assert first.again_s == pytest.approx(3600, abs=60)
    await set_clock(dsn, 3000)
    later = await claim(store, worker_id)
    assert (len(later), later.again_s) == (0, pytest.approx(600, abs=60))
    await set_clock(dsn, 3700)
    assert len(await claim(store, worker_id)) == 2


@pytest.mark.parametrize("keyed", [False, True])
async def test_run_that_goes_on_passes_those_that_the_rate_holds_back(
    store: Store, dsn: str, keyed: bool
) -> None:
    await set_queue(store, "q", {"rate": (1, 60.0), "concurrency_per_key": 9 if keyed else None})
    await add_many(dsn, "q", 3)
    worker_id = await registered(store)
    started = await claim(store, worker_id)
    assert len(started) == 1
    await release(store, worker_id, started, "sleeping")
    await add_many(dsn, "r", 0)
    await add(store, "q", priority=9)
    again = await claim(store, worker_id)
    assert [run.run_id for run in again] == [started[0].run_id]
    await release(store, worker_id, again, "sleeping")
    await set_clock(dsn, 61)
    assert len(await claim(store, worker_id)) == 2, "its second start does not count"


# --- lines ----------------------------------------------------------------------------------


async def test_runs_of_a_queue_without_limits_wait_in_the_common_line(store: Store) -> None:
    worker_id = await registered(store)
    await add(store, "free", "a")
    await add(store, "default", "b")
    assert not await any_queues(store, None)
    assert [run.external_id for run in await store.claim_runs(worker_id, NAMES, 9)] == ["a", "b"]


async def test_common_line_never_gives_a_run_of_a_limited_queue(store: Store, dsn: str) -> None:
    """Not even one whose row does not know yet: it moves to its own line."""
    await set_queue(store, "q", {"concurrency": 1})
    await add(store, "q", "a", priority=3)
    await add(store, "q", "b")
    await add(store, "default", "c")
    assert await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs WHERE apart") == 2
    await rows(dsn, "UPDATE kagzi.workflow_runs SET apart = false")
    worker_id = await registered(store)
    claims = await store.claim_runs(worker_id, NAMES, 9)
    assert ([run.external_id for run in claims], claims.moved) == (["c"], 2)
    moved = "SELECT status, epoch, crash_count, started_at, worker_id FROM kagzi.workflow_runs"
    assert (await rows(dsn, f"{moved} WHERE apart"))[0] == ("pending", 0, 0, None, None)
    assert await names(store, worker_id) == ["a"]


async def test_run_comes_whole_from_either_line(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    run_id = await add(store, "q")
    await rows(
        dsn,
        "UPDATE kagzi.workflow_runs SET scheduled_at = now(), news = 3, epoch = 1, crash_count = 1,"
        " parent_run_id = id",
    )
    (common,) = await store.claim_runs(worker_id, NAMES, 1)
    held = "UPDATE kagzi.workflow_runs SET status = %(status)s, worker_id = %(worker)s, epoch = 1"
    await rows(dsn, f"{held}, crash_count = 1, apart = true", status="pending", worker=None)
    await declare_queues(store, ["q"])
    (apart,) = await claim(store, worker_id)
    assert apart == common
    assert (apart.run_id, apart.epoch, apart.news, apart.parent_run_id) == (run_id, 2, 3, run_id)


async def test_default_queue_can_be_paused_and_goes_back_to_the_common_line(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    await add(store, "default", "a")
    await set_queue(store, "default", {"paused": True})
    await add(store, "default", "b")
    claims = await store.claim_runs(worker_id, NAMES, 9)
    assert (list(claims), claims.moved) == ([], 1)
    assert await names(store, worker_id) == []
    await set_queue(store, "default", {"paused": False})
    await add(store, "default", "c")
    assert [run.external_id for run in await store.claim_runs(worker_id, NAMES, 9)] == ["c"]
    assert sorted(await names(store, worker_id)) == ["a", "b"]


async def test_worker_of_some_queues_leaves_the_others_and_does_not_search_them(
    store: Store, dsn: str
) -> None:
    worker_id, other = await registered(store), await registered(store)
    for queue in ("mail", "report", "default"):
        await add(store, queue, queue)
    served = ["mail", "default"]
    claims = await store.claim_runs(worker_id, NAMES, 9, 1, served)
    assert ([run.external_id for run in claims], claims.moved) == (["mail", "default"], 1)
    assert await claim(store, worker_id, served=served) == []
    assert await names(store, other) == ["report"], "it has a line now, which is known"
    await add(store, "default", "second")
    assert (await store.claim_runs(worker_id, NAMES, 9, 0, ["mail"])).moved == 0
    assert not await value(dsn, "SELECT apart FROM kagzi.workflow_runs WHERE external_id='second'")


async def test_changes_leave_what_they_do_not_name(store: Store) -> None:
    await set_queue(store, "q", {"concurrency": 5, "rate": (2, 1.5), "paused": True})
    await set_queue(store, "q", {"concurrency_per_key": 2})
    changed = await set_queue(store, "q", {"rate": None})
    assert (changed.concurrency, changed.concurrency_per_key) == (5, 2)
    assert (changed.rate, changed.paused) == (None, True)


async def test_list_counts_what_waits_sleeps_and_runs(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    await set_queue(store, "limited", {"concurrency": 1})
    for _ in range(3):
        await add(store, "limited")
    await add(store, "free")
    await claim(store, worker_id)
    await rows(
        dsn,
        "UPDATE kagzi.workflow_runs SET status = 'sleeping', wake_at = now() + interval '1 day'"
        " WHERE queue = 'free'",
    )
    free, limited = await list_queues(store)
    assert (free.name, free.waiting, free.sleeping, free.running) == ("free", 0, 1, 0)
    assert (limited.name, limited.waiting, limited.sleeping, limited.running) == (
        *("limited", 2, 0, 1),
    )


# --- plans ----------------------------------------------------------------------------------


@pytest.fixture
async def crowded(store: Store, dsn: str) -> UUID:
    """100,000 waiting runs, half of them in one limited queue; a worker."""
    await add_many(dsn, "q", 50_000, key="'k' || n % 10", priority="n % 5")
    await add_many(dsn, "elsewhere", 50_000)
    return await registered(store)


LIMITS: list[dict[str, Any]] = [
    {"concurrency": 10},
    {"concurrency_per_key": 2},
    {"rate": (5, 60.0)},
    {},
]


async def test_claim_touches_few_of_a_hundred_thousand_runs(
    store: Store, dsn: str, crowded: UUID
) -> None:
    query = load_queries("kagzi")["claim_apart"].encode()
    parameters = {"worker_id": crowded, "served": None, "names": ["w"], "versions": ["1"]}
    counted = (
        b"SELECT seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables"
        b" WHERE relname = 'workflow_runs'"
    )
    for limits in LIMITS:
        await rows(dsn, "DELETE FROM kagzi.queues WHERE name = 'q'")
        await set_queue(store, "q", limits)
        await rows(dsn, "UPDATE kagzi.queues SET settled = true")
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            fetched_before = 0
            for _ in range(7):  # from the sixth on a plan for any parameters may be used
                await connection.execute(query, {**parameters, "most": 5, "suspects": 1})
                cursor = await connection.execute(counted)
                scans, fetched = await cursor.fetchone() or (0, 0)
                assert scans == 0, limits
                # With keys it looks at the head of the line, up to 500; else at what it takes.
                most = 1_500 if "concurrency_per_key" in limits else 200
                assert fetched - fetched_before < most, limits
                fetched_before = fetched
            await connection.rollback()


async def test_claim_behind_a_long_line_of_one_key_goes_from_key_to_key(
    store: Store, dsn: str, crowded: UUID
) -> None:
    await rows(dsn, "UPDATE kagzi.workflow_runs SET queue_key = 'busy' WHERE queue = 'q'")
    await rows(dsn, "VACUUM ANALYZE kagzi.workflow_runs")
    await set_queue(store, "q", {"concurrency_per_key": 1})
    await rows(dsn, "UPDATE kagzi.queues SET settled = true")
    assert len(await claim(store, crowded, served=["q"])) == 1
    for number in range(20):
        await add(store, "q", key=f"other {number}", priority=-9)
    query = load_queries("kagzi")["claim_apart"].encode()
    parameters = {"worker_id": crowded, "served": ["q"], "names": ["w"], "versions": ["1"]}
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute(query, {**parameters, "most": 50, "suspects": 1})
        assert len(await cursor.fetchall()) == 20
        cursor = await connection.execute(
            "SELECT seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relname = 'workflow_runs'"
        )
        scans, fetched = await cursor.fetchone() or (1, 0)
        assert scans == 0
        assert fetched < 2_000


async def test_a_run_claimed_from_its_queue_is_known_as_well_as_one_of_the_common_line(
    store: Store, dsn: str
) -> None:
    await set_queue(store, "limited", {"concurrency": 9})
    worker_id = await registered(store)
    for queue in ("limited", "default"):
        await add(store, queue, name=queue)
    await rows(
        dsn,
        """UPDATE kagzi.workflow_runs SET news = 3, parent_run_id = gen_random_uuid(),
            scheduled_at = '2026-01-01T00:00Z', crash_count = 1, epoch = 4, priority = 5""",
    )
    limited = await claim(store, worker_id, served=["limited"])
    common = await store.claim_runs(worker_id, [("w", "1")], 100, 0, None)
    unlike = {"run_id", "external_id", "created_at", "parent_run_id"}
    facts = [
        {name: value for name, value in asdict(run).items() if name not in unlike}
        for run in (*limited, *common)
    ]
    assert facts[0] == facts[1]
    assert facts[0]["news"] == 3
    assert None not in {run.parent_run_id for run in (*limited, *common)}
