"""What has ended is gone: connections, tasks, descriptors, entries, memory."""

from __future__ import annotations

import asyncio
import gc
import random
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import kagzi
from kagzi.store.store import MOST_CONNECTIONS
from tests.faults import leftovers
from tests.fix_engine import Engine, started, until
from tests.fix_faults import value

BACKENDS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
async def engine(dsn: str) -> AsyncIterator[Engine]:
    async with started(dsn, processes=2) as made:
        yield made


@dataclass
class Held:
    """What a client and its worker hold while nothing runs."""

    backends: int
    tasks: int
    descriptors: list[int]
    threads: int


async def held(engine: Engine) -> Held:
    await engine.settled()
    gc.collect()
    return Held(
        await value(engine.dsn, BACKENDS),
        len(asyncio.all_tasks()),
        [process.num_fds() for process in processes(engine)],
        psutil.Process().num_threads(),
    )


def processes(engine: Engine) -> list[psutil.Process]:
    """The coordinator, then its pool."""
    assert engine.worker.pool is not None
    pool = [psutil.Process(pid) for pid in sorted(engine.worker.pool.process_ids)]
    return [psutil.Process(), *pool]


async def end_badly(engine: Engine, count: int, chance: random.Random) -> None:
    """Runs that fail, are half-done when they end, or whose callers are cancelled."""

    async def one(number: int) -> None:
        starting = asyncio.ensure_future(engine.start(leftovers.ends_badly, number))
        if number % 4 == 0:
            await turns(chance.randrange(12))
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        waiting = asyncio.ensure_future((await starting).result(timeout=30))
        if number % 4 == 1:
            await turns(chance.randrange(30))
            waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    for begin in range(0, count, 50):
        await asyncio.gather(*(one(number) for number in range(begin, begin + 50)))
    await until(lambda: none_left(engine), 30)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def none_left(engine: Engine) -> bool:
    query = "SELECT count(*) FROM kagzi.workflow_runs WHERE status IN ('pending', 'running')"
    return bool(await value(engine.dsn, query) == 0)


async def test_nothing_is_left_of_a_thousand_runs_that_failed_or_were_cancelled(
    engine: Engine,
) -> None:
    chance = random.Random(7)
    await end_badly(engine, 200, chance)
    before = await held(engine)
    await end_badly(engine, 1000, chance)

    async def as_before() -> bool:
        # The pool of connections lets go of idle ones at its leisure; others must not be more.
        after = await held(engine)
        return (
            after.backends <= before.backends + MOST_CONNECTIONS - 1
            and after.tasks <= before.tasks
            and after.threads <= before.threads + 2
            and all(
                new <= old + MOST_CONNECTIONS
                for new, old in zip(after.descriptors, before.descriptors, strict=True)
            )
        )

    try:
        await until(as_before)
    except TimeoutError:
        pytest.fail(f"before {before}, after {await held(engine)}")

    def all_given_back() -> bool:
        counts = engine.client._store.counts()
        return (
            counts["pool_available"] == counts["pool_size"] <= MOST_CONNECTIONS
            and counts.get("requests_waiting", 0) == 0
        )

    await until(all_given_back)
    assert entries(engine) == {}


def entries(engine: Engine) -> dict[str, Any]:
    """What client, worker and scheduler still keep of runs."""
    worker, client = engine.worker, engine.client
    executor, writer = worker.executor, worker.writer
    kept = {
        "runs": worker.runs,
        "begun": executor.scheduler.begun,
        "waiting": executor.scheduler.waiting(),
        "resumed": executor._resumed,
        "ended": executor._ended,
        "inner": worker.answers._inner,
        "memos": worker._memos.waiting,
        "bodies here": worker._local_place._tasks,
        "bodies in the pool": [s for link in worker.pool._links for s in link.steps],  # type: ignore[union-attr]
        "gates": [gate for gate in worker._gates.values() if gate.held],
        "batches": [batch for batch in (writer._open, *writer._full) if batch],
        "large": [*writer._large, *writer._held_back, *writer._large_of],
        "waiters": client._waiting._waits,
        "starts": client._desk._waiting,
    }
    return {name: what for name, what in kept.items() if what}


async def test_memory_is_flat_over_a_hundred_thousand_steps(dsn: str, tmp_path: Path) -> None:
    """Of the worker and its pool process; 100 bytes kept of each step would be 10 MB."""
    async with started(dsn, processes=1) as engine:

        async def drive(runs: int) -> None:
            for _ in range(runs):
                assert await engine.run(leftovers.many, 1250) == 4 * 1250 * 1249 // 2 + 1

        # Pool processes collect garbage rarely: memory is level after the first few times.
        await drive(26)
        before = await memory(engine, tmp_path)
        await drive(20)  # of 5,001 steps each
        after = await memory(engine, tmp_path)
    grown = {name: after[name] - before[name] for name in after}
    assert sum(grown.values()) < 4e6, grown


async def memory(engine: Engine, where: Path) -> dict[str, int]:
    """Bytes that each process has for itself, when what is free was given back."""
    members = processes(engine)
    folder = tempfile.mkdtemp(dir=where)
    tidied = await engine.run(leftovers.tidy_up, folder, len(members) - 1)
    assert set(tidied) == {process.pid for process in members[1:]}
    await engine.settled()
    leftovers.give_back_memory()
    return {f"{n}: {one.pid}": one.memory_full_info().uss for n, one in enumerate(members)}


async def test_client_that_comes_and_goes_leaves_no_connection_thread_or_descriptor(
    dsn: str,
) -> None:
    async def come_and_go() -> None:
        async with kagzi.connect(dsn, migrate=False) as client:
            async with client.worker(processes=0, poll_s=0.1):
                handle = await client.start(leftovers.ends_badly, 2)
                await asyncio.gather(handle.result(timeout=20), return_exceptions=True)

    def present() -> tuple[int, int, int]:
        """Tasks, threads and descriptors, but for the threads that the loop keeps for itself."""
        gc.collect()
        own = psutil.Process()
        of_loop = sum(one.name.startswith("asyncio_") for one in threading.enumerate())
        return len(asyncio.all_tasks()), own.num_threads() - of_loop, own.num_fds()

    def as_before() -> bool:
        """A thread may be about to end."""
        return all(new <= old for new, old in zip(present(), before, strict=True))

    for _ in range(3):
        await come_and_go()
    before = present()
    for _ in range(10):
        await come_and_go()
    try:
        await until(as_before, 20)
    except TimeoutError:
        pytest.fail(f"before {before}, after {present()}")

    async def no_backend() -> bool:
        return bool(await value(dsn, BACKENDS) == 0)

    await until(no_backend)
