"""A pool process: receives frames of steps, runs their bodies, answers in frames.

Async bodies share the process's uvloop; sync ones run in threads; bodies that compute run one at a
time. Nothing here touches the database.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing.process
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import uvloop

from kagzi._core import FrameReader, FrameWriter
from kagzi.codec.failures import describe_exception
from kagzi.definition import Definition, StepFunction
from kagzi.engine.tasks import install_factory
from kagzi.engine.turns import Turns
from kagzi.errors import InvalidDefinition, StepTimeout
from kagzi.host import current
from kagzi.pool import wire
from kagzi.pool.body import Body, Failure, Message, Threads, describe_failure
from kagzi.pool.marks import Marks, map_cells
from kagzi.registry import registry

MakeContext = Callable[["PoolProcess", "Body"], Any]

CANCEL_GRACE_S = 2.0
NO_GUARD = 73


class PoolProcess(asyncio.Protocol):
    """The process's end of the socket."""

    def __init__(self, marks: Marks, make_context: MakeContext) -> None:
        self.marks = marks
        self._make_context = make_context
        self._reader = FrameReader()
        self._out = FrameWriter()
        self._flushing = False
        self._functions: dict[int, Definition | BaseException | tuple[str, str]] = {}
        self._bodies: dict[int, Body] = {}
        self._transport: asyncio.Transport | None = None
        self._threads = Threads(self)
        self._loop = asyncio.get_running_loop()
        self._turns = Turns(self._loop)
        self.ended = self._loop.create_future()

    # --- the socket -------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(high=wire.MOST_UNSENT_BYTES)
        self._transport = transport
        self.send(wire.READY, os.getpid())

    def connection_lost(self, exc: Exception | None) -> None:
        # The coordinator is gone, whatever it was: nobody can use a result from here.
        os._exit(0)

    def pause_writing(self) -> None:
        # What has not begun waits. Nothing that the coordinator needs to go on does.
        self._turns.hold(True)
        self._threads.hold(True)

    def resume_writing(self) -> None:
        self._turns.hold(False)
        self._threads.hold(False)

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            kind = message[0]
            if kind == wire.RUN:
                self._begin(message)
            elif kind == wire.CANCEL:
                self._cancel(message[1])
            elif kind == wire.OUTCOME:
                body = self._bodies.get(message[1])
                if body is not None and body.extra is not None:
                    body.extra.outcome(message)
            elif kind == wire.DEFINE:
                self._define(message)
            elif kind == wire.STOP:
                os._exit(0)

    def send(
        self,
        kind: int,
        number: int,
        first: int = 0,
        second: int = 0,
        head: bytes = b"",
        body: bytes = b"",
    ) -> None:
        """Put a message into the frame that goes out at the end of this turn of the loop."""
        if len(body) >= wire.LARGE_BYTES and self._transport is not None:
            self._out.add_head(kind, number, first, second, head, len(body))
            self._transport.writelines((self._out.take(), body))
            return
        self._out.add(kind, number, first, second, head, body)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is not None and len(self._out):
            self._transport.write(self._out.take())

    # --- beginning --------------------------------------------------------------------------

    def _define(self, message: Message) -> None:
        _, _, first, _, head, body = message
        self._functions[first] = head.decode(), body.decode()

    def _function(self, number: int, step: int) -> Definition | BaseException:
        """What a number stands for; the first step that asks is to blame for the import."""
        known = self._functions[number]
        if isinstance(known, tuple):
            with self.marks.on_behalf_of(step):
                try:
                    known = find_step(*known)
                except BaseException as error:
                    known = error
            self._functions[number] = known
        return known

    def _begin(self, message: Message) -> None:
        definition = self._function(message[2], message[1])
        if isinstance(definition, BaseException):
            now_us = time.time_ns() // 1000
            self.send(wire.FAILED, message[1], now_us, 0, b"0", describe_exception(definition))
            return
        body = Body(message, message[2], definition)
        self._bodies[body.number] = body
        if definition.is_async:
            context = contextvars.copy_context()
            context.run(current.set, body)
            body.task = asyncio.Task(
                self.marks.on_loop(self._run(body), body.number), loop=self._loop, context=context
            )
        else:
            self._threads.put(body)

    async def _run(self, body: Body) -> None:
        """An async body, on the loop."""
        if self._turns.held:
            await self._turns.wait()
        definition = body.definition
        body.cell = self.marks.begin(body.number)
        body.started_us = time.time_ns() // 1000
        if body.timeout_us:
            self.arm(body)
        try:
            args, kwargs = definition.arguments.decode(body.input)
            if definition.wants_context:
                args = (self._make_context(self, body), *args)
            value = await definition.function(*args, **kwargs)
            output = definition.returns.encode(value)
        except BaseException as error:
            if body.answered:
                self._end(body)  # nobody wants to know what a cancelled body raised
            else:
                self.raised(body, describe_failure(definition, error))
        else:
            self.returned(body, output)

    def arm(self, body: Body) -> None:
        """Start the clock of a body with a timeout."""
        if body.number in self._bodies:
            body.timer = self._loop.call_later(body.timeout_us / 1e6, self._time_out, body)

    # --- ending -----------------------------------------------------------------------------

    def returned(self, body: Body, output: bytes) -> None:
        if self._end(body):
            duration_us = time.time_ns() // 1000 - body.started_us
            self.send(wire.DONE, body.number, body.started_us, duration_us, b"", output)

    def raised(self, body: Body, failure: Failure) -> None:
        if self._end(body):
            self._send_failure(wire.FAILED, body, failure)

    def _send_failure(self, kind: int, body: Body, failure: Failure) -> None:
        duration_us = time.time_ns() // 1000 - body.started_us
        self.send(kind, body.number, body.started_us, duration_us, *failure)

    def _timeout_of(self, body: Body) -> Failure:
        error = StepTimeout(f"no result within {body.timeout_us / 1e6:g} s")
        with self.marks.on_behalf_of(body.number):
            return describe_failure(body.definition, error)

    def _end(self, body: Body) -> bool:
        """The body is over: free its cell. True if its outcome is still to be told."""
        self.marks.end(body.cell)
        self._bodies.pop(body.number, None)
        if body.timer is not None:
            body.timer.cancel()
        if body.extra is not None:
            body.extra.close()
        if body.answered:
            if body.definition.is_async:
                self.send(wire.CANCELLED, body.number)
            else:
                self.send(wire.FREED, body.number, body.lane)
            return False
        if body.timed_out:
            self._send_failure(wire.FAILED, body, self._timeout_of(body))
            return False
        return True

    def _cancel(self, number: int) -> None:
        body = self._bodies.get(number)
        if body is None or body.answered:
            return
        if body.task is not None:
            body.answered = True
            if body.started_us == 0:
                self._bodies.pop(number)
                self.send(wire.CANCELLED, number)
            body.task.cancel()
        elif self._threads.withdraw(body):
            self._bodies.pop(number)
            self.send(wire.CANCELLED, number)
        else:
            body.answered = True
            self.send(wire.ABANDONED, number, body.lane)

    def _time_out(self, body: Body) -> None:
        if body.answered or body.number not in self._bodies:
            return
        if body.task is None:
            self._give_up(body)
            return
        body.timed_out = True
        body.task.cancel()
        body.timer = self._loop.call_later(CANCEL_GRACE_S, self._give_up, body)

    def _give_up(self, body: Body) -> None:
        """A body that cannot be stopped: the coordinator will replace this process."""
        if not body.answered and body.number in self._bodies:
            self._send_failure(wire.TIMED_OUT, body, self._timeout_of(body))
            body.answered = True


