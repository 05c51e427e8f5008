"""Schedules while workers are killed, frozen and cut off: still one run for each tick."""

from __future__ import annotations

import random
import signal
from datetime import UTC, datetime, timedelta

import pytest

import kagzi
from kagzi import Context
from tests.engine.test_schedules import move_clock
from tests.fix_engine import until
from tests.fix_faults import StartWorker, rows, value

CUT_OFF = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'kagzi%%' AND random() < 0.5"""


@kagzi.workflow
async def nothing_to_do(ctx: Context) -> None: ...


@pytest.mark.parametrize("seed", [1])
async def test_each_tick_has_one_run_whatever_becomes_of_the_workers(
    dsn: str, start_worker: StartWorker, seed: int
) -> None:
    chance = random.Random(seed)
    start = datetime(2026, 3, 1, 0, 0, 1, tzinfo=UTC)
    names = ["a", "b", "c"]
    await move_clock(dsn, start)
    async with kagzi.connect(dsn, migrate=False) as client:
        for name in names:
            await client.schedule(nothing_to_do, "* * * * *", id=name, catch_up="all")
    workers = [start_worker(dsn, poll_s=0.01) for _ in range(3)]
    minutes = 0
    runs = "SELECT count(*) FROM kagzi.workflow_runs"
    for _ in range(12):
        known = await value(dsn, runs)
        minutes += chance.choice([1, 2, 5, 300])
        await move_clock(dsn, start + timedelta(minutes=minutes))
        if chance.random() < 0.5:  # in the midst of it; else at its beginning
            await until(lambda: more_than(dsn, known))  # noqa: B023
        victim = chance.randrange(len(workers))
        match chance.choice(["kill", "stop", "cut off", "nothing"]):
            case "kill":
                workers[victim].kill()
                workers[victim] = start_worker(dsn, poll_s=0.01)
            case "stop":
                workers[victim].signal(signal.SIGSTOP)
                await move_clock(dsn, start + timedelta(minutes=minutes))
                workers[victim].signal(signal.SIGCONT)
            case "cut off":
                await rows(dsn, CUT_OFF)

    async def all_there() -> bool:
        return bool(await value(dsn, runs) >= minutes * len(names))

    await until(all_there, 60)
    counts = await rows(
        dsn,
        """SELECT schedule_id, count(*), count(DISTINCT scheduled_at), min(scheduled_at),
            max(scheduled_at) FROM kagzi.workflow_runs GROUP BY 1 ORDER BY 1""",
    )
    first, last = (start + timedelta(minutes=n, seconds=-1) for n in (1, minutes))
    assert counts == [(name, minutes, minutes, first, last) for name in names]


async def more_than(dsn: str, known: int) -> bool:
    return bool(await value(dsn, "SELECT count(*) FROM kagzi.workflow_runs") > known)
