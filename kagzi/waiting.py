"""Clients that wait for runs to end: one look at a time, at all of them together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection
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
        self._all = False  # some of the runs that are waited for may have ended
        self.told = 0  # how often that was said
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._task is not None:
            await cancel_all([self._task])

    async def end_of(self, run_id: UUID, going: bool = False) -> End:
        """Wait for a run's end: its status, output and error.

        Args:
            going: It had not ended when `told` was what it is now, so there is no need to look.

        Raises:
            UnknownRun: It was deleted.
            StoreUnavailable: No connection, for longer than a pause.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[End] = loop.create_future()
        self._waits.setdefault(run_id, set()).add(future)
        if not going and not self._is_held(run_id):
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
        self.told += 1
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
                everyone = False
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._news.wait()
                except TimeoutError:
                    everyone = True
                self._news.clear()
                new, self._new = self._new, set()
                if self._all or everyone:
                    self._all = False
                    new &= self._waits.keys()
                    await self._look(self._waits.keys() - new, everyone)
                await self._look(new, True)
        finally:
            self._task = None

    async def _look(self, run_ids: Collection[UUID], everyone: bool) -> None:
        """At these runs, unless they are held here; `everyone`: also whether they are there."""
        asked = [run_id for run_id in run_ids if not self._is_held(run_id)]
        for start in range(0, len(asked), MOST):
            await self._look_at(asked[start : start + MOST], everyone)

    async def _look_at(self, asked: list[UUID], everyone: bool) -> None:
        try:
            found = await read_ends(self._store, asked, everyone)
        except StoreError as failure:
            self._fail(asked, failure)
            return
        for run_id, status, output, error in found:
            if status.is_terminal:
                self.ended(run_id, (status, output, error))
        if everyone:
            there = {row[0] for row in found}
            for run_id in asked:
                if run_id not in there:
                    self._fail([run_id], UnknownRun(f"run {run_id} was deleted"))

    def _fail(self, asked: list[UUID], error: Exception) -> None:
        for run_id in asked:
            for future in self._waits.get(run_id, ()):
                if not future.done():
                    future.set_exception(error)