def find_step(reference: str, name: str) -> Definition:
    """The step registered under `name`, after importing the module that should register it.

    Raises:
        InvalidDefinition: There is no such module here, or it gives no such step.
    """
    module_name, _, qualname = reference.partition(":")
    try:
        module: Any = (
            sys.modules["__main__"]
            if module_name == "__main__"
            else importlib.import_module(module_name)
        )
    except ModuleNotFoundError as error:
        raise InvalidDefinition(
            f"a pool process cannot import {module_name!r} ({error}): install the module or add "
            "its folder to PYTHONPATH, or declare the step with where='coordinator'"
        ) from error
    try:
        return registry.step(name)
    except LookupError:
        pass
    target = module
    for part in qualname.split("."):
        target = getattr(target, part, None)
    if isinstance(target, StepFunction):
        return target.definition
    raise InvalidDefinition(
        f"a pool process imported {module_name!r} and found no step {name!r} in it: register it "
        "when the module is imported, or declare it with where='coordinator'"
    )


def main(
    channel: socket.socket, cells: int, make_context: MakeContext, modules: tuple[str, ...]
) -> None:
    """Run a pool process until its coordinator goes away.

    Args:
        channel: This end of the socket pair.
        cells: Descriptor of the shared memory for marks.
        make_context: Makes the Context for a body that asks for one.
        modules: Imported at the start, so that the first step does not wait for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    _die_with_parent()
    marks = Marks(map_cells(cells))
    for module in modules:
        with suppress(Exception):  # the step that needs it will say so
            importlib.import_module(module)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        install_factory(loop, lambda coroutine: _marked(marks, coroutine))
        channel.setblocking(False)
        _, process = await loop.connect_accepted_socket(
            lambda: PoolProcess(marks, make_context), channel
        )
        await process.ended

    # What was imported stays; bodies make few cycles, and a full collection would look at it all.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    uvloop.run(serve())


def _die_with_parent() -> None:
    """Even a process whose loop is blocked ends when its coordinator is killed (Linux).

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _marked(marks: Marks, coroutine: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
    """Tasks that a body makes are marked as its own."""
    body = current_body()
    return coroutine if body is None else marks.on_loop(coroutine, body.number)


def current_body() -> Body | None:
    found = current.get(None)
    return found if isinstance(found, Body) else None


def refuse_import() -> None:
    """End a pool process that is importing the main script and finds it starting kagzi there.

    The coordinator sees the exit code and raises `MissingMainGuard`.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        os._exit(NO_GUARD)
