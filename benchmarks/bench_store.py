"""What single statements of the store cost: one transaction each, on a real Postgres.

The server is that of DATABASE_URL, else the embedded one. Each sample has a schema of its own.
"""

import asyncio
import os
import time
from contextlib import ExitStack
from typing import Any
from uuid import UUID, uuid4

from kagzi import _core as core
from kagzi.bench.session import own_schema
from kagzi.ids import uuid7
from kagzi.store import embedded
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.migrate import migrate
from kagzi.store.rows import Batch
from kagzi.store.store import Store

SCHEMA = "kagzi_asv"
WORKFLOW = "benchmarks.bench_store.workflow"


class OnServer:
    """One sample: a migrated schema, an open store and a registered worker."""

    number = 1
    warmup_time = 0

    def setup(self, *parameters: Any) -> None:
        self.closing = ExitStack()
        dsn = os.environ.get("DATABASE_URL")
        dsn = dsn or self.closing.enter_context(embedded.attach()).dsn
        self.closing.enter_context(own_schema(dsn, SCHEMA))
        migrate(dsn, SCHEMA)
        self.loop = asyncio.new_event_loop()
        self.closing.callback(self.loop.close)
        self.worker_id = uuid7()
        self.wait(self.open(Connector(dsn, SCHEMA)))

    def teardown(self, *parameters: Any) -> None:
        self.wait(self.close())
        self.closing.close()

    def wait(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    async def open(self, connector: Connector) -> None:
        self.store = Store(connector)
        await self.store.open()
        self.fenced = FencedConnection(connector, self.worker_id)
        await self.store.register_worker(self.worker_id, "host", "boot", 1, "0", {}, 600.0)

    async def close(self) -> None:
        await self.fenced.close()
        await self.store.close()

    async def insert_run(self) -> UUID:
        run_id = uuid7()
        await self.store.insert_run(run_id, str(run_id), WORKFLOW, "1", 0, b"[]")
        return run_id


class InsertRun(OnServer):
    def setup(self) -> None:
        super().setup()
        self.wait(self.insert_run())

    def time_insert_run(self) -> None:
        self.wait(self.insert_run())


class Claim(OnServer):
    params = (0, 1, 100)
    param_names = ("due",)

    def setup(self, due: int) -> None:
        super().setup()
        self.time_claim(due)
        for _ in range(due):
            self.wait(self.insert_run())

    def time_claim(self, due: int) -> None:
        self.wait(self.store.claim_runs(self.worker_id, [(WORKFLOW, "1")], 100))


class Write(OnServer):
    params = (1, 50, 100, 1000)
    param_names = ("rows",)

    def setup(self, rows: int) -> None:
        super().setup()
        # The connection is made and the statement prepared by the first batches.
        for _ in range(2):
            self.wait(self.fenced.write(self.batch_of(rows)))
        self.batch = self.batch_of(rows)

    def batch_of(self, rows: int) -> Batch:
        run_id, now_us = uuid4().bytes, time.time_ns() // 1000
        steps = []
        for index in range(rows):
            digest = core.hash_input("bench.nothing", b"[0]")
            step = core.Step(None, run_id, f"group/{index}", None, "bench.nothing", b"[0]", digest)
            step.status, step.output = "completed", b"0"
            step.started_us = step.completed_us = now_us
            step.worker_id = step.group_id = self.worker_id.bytes
            step.attempt = 1
            steps.append(step)
        batch = Batch()
        batch.add_steps(steps)
        return batch

    def time_write(self, rows: int) -> None:
        self.wait(self.fenced.write(self.batch))
