"""Durable time: pauses, and blocks with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

import orjson

from kagzi._core import Step, StoredStep, hash_input
from kagzi.engine.clock import StoreClock
from kagzi.engine.work import Home, Work, changed
from kagzi.errors import InvalidInput
from kagzi.scope import Scope
from kagzi.store.recorded import DEADLINE, StoredGroup

SLEEP = "kagzi.sleep"
TIMEOUT_END = "kagzi.timeout.end"
FARTHEST = datetime(9000, 1, 1, tzinfo=UTC)


class TimeRow:
    """A checkpoint that no body makes: a moment, or a decision about one."""

    def __init__(self, home: Home, scope: Scope, path: str, function: str, asked: Any) -> None:
        self._home = home
        self._function = function
        self.digest = hash_input(function, orjson.dumps(asked))
        self.step = Step(home, home.run_key, path, None, function, orjson.dumps(asked), self.digest)
        self.step.worker_id = home.worker_key
        self.step.parent_id = scope.base or None
        self.step.call_number = home.number
        self.step.attempt = 1

    def recorded(self) -> StoredStep | None:
        """What is recorded under this id. Raises `NonDeterminism` if it is something else."""
        stored = self._home.recorded_steps.get(self.step.id)
        if stored is None:
            return None
        if stored.function != self._function or stored.input_hash != self.digest:
            asked = repr(self._function)
            if stored.function == self._function:
                asked = "the same with another"
            error = changed(
                f"step {self.step.id!r}", self.step.id, f"{stored.function!r} with one input", asked
            )
            self._home.doom(error)
            raise error
        return stored

    def write(self, now: datetime, value: Any) -> None:
        """Put it into the writer's stream."""
        self.write_bytes(now, orjson.dumps(value))

    def write_bytes(self, now: datetime, output: bytes) -> None:
        """The same of a value that is encoded already."""
        step = self.step
        step.status, step.output = "completed", output
        step.started_us = step.completed_us = int(now.timestamp() * 1e6)
        step.completed_number = self._home.next_number()
        self._home.writer.put_steps([step])


