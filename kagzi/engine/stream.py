"""A queue from the checkpoint writer to one reader of a group's results."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any


class Stream:
    """A queue from the writer to one reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    @property
    def items(self) -> Iterable[tuple[int, Any]]:
        """What was put and not taken yet."""
        return self._items

    def put(self, index: int, value: Any) -> None:
        self._items.append((index, value))
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Any]:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._items.popleft()
