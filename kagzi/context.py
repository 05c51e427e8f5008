"""What a workflow receives, and a step that opens groups: names work, encodes it, hands it on.

A Context gives every call its step id at the call, encodes the arguments, and turns the bytes that
come back into typed values. Who runs the steps is the `Host`'s business: the coordinator's live
run, or, inside a pool process, the link to it.
"""

from __future__ import annotations

import os
import random
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar, overload
from uuid import UUID

from kagzi._core import hash_input
from kagzi.definition import Call, StepFunction, Workflow
from kagzi.errors import InvalidInput
from kagzi.groups import Groups, PlainFunction
from kagzi.host import Host, StepFuture, StepRequest
from kagzi.model import (
    check_duration_s,
    check_name,
)
from kagzi.registry import definition_of, step

T = TypeVar("T")


class Context(Groups):
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
