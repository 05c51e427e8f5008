"""A connection that its user keeps, for statements that are sent very often.

Below psycopg's query layer and its pool, which take longer than the server for a short statement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from kagzi.store.connections import (
    Connector,
    cancellations,
    heed_cancellation,
    is_forbidden,
    is_outage,
)
from kagzi.store.history import History
from kagzi.store.statements import Statement

T = TypeVar("T")


class DirectConnection:
    """Made when it is first used, and again after it was closed.

    An error leaves it as it is: whoever uses it decides whether it is closed.

    Args:
        connector: Makes connections.
        name: What the server shows of it (`application_name`).
        history: Of the server that it must lead to.

    Attributes:
        current: The connection; None before the first use, and after `close`.
    """

    def __init__(self, connector: Connector, name: str, history: History | None = None) -> None:
        self._connector = connector
        self._name = name
        self._history = history
        self._known = self._none_known()
        self._making = asyncio.Lock()
        self.current: psycopg.AsyncConnection[Any] | None = None

    def _none_known(self) -> set[str] | None:
        """Statements that the server has prepared; None: the next backend may be another one."""
        return None if self._connector.is_pooled else set()

    async def open(self) -> psycopg.AsyncConnection[Any]:
        """The connection, made if there is none.

        Raises:
            psycopg.Error: As it is.
            ServerReplaced: It leads to another server than it should.
        """
        async with self._making:
            if self.current is None:
                connection = await self._connector.connect(application_name=self._name)
                # What psycopg itself prepares it drops after a ROLLBACK, and everybody's with it.
                connection.prepare_threshold = None
                try:
                    if self._history is not None:
                        await self._history.check(connection)
                    await self._connector.plan_once(connection)
                except BaseException:
                    await connection.close()
                    raise
                self.current, self._known = connection, self._none_known()
            return self.current

    @property
    def is_free(self) -> bool:
        """Whether nobody uses it or waits for it."""
        return not self._making.locked() and not (self.current and self.current.lock.locked())

    async def execute(
        self, statement: Statement, values: Mapping[str, bytes | None]
    ) -> pq.abc.PGresult:
        """Send one statement; its rows are in binary. Raises psycopg's errors as they are."""
        connection = await self.open()
        return await self.wait(statement.messages(connection, values, self._known))

    async def wait(self, messages: Generator[Any, Any, T]) -> T:
        """Exchange messages on the open connection."""
        assert self.current is not None, "opened before"
        async with self.current.lock:
            return await self.current.wait(messages)

    async def ask(self, statement: Statement, parameters: Mapping[str, Any]) -> pq.abc.PGresult:
        """The same with Python's values, and errors explained; once, so its outcome may be unknown.

        Closed after a failure, and when the caller is cancelled in the midst of the exchange.

        Raises:
            StoreUnavailable: The connection was lost, with psycopg's error as its cause.
            StoreForbidden: The role lacks a right.
            psycopg.Error: The statement failed.
        """
        before = cancellations()
        values = statement.encode(parameters)
        try:
            return await self.execute(statement, values)
        except psycopg.Error as error:
            heed_cancellation(before)
            if is_outage(error):
                await self.close()
            elif not is_forbidden(error):
                raise
            raise self._connector.unavailable(error) from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        connection, self.current = self.current, None
        if connection is not None:
            await connection.close()
