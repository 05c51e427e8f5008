"""Through PgBouncer in transaction mode everything works on polling, and no session is changed."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from datetime import UTC, timedelta
from typing import Any

import psycopg
import pytest

import kagzi
from kagzi import Context
from kagzi.ids import uuid7
from kagzi.store.connections import Connector
from kagzi.store.migrate import migrate
from kagzi.store.store import Store
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import started, until
from tests.fix_faults import StartWorker, orphans, value
from tests.fix_pgbouncer import BACKENDS

LEASE = {"lease_s": 2.0, "heartbeat_s": 0.2, "poll_s": 0.05}


async def test_pooler_is_recognised_and_a_server_is_not_taken_for_one(
    dsn: str, pooled_dsn: str
) -> None:
    for address, pooled in ((dsn, False), (pooled_dsn, True)):
        connector = Connector(address)
        await connector.check_server()
        assert connector.is_pooled is pooled


@kagzi.step(memo="global")
async def remembered(folder: str) -> str:
    Witness(folder).note("computed")
    return "computed"


@kagzi.step
async def needs_cure(folder: str) -> str:
    if not Witness(folder).is_open("cured"):
        raise ValueError("not yet")
    return "cured"


@kagzi.workflow
async def of_everything(ctx: Context, folder: str) -> list[Any]:
    await ctx.sleep(timedelta(milliseconds=10))
    group = await ctx.parallel_vec("g", [programs.note.bind(folder, "g") for _ in range(200)])
    told = await ctx.wait_event("topic")
    memo = await ctx.step(remembered, folder)
    large = await ctx.step(programs.note, folder, "x" * 300_000)
    return [len(group), told, memo, len(large), await ctx.step(needs_cure, folder)]


async def test_engine_works_through_it_and_leaves_sessions_as_they_were(
    dsn: str, pooled_dsn: str, witness: Witness
) -> None:
    async with started(pooled_dsn, processes=1, concurrency=50, **LEASE) as engine:
        handles = [await engine.start(of_everything, witness.folder) for _ in range(8)]
        for handle in handles:
            await engine.client.send(handle, "topic", "news")
        for handle in handles:
            with pytest.raises(kagzi.StepFailed, match="not yet"):
                await handle.result(timeout=60)
        witness.open("cured")
        for handle in handles:
            await engine.client.retry(handle)
        expected = [200, "news", "computed", 300_000, "cured"]
        assert [await handle.result(timeout=60) for handle in handles] == [expected] * 8
        assert witness.counts["g"] == 1600, "no step twice"
        assert engine.worker.lost is None
        assert (await engine.client.runs())[0].created_at.tzinfo is UTC

        async with kagzi.connect(pooled_dsn) as other:  # starts there, is driven here: by polling
            handle = await other.start(programs.story, witness.folder)
            assert await handle.result(timeout=60) == programs.STORY

        parked = await engine.start(of_everything, witness.folder)
        await until(lambda: is_status(parked, "sleeping"), 20)
        await engine.client.cancel(parked)
        with pytest.raises(kagzi.RunWasCancelled):
            await parked.result(timeout=20)
        await sessions_are_untouched(pooled_dsn)
    assert await orphans(dsn) == []
    assert await value(dsn, "SELECT count(*) FROM kagzi.worker_leases") == 0


async def is_status(handle: kagzi.RunHandle[Any], status: str) -> bool:
    return await handle.status() == status


async def sessions_are_untouched(pooled_dsn: str) -> None:
    """Look at every backend there is: one open transaction in each."""
    query = (
        "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements),"
        " (SELECT count(*) FROM pg_listening_channels()),"
        " current_setting('idle_in_transaction_session_timeout'),"
        " current_setting('lock_timeout')"
    )
    async with AsyncExitStack() as stack:
        seen = set()
        for _ in range(BACKENDS):
            connection = await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(pooled_dsn, prepare_threshold=None)
            )
            cursor = await connection.execute(query.encode())
            pid, *state = await cursor.fetchone() or ()
            seen.add(pid)
            assert state == [0, 0, "0", "0"]
        assert len(seen) == BACKENDS


async def test_killed_worker_is_rescued_from_through_it(
    dsn: str, pooled_dsn: str, start_worker: StartWorker, witness: Witness
) -> None:
    async with kagzi.connect(pooled_dsn) as client:
        handle = await client.start(programs.behind_gate, witness.folder, 8)
        first = start_worker(pooled_dsn, processes=1, **LEASE)
        await until(lambda: len(witness.entries) >= 9, 20)
        first.signal(signal.SIGSTOP)
        async with client.worker(processes=1, **LEASE):  # type: ignore[arg-type]
            await until(lambda: len(witness.entries) >= 17, 20)
            witness.open("go")
            assert len(await handle.result(timeout=20)) == 8
            first.signal(signal.SIGCONT)
            await until(lambda: "takes the place of" in first.said, 20)
        assert witness.counts["before"] == witness.counts["after"] == 1
    assert await orphans(dsn) == []


async def test_backend_frozen_within_a_write_is_ended_through_it_and_no_other(
    dsn: str, pooled_dsn: str
) -> None:
    """The name of a backend is that of whichever client had it last."""
    connector = Connector(pooled_dsn)
    await connector.check_server()
    store = Store(connector)
    await store.open()
    try:
        worker_id = uuid7()
        await store.register_worker(worker_id, "elsewhere", "b", 1, "then", {}, 30.0)
        async with AsyncExitStack() as stack:
            frozen, other = [
                await stack.enter_async_context(
                    await connector.connect(application_name=f"kagzi:{worker_id}")
                )
                for _ in range(2)
            ]
            await other.execute("BEGIN")
            await frozen.execute("BEGIN")
            await frozen.execute("SELECT kagzi.hold_fence(%s)", [worker_id])
            await store.rescue(worker_id, "test", forced=True)
            query = "SELECT status FROM kagzi.workers"
            assert await value(dsn, query) == "ended"
            with pytest.raises(psycopg.Error):
                await frozen.execute("SELECT 1")
            await other.execute("COMMIT")
    finally:
        await store.close()


async def test_schema_is_made_through_it_by_several_at_once(dsn: str, pooled_dsn: str) -> None:
    found = await asyncio.gather(
        *(asyncio.to_thread(migrate, pooled_dsn, "other") for _ in range(4))
    )
    assert sorted(map(bool, found)) == [False, False, False, True]
