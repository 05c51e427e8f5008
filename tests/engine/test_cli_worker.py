"""`kagzi worker` and `kagzi run` as processes: signals, drains, lost leases."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

import kagzi
from kagzi import RunStatus
from tests.engine.cli_flows import doubled, gated
from tests.engine.processes import Gate, Process

FLOWS = "tests.engine.cli_flows"
SERVING = "SIGTERM or Ctrl-C drains"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def worker(dsn: str, *options: str) -> Process:
    return Process(dsn, "worker", FLOWS, "--processes", "1", *options)


async def test_worker_drives_runs_that_others_start(dsn: str) -> None:
    async with kagzi.connect(dsn) as client, worker(dsn) as process:
        handle = await client.start(doubled, [1, 2])
        assert await handle.result(60) == [2, 4]
        await process.says(SERVING)
        process.terminate()
        assert await process.ended() == 0


@pytest.mark.parametrize("stop", [Process.terminate, Process.interrupt])
async def test_worker_finishes_what_it_holds_when_told_to_stop(
    dsn: str, gate: Gate, stop: object
) -> None:
    async with kagzi.connect(dsn) as client, worker(dsn) as process:
        await process.says(SERVING)
        handle = await client.start(gated, str(gate.folder))
        await gate.begun()
        late = await client.start(doubled, [1])
        assert await late.result(60) == [2]
        stop(process)  # type: ignore[operator]
        await process.says("draining")
        unclaimed = await client.start(doubled, [1])
        await gate.let_go("on")
        assert await process.ended() == 0
        assert await handle.result(60) == "on"
        assert await unclaimed.status() is RunStatus.PENDING


async def test_worker_gives_back_what_is_not_done_at_the_deadline(dsn: str, gate: Gate) -> None:
    async with kagzi.connect(dsn) as client, worker(dsn, "--drain-s", "0.1") as process:
        await process.says(SERVING)
        handle = await client.start(gated, str(gate.folder))
        await gate.begun()
        process.terminate()
        assert await process.ended() == 0
        assert "1 run(s) are given back" in process.errors
        assert await handle.status() is RunStatus.PENDING


async def test_second_signal_stops_the_worker_at_once(dsn: str, gate: Gate) -> None:
    async with kagzi.connect(dsn) as client, worker(dsn, "--drain-s", "1000") as process:
        await process.says(SERVING)
        handle = await client.start(gated, str(gate.folder))
        await gate.begun()
        process.terminate()
        await process.says("draining")
        process.terminate()
        assert await process.ended() == 0
        assert await handle.status() is RunStatus.PENDING


async def test_worker_that_lost_its_lease_begins_anew_and_stops_as_before(
    dsn: str, gate: Gate
) -> None:
    options = ("--heartbeat-s", "0.1", "--lease-s", "30")
    async with kagzi.connect(dsn) as client, worker(dsn, *options) as process:
        await process.says(SERVING)
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
            await conn.execute("UPDATE kagzi.workers SET status = 'ended'")
            await conn.execute("DELETE FROM kagzi.worker_leases")
        await process.says("stops its runs: another worker ended the lease")
        await process.says("takes the place of")
        handle = await client.start(gated, str(gate.folder))
        await gate.begun()
        await gate.let_go("anew")
        assert await handle.result(timeout=20) == "anew"
        process.terminate()
        assert await process.ended() == 0


async def test_interrupted_run_is_given_back_and_goes_on_with_the_same_id(
    dsn: str, gate: Gate
) -> None:
    target = (f"{FLOWS}:gated", "--input", f'["{gate.folder}"]')
    command = ("run", *target, "--id", "gated", "--processes", "1")
    async with Process(dsn, *command) as process:
        await gate.begun()
        process.interrupt()
        assert await process.ended() == 130
        assert "given back" in process.errors
        assert process.output == ""
    async with kagzi.connect(dsn) as client, Process(dsn, *command) as process:
        handle = await client.get("gated")
        await gate.begun()
        assert await handle.status() is RunStatus.RUNNING
        await gate.let_go("again")
        assert await process.ended() == 0
        assert process.output == '"again"\n'
