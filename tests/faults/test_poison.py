"""A run that brings its worker down is ended after some deaths; those held beside it go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import kagzi
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import started, until
from tests.fix_faults import StartWorker, value

INNOCENTS = 20


async def serve_until(result: asyncio.Future[object], start_worker: StartWorker, dsn: str) -> int:
    """Start a worker after the other until the result is there; how many died."""
    deaths = 0
    while not result.done():
        worker = start_worker(dsn, processes=0, max_crashes=4)
        await until(lambda w=worker: result.done() or w.exit_code is not None, 20)
        deaths += worker.exit_code == 9
    return deaths


@pytest.mark.parametrize("how", ["workflow", "step"])
async def test_poison_run_is_ended_after_max_crashes_and_all_its_neighbours_complete(
    dsn: str, start_worker: StartWorker, tmp_path: Path, how: str
) -> None:
    witness = Witness(tmp_path)
    async with kagzi.connect(dsn, migrate=False) as client:
        bad = await client.start(programs.poison, witness.folder, how, id="bad", priority=1)
        runs = [
            await client.start(programs.innocent, witness.folder, number)
            for number in range(INNOCENTS)
        ]

        async def everything() -> object:
            with pytest.raises(kagzi.RunCrashed, match="4 workers in a row"):
                await bad.result(timeout=60)
            return await asyncio.gather(*(run.result(timeout=60) for run in runs))

        done = asyncio.ensure_future(everything())
        deaths = await serve_until(done, start_worker, dsn)
        assert await done == list(range(INNOCENTS))
        assert (deaths, witness.counts["poison"]) == (4, 4)
        query = "SELECT max(crash_count) FROM kagzi.workflow_runs"
        assert await value(dsn, query) == 0

        witness.open("cured")
        await client.retry(bad)
        assert await bad.result(timeout=20) == "cured", "the worker that is left goes on with it"


async def test_worker_holds_one_suspect_at_a_time_beside_all_others(
    dsn: str, tmp_path: Path
) -> None:
    witness = Witness(tmp_path)
    async with started(dsn, processes=0) as engine:
        engine.worker.concurrency = 0
        suspects = [await engine.start(programs.behind_gate, witness.folder, 1) for _ in range(3)]
        await engine.rows("UPDATE kagzi.workflow_runs SET crash_count = 2")
        others = [await engine.start(programs.behind_gate, witness.folder, 1) for _ in range(3)]
        engine.worker.concurrency = 100
        await until(lambda: len(witness.entries) == 8)
        claiming = engine.worker.claiming
        assert await claiming.claim(100) == 0
        held = engine.worker.runs.keys()
        assert held == {run.run_id for run in others} | {suspects[0].run_id}
        engine.worker.claiming._probation_until = 0.0
        assert await engine.worker.claiming.claim(100) == 1, (
            "one that harmed nobody for long has company"
        )
        assert suspects[1].run_id in held
        witness.open("go")
        await asyncio.gather(*(run.result(timeout=20) for run in suspects + others))


async def test_suspects_and_others_are_claimed_by_one_order(dsn: str, tmp_path: Path) -> None:
    """With room for one run it is the first of all; a suspect is neither preferred nor starved."""
    async with started(dsn, processes=0) as engine:
        engine.worker.concurrency = 0
        for name, priority in (("a", 0), ("b", 2), ("c", 1), ("d", 3)):
            await engine.start(programs.story, str(tmp_path), id=name, priority=priority)
        await engine.rows(
            "UPDATE kagzi.workflow_runs SET crash_count = 2 WHERE external_id IN ('b', 'c')"
        )
        store, names = engine.client._store, [(programs.story.name, programs.story.version)]
        worker_id = engine.worker.worker_id
        found = []
        for _ in range(3):
            found += [run.external_id for run in await store.claim_runs(worker_id, names, 1)]
        assert found == ["d", "b", "c"]
        await store.free_strays(worker_id, [])
        await engine.rows("UPDATE kagzi.workflow_runs SET crash_count = 2")
        assert await store.claim_runs(worker_id, names, 4, suspects=0) == []
        assert len(await store.claim_runs(worker_id, names, 4)) == 1
        await store.free_strays(worker_id, [])
