"""One pool process, coordinator's side: frames out, answers in, the end of the stream."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any, Protocol

from kagzi._core import FrameReader, FrameWriter, Place, Scheduler, Step
from kagzi.pool import wire

POOL_ROOM = (wire.ASYNC_ROOM, wire.THREADS, 1)
ALONE_ROOM = (0, 0, 0, 0, 0, 0, 1)

Message = tuple[int, int, int, int, bytes, bytes]


class Feeder(Protocol):
    """What the pool needs of the executor that its processes are links of."""

    scheduler: Scheduler

    def add_link(self, link: Any) -> None: ...
    def remove_link(self, link: Any) -> None: ...
    def submit(self, steps: Any) -> None: ...
    def finish(self, step: Step) -> None: ...
    def finished(self, steps: list[Step]) -> None: ...
    def ending(self, step: Step) -> asyncio.Future[None]: ...


class Answers(Protocol):
    """Who is told how bodies ended."""

    def completed(self, steps: list[Step]) -> None:
        """Bodies that returned; the scheduler has finished them."""

    def failed(
        self,
        step: Step,
        error: bytes,
        wanted: bool,
        started_us: int,
        completed_us: int,
        process_id: int,
    ) -> None:
        """A body that raised, ran out of time, or took its process down."""

    def cut_off(self, steps: list[Step]) -> list[Step]:
        """Bodies that ended with their process; those that are still wanted, to be begun again."""

    def again(self, steps: list[Step]) -> None:
        """Bodies that were cut off by a neighbour's end; the attempt does not count."""

    def inner(self, link: PoolLink, step: Step, message: Message) -> None:
        """A body asks for inner work."""


class Keeper(Protocol):
    """What a link needs of its pool."""

    answers: Answers

    def replace(self, link: PoolLink, reason: str) -> None:
        """A process that cannot go on for long."""

    def lost(self, link: PoolLink) -> None:
        """A process that is gone."""

    def suspect_waits(self, link: PoolLink) -> None:
        """A suspect, in a process of its own, waits for inner work."""


class PoolLink(asyncio.Protocol):
    """One pool process."""

    def __init__(self, pool: Keeper, executor: Feeder, alone: bool) -> None:
        self._pool = pool
        self._executor = executor
        self.alone = alone
        self._room = ALONE_ROOM if alone else POOL_ROOM
        self.place = Place(self._room, self)
        self._reader = FrameReader()
        self._out = FrameWriter()
        self._functions: dict[str, int] = {}
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[int] = self._loop.create_future()
        self.process: Any = None
        self.process_id = 0
        self.steps: dict[int, Step] = {}
        self.joined = False  # it is given steps
        self.leaving = False
        self.seen_running: dict[int, float] = {}  # steps with a timeout: since when, at each look
        self.cells: memoryview | None = None
        self._flushing = False

    # --- out --------------------------------------------------------------------------------

    def start(self, steps: list[Step]) -> None:
        functions = self._functions
        out = self._out
        mine = self.steps
        for step in steps:
            number = functions.get(step.function)
            if number is None:
                number = functions[step.function] = len(functions) + 1
                reference = step.definition.reference
                out.add(
                    wire.DEFINE, 0, number, 0, reference.encode(), step.definition.name.encode()
                )
            out.add_step(wire.RUN, step, number)
            mine[step.number] = step
        self.flush()

    def cancel(self, step: Step) -> None:
        self.send(wire.CANCEL, step.number)

    def suspended(self, step: Step) -> None:
        if self.alone:
            self._pool.suspect_waits(self)

    def send(
        self,
        kind: int,
        number: int = 0,
        first: int = 0,
        second: int = 0,
        head: bytes = b"",
        body: bytes = b"",
    ) -> None:
        self._out.add(kind, number, first, second, head, body)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._transport is not None and len(self._out):
            self._transport.write(self._out.take())

    # --- in ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.flush()

    def data_received(self, data: bytes) -> None:
        messages = self._reader.feed(data)
        done, rest = self._executor.scheduler.absorb(messages, wire.DONE, self.process_id)
        if done:
            mine = self.steps
            for step in done:
                mine.pop(step.number, None)
            self._executor.finished(done)
            self._pool.answers.completed(done)
        for message in rest:
            self._receive(message)

    def hold(self, held: bool) -> None:
        """Leave what the process sends in the socket, and what does not fit there with it."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.is_reading() is not held:
            return
        if held:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _receive(self, message: Message) -> None:
        kind, number, first, second, head, body = message
        if kind == wire.READY:
            self.process_id = number
            if not self.ready.done():
                self.ready.set_result(number)
            return
        if kind == wire.FREED:
            self._change_room(first, 1)
            return
        step = self.steps.get(number)
        if step is None:
            return
        if kind == wire.INNER or kind == wire.INNER_CANCEL:
            self._pool.answers.inner(self, step, message)
            return
        del self.steps[number]
        self.finish(step)
        if kind == wire.FAILED or kind == wire.TIMED_OUT:
            self._pool.answers.failed(
                step, body, head == b"1", first, first + second, self.process_id
            )
            if kind == wire.TIMED_OUT:
                self._pool.replace(self, "a step ran past its timeout and cannot be stopped")
        elif kind == wire.ABANDONED:
            self._change_room(first, -1)
            if self.place.room(first) == 0 or self.alone:
                self._pool.replace(self, "abandoned threads fill it")

    def finish(self, step: Step) -> None:
        """A body has ended here: its permits are free, and its next attempt runs with others."""
        self._executor.finish(step)
        if self.alone:
            step.lane = step.definition.lane

    def _change_room(self, lane: int, change: int) -> None:
        room = min(self._room[lane], max(0, self.place.room(lane) + change))
        self.place.set_room(lane, room)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)

    # --- the end ----------------------------------------------------------------------------

    def kill(self) -> None:
        process_id = self.process_id or (self.process.pid if self.process is not None else 0)
        if process_id:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.ready.done():
            self.ready.cancel()
