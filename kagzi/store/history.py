"""Which server this is: notices that another one, or one with another history, has taken its place.

A standby that is promoted may lack the last commits of the server before it. What a worker's runs
have seen then is not in the store any more, so the worker drops them and loads them again. The
question is asked whenever a connection is made anew: whatever replaces a server cuts them.
"""

from __future__ import annotations

import logging
from typing import Any

import psycopg

from kagzi.errors import ServerReplaced
from kagzi.store.queries import load_queries

logger = logging.getLogger("kagzi.store")

# Refusals of a role, or of a database that looks like Postgres, to tell. Then nothing is compared.
_UNTOLD = ("42501", "42883", "0A000", "55000")

Answer = tuple[str | None, str | None]


class History:
    """What a worker's runs were loaded from: a cluster and its timeline.

    Attributes:
        known: Its identifier and timeline, each None where unknown; set by the first look.
    """

    def __init__(self, schema: str) -> None:
        queries = load_queries(schema)
        self._forms = [queries[name].encode() for name in ("read_history", "read_timeline")]
        self.known: Answer | None = None

    async def check(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Ask over this connection, in autocommit.

        Raises:
            ServerReplaced: It leads to another server, or to another history of it.
        """
        while self._forms:
            try:
                cursor = await connection.execute(self._forms[0])
                return self._compare(await cursor.fetchone())
            except psycopg.Error as error:
                self._untold(error)

    def check_blocking(self, connection: psycopg.Connection[Any]) -> None:
        """The same, in a thread."""
        while self._forms:
            try:
                return self._compare(connection.execute(self._forms[0]).fetchone())
            except psycopg.Error as error:
                self._untold(error)

    def _untold(self, error: psycopg.Error) -> None:
        if error.sqlstate not in _UNTOLD:
            raise error
        self._forms = self._forms[1:]
        if not self._forms:
            logger.info("this server does not tell its timeline: a failover is not noticed")

    def _compare(self, answer: Answer | None) -> None:
        assert answer is not None, "one row"
        if self.known is None:
            self.known = answer
            return
        for ours, theirs in zip(self.known, answer, strict=True):
            if ours is not None and theirs is not None and ours != theirs:
                raise ServerReplaced(
                    f"the server was replaced (timeline {self.known[1]} of system {self.known[0]} "
                    f"before, timeline {answer[1]} of system {answer[0]} now)"
                )
        self.known = self.known[0] or answer[0], self.known[1] or answer[1]
