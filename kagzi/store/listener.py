"""Hears notifications on a connection of its own; whoever waits looks for itself when woken."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from psycopg import sql

from kagzi.background import cancel_all
from kagzi.store.connections import Connector, heed_cancellation

logger = logging.getLogger("kagzi.store")

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)


class Listener:
    """Keeps a listening connection up. Losing it loses nothing: everybody polls as well.

    Args:
        heard: Called with the channel of each notification.

    Attributes:
        hears: Whatever is said now will be heard, or `heard` is called when it listens again.
    """

    def __init__(
        self, connector: Connector, channels: Iterable[str], heard: Callable[[str], None]
    ) -> None:
        self._connector = connector
        self._channels = tuple(channels)
        self._heard = heard
        self._task: asyncio.Task[None] | None = None
        self.hears = False

    def start(self) -> None:
        """Listen; not through a pooler, which may hand the connection's backend to others."""
        if self._task is None and not self._connector.is_pooled:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            await cancel_all([self._task])
            self._task = None

    async def _run(self) -> None:
        failures = 0
        while True:
            connection: psycopg.AsyncConnection[Any] | None = None
            try:
                connection = await self._connector.connect(application_name="kagzi-listener")
                for channel in self._channels:
                    await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                    self._heard(channel)  # what was missed meanwhile
                failures, self.hears = 0, True
                async for notification in connection.notifies():
                    self._heard(notification.channel)
            except psycopg.Error as error:
                heed_cancellation(0)
                if failures == 0:
                    logger.info("listening stopped: %s", self._connector.explain(error))
            finally:
                self.hears = False
                if connection is not None:
                    await connection.close()
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1


def due_channel(schema: str) -> str:
    """Where it is said that a run is due."""
    return f"{schema}_due"


def done_channel(schema: str) -> str:
    """Where it is said that a run has ended."""
    return f"{schema}_done"


def queues_channel(schema: str) -> str:
    """Where it is said that the limits of a queue have changed."""
    return f"{schema}_queues"


def news_channel(schema: str) -> str:
    """Where it is said that somebody outside wants something of a run."""
    return f"{schema}_news"
