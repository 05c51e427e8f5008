"""A worker that lost its lease goes on as another incarnation; the earlier one writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psutil
import pytest

import kagzi
from kagzi import Client, Context, PoolStartFailed, ServerReplaced
from kagzi.worker import Keeper, Worker
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import until
from tests.fix_faults import orphans, rows, value
from tests.fix_proxy import Proxy

QUICK = {"lease_s": 20.0, "heartbeat_s": 0.1, "poll_s": 0.05}


@asynccontextmanager
async def kept(dsn: str, **options: Any) -> AsyncIterator[tuple[Client, Keeper]]:
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(**{"processes": 0, **QUICK, **options}) as worker:
            yield client, worker


async def end_lease(dsn: str, worker_id: UUID) -> None:
    """As another worker's rescue."""
    await rows(
        dsn,
        "WITH w AS (UPDATE kagzi.workers SET status = 'ended' WHERE id = %(id)s), l AS"
        " (DELETE FROM kagzi.worker_leases WHERE worker_id = %(id)s) UPDATE kagzi.workflow_runs"
        " SET status = 'pending', worker_id = NULL WHERE worker_id = %(id)s",
        id=worker_id,
    )


async def test_worker_whose_lease_was_ended_goes_on_with_new_id_and_new_processes(
    dsn: str, witness: Witness
) -> None:
    async with kept(dsn, processes=1) as (client, worker):
        handle = await client.start(programs.behind_gate, witness.folder, 4)
        await until(lambda: len(witness.entries) >= 5, 20)
        first = worker.incarnation
        assert first.pool is not None
        processes = [psutil.Process(pid) for pid in first.pool.process_ids]
        await end_lease(dsn, first.worker_id)
        await until(lambda: worker.count == 2 and worker.lost is None, 20)
        assert worker.worker_id != first.worker_id
        await until(lambda: not any(process.is_running() for process in processes), 20)
        await until(lambda: len(witness.entries) >= 9, 20)
        witness.open("go")
        pids = await handle.result(timeout=20)
        assert not set(pids) & {process.pid for process in processes}
        by = await rows(dsn, "SELECT worker_id, count(*) FROM kagzi.step_runs GROUP BY 1")
        assert dict(by) == {first.worker_id: 1, worker.worker_id: 5}
        assert witness.counts["before"] == 1
        await worker.drain(1.0)
        events = "SELECT event FROM kagzi.worker_events WHERE worker_id = %(id)s ORDER BY at"
        assert await rows(dsn, events, id=first.worker_id) == [("started",), ("lost",)]
    assert worker.ended.done()
    assert await value(dsn, "SELECT count(*) FROM kagzi.worker_leases") == 0
    assert await orphans(dsn) == []


async def test_pool_process_that_dies_as_an_incarnation_begins_is_a_warning_and_it_is_tried_again(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with kept(dsn) as (_, worker):
        plain, failures = Worker.open, [PoolStartFailed("it ended before it was ready")]

        async def fail_once(self: Worker) -> None:
            if failures:
                raise failures.pop()
            await plain(self)

        monkeypatch.setattr(Worker, "open", fail_once)
        await end_lease(dsn, worker.worker_id)
        await until(lambda: worker.count == 2, 20)
    (told,) = [one for one in caplog.records if "does not start yet" in one.getMessage()]
    assert told.levelname == "WARNING"
    assert told.exc_info is None


async def test_worker_that_is_closing_does_not_begin_anew(dsn: str, witness: Witness) -> None:
    async with kept(dsn) as (client, worker):
        await client.start(programs.behind_gate, witness.folder, 1)
        await until(lambda: len(witness.entries) >= 2, 20)
        draining = asyncio.ensure_future(worker.drain(30.0))
        await end_lease(dsn, worker.worker_id)
        await asyncio.wait_for(draining, 20)
        assert worker.lost is not None
        witness.open("go")
    assert worker.count == 1


async def test_body_that_will_not_let_go_does_not_hold_up_the_next_incarnation(
    dsn: str, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value is nobody's any more."""
    monkeypatch.setattr("kagzi.worker.keeper.CLOSE_S", 0.1)
    async with kept(dsn) as (client, worker):
        handle = await client.start(holds_on, witness.folder)
        await until(lambda: witness.counts["holds on"] == 1, 20)
        await end_lease(dsn, worker.worker_id)
        await until(lambda: witness.counts["holds on"] == 2, 20)
        witness.open("second")
        assert await handle.result(timeout=20) == "2"
        witness.open("first")


@kagzi.step(where="coordinator")
async def stubborn(folder: str) -> str:
    witness = Witness(folder)
    witness.note("holds on")
    which = witness.counts["holds on"]
    passing = asyncio.ensure_future(witness.pass_gate(("first", "second")[which - 1]))
    while not passing.done():
        try:
            await asyncio.shield(passing)
        except asyncio.CancelledError:
            witness.note("was told")
    return str(which)


@kagzi.workflow
async def holds_on(ctx: Context, folder: str) -> str:
    return await ctx.step(stubborn, folder)


async def test_after_a_failover_runs_are_loaded_again_from_what_the_server_has(
    proxy: Proxy, dsn: str, witness: Witness
) -> None:
    """The last commits are missing there: what the workflow saw of them never happened."""
    async with kept(proxy.dsn, lease_s=30.0) as (client, worker):
        handle = await client.start(programs.behind_gate, witness.folder, 2)
        await until(lambda: len(witness.entries) >= 3, 20)
        first = worker.incarnation
        known = first.history.known
        assert known is not None
        assert all(known)
        first.history.known = (known[0], "0000000F")
        await rows(dsn, "DELETE FROM kagzi.step_runs")
        await proxy.cut_all()
        await until(lambda: worker.count == 2, 20)
        assert isinstance(first.lost, ServerReplaced)
        witness.open("go")
        assert len(await handle.result(timeout=20)) == 2
        assert witness.counts["before"] == 2, "its first result was lost with the server"
        assert await value(dsn, "SELECT count(*) FROM kagzi.step_runs") == 4


async def test_same_server_is_known_again_after_it_cut_every_connection(
    proxy: Proxy, witness: Witness
) -> None:
    async with kept(proxy.dsn, lease_s=30.0) as (client, worker):
        handle = await client.start(programs.behind_gate, witness.folder, 2)
        await until(lambda: len(witness.entries) >= 3, 20)
        await proxy.cut_all()
        witness.open("go")
        assert len(await handle.result(timeout=20)) == 2
        assert worker.count == 1


async def test_what_the_store_did_is_not_held_against_the_runs(
    proxy: Proxy, dsn: str, witness: Witness
) -> None:
    """A lease that could not be renewed is no crash; one that another worker ended may be."""
    async with kept(proxy.dsn) as (client, worker):
        handle = await client.start(programs.behind_gate, witness.folder, 1)
        await until(lambda: len(witness.entries) >= 2, 20)
        for count in (2, 3, 4):
            first = worker.incarnation
            assert first.history.known is not None
            first.history.known = ("another", first.history.known[1])
            await proxy.cut_all()
            await until(lambda c=count: worker.count == c, 20)
            await until(lambda: handle.run_id in worker.runs, 20)
        query = "SELECT crash_count FROM kagzi.workflow_runs"
        assert await value(dsn, query) == 1
        await end_lease(dsn, worker.worker_id)
        await until(lambda: worker.count == 5, 20)
        await until(lambda: handle.run_id in worker.runs, 20)
        assert await value(dsn, query) == 2
        witness.open("go")
        await handle.result(timeout=20)
