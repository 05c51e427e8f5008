"""Who is there and how they are: the list, the endpoint, and what is kept of the past."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner

import kagzi
from kagzi import InvalidInput
from kagzi.cli import main
from kagzi.ids import uuid7
from kagzi.store.workers import delete_old_workers
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import PATIENCE_S, started, until
from tests.fix_faults import rows, value
from tests.fix_proxy import Proxy


async def test_list_of_workers_tells_what_each_is_and_holds(dsn: str, witness: Witness) -> None:
    options: dict[str, Any] = {"processes": 1, "concurrency": 7, "queues": ["default", "b"]}
    options["heartbeat_s"] = 15.0  # none comes between the clock's leap and the look
    async with started(dsn, **options) as engine:
        handle = await engine.start(programs.behind_gate, witness.folder, 1)
        await until(lambda: len(witness.entries) >= 2)
        (worker,) = await engine.client.workers()
        assert worker.id == engine.worker.worker_id
        assert (worker.pid, worker.status, worker.runs) == (os.getpid(), "active", 1)
        assert (worker.processes, worker.concurrency) == (1, 7)
        assert worker.queues == ("b", "default")
        assert worker.heartbeat_age_s is not None
        assert worker.lease_left_s is not None
        assert (
            0 <= worker.heartbeat_age_s < 30 == round(worker.heartbeat_age_s + worker.lease_left_s)
        )
        assert (worker.event, worker.ended_at, worker.is_expired) == ("started", None, False)
        await engine.move_clock(31)
        (worker,) = await engine.client.workers()
        assert worker.is_expired
        witness.open("go")
        await handle.result(PATIENCE_S)
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.workers() == []
        (worker,) = await client.workers(everyone=True)
        assert (worker.status, worker.event, worker.event_detail) == ("ended", "ended", "closed")
        assert worker.ended_at is not None


async def test_command_lists_workers_for_people_and_programs(dsn: str) -> None:
    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["--dsn", dsn, "workers", *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "no workers" in await asyncio.to_thread(shown)
    async with started(dsn, processes=0) as engine:
        (data,) = json.loads(await asyncio.to_thread(shown, "--json"))
        assert data["id"] == str(engine.worker.worker_id)
        assert (data["status"], data["runs"], data["is_expired"]) == ("active", 0, False)
        table = await asyncio.to_thread(shown)
        for word in (str(engine.worker.worker_id), "active", "0/1000", "started"):
            assert word in table
    assert "no workers" in await asyncio.to_thread(shown)
    assert "ended: closed" in await asyncio.to_thread(shown, "--all")


async def test_draining_worker_says_so_while_it_finishes(dsn: str, witness: Witness) -> None:
    async with started(dsn, processes=0) as engine:
        handle = await engine.start(programs.behind_gate, witness.folder, 1)
        await until(lambda: len(witness.entries) >= 2)
        draining = asyncio.ensure_future(engine.worker.drain(20.0))

        async def is_draining() -> bool:
            (worker,) = await engine.client.workers()
            return (worker.status, worker.event, worker.runs) == ("draining", "draining", 1)

        await until(is_draining)
        late = await engine.start(steps_run)
        witness.open("go")
        assert len(await handle.result(PATIENCE_S)) == 1
        await draining
        assert await late.status() == "pending"


@kagzi.workflow
async def steps_run(ctx: kagzi.Context) -> int:
    return 1


async def test_life_of_a_worker_is_on_record(dsn: str) -> None:
    async with started(dsn, processes=1) as engine:
        with pytest.raises(kagzi.StepFailed):
            await engine.run(dies)
        worker_id = engine.worker.worker_id
        await engine.worker.drain(5.0)
    query = "SELECT event, detail FROM kagzi.worker_events WHERE worker_id = %(id)s ORDER BY at"
    events = await rows(dsn, query, id=worker_id)
    assert [event for event, _ in events] == ["started", "pool process lost", "draining", "ended"]
    assert "died while running 'die'" in events[1][1]


@kagzi.step
async def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@kagzi.workflow
async def dies(ctx: kagzi.Context) -> None:
    await ctx.step(die)


# --- what is kept ---------------------------------------------------------------------------


async def test_workers_that_ended_long_ago_are_forgotten_with_their_events(dsn: str) -> None:
    """But not one that holds a run still."""
    ids = [uuid7() for _ in range(4)]
    async with started(dsn, processes=0) as engine:
        engine.worker.concurrency = 0
        await engine.start(steps_run)
        for place, worker_id in enumerate(ids):
            store = engine.client._store
            await store.register_worker(worker_id, "elsewhere", "b", 1, "then", {}, 30.0)
            await store.rescue(worker_id, "test", forced=True)
            hours = (0, 25, 30, 30)[place]
            await rows(
                dsn,
                "UPDATE kagzi.workers SET ended_at = ended_at - %(hours)s * interval '1 h'"
                " WHERE id = %(id)s",
                id=worker_id,
                hours=hours,
            )
        holds = "UPDATE kagzi.workflow_runs SET status = 'running', worker_id = %(id)s"
        await rows(dsn, holds, id=ids[3])
        assert not await delete_old_workers(store)
        left = {row[0] for row in await rows(dsn, "SELECT id FROM kagzi.workers")}
        assert left == {ids[0], ids[3], engine.worker.worker_id}
        query = "SELECT DISTINCT worker_id FROM kagzi.worker_events"
        assert {row[0] for row in await rows(dsn, query)} == left


@pytest.mark.parametrize("is_known", [True, False], ids=["ended", "forgotten"])
async def test_run_that_a_rescue_passed_over_is_freed_by_the_next(dsn: str, is_known: bool) -> None:
    """It was locked at that moment; its worker is ended, or even forgotten, since."""
    async with started(dsn, processes=0, lease_s=2.0, heartbeat_s=0.1) as engine:
        engine.worker.concurrency = 0
        handle = await engine.start(steps_run)
        gone = uuid7()
        if is_known:
            store = engine.client._store
            await store.register_worker(gone, "elsewhere", "b", 1, "then", {}, 30.0)
            await store.rescue(gone, "test", forced=True)
        await rows(
            dsn, "UPDATE kagzi.workflow_runs SET status = 'running', worker_id = %(id)s", id=gone
        )
        engine.worker.concurrency = 10
        assert await handle.result(PATIENCE_S) == 1


# --- the endpoint ---------------------------------------------------------------------------


async def ask(port: int, path: str = "/healthz", method: str = "GET") -> tuple[int, Any]:
    def get() -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    return await asyncio.to_thread(get)


async def is_there(port: int) -> bool:
    return (await ask(port, method="HEAD"))[0] == 200


async def test_endpoint_tells_how_the_worker_is(proxy: Proxy, dsn: str, witness: Witness) -> None:
    async with kagzi.connect(proxy.dsn, migrate=False) as client:
        options: dict[str, Any] = {"lease_s": 5.0, "heartbeat_s": 0.1, "poll_s": 0.05}
        async with client.worker(processes=1, health_port=0, **options) as worker:
            assert worker.health is not None
            port = worker.health.port
            handle = await client.start(programs.behind_gate, witness.folder, 1)
            await until(lambda: len(witness.entries) >= 2)

            async def told_well() -> Any:
                status, told = await ask(port)
                return told if status == 200 else None

            told = await until(told_well)
            assert UUID(told["worker_id"]) == worker.worker_id
            assert (told["healthy"], told["reasons"], told["status"]) == (True, [], "active")
            assert (told["runs"], told["pool_processes"], told["processes"]) == (1, 1, 1)
            assert told["store_reachable"]
            assert 0 <= told["lease_age_s"] < 30
            assert 0 <= told["loop_lag_s"] < 5
            assert (await ask(port, "/other"))[0] == 404
            assert (await ask(port, method="POST"))[0] == 405

            proxy.refusing = True
            await proxy.cut_all()

            async def is_cut_off() -> Any:
                status, told = await ask(port)
                return told if status == 503 and not told["store_reachable"] else None

            told = await until(is_cut_off)
            assert not told["healthy"]
            await until(lambda: worker.lost is not None)
            told = await until(is_cut_off)
            assert told["status"] == "lost"
            proxy.refusing = False

            told = await until(told_well)
            assert UUID(told["worker_id"]) == worker.worker_id
            assert await until(lambda: is_there(port))
            witness.open("go")
            await handle.result(PATIENCE_S)
        with pytest.raises(OSError, match="refused"):
            await ask(port)
    assert await value(dsn, "SELECT count(*) FROM kagzi.worker_leases") == 0


async def test_endpoint_that_cannot_listen_says_so_before_anything_is_started(dsn: str) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(processes=0, health_port=0) as worker:
            assert worker.health is not None
            for port in (worker.health.port, -1, 65536, "80"):
                with pytest.raises(InvalidInput, match="health"):
                    async with client.worker(processes=0, health_port=port):  # type: ignore[arg-type]
                        pass
            assert len(await client.workers()) == 1


async def test_endpoint_lets_half_a_request_and_nonsense_pass_by(dsn: str) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(processes=0, health_port=0) as worker:
            assert worker.health is not None
            port = worker.health.port
            for sent in (b"", b"GET /heal", b"\r\n\r\n", b"x" * 100_000):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                if sent == b"\r\n\r\n":
                    assert b"405" in await reader.readline()
                writer.close()
                await asyncio.gather(writer.wait_closed(), return_exceptions=True)
            assert (await ask(port))[0] == 200
