"""How a worker's memory grows over one run: `python -m tests.engine.growth DSN WORKFLOW ARGS`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import uvloop

import kagzi
from kagzi.bench.counters import reset_peak, resident_mib
from kagzi.store import checkpoints
from tests.engine import test_large_results as flows


async def main(dsn: str, name: str, args: list[Any]) -> dict[str, float]:
    checkpoints.MOST_UNWRITTEN = 4 << 20
    async with (
        kagzi.connect(dsn, migrate=False) as client,
        client.worker(processes=2, modules=(flows.__name__,)) as worker,
    ):
        worker.incarnation.room.left = 8 << 20
        await (await client.start(flows.listed, 20, 100, False)).result(timeout=30)
        pool = worker.incarnation.pool
        assert pool is not None
        pids = [os.getpid(), *pool.process_ids]
        before = [resident_mib(pid) or 0.0 for pid in pids]
        for pid in pids:
            reset_peak(pid)
        await (await client.start(getattr(flows, name), *args)).result(timeout=50)
        own, *others = [
            (resident_mib(pid, peak=True) or 0.0) - start
            for pid, start in zip(pids, before, strict=True)
        ]
    return {"worker": own, "pool": max(others)}


if __name__ == "__main__":
    dsn, name, args = sys.argv[1:]
    print(json.dumps(uvloop.run(main(dsn, name, json.loads(args)))))
