"""Clients that wait for runs to end: one look at a time, at all of them together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from uuid import UUID

from kagzi.background import begin_apart, cancel_all
from kagzi.errors import StoreError, UnknownRun
from kagzi.model import RunStatus
from kagzi.store.operations import read_ends
from kagzi.store.store import Store

logger = logging.getLogger("kagzi")

POLL_S = 1.0
MOST = 1000

End = tuple[RunStatus, bytes | None, bytes | None]


class Waiting:
    """What a client waits for.

    Args:
        store: An open store.
        is_held: Whether a worker of this program drives a run: it will say when that ends.
    """

    def __init__(self, store: Store, is_held: Callable[[UUID], bool]) -> None:
        self._store = store
        self._is_held = is_held
        self._waits: dict[UUID, set[asyncio.Future[End]]] = {}
        self._followers: set[asyncio.Event] = set()
        self._new: set[UUID] = set()
        self._all = False  # look at every run that is waited for
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._task is not None:
            await cancel_all([self._task])

    async def end_of(self, run_id: UUID) -> End:
        """Wait for a run's end: its status, output and error.

        Raises:
            UnknownRun: It was deleted.
            StoreUnavailable: No connection, for longer than a pause.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[End] = loop.create_future()
        self._waits.setdefault(run_id, set()).add(future)
        if not self._is_held(run_id):
            self._new.add(run_id)
            self._news.set()
        if self._task is None:
            self._task = begin_apart(self._look_for_ever())
        try:
            return await future
        finally:
            futures = self._waits.get(run_id)
            if futures is not None:
                futures.discard(future)
                if not futures:
                    del self._waits[run_id]

    async def wakes(self) -> AsyncGenerator[None, None]:
        """At once, and whenever something may have happened, or after a while."""
        event = asyncio.Event()
        self._followers.add(event)
        try:
            while True:
                event.clear()
                yield
                try:
                    async with asyncio.timeout(POLL_S):
                        await event.wait()
                except TimeoutError:
                    pass
        finally:
            self._followers.discard(event)

    def heard(self) -> None:
        """Some run may have ended."""
        self._all = True
        self._news.set()
        for event in self._followers:
            event.set()

    def ended(self, run_id: UUID, end: End) -> None:
        """A worker of this program has ended a run, and that is durable."""
        for future in self._waits.get(run_id, ()):
            if not future.done():
                future.set_result(end)
        for event in self._followers:
            event.set()

    async def _look_for_ever(self) -> None:
        try:
            while self._waits:
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._news.wait()
                except TimeoutError:
                    self._all = True
                self._news.clear()
                looked_at = self._waits if self._all else self._new
                asked = [run_id for run_id in looked_at if not self._is_held(run_id)]
                self._all, self._new = False, set()
                for start in range(0, len(asked), MOST):
                    await self._look(asked[start : start + MOST])
        finally:
            self._task = None

    async def _look(self, asked: list[UUID]) -> None:
        try:
            found = {row[0]: row[1:] for row in await read_ends(self._store, asked)}
        except StoreError as error:
            self._fail(asked, error)
            return
        for run_id in asked:
            end = found.get(run_id)
            if end is None:
                self._fail([run_id], UnknownRun(f"run {run_id} was deleted"))
            elif end[0].is_terminal:
                self.ended(run_id, end)

    def _fail(self, asked: list[UUID], error: Exception) -> None:
        for run_id in asked:
            for future in self._waits.get(run_id, ()):
                if not future.done():
                    future.set_exception(error)
