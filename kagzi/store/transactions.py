"""Bodies of steps that write user data in the transaction of their own checkpoint: exactly once.

Data and checkpoint are committed together, or neither is. When the answer to the COMMIT is lost,
the checkpoint tells which: if it is there, its result counts; if not, the body runs again, and the
primary key of the checkpoint refuses whichever of the two transactions comes second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn
from uuid import UUID
from weakref import WeakSet

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from kagzi._core import Step
from kagzi.errors import LeaseLost, ServerReplaced
from kagzi.store.connections import Connector, is_outage, no_reset
from kagzi.store.history import History
from kagzi.store.queries import load_queries
from kagzi.store.rows import at_us

logger = logging.getLogger("kagzi.store")

MOST_CONNECTIONS = 8
POOL_TIMEOUT_S = 30.0
BACKOFF_S = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)

Body = Callable[[psycopg.AsyncConnection[Any]], Awaitable[Any]]


class _Stored(Exception):
    """The step has a checkpoint already; leaves the transaction, which is rolled back."""


class Transactions:
    """Connections for such bodies, opened when the first of them runs.

    Args:
        connector: Makes connections.
        worker_id: Whose fence guards every checkpoint.
        history: Of the server that the worker's runs were loaded from.
        on_lost: Told that the worker's lease was ended, or its server replaced.
    """

    def __init__(
        self,
        connector: Connector,
        worker_id: UUID,
        history: History,
        on_lost: Callable[[LeaseLost], None],
    ) -> None:
        self._connector = connector
        self._worker_id = worker_id
        self._history = history
        self._on_lost = on_lost
        self._checked: WeakSet[psycopg.AsyncConnection[Any]] = WeakSet()
        queries = load_queries(connector.schema)
        self._write = queries["write_transaction_step"].encode()
        self._read = queries["read_transaction_step"].encode()
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] | None = None

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()

    async def run(self, step: Step, body: Body) -> Any:
        """Run a body and commit its checkpoint with what it wrote; its result.

        Errors of the connection and of the server are not the body's: it runs again, however
        often. Everything else that it raises is its own, and what it wrote is taken back.

        Raises:
            LeaseLost: The worker's lease was ended, or the server replaced; nothing was committed.
        """
        failures = 0
        while True:
            try:
                return await self._try(step, body)
            except _Stored:
                pass
            except PoolTimeout as error:
                self._say(failures, str(error))
            except psycopg.Error as error:
                if not _is_ours(error):
                    raise
                self._say(failures, self._connector.explain(error))
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1

    def _say(self, failures: int, reason: str) -> None:
        if failures % 10 == 1:
            logger.warning("a step waits to write in its transaction: %s", reason)

    async def _try(self, step: Step, body: Body) -> Any:
        returns = step.definition.returns
        pool = await self._opened()
        async with pool.connection() as connection:
            await self._check(connection)
            cursor = self._connector.cursor(connection)
            await cursor.execute(self._read, {**_names(step), "worker_id": self._worker_id})
            row = await cursor.fetchone()
            assert row is not None, "one row"
            is_held, stored = row
            if not is_held:  # its body would be another execution for nothing
                self._lose()
            if stored is not None:
                return returns.decode(stored)
            async with connection.transaction():
                value = await body(connection)
                output = returns.encode(value)
                await self._write_step(connection, step, output)
            return value

    async def _check(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Once per connection: that it leads to the server that the run was loaded from."""
        if connection in self._checked:
            return
        try:
            await self._history.check(connection)
        except ServerReplaced as lost:
            self._on_lost(lost)
            raise
        self._checked.add(connection)

    async def _write_step(
        self, connection: psycopg.AsyncConnection[Any], step: Step, output: bytes
    ) -> None:
        cursor = self._connector.cursor(connection)
        await cursor.execute(
            self._write,
            {
                **_names(step),
                "function": step.function,
                "output": output,
                "input": step.input,
                "input_hash": step.input_hash,
                "attempts": step.attempt,
                "group_id": None if step.group_id is None else UUID(bytes=step.group_id),
                "parent_id": step.parent_id,
                "started_at": at_us(step.started_us),
                "completed_at": at_us(time.time_ns() // 1000),
                "call_number": step.call_number,
                "completed_number": step.run.next_number(),
                "worker_id": self._worker_id,
            },
        )
        row = await cursor.fetchone()
        assert row is not None, "one row of counts"
        fence, inserted = row
        if not fence:
            self._lose()
        if not inserted:
            raise _Stored

    def _lose(self) -> NoReturn:
        lost = LeaseLost(f"the lease of worker {self._worker_id} was ended by another worker")
        self._on_lost(lost)
        raise lost

    async def _opened(self) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        if self._pool is None:
            # By this name a rescuer ends a backend that holds the fence of a frozen worker.
            conninfo = self._connector.conninfo(application_name=f"kagzi:{self._worker_id}")
            self._pool = AsyncConnectionPool(
                conninfo,
                kwargs=self._connector.options,
                min_size=0,
                max_size=MOST_CONNECTIONS,
                timeout=POOL_TIMEOUT_S,
                configure=self._connector.configure_shared,
                reset=no_reset,
                open=False,
                name="kagzi-steps",
            )
            await self._pool.open()
        return self._pool


def _is_ours(error: psycopg.Error) -> bool:
    """Whether an error is the server's or the connection's, and none of the body's making."""
    state = error.sqlstate
    if state is None:
        return is_outage(error)
    return state[:2] in _OURS or state in _OURS


# Connection, resources, shutdown, system; read-only server; and who lost a conflict, runs again.
_OURS = ("08", "53", "58", "57P01", "57P02", "57P03", "25006", "40001", "40P01")


def _names(step: Step) -> dict[str, Any]:
    return {"run_id": UUID(bytes=step.run_id), "step_id": step.id}
