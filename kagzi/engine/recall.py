"""Reads recorded results that were left in the store, for work that asks for them on replay."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kagzi._core import StoredStep
from kagzi.elsewhere import Ahead, Elsewhere


class RecallHome(Protocol):
    """What this module needs of the run."""

    loop: asyncio.AbstractEventLoop
    recorded_steps: dict[str, StoredStep]

    async def fetch(self, ids: list[str]) -> list[bytes]: ...

    def doom(self, error: BaseException) -> None: ...


Deliver = Callable[[list[bytes]], None]


class Recall:
    """Of one run. Delivers in the order in which it was asked.

    A step's result comes with those of the steps that were called after it, up to some MiB, so a
    run that goes over many steps asks the store for what they hold, not for each of them.
    """

    def __init__(self, home: RecallHome) -> None:
        self._home = home
        self._asked: deque[tuple[list[str], Deliver]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._ahead = Ahead(home.fetch)
        self._order: list[str] | None = None
        self._places: dict[str, int] = {}

    def ask(self, ids: list[str], deliver: Deliver) -> None:
        """Call back with the results of these steps, unless the run is let go before."""
        self._asked.append((ids, deliver))
        if self._task is None:
            self._task = self._home.loop.create_task(self._answer_all())

    def close(self) -> None:
        self._asked.clear()
        if self._task is not None:
            self._task.cancel()

    async def _answer_all(self) -> None:
        try:
            while self._asked:
                ids, deliver = self._asked.popleft()
                deliver([await self._next(ids[0])] if len(ids) == 1 else await self._all(ids))
        except Exception as error:
            self._home.doom(error)
        finally:
            self._task = None

    async def _next(self, step_id: str) -> bytes:
        stored = self._home.recorded_steps[step_id]
        return await self._ahead.get(step_id, Elsewhere(stored.output_bytes), self._after(step_id))

    def _after(self, step_id: str) -> Iterator[tuple[str, Any]]:
        """What was called later, and was left in the store as well. Not of groups."""
        steps = self._home.recorded_steps
        if self._order is None:
            left = [path for path, one in steps.items() if one.is_elsewhere and not one.in_group]
            left.sort(key=lambda path: (steps[path].call_number, path))
            self._order = left
            self._places = {path: place for place, path in enumerate(left)}
        place = self._places.get(step_id, len(self._order))
        for later in range(place + 1, len(self._order)):
            path = self._order[later]
            if path in steps:
                yield path, Elsewhere(steps[path].output_bytes)

    async def _all(self, ids: list[str]) -> list[bytes]:
        steps, ahead = self._home.recorded_steps, Ahead(self._home.fetch)
        sizes = [(step_id, Elsewhere(steps[step_id].output_bytes)) for step_id in ids]
        return [
            await ahead.get(step_id, size, (sizes[later] for later in range(place, len(sizes))))
            for place, (step_id, size) in enumerate(sizes, 1)
        ]
