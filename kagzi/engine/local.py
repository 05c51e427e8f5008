"""The worker's own process as a place where bodies run: closures, and all steps without a pool."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from kagzi._core import LANE_OWN_ASYNC, LANE_OWN_CPU, LANE_OWN_THREAD, Place, Step
from kagzi.codec.failures import describe_exception
from kagzi.engine.turns import Turns
from kagzi.errors import StepTimeout
from kagzi.host import current
from kagzi.model import StepInfo

THREADS = 32
ROOM = {LANE_OWN_ASYNC: 10_000, LANE_OWN_THREAD: THREADS, LANE_OWN_CPU: 1}


class _Running:
    """What a body here can tell of its step."""

    __slots__ = ("_attempt", "_step")

    def __init__(self, step: Step) -> None:
        self._step = step
        self._attempt = step.attempt

    @property
    def info(self) -> StepInfo:
        return StepInfo(self._step.run.run_id, self._step.id, self._attempt)


class LocalPlace:
    """Runs bodies in tasks of this loop, and sync ones in threads.

    Args:
        prepare: Gives the new task of a step's body its scope.
        context_for: The Context that a step asks for.
        transact: Runs a body over a connection and commits its checkpoint with what it wrote.
        returned, failed, ended: Told how each body ended.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        prepare: Callable[[asyncio.Task[Any], Step], None],
        context_for: Callable[[Step], Any],
        transact: Callable[[Step, Callable[[Any], Any]], Awaitable[Any]],
        returned: Callable[[Step], None],
        failed: Callable[[Step, bytes, bool], None],
        ended: Callable[[Step], None],
    ) -> None:
        self._loop = loop
        self.place = Place((0, 0, 0, *(ROOM[lane] for lane in sorted(ROOM))), self)
        self._prepare = prepare
        self._context_for = context_for
        self._transact = transact
        self._returned = returned
        self._failed = failed
        self._ended = ended
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._turns = Turns(loop)
        self._threads = ThreadPoolExecutor(THREADS, "kagzi-step")

    def start(self, steps: list[Step]) -> None:
        for step in steps:
            task = self._loop.create_task(self._run(step))
            self._tasks[step.number] = task
            task.add_done_callback(partial(self._end_unbegun, step, step.number))
            self._prepare(task, step)

    def cancel(self, step: Step) -> None:
        task = self._tasks.get(step.number)
        if task is not None:
            task.cancel()

    def suspended(self, step: Step) -> None:
        pass

    def hold(self, held: bool) -> None:
        """Let no more bodies begin while `held`; those that have begun go on."""
        self._turns.hold(held)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, step: Step) -> None:
        definition = step.definition
        number = step.number
        if self._turns.held:
            await self._turns.wait()  # cancelled here, it has not begun
        step.started_us = time.time_ns() // 1000
        step.process_id = 0
        current.set(_Running(step))
        error: BaseException | None = None
        output: bytes | None = None
        try:
            args, kwargs = definition.arguments.decode(step.input)
            if definition.wants_context:
                args = (self._context_for(step), *args)
            if definition.transaction:
                body = partial(_with_connection, definition.function, args, kwargs)
                value = await self._timed(step, self._transact(step, body))
            elif definition.is_async:
                value = await self._timed(step, definition.function(*args, **kwargs))
            else:
                value, error = await self._timed(step, self._in_thread(step, args, kwargs))
            if error is None:
                output = definition.returns.encode(value)
        except BaseException as raised:
            error = raised
        self._tasks.pop(number, None)
        if step.number != number:
            return
        step.completed_us = time.time_ns() // 1000
        self._ended(step)
        if step.group.closed:
            step.run.bodies.left(step)
            return
        if error is None:
            step.status, step.output = "completed", output
            self._returned(step)
        else:
            wanted = definition.retry.wants(error)
            self._failed(step, describe_exception(error), wanted)

    def _end_unbegun(self, step: Step, number: int, _: object) -> None:
        """A task that was cancelled before its first turn has never been in `_run`."""
        if self._tasks.pop(number, None) is not None and step.number == number:
            self._ended(step)

    async def _timed(self, step: Step, body: Any) -> Any:
        if not step.timeout_us:
            return await body
        limit = asyncio.timeout(step.timeout_us / 1e6)
        try:
            async with limit:
                return await body
        except TimeoutError:
            if not limit.expired():
                raise
            raise StepTimeout(f"no result within {step.timeout_us / 1e6:g} s") from None

    async def _in_thread(
        self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """What a sync body returns, or raises: a future cannot hold every exception."""
        # A cancelled wait leaves its thread running; it counts as busy until it ends.
        context = contextvars.copy_context()
        work = self._threads.submit(context.run, _call, step.definition.function, args, kwargs)
        try:
            value, error = await asyncio.wrap_future(work, loop=self._loop)
        except asyncio.CancelledError:
            if not work.cancel() and not work.done():
                self._give_up_thread(step.lane)
                work.add_done_callback(lambda _: self._thread_ended(step.lane))
            raise
        if inspect.isawaitable(value):  # a lambda around an async function
            value = await value
        return value, error

    def _give_up_thread(self, lane: int) -> None:
        self.place.set_room(lane, max(0, self.place.room(lane) - 1))

    def _thread_ended(self, lane: int) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take_thread_back, lane)

    def _take_thread_back(self, lane: int) -> None:
        self.place.set_room(lane, min(ROOM[lane], self.place.room(lane) + 1))


async def _with_connection(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], connection: Any
) -> Any:
    return await function(connection, *args, **kwargs)


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, BaseException | None]:
    try:
        return function(*args, **kwargs), None
    except BaseException as error:
        return None, error
