"""A step's body inside a pool process, and the threads that run sync ones."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from typing import Any, Protocol
from uuid import UUID

from kagzi._core import LANE_CPU, LANE_THREAD
from kagzi.codec.failures import describe_exception
from kagzi.definition import Definition
from kagzi.host import current
from kagzi.model import StepInfo
from kagzi.pool import wire
from kagzi.pool.marks import Marks

Message = tuple[int, int, int, int, bytes, bytes]


class Body:
    """A step's body that was received and has not answered."""

    __slots__ = (
        "answered",
        "attempt",
        "cell",
        "definition",
        "extra",
        "function",
        "head",
        "input",
        "lane",
        "number",
        "started_us",
        "task",
        "timed_out",
        "timeout_us",
        "timer",
    )

    def __init__(self, message: Message, function: int, definition: Definition) -> None:
        _, self.number, _, second, self.head, self.input = message
        self.function = function
        self.definition = definition
        self.attempt = second & 0xFFFF
        self.timeout_us = second >> 16
        self.lane = definition.lane
        self.started_us = 0
        self.cell = 0
        self.answered = False  # the coordinator knows how it ended, or no longer cares
        self.timed_out = False
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.extra: Any = None  # the link of its Context, if it has one

    @property
    def info(self) -> StepInfo:
        return StepInfo(UUID(bytes=self.head[:16]), self.head[16:].decode(), self.attempt)


Failure = tuple[bytes, bytes]  # b"1" if the retry policy wants it again, and the error


class BodyHome(Protocol):
    """Who is told how sync bodies end."""

    marks: Marks

    def arm(self, body: Body) -> None: ...

    def returned(self, body: Body, output: bytes) -> None: ...

    def raised(self, body: Body, failure: Failure) -> None: ...


class Threads:
    """Runs sync bodies: some threads for blocking ones, one for those that compute."""

    def __init__(self, process: BodyHome) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._queues: dict[int, queue.SimpleQueue[Body]] = {
            LANE_THREAD: queue.SimpleQueue(),
            LANE_CPU: queue.SimpleQueue(),
        }
        self._started = {LANE_THREAD: 0, LANE_CPU: 0}
        self._most = {LANE_THREAD: wire.THREADS, LANE_CPU: 1}
        self._lock = threading.Lock()
        self._waiting: set[int] = set()
        self._answers: list[tuple[Body, bytes | Failure]] = []
        self._may_begin = threading.Event()
        self._may_begin.set()

    def hold(self, held: bool) -> None:
        """Let no more bodies begin while `held`."""
        if held:
            self._may_begin.clear()
        else:
            self._may_begin.set()

    def put(self, body: Body) -> None:
        lane = body.lane
        self._waiting.add(body.number)
        self._queues[lane].put(body)
        if self._started[lane] < self._most[lane]:
            self._started[lane] += 1
            threading.Thread(
                target=self._work, args=(lane,), name=f"kagzi-{lane}", daemon=True
            ).start()

    def withdraw(self, body: Body) -> bool:
        """Take a body back that no thread has begun."""
        with self._lock:
            if body.number in self._waiting:
                self._waiting.discard(body.number)
                return True
            return False

    def _work(self, lane: int) -> None:
        bodies = self._queues[lane]
        while True:
            body = bodies.get()
            if not self._may_begin.is_set():
                self._may_begin.wait()
            with self._lock:
                if body.number not in self._waiting:
                    continue
                self._waiting.discard(body.number)
                cell = self._process.marks.begin_thread(body.number)
            body.cell = cell
            body.started_us = time.time_ns() // 1000
            if body.timeout_us:
                self._loop.call_soon_threadsafe(self._process.arm, body)
            context = contextvars.Context()
            answer = context.run(_run_sync, body)
            with self._lock:
                self._answers.append((body, answer))
                first = len(self._answers) == 1
            if first:
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            answers, self._answers = self._answers, []
        for body, answer in answers:
            with self._lock:
                if isinstance(answer, bytes):
                    self._process.returned(body, answer)
                else:
                    self._process.raised(body, answer)


def _run_sync(body: Body) -> bytes | Failure:
    definition = body.definition
    current.set(body)
    try:
        args, kwargs = definition.arguments.decode(body.input)
        return definition.returns.encode(definition.function(*args, **kwargs))
    except BaseException as error:
        return describe_failure(definition, error)


def describe_failure(definition: Definition, error: BaseException) -> Failure:
    """How a body failed. Never raises, but it runs code of the error's: mark that as the step's."""
    try:
        wanted = definition.retry.wants(error)
    except BaseException:
        wanted = False
    return b"1" if wanted else b"0", describe_exception(error)