class Sleep(Work):
    """A pause whose end is a checkpoint.

    Attributes:
        durable: Its end is committed, so the run may be parked.
    """

    def __init__(
        self,
        home: Home,
        scope: Scope,
        path: str,
        seconds: float | None,
        until: datetime | None,
        clock: StoreClock,
    ) -> None:
        super().__init__(home, scope, path)
        asked = until.astimezone(UTC).isoformat() if until is not None else seconds
        self._row = TimeRow(home, scope, path, SLEEP, asked)
        self._seconds = seconds
        self._until = until
        self._clock = clock
        self._timer: Any = None
        self._deadlines = list(scope.deadlines)
        self.durable = False
        self.wake_at: datetime | None = None

    def begin(self) -> None:
        stored = self._row.recorded()
        if stored is not None:
            assert stored.output is not None, "a pause records its end"
            self.wake_at = datetime.fromisoformat(orjson.loads(stored.output))
            self._wait()
            return
        now = self._clock.now()
        self.wake_at = self._until if self._until is not None else later(now, self._seconds or 0.0)
        self._row.write(now, self.wake_at.isoformat())
        self.home.writer.after_commit(self._wait)

    def steps(self) -> Iterable[Step]:
        return ()

    def withdraw(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().withdraw()

    def _wait(self) -> None:
        if self.ended:
            return
        assert self.wake_at is not None, "set when it began"
        self.durable = True
        block = first_to_end(self._deadlines, self.wake_at)
        if block is not None:
            block.put_off(self._wait)
            return
        left_s = self._clock.seconds_until(self.wake_at)
        if left_s <= 0:
            self.closed = True
            self.hand_over()
        else:
            self._timer = self.home.set_timer(left_s, self._wait, self.wake_at)


def later(now: datetime, seconds: float) -> datetime:
    """`now` and so long. Raises `InvalidInput` beyond what can be stored."""
    try:
        at = now + timedelta(seconds=seconds)
    except OverflowError:
        at = FARTHEST
    if at >= FARTHEST:
        raise InvalidInput(f"a sleep of {seconds:g} s ends beyond the year 9000")
    return at


def first_to_end(blocks: list[Deadline], at: datetime) -> Deadline | None:
    """The block whose time is up first, if that is before a wait inside it can end."""
    first = min((b for b in blocks if b.inside), key=lambda b: b.moment, default=None)
    return first if first is not None and first.moment <= at else None


class Deadline:
    """`async with ctx.timeout(s)`: ends the block's waits when its time is up.

    Whether it was is a checkpoint, committed before anyone notices. On replay what was recorded
    before that moment is given as it was, and the next wait is where the block ends; what was
    recorded later, by a task that outlives the block, is given when the block has ended.

    Attributes:
        inside: The block has begun and not ended.
        moment: When its time is up.
        expired_number: On replay: when, in the run's own count, its time was up; else None.
    """

    def __init__(
        self, home: Home, scope: Scope, path: str, seconds: float, clock: StoreClock
    ) -> None:
        self._home = home
        self._scope = scope
        self._path = path
        self._seconds = seconds
        self._clock = clock
        self._start = TimeRow(home, scope, path, DEADLINE, seconds)
        self._end = TimeRow(home, scope, f"{path}/end", TIMEOUT_END, seconds)
        self._timer: Any = None
        self._task: asyncio.Task[Any] | None = None
        self._committed: asyncio.Future[None] | None = None
        self.inside = False
        self.moment = FARTHEST
        self._after: list[Callable[[], None]] = []
        self._cancelled = False
        self._decided = False
        self._known = False
        self.expired_number: int | None = None

    async def __aenter__(self) -> Deadline:
        self._task = asyncio.current_task()
        ended = self._end.recorded()
        started = self._start.recorded()
        if started is not None:
            assert started.output is not None, "a deadline is recorded with its moment"
            self.moment = datetime.fromisoformat(orjson.loads(started.output))
        if ended is not None:
            self._known = True
            assert ended.output is not None, "a decision says which"
            if orjson.loads(ended.output):
                self._decided = True
                self.expired_number = ended.completed_number
        elif started is None:
            now = self._clock.now()
            self.moment = later(now, self._seconds)
            self._start.write(now, self.moment.isoformat())
        self.inside = True
        if not self._known:
            self._wait()
        self._scope.deadlines.append(self)
        return self

    def _wait(self) -> None:
        """Set the timer; a block around this one that ends no later goes first."""
        if not self.inside:
            return
        around = first_to_end([b for b in self._scope.deadlines if b is not self], self.moment)
        if around is not None:
            around.after(self._wait)
            return
        left_s = max(0.0, self._clock.seconds_until(self.moment))
        self._timer = self._home.set_timer(left_s, self._expire, self.moment)

    def reached(self, recorded: StoredStep | StoredGroup | None) -> bool:
        """On replay: whether the block had ended before this was recorded."""
        return (
            self.inside
            and self.expired_number is not None
            and (recorded is None or recorded.completed_number > self.expired_number)
        )

    def after(self, action: Callable[[], None]) -> None:
        """Call back when the block has ended."""
        self._after.append(action)

    def put_off(self, action: Callable[[], None]) -> None:
        """Call back when the block has ended; on replay, this is the wait that it ends in."""
        self.after(action)
        if self.expired_number is not None:
            self._home.loop.call_soon(self._interrupt)

    def _interrupt(self) -> None:
        """Cancel the task of the block, once."""
        if self.inside and not self._cancelled and self._task is not None:
            self._cancelled = True
            self._task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self.inside = False
        if self._timer is not None:
            self._timer.cancel()
        self._scope.deadlines.remove(self)
        for action in self._after:
            self._home.loop.call_soon(action)
        if self._committed is not None and not self._committed.done():
            await asyncio.shield(self._committed)
        if not self._decided:
            if not self._known and kind is not asyncio.CancelledError:
                self._end.write(self._clock.now(), False)
            return None
        if self._cancelled and self._task is not None:
            self._task.uncancel()
        if kind is None or (kind is asyncio.CancelledError and self._cancelled):
            raise TimeoutError(
                f"the block of {self._path!r} did not end within {self._seconds:g} s"
            ) from error
        return None

    def _expire(self) -> None:
        self._decided = True
        self._committed = self._home.loop.create_future()
        self._end.write(self._clock.now(), True)
        self._home.writer.after_commit(self._expired)

    def _expired(self) -> None:
        committed = self._committed
        assert committed is not None, "made when it expired"
        if not committed.done():
            committed.set_result(None)
        # What became durable before goes first: those who wait for it have a few turns.
        self._hop(4)

    def _hop(self, turns: int) -> None:
        if turns:
            self._home.loop.call_soon(self._hop, turns - 1)
        else:
            self._interrupt()
