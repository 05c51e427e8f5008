"""What a workflow receives, and a step that opens groups: names work, encodes it, hands it on.

A Context gives every call its step id at the call, encodes the arguments, and turns the bytes that
come back into typed values. Who runs the steps is the `Host`'s business: the coordinator's live
run, or, inside a pool process, the link to it.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial
from types import CodeType
from typing import Any, Literal, Protocol, TypeVar, overload
from uuid import UUID

import orjson

from kagzi._core import hash_input
from kagzi.definition import Call, Definition, StepFunction, Workflow
from kagzi.errors import AllStepsFailed, InvalidInput, StepFailed
from kagzi.host import GroupOutcome, GroupRequest, Host, StepFuture, StepRequest
from kagzi.mapping import WINDOW, MapStream, is_streamed
from kagzi.model import (
    ErrorStrategy,
    GroupKind,
    ParallelResult,
    Winner,
    check_count,
    check_duration_s,
    check_name,
)
from kagzi.registry import as_call, definition_of, step
from kagzi.relations import Relations
from kagzi.scope import Scope, keyed_ids, member_ids

T = TypeVar("T")
A = TypeVar("A")
A1 = TypeVar("A1")
A2 = TypeVar("A2")
A3 = TypeVar("A3")
A4 = TypeVar("A4")
A5 = TypeVar("A5")
A6 = TypeVar("A6")
A7 = TypeVar("A7")
A8 = TypeVar("A8")
A9 = TypeVar("A9")
A10 = TypeVar("A10")


class PlainFunction(Protocol):
    """To a type checker: a lambda or `def` that is no step. (A step is callable, too.)"""

    @property
    def __code__(self) -> CodeType: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Context(Relations):
    """The handle on its run that a workflow function receives first."""

    __slots__ = ()

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def run_id(self) -> UUID:
        """The database's id of the run."""
        return self._host.run_id

    @property
    def scheduled_at(self) -> datetime | None:
        """The tick of the schedule that this run is for, in UTC; None if no schedule started it.

        For workflow code: give it to a step as an argument.
        """
        return self._host.scheduled_at

    # --- one step ---------------------------------------------------------------------------

    @overload
    def step(
        self,
        function: Call[T],
        /,
        *,
        id: str | None = ...,
        name: str | None = ...,
        priority: int | None = ...,
        limit: int | None = ...,
        retry: Any = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[T]: ...
    @overload
    def step(
        self, function: StepFunction[..., ..., Any, T], /, *args: Any, **kwargs: Any
    ) -> StepFuture[T]: ...
    @overload
    def step(
        self, function: PlainFunction | partial[Any], /, *args: Any, **kwargs: Any
    ) -> StepFuture[Any]: ...
    def step(
        self,
        function: Any,
        /,
        *args: Any,
        id: str | None = None,  # noqa: A002 - the public option has this name
        name: str | None = None,
        priority: int | None = None,
        limit: int | None = None,
        retry: Any = None,
        timeout: float | timedelta | None = None,
        **kwargs: Any,
    ) -> StepFuture[Any]:
        """Start a step; returns at once with an awaitable of its result.

        Args:
            function: A step, a call (`fetch.bind(url)`), or a function or closure, which then
                runs in the worker's own process.
            id: Names the step exactly. The same id with the same work is the same step.
            name: Instead of the function's name in a numbered id.
            priority, limit, retry, timeout: As in `Call.options`.

        Raises:
            StepFailed: When awaited, if its last attempt failed.
            StepConflict: The id is in use for other work.
            CodecError, InvalidInput: Arguments that cannot be stored, or do not fit.
        """
        call: Call[Any]
        if isinstance(function, Workflow):
            function = Call(function.as_step("run"), args, kwargs)
            args, kwargs = (), {}
        if type(function) is Call:
            if args or kwargs:
                raise InvalidInput("a call has its arguments already; pass the step to give others")
            call = function
        else:
            call = Call(definition_of(function), args, kwargs)
        if priority is not None or limit is not None or retry is not None or timeout is not None:
            call = call.options(priority=priority, limit=limit, retry=retry, timeout=timeout)
        scope = self._host.scope()
        definition = call.definition
        data = definition.encode(call.args, call.kwargs)
        if id is not None:
            step_id = scope.explicit_id(id, hash_input(definition.name, data))
        else:
            short = definition.short_name if name is None else check_name("step name", name)
            step_id = scope.next_id(short)
        request = StepRequest(step_id, definition, data, call.choices, id is not None)
        return self._host.start_step(scope, request, definition.returns.decode)

    # --- groups -----------------------------------------------------------------------------

    @overload
    def parallel(self, name: str, c1: Call[A1], /) -> StepFuture[tuple[A1]]: ...
    @overload
    def parallel(self, name: str, c1: Call[A1], c2: Call[A2], /) -> StepFuture[tuple[A1, A2]]: ...
    @overload
    def parallel(
        self, name: str, c1: Call[A1], c2: Call[A2], c3: Call[A3], /
    ) -> StepFuture[tuple[A1, A2, A3]]: ...
    @overload
    def parallel(
        self, name: str, c1: Call[A1], c2: Call[A2], c3: Call[A3], c4: Call[A4], /
    ) -> StepFuture[tuple[A1, A2, A3, A4]]: ...
    @overload
    def parallel(
        self, name: str, c1: Call[A1], c2: Call[A2], c3: Call[A3], c4: Call[A4], c5: Call[A5], /
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5]]: ...
    @overload
    def parallel(
        self,
        name: str,
        c1: Call[A1],
        c2: Call[A2],
        c3: Call[A3],
        c4: Call[A4],
        c5: Call[A5],
        c6: Call[A6],
        /,
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5, A6]]: ...
    @overload
    def parallel(
        self,
        name: str,
        c1: Call[A1],
        c2: Call[A2],
        c3: Call[A3],
        c4: Call[A4],
        c5: Call[A5],
        c6: Call[A6],
        c7: Call[A7],
        /,
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5, A6, A7]]: ...
    @overload
    def parallel(
        self,
        name: str,
        c1: Call[A1],
        c2: Call[A2],
        c3: Call[A3],
        c4: Call[A4],
        c5: Call[A5],
        c6: Call[A6],
        c7: Call[A7],
        c8: Call[A8],
        /,
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5, A6, A7, A8]]: ...
    @overload
    def parallel(
        self,
        name: str,
        c1: Call[A1],
        c2: Call[A2],
        c3: Call[A3],
        c4: Call[A4],
        c5: Call[A5],
        c6: Call[A6],
        c7: Call[A7],
        c8: Call[A8],
        c9: Call[A9],
        /,
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5, A6, A7, A8, A9]]: ...
    @overload
    def parallel(
        self,
        name: str,
        c1: Call[A1],
        c2: Call[A2],
        c3: Call[A3],
        c4: Call[A4],
        c5: Call[A5],
        c6: Call[A6],
        c7: Call[A7],
        c8: Call[A8],
        c9: Call[A9],
        c10: Call[A10],
        /,
    ) -> StepFuture[tuple[A1, A2, A3, A4, A5, A6, A7, A8, A9, A10]]: ...
    @overload
    def parallel(
        self,
        name: str,
        calls: Mapping[str, Call[A]],
        /,
        *,
        on_error: Literal[ErrorStrategy.FAIL_FAST] = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[dict[str, A]]: ...
    @overload
    def parallel(
        self,
        name: str,
        calls: Mapping[str, Call[A]],
        /,
        *,
        on_error: Literal[ErrorStrategy.COLLECT_ALL],
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[ParallelResult[A]]: ...
    @overload
    def parallel(
        self,
        name: str,
        /,
        *calls: Any,
        on_error: ErrorStrategy = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[Any]: ...
    def parallel(
        self,
        name: str,
        /,
        *calls: Any,
        on_error: ErrorStrategy = ErrorStrategy.FAIL_FAST,
        limit: int | None = None,
        priority: int = 0,
        timeout: float | timedelta | None = None,
    ) -> StepFuture[Any]:
        """Start calls together; awaits to a tuple of their results in order.

        One dict instead of calls gives a dict, its keys naming the steps. With
        `on_error=COLLECT_ALL`: a `ParallelResult`.

        Raises:
            StepFailed: When awaited: of the first step to fail (FAIL_FAST).
            GroupTimeout: When awaited: not done within `timeout`.
        """
        keys: tuple[str, ...] | None = None
        if len(calls) == 1 and isinstance(calls[0], Mapping):
            keys = tuple(calls[0])
            calls = tuple(calls[0].values())
        shape: Callable[[list[Any]], Any] = tuple
        if keys is not None:
            names = keys
            shape = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
        return self._group(name, calls, keys, on_error, limit, priority, timeout, shape)

    @overload
    def parallel_vec(
        self,
        name: str,
        calls: Iterable[Call[T]],
        *,
        keys: Iterable[str] | None = ...,
        on_error: Literal[ErrorStrategy.FAIL_FAST] = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[list[T]]: ...
    @overload
    def parallel_vec(
        self,
        name: str,
        calls: Iterable[Call[T]],
        *,
        keys: Iterable[str] | None = ...,
        on_error: Literal[ErrorStrategy.COLLECT_ALL],
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[ParallelResult[T]]: ...
    @overload
    def parallel_vec(
        self,
        name: str,
        calls: Iterable[Callable[..., Any]],
        *,
        keys: Iterable[str] | None = ...,
        on_error: ErrorStrategy = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[Any]: ...
    def parallel_vec(
        self,
        name: str,
        calls: Iterable[Any],
        *,
        keys: Iterable[str] | None = None,
        on_error: ErrorStrategy = ErrorStrategy.FAIL_FAST,
        limit: int | None = None,
        priority: int = 0,
        timeout: float | timedelta | None = None,
    ) -> StepFuture[Any]:
        """As `parallel`, over an iterable of calls; awaits to a list in order.

        Args:
            keys: Names for the steps' ids instead of their places, one per call.
            limit: At most this many of the group's bodies are open at once.
            priority: Higher begins first among the ready steps of the worker.
        """
        named = None if keys is None else tuple(keys)
        return self._group(name, list(calls), named, on_error, limit, priority, timeout, list)

    @overload
    def map(  # type: ignore[overload-overlap]
        self,
        name: str,
        function: StepFunction[..., ..., Any, T],
        items: Iterator[A] | AsyncIterable[A] | Callable[[int], Iterable[A] | AsyncIterable[A]],
        *,
        key: Callable[[A], str] | None = ...,
        on_error: ErrorStrategy = ...,
        limit: int | None = ...,
        priority: int = ...,
        window: int = ...,
    ) -> MapStream[T]: ...
    @overload
    def map(
        self,
        name: str,
        function: StepFunction[..., ..., Any, T],
        items: Iterable[A],
        *,
        key: Callable[[A], str] | None = ...,
        on_error: Literal[ErrorStrategy.FAIL_FAST] = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[list[T]]: ...
    @overload
    def map(
        self,
        name: str,
        function: StepFunction[..., ..., Any, T],
        items: Iterable[A],
        *,
        key: Callable[[A], str] | None = ...,
        on_error: Literal[ErrorStrategy.COLLECT_ALL],
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[ParallelResult[T]]: ...
    @overload
    def map(
        self,
        name: str,
        function: PlainFunction | partial[Any],
        items: Iterable[A],
        *,
        key: Callable[[A], str] | None = ...,
        on_error: ErrorStrategy = ...,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[Any]: ...
    def map(
        self,
        name: str,
        function: Any,
        items: Any,
        *,
        key: Callable[[Any], str] | None = None,
        on_error: ErrorStrategy = ErrorStrategy.FAIL_FAST,
        limit: int | None = None,
        priority: int = 0,
        timeout: float | timedelta | None = None,
        window: int | None = None,
    ) -> Any:
        """`function` over each of `items`, each its only argument; a list in order.

        Items that come one by one (an iterator, an async iterator, or a function that gives either
        from a place on, counted from 0) are taken and run as they come, two windows of them at a
        time. Then `async for value in ctx.map(...)` hands the results on in order without keeping
        them, and steps are named by window and place: `pages/3/17`. After a crash complete windows
        neither run nor load again; a function is asked to go on behind them.

        Args:
            key: Names each step by its item instead of its place.
            timeout: Not for items that come one by one.
            window: How many items that come one by one are one group. Default: 1,000.
        """
        definition = definition_of(function)
        if is_streamed(items) or (window is not None and isinstance(items, Iterable)):
            if timeout is not None:
                raise InvalidInput(
                    "a map over items that come one by one takes no timeout: "
                    "put it on the step, or use `async with ctx.timeout(...)`"
                )
            return self._stream(name, definition, items, key, on_error, limit, priority, window)
        if not isinstance(items, Iterable):
            raise InvalidInput(f"map {name!r} needs items, got {items!r}")
        listed = list(items)
        keys = None if key is None else [key(item) for item in listed]
        calls = [Call[Any](definition, (item,), {}) for item in listed]
        return self._group(name, calls, keys, on_error, limit, priority, timeout, list)

    @overload
    def race(
        self,
        name: str,
        calls: Mapping[str, Call[T]] | Iterable[Call[T]],
        *,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[Winner[T]]: ...
    @overload
    def race(
        self,
        name: str,
        calls: Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]],
        *,
        limit: int | None = ...,
        priority: int = ...,
        timeout: float | timedelta | None = ...,
    ) -> StepFuture[Winner[Any]]: ...
    def race(
        self,
        name: str,
        calls: Any,
        *,
        limit: int | None = None,
        priority: int = 0,
        timeout: float | timedelta | None = None,
    ) -> StepFuture[Winner[Any]]:
        """Start calls together; awaits to the first that succeeds. The others are cancelled.

        Raises:
            AllStepsFailed: When awaited: every step failed.
            InvalidInput: There are no calls.
        """
        keys = None
        if isinstance(calls, Mapping):
            keys = tuple(calls)
            calls = calls.values()
        scope = self._host.scope()
        request = self._request(
            scope,
            GroupKind.RACE,
            name,
            list(calls),
            keys,
            ErrorStrategy.COLLECT_ALL,
            limit,
            priority,
            timeout,
        )
        if not request.ids:
            raise InvalidInput(f"race {request.path!r} has no calls, so nothing can win it")

        def settle(outcome: GroupOutcome) -> Winner[Any]:
            index = outcome.winner
            if index is None:
                count = len(request.ids)
                raise AllStepsFailed(
                    f"all {count} steps of race {request.path!r} failed: "
                    + "; ".join(str(failure) for failure in outcome.failures.values()),
                    list(outcome.failures.values()),
                )
            value = request.definitions[index].returns.decode(outcome.values[index])
            return Winner(request.ids[index], index, value)

        return self._host.start_group(scope, request, settle)

    async def as_completed(
        self,
        name: str,
        calls: Iterable[Call[T]],
        *,
        keys: Iterable[str] | None = None,
        limit: int | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Winner[T]]:
        """The results in the order in which they became durable; a replay gives the same order.

        Leaving the loop cancels what is still running.

        Raises:
            StepFailed: At the place of a step that failed.
        """
        scope = self._host.scope()
        named = None if keys is None else tuple(keys)
        request = self._request(
            scope,
            GroupKind.PARALLEL,
            name,
            list(calls),
            named,
            ErrorStrategy.COLLECT_ALL,
            limit,
            priority,
            None,
        )
        request.in_order_of_completion = True
        stream = self._host.stream_group(scope, request)
        try:
            async for index, output in stream:
                if isinstance(output, StepFailed):
                    raise output
                value = request.definitions[index].returns.decode(output)
                yield Winner(request.ids[index], index, value)
        finally:
            await stream.aclose()

    # --- time and chance --------------------------------------------------------------------

    def sleep(self, duration: float | timedelta) -> StepFuture[None]:
        """A durable pause: its end is kept in the store, and a long one holds nothing."""
        scope = self._host.scope()
        at_once = duration is not False and duration in (0, timedelta(0))
        seconds = 0.0 if at_once else check_duration_s("sleep", duration)
        future: StepFuture[None] = self._host.sleep(scope, scope.next_id("sleep"), seconds, None)
        return future

    def sleep_until(self, at: datetime) -> StepFuture[None]:
        """A durable pause up to a moment, given with its time zone."""
        if at.tzinfo is None:
            raise InvalidInput(f"sleep_until needs a datetime with a time zone, got {at!r}")
        scope = self._host.scope()
        future: StepFuture[None] = self._host.sleep(scope, scope.next_id("sleep"), None, at)
        return future

    def timeout(self, duration: float | timedelta) -> Any:
        """`async with ctx.timeout(5):` raises TimeoutError when the block is not done in time.

        That it was, or was not, is recorded: a replay goes the same way.
        """
        scope = self._host.scope()
        return self._host.timeout(
            scope, scope.next_id("timeout"), check_duration_s("timeout", duration)
        )

    def now(self) -> StepFuture[datetime]:
        """The time (UTC) when this was first asked, recorded."""
        return self.step(_now, name="now")

    def random(self) -> StepFuture[float]:
        """A random number in [0, 1), recorded."""
        return self.step(_random, name="random")

    def uuid4(self) -> StepFuture[UUID]:
        """A random UUID, recorded."""
        return self.step(_uuid4, name="uuid4")

    # --- changes of the code ----------------------------------------------------------------

    def patched(self, id: str) -> bool:  # noqa: A002 - the public parameter has this name
        """Whether this run takes new code, or the code that it has run here before.

        True where a run comes for the first time; False where it had gone further before this
        call was in the code. The answer is recorded, and every replay gives the same. Within one
        task of the run, the same id has the same answer wherever it is asked.

        Keep the old code until no run is left that has it as its answer (`kagzi check` tells), then
        remove the call: answers that nobody asks for are ignored.

        Raises:
            InvalidInput: Called in a step's body.
        """
        return self._host.patched(self._host.scope(), check_name("patch id", id))

    # --- inside -----------------------------------------------------------------------------

    def _request(
        self,
        scope: Scope,
        kind: GroupKind,
        name: str,
        targets: Iterable[Any],
        keys: Iterable[str] | None,
        strategy: ErrorStrategy,
        limit: int | None,
        priority: int,
        timeout: float | timedelta | None,
    ) -> GroupRequest:
        """Check and encode a group whole, before anything of it is named or begun."""
        calls = [target if type(target) is Call else as_call(target) for target in targets]
        if not isinstance(strategy, ErrorStrategy):
            raise InvalidInput(f"on_error must be a kagzi.ErrorStrategy, got {strategy!r}")
        if type(priority) is not int or abs(priority) > 2**31 - 1:
            raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
        if limit is not None:
            check_count("limit", limit)
        timeout_s = None if timeout is None else check_duration_s("timeout", timeout)
        check_name("group name", name)
        inputs = [call.definition.arguments.encode(call.args, call.kwargs) for call in calls]
        path = scope.next_id(name)
        scope.check_depth(path)
        ids = member_ids(path, len(calls)) if keys is None else keyed_ids(path, keys)
        if len(ids) != len(calls):
            raise InvalidInput(f"group {path!r} has {len(calls)} calls but {len(ids)} keys")
        choices = None
        if any(call.choices is not None for call in calls):
            choices = [call.choices for call in calls]
        definitions = [call.definition for call in calls]
        return GroupRequest(
            path, kind, strategy, ids, definitions, inputs, choices, limit, priority, timeout_s
        )

    def _stream(
        self,
        name: str,
        definition: Definition,
        items: Any,
        key: Callable[[Any], str] | None,
        strategy: ErrorStrategy,
        limit: int | None,
        priority: int,
        window: int | None,
    ) -> MapStream[Any]:
        if not isinstance(strategy, ErrorStrategy):
            raise InvalidInput(f"on_error must be a kagzi.ErrorStrategy, got {strategy!r}")
        if type(priority) is not int or abs(priority) > 2**31 - 1:
            raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
        if limit is not None:
            check_count("limit", limit)
        size = WINDOW if window is None else check_count("window", window)
        check_name("group name", name)
        scope = self._host.scope()
        path = scope.next_id(name)
        scope.check_depth(path)
        return MapStream(
            self._host, scope, path, definition, items, key, strategy, limit, priority, size
        )

    def _group(
        self,
        name: str,
        targets: Iterable[Any],
        keys: Iterable[str] | None,
        strategy: ErrorStrategy,
        limit: int | None,
        priority: int,
        timeout: float | timedelta | None,
        shape: Callable[[list[Any]], Any],
    ) -> StepFuture[Any]:
        scope = self._host.scope()
        request = self._request(
            scope, GroupKind.PARALLEL, name, targets, keys, strategy, limit, priority, timeout
        )
        if strategy is ErrorStrategy.COLLECT_ALL:
            names = None if keys is None else tuple(keys)
            return self._host.start_group(
                scope,
                request,
                lambda outcome: ParallelResult(
                    decoded(request, outcome.values), outcome.failures, names
                ),
            )
        return self._host.start_group(
            scope, request, lambda outcome: shape(decoded(request, outcome.values))
        )


def decoded(request: GroupRequest, values: list[bytes | None]) -> list[Any]:
    """A group's results, typed by each step's own return annotation; None where it failed."""
    definitions = request.definitions
    if not definitions:
        return []
    first = definitions[0]
    if first.returns.plain and definitions.count(first) == len(definitions) and None not in values:
        joined = b"[" + b",".join(values) + b"]"  # type: ignore[arg-type]
        if b"[ " not in joined and b", " not in joined:  # no integer beyond 64 bits, at a glance
            return orjson.loads(joined)  # type: ignore[no-any-return]
    return [
        None if value is None else definition.returns.decode(value)
        for definition, value in zip(definitions, values, strict=True)
    ]


# What a context records of the world is steps like any other, run in the worker's own process.
# Their names are in every recorded run: they stay when the functions move.


@step(name="kagzi.now", where="coordinator")
async def _now(ctx: Context) -> datetime:
    return ctx._host.store_now()  # by the clock that ends a sleep


@step(name="kagzi.random", where="coordinator")
async def _random() -> float:
    return random.random()


@step(name="kagzi.uuid4", where="coordinator")
async def _uuid4() -> UUID:
    return UUID(bytes=os.urandom(16), version=4)
