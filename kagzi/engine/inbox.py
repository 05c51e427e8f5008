"""Events that were sent to a run, and the waits for them.

Events are rows that nobody changes. Which wait took which is a checkpoint, so a replay gives each
wait what it had, and what no checkpoint names is still to be had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any

import orjson

from kagzi import faultpoints
from kagzi._core import Step, StoredStep
from kagzi.engine.clock import StoreClock
from kagzi.engine.sleeping import TimeRow, later
from kagzi.engine.work import Home, Work
from kagzi.errors import EventTimeout
from kagzi.scope import Scope

EVENT = "kagzi.event"
EVENT_UNTIL = "kagzi.event.until"
UNREAD_S = 0.05
NO_EVENT = b"[null]"

Load = Callable[[], Awaitable[tuple[int, list[tuple[int, str, bytes]]]]]


class Inbox:
    """What one run has been sent and has not used yet, by topic, in the order it was sent in.

    Args:
        load: Reads the run's news count and all its events.
        recorded: The run's checkpoints, which name the events that are used up.
        ask: Called when a wait needs events that were not read yet.
    """

    def __init__(
        self, load: Load, recorded: dict[str, StoredStep], ask: Callable[[], None]
    ) -> None:
        self._load = load
        self._ask = ask
        self._recorded = recorded
        self._known: set[int] | None = None
        self._events: dict[str, deque[tuple[int, bytes]]] = {}
        self._waits: dict[str, deque[EventWait]] = {}

    @property
    def in_use(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waits)

    @property
    def is_read(self) -> bool:
        """Whether what was sent before the run was claimed is known: no news tells of that."""
        return self._known is not None

    def enter(self, wait: EventWait) -> None:
        self._waits.setdefault(wait.topic, deque()).append(wait)
        if self._known is None:
            self._ask()
        self._match(wait.topic)

    def leave(self, wait: EventWait) -> None:
        waits = self._waits.get(wait.topic)
        if waits is not None and wait in waits:
            waits.remove(wait)
            if not waits:
                del self._waits[wait.topic]

    async def look(self) -> int:
        """Take in what was sent meanwhile; how much news that makes."""
        news, events = await self._load()
        if self._known is None:
            self._known = {
                number
                for stored in self._recorded.values()
                if stored.function == EVENT and stored.output is not None
                for number in [taken_event(stored.output)[0]]
                if number is not None
            }
        for number, topic, value in events:
            if number not in self._known:
                self._known.add(number)
                self._events.setdefault(topic, deque()).append((number, value))
        for topic in list(self._waits):
            self._match(topic)
        return news

    def _match(self, topic: str) -> None:
        waits, events = self._waits.get(topic), self._events.get(topic)
        while waits and events:
            waits.popleft().take(*events.popleft())
        if waits is not None and not waits:
            del self._waits[topic]


class EventWait(Work):
    """A wait for one event of a topic."""

    def __init__(
        self,
        home: Home,
        scope: Scope,
        path: str,
        topic: str,
        seconds: float | None,
        clock: StoreClock,
        inbox: Inbox,
    ) -> None:
        super().__init__(home, scope, path)
        self.topic = topic
        self._entered = False
        self._row = TimeRow(home, scope, path, EVENT, [topic, seconds])
        self._until = TimeRow(home, scope, f"{path}/until", EVENT_UNTIL, seconds)
        self._seconds = seconds
        self._clock = clock
        self._inbox = inbox
        self._timer: Any = None
        self._moment: datetime | None = None

    @property
    def durable(self) -> bool:
        """What it needs to be taken up again is committed, and it has looked: parking is safe."""
        return self._entered and self._inbox.is_read

    def begin(self) -> None:
        stored = self._row.recorded()
        if stored is not None:
            assert stored.output is not None, "an event's checkpoint has its value"
            self.closed = True
            self._settle(stored.output)
            return
        if self._seconds is None:
            self._enter()
            return
        until = self._until.recorded()
        if until is not None:
            assert until.output is not None, "a deadline is recorded with its moment"
            self._moment = datetime.fromisoformat(orjson.loads(until.output))
            self._enter()
            return
        now = self._clock.now()
        self._moment = later(now, self._seconds)
        self._until.write(now, self._moment.isoformat())
        self.home.writer.after_commit(self._enter)

    def steps(self) -> Iterable[Step]:
        return ()

    def withdraw(self) -> None:
        self._stop_waiting()
        super().withdraw()

    def take(self, number: int, value: bytes) -> None:
        """This event is the one; handed over when that is durable."""
        if faultpoints.reach is not None:
            faultpoints.reach("event.taken")
        self._close(b"[%d,%s]" % (number, value))

    def _enter(self) -> None:
        if self.ended or self.closed:
            return
        self._entered = True
        if self._moment is not None:
            left_s = max(0.0, self._clock.seconds_until(self._moment))
            self._timer = self.home.set_timer(left_s, self._expire, self._moment)
        self._inbox.enter(self)
        self.home.settle_down()

    def _expire(self) -> None:
        if self.closed:
            return
        if self._inbox.is_read:
            self._close(NO_EVENT)
        else:  # what was sent in time, while nobody held the run, comes first
            self._timer = self.home.set_timer(UNREAD_S, self._expire, self._moment)

    def _close(self, output: bytes) -> None:
        self.closed = True
        self._stop_waiting()
        self._row.write_bytes(self._clock.now(), output)
        self.home.writer.after_commit(lambda: self._settle(output))

    def _stop_waiting(self) -> None:
        self._inbox.leave(self)
        if self._timer is not None:
            self._timer.cancel()

    def _settle(self, output: bytes) -> None:
        number, value = taken_event(output)
        if number is None:
            self.hand_over(
                error=EventTimeout(f"no event {self.topic!r} came within {self._seconds:g} s")
            )
        else:
            self.hand_over(value)


def taken_event(output: bytes) -> tuple[int | None, bytes]:
    """Number and value of the event that a checkpoint names; no number: its time was up."""
    if output == NO_EVENT:
        return None, b""
    number, _, value = output[1:-1].partition(b",")
    return int(number), value
