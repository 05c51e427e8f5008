"""One step over each of many items, as they come: a window of them at a time, results in order.

The items are cut into parts, each a group of its own (`pages/0`, `pages/1`, …), of which two are
under way. A part that is complete needs no more than its group's row: a replay neither loads its
steps nor asks for them again, but for the results themselves, which it hands on as before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from kagzi.codec import Codec
from kagzi.definition import Definition
from kagzi.elsewhere import LEAST_BYTES, Ahead, Elsewhere
from kagzi.errors import InvalidInput, StepFailed
from kagzi.host import GroupOutcome, GroupRequest, StepFuture
from kagzi.model import ErrorStrategy, GroupKind, ParallelResult
from kagzi.scope import Scope, joined, keyed_ids, member_ids

T = TypeVar("T")

WINDOW = 1000
AHEAD = 2  # parts under way
BREATH = 100  # items of a plain iterator between two turns of the loop


class MapHost(Protocol):
    """What streaming needs of the host."""

    def start_group(
        self, scope: Scope, request: GroupRequest, settle: Callable[[GroupOutcome], Any]
    ) -> StepFuture[Any]: ...

    def make_gate(self, limit: int) -> Any:
        """Permits that groups can share."""

    def streamed(self, path: str) -> int | None:
        """How many steps a part has whose results are recorded, all of them, and not loaded."""

    async def recall_stream(self, path: str, ids: list[str]) -> list[bytes | Elsewhere]:
        """Their results, in the order of the ids."""

    async def fetch(self, ids: list[str]) -> list[bytes]:
        """Results that are `Elsewhere`, in the order of the ids."""


class MapStream(Generic[T]):
    """What `ctx.map` gives for items that come one by one. Use it once, in one of two ways.

    `await` it for all the results in a list, or take them in order, without keeping them:
    `async for value in ctx.map(...)`. With `on_error=COLLECT_ALL` the first gives a
    `ParallelResult`, and the second gives a `StepFailed` in the place of a result.
    """

    def __init__(
        self,
        host: MapHost,
        scope: Scope,
        path: str,
        definition: Definition,
        items: Any,
        key: Callable[[Any], str] | None,
        strategy: ErrorStrategy,
        limit: int | None,
        priority: int,
        window: int,
    ) -> None:
        self._host = host
        self._scope = scope
        self._path = path
        self._definition = definition
        self._items = items
        self._key = key
        self._strategy = strategy
        self._limit = limit
        self._gate = None if limit is None else host.make_gate(limit)
        self._priority = priority
        self._window = window
        self._used = False
        self._keeps_all = False
        if _is_source(items) and key is not None:
            raise InvalidInput(
                f"map {path!r} has a function for its items and a key: where a function goes on "
                "from is a place, so let places name the steps"
            )

    def __await__(self) -> Generator[Any, None, Any]:
        return self._collect().__await__()

    def __aiter__(self) -> AsyncGenerator[T, None]:
        return self._values()

    async def _collect(self) -> Any:
        self._keeps_all = True
        values: list[Any] = []
        errors: dict[int, StepFailed] = {}
        async for value in self._values():
            if isinstance(value, StepFailed):
                errors[len(values)] = value
                values.append(None)
            else:
                values.append(value)
        if self._strategy is ErrorStrategy.COLLECT_ALL:
            return ParallelResult(values, errors)
        return values

    async def _values(self) -> AsyncGenerator[Any, None]:
        if self._used:
            raise InvalidInput(f"map {self._path!r} was used before: its items are gone")
        self._used = True
        parts = self._parts()
        flying: deque[StepFuture[Any] | _Recalled] = deque()
        try:
            async for part in parts:
                flying.append(part)
                if len(flying) == AHEAD:
                    async for value in self._decoded(*await flying.popleft()):
                        yield value
            while flying:
                async for value in self._decoded(*await flying.popleft()):
                    yield value
        finally:
            for part in flying:
                part.cancel()
            await parts.aclose()

    async def _parts(self) -> AsyncGenerator[Any, None]:
        """The parts, each begun when it is asked for; recorded ones when they are awaited."""
        source, number = self._items, 0
        if _is_source(source):
            place = 0
            while (size := self._host.streamed(joined(self._path, str(number)))) is not None:
                path = joined(self._path, str(number))
                yield _Recalled(self._recall(path, member_ids(path, size)))
                place, number = place + size, number + 1
            source = source(place)
        async for items in _cut(source, self._window):
            path = joined(self._path, str(number))
            number += 1
            if self._key is None:
                ids = member_ids(path, len(items))
            else:
                ids = keyed_ids(path, [self._key(item) for item in items])
            if self._host.streamed(path) == len(items):
                yield _Recalled(self._recall(path, ids))
                continue
            request = self._request(path, ids, items)
            yield self._host.start_group(self._scope, request, partial(_Part, ids))

    def _request(self, path: str, ids: list[str], items: list[Any]) -> GroupRequest:
        definition = self._definition
        encode = definition.arguments.encode
        return GroupRequest(
            path,
            GroupKind.STREAM,
            self._strategy,
            ids,
            [definition] * len(items),
            [encode((item,), {}) for item in items],
            limit=self._limit,
            gate=self._gate,
            priority=self._priority,
            spills=not self._keeps_all,
        )

    async def _recall(self, path: str, ids: list[str]) -> _Part:
        return _Part(ids, GroupOutcome(await self._host.recall_stream(path, ids)))

    async def _decoded(self, ids: list[str], outcome: GroupOutcome) -> AsyncGenerator[Any, None]:
        """A part's results, each decoded when it is asked for, and not kept."""
        returns: Codec[Any] = self._definition.returns
        values, failures, shelf = outcome.values, outcome.failures, outcome.shelf
        ahead = Ahead(self._host.fetch)
        for place, step_id in enumerate(ids):
            if place in failures:
                yield failures[place]
                continue
            value, values[place] = values[place], None
            if type(value) is Elsewhere:
                coming = ((ids[later], values[later]) for later in range(place + 1, len(ids)))
                value = await ahead.get(step_id, value, coming)
            elif shelf is not None and len(value) >= LEAST_BYTES:
                shelf.give(len(value))
            yield returns.decode(value)


class _Part(NamedTuple):
    """A part that is complete."""

    ids: list[str]
    outcome: GroupOutcome


class _Recalled:
    """A part whose results are read when they are awaited."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __await__(self) -> Generator[Any, None, _Part]:
        return self._read.__await__()  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self._read.close()


def is_streamed(items: Any) -> bool:
    """Whether items come one by one: from an iterator, an async one, or a function of a place."""
    return isinstance(items, AsyncIterable) or hasattr(items, "__next__") or _is_source(items)


def _is_source(items: Any) -> bool:
    return callable(items) and not isinstance(items, Iterable | AsyncIterable)


async def _cut(items: Any, size: int) -> AsyncGenerator[list[Any], None]:
    """Lists of `size` items; the last may be shorter."""
    part: list[Any] = []
    if isinstance(items, AsyncIterable):
        async for item in items:
            part.append(item)
            if len(part) == size:
                yield part
                part = []
    else:
        for count, item in enumerate(items, 1):
            part.append(item)
            if len(part) == size:
                yield part
                part = []
            if count % BREATH == 0:
                await asyncio.sleep(0)
    if part:
        yield part
