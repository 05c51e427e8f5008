"""Single steps and groups of a live run: strategies, decisions, results.

Work is told of its steps' answers before they are durable, says which of them are written, and
hands its outcome to its callers once they are. What depends on the order of completion is decided
when the answer comes and written together with the row that decided it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from hashlib import blake2b
from typing import Any, Protocol
from uuid import UUID

from kagzi._core import Gate, Slots, Step, hash_input
from kagzi.errors import GroupTimeout, NonDeterminism, StepFailed
from kagzi.failures import read_failure
from kagzi.host import GroupOutcome, GroupRequest, StepFuture, StepRequest
from kagzi.model import ErrorStrategy, GroupKind
from kagzi.registry import CallOptions, Definition
from kagzi.scope import Scope
from kagzi.store.checkpoints import LARGE_BYTES, CheckpointWriter
from kagzi.store.rows import GroupRow, Mark, StoredStep, at_us
from kagzi.store.store import StoredGroup

WINNER = "winner"
FAILURE = "failure"
TIMEOUT = "timeout"

Settle = Callable[[Any], Any]


class Home(Protocol):
    """What work needs of the run that it belongs to."""

    run_id: UUID
    run_key: bytes
    worker_key: bytes
    loop: asyncio.AbstractEventLoop
    writer: CheckpointWriter
    number: int
    recorded_steps: dict[str, StoredStep]
    recorded_groups: dict[str, StoredGroup]

    def next_number(self) -> int:
        """Number of the next event of the run: a call, or a completion."""

    def submit(self, steps: list[Step]) -> None:
        """Let steps begin."""

    def withdraw(self, steps: Iterable[Step]) -> None:
        """Stop steps whose results nobody waits for any more."""

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None:
        """The permits that a function's `limit` shares in this worker."""

    def set_timer(self, delay_s: float, callback: Callable[[], None]) -> Any:
        """Call back later; the handle has `cancel()`."""

    def hand_over(self, work: Work, deliver: Callable[[], None]) -> None:
        """Deliver an outcome, when the code that waits for it has its permits again."""

    def work_ended(self, work: Work) -> None:
        """Its outcome was handed over, or nobody wants it."""

    def remember(self, steps: list[Step]) -> None:
        """Steps inside another step's body are durable: its next attempt finds them recorded."""

    def doom(self, error: BaseException) -> None:
        """The run cannot go on: end it as failed with this error."""


class Work:
    """A step or group that someone waits for. Joined by callers, each with a future of its own.

    Attributes:
        closed: Its outcome is settled, or unwanted; further answers are dropped.
        ended: It was handed over, or withdrawn.
        withdrawn: Nobody wanted it any more.
        waiting: The body around it has given up its permits until it is handed over.
    """

    def __init__(self, home: Home, scope: Scope, path: str) -> None:
        self.home = home
        self.scope = scope
        self.path = path
        self.closed = False
        self.ended = False
        self.withdrawn = False
        self.waiting = False
        self.outcome: tuple[Any, BaseException | None] | None = None
        self.call_number = home.next_number()
        self.callers: list[tuple[StepFuture[Any], Settle]] = []

    def join(self, settle: Settle) -> StepFuture[Any]:
        """A future for one more caller."""
        future: StepFuture[Any] = StepFuture(self.path, self.home.loop)
        self.callers.append((future, settle))
        # The plain class's method: ours would count this as a caller's own listening.
        asyncio.Future.add_done_callback(future, self._caller_done)
        if self.outcome is not None:
            self._deliver(*self.outcome)
        return future

    def detach(self) -> None:
        """Its callers are gone, but will be back: it goes on without them."""
        self.callers = []
        self.waiting = False

    @property
    def awaited(self) -> bool:
        return any(future.awaited for future, _ in self.callers)

    def steps(self) -> Iterable[Step]:
        """Its steps that may still be under way."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Nobody wants it: stop what runs, write nothing more."""
        self.withdrawn = True
        if not self.closed:
            self.closed = True
            self.home.withdraw(self.steps())
        self._end()

    def hand_over(self, outcome: Any = None, error: BaseException | None = None) -> None:
        """Give the durable outcome to every caller."""
        if self.ended:
            return
        self.home.hand_over(self, lambda: self._deliver(outcome, error))

    def _deliver(self, outcome: Any, error: BaseException | None) -> None:
        self.outcome = (outcome, error)
        callers, self.callers = self.callers, []
        for future, settle in callers:
            if future.done():
                continue
            if error is not None:
                future.fail(error)
                continue
            try:
                value = settle(outcome)
            except Exception as failure:
                future.fail(failure)
            else:
                future.settle(value)
        self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self.home.work_ended(self)

    def _caller_done(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled():
            return
        self.callers = [caller for caller in self.callers if caller[0] is not future]
        if not self.callers and not self.ended:
            self.withdraw()

    def _make_step(
        self,
        step_id: str,
        definition: Definition,
        payload: bytes,
        digest: bytes,
        choices: CallOptions | None,
        priority: int,
        gate: Gate | None,
        index: int,
    ) -> Step:
        home = self.home
        step = Step(
            home,
            home.run_key,
            step_id,
            definition,
            definition.name,
            payload,
            digest,
            definition.lane,
            priority,
            gate,
            None,
            self,
            index,
        )
        step.worker_id = home.worker_key
        step.call_number = self.call_number
        step.parent_id = self.scope.base or None
        step.attempt = 1
        step.timeout_us = definition.timeout_us
        if choices is not None:
            step.extra = choices
            if choices.priority is not None:
                step.priority = choices.priority
            if choices.timeout_s is not None:
                step.timeout_us = max(1, int(choices.timeout_s * 1e6))
        if definition.limit is not None or (choices is not None and choices.limit is not None):
            step.function_gate = home.function_gate(definition, choices)
        return step

    def _check_recorded(
        self, step_id: str, stored: StoredStep, definition: Definition, digest: bytes
    ) -> None:
        """Raise `NonDeterminism`, and end the run with it, if the record is of other work."""
        if stored.function == definition.name and stored.input_hash == digest:
            return
        if stored.function != definition.name:
            what = f"was recorded as {stored.function!r}, and the code now asks for {definition.name!r}"
        else:
            what = f"({definition.name!r}) was recorded with another input than the code now gives"
        error = NonDeterminism(
            f"step {step_id!r} {what}; put the code back, or start a new run: "
            "decisions of a workflow may rest only on its own steps' results"
        )
        self.home.doom(error)
        raise error

    # Answers, from the executor.

    def accept(self, steps: list[Step]) -> None:
        """Bodies that returned, in order."""
        raise NotImplementedError

    def accept_failure(self, step: Step) -> None:
        """A step whose last attempt failed; `step.error` says how."""
        raise NotImplementedError

    def refuse(self, step: Step) -> None:
        """A step's row could not be stored; it has become a failed one, and nothing is written."""
        raise NotImplementedError

    def restore(self, step: Step, stored: StoredStep) -> None:
        """A step was stored before: what is stored counts."""
        step.status, step.output, step.error = stored.status, stored.output, stored.error


class Single(Work):
    """One step outside of groups."""

    def __init__(self, home: Home, scope: Scope, request: StepRequest) -> None:
        super().__init__(home, scope, request.id)
        self.definition = request.definition
        self.digest = hash_input(request.definition.name, request.input)
        self.step = self._make_step(
            request.id,
            request.definition,
            request.input,
            self.digest,
            request.choices,
            0,
            None,
            -1,
        )

    def begin(self) -> None:
        stored = self.home.recorded_steps.get(self.path)
        if stored is None:
            self.home.submit([self.step])
            return
        self._check_recorded(self.path, stored, self.definition, self.digest)
        self.closed = True
        self.restore(self.step, stored)
        self.step.attempt = stored.attempts
        self._settle()

    def is_same(self, definition: Definition, payload: bytes) -> bool:
        return definition.name == self.definition.name and payload == self.step.input

    def steps(self) -> Iterable[Step]:
        return (self.step,)

    def accept(self, steps: list[Step]) -> None:
        if self.closed:
            return
        self.closed = True
        step = steps[0]
        step.completed_number = self.home.next_number()
        output = step.output
        if output is not None and len(output) > LARGE_BYTES:
            self.home.writer.put_large(step, self._settle)
        else:
            self.home.writer.put_steps(steps)
            self.home.writer.after_commit(self._settle)

    def accept_failure(self, step: Step) -> None:
        self.accept([step])

    def refuse(self, step: Step) -> None:
        pass  # `_settle` looks at the step's status

    def _settle(self) -> None:
        step = self.step
        if self.scope.base:
            self.home.remember([step])
        if step.status == "completed":
            self.hand_over(step.output)
            return
        assert step.error is not None, "a failed step says why"
        self.home.writer.put_mark(Mark(self.home.run_id, step.id, self.home.number, False))
        self.hand_over(error=read_failure(step.error, step.id, step.attempt))


class Group(Work):
    """Steps started together and joined together."""

    def __init__(self, home: Home, scope: Scope, request: GroupRequest) -> None:
        super().__init__(home, scope, request.path)
        self.request = request
        self.slots = Slots(len(request.ids))
        self.cached = 0
        self.decision: str | None = None
        self.decided_index: int | None = None
        self.row: GroupRow | None = None
        self.started_us = time.time_ns() // 1000
        self.group_id = blake2b(
            home.run_key + request.path.encode(), digest_size=16, usedforsecurity=False
        ).digest()
        self._steps: list[Step] = []
        self._timer: Any = None
        self.stream: Stream | None = None

    def begin(self) -> None:
        """Recall what is recorded; start the rest, unless a decision is recorded."""
        request = self.request
        recorded = self.home.recorded_groups.get(self.path)
        if recorded is not None:
            self._check_shape(recorded)
        first_us = self._recall()
        if recorded is not None and recorded.decision is not None:
            self._close_from(recorded)
        elif self.slots.remaining == 0 or self._decided_by_record():
            self.closed = True
            if recorded is None:
                self._close_row()
                self.home.writer.after_commit(self._settle)
            else:
                self._settle()
        elif self.stream is None:
            self._submit()
        if request.timeout_s is not None and not self.closed:
            passed_s = max(0, self.started_us - (first_us or self.started_us)) / 1e6
            self._timer = self.home.set_timer(
                max(0.0, request.timeout_s - passed_s), self._time_out
            )

    def steps(self) -> Iterable[Step]:
        settled = self.slots.settled
        return [step for step in self._steps if not settled(step.index)]

    # --- recall -----------------------------------------------------------------------------

    def _check_shape(self, recorded: StoredGroup) -> None:
        request = self.request
        if recorded.kind != request.kind or recorded.size != len(request.ids):
            error = NonDeterminism(
                f"group {self.path!r} was recorded as {recorded.kind} of {recorded.size} steps, "
                f"and the code now asks for {request.kind} of {len(request.ids)}"
            )
            self.home.doom(error)
            raise error

    def _recall(self) -> int | None:
        """Fill the slots of recorded steps, make steps of the rest; when the first one began."""
        request, home, slots = self.request, self.home, self.slots
        recorded = home.recorded_steps
        gate = Gate(request.limit) if request.limit is not None else None
        group_id, priority = self.group_id, request.priority
        first_us: int | None = None
        choices = request.choices
        done: list[tuple[int, int]] = []
        for index, (step_id, definition, payload) in enumerate(
            zip(request.ids, request.definitions, request.inputs, strict=True)
        ):
            digest = hash_input(definition.name, payload)
            stored = recorded.get(step_id) if recorded else None
            if stored is None:
                options = None if choices is None else choices[index]
                step = self._make_step(
                    step_id, definition, payload, digest, options, priority, gate, index
                )
                step.group_id = group_id
                self._steps.append(step)
                continue
            self._check_recorded(step_id, stored, definition, digest)
            self.cached += 1
            if first_us is None or stored.started_us < first_us:
                first_us = stored.started_us
            done.append((stored.completed_number, index))
            if stored.status == "completed":
                slots.fill(index, stored.output)
            else:
                assert stored.error is not None, "a failed step says why"
                slots.fail(index, read_failure(stored.error, step_id, stored.attempts))
        self._recorded_order = [index for _, index in sorted(done)]
        return first_us

    def _decided_by_record(self) -> bool:
        """Whether what is recorded decides, though no decision is: its row came later and was lost."""
        failures = self.slots.failures
        if self.request.kind is GroupKind.RACE:
            for index in self._recorded_order:
                if index not in failures:
                    self.decision, self.decided_index = WINNER, index
                    return True
        elif self.request.strategy is ErrorStrategy.FAIL_FAST and failures:
            index = next(i for i in self._recorded_order if i in failures)
            self.decision, self.decided_index = FAILURE, index
            return True
        return False

    def _close_from(self, recorded: StoredGroup) -> None:
        self.closed = True
        self.decision, self.decided_index = recorded.decision, recorded.decided_index
        self._settle()

    def _submit(self) -> None:
        if self._steps:
            self.home.submit(list(self._steps))

    # --- answers ----------------------------------------------------------------------------

    def accept(self, steps: list[Step]) -> None:
        if self.closed:
            return
        if self.request.kind is GroupKind.RACE:
            steps = steps[:1]
            self.decision, self.decided_index = WINNER, steps[0].index
        home = self.home
        small = steps
        number = home.number
        for step in steps:
            number += 1
            step.completed_number = number
            output = step.output
            if output is not None and len(output) > LARGE_BYTES:
                small = [s for s in small if s is not step]
                home.writer.put_large(step, lambda step=step: self._count([step]))  # type: ignore[misc]
        home.number = number
        if small:
            home.writer.put_steps(small)
            self._count(small)
        elif self.request.kind is GroupKind.RACE:
            home.withdraw([step for step in self.steps() if step is not steps[0]])

    def _count(self, steps: list[Step]) -> None:
        """Answers whose rows are on their way, ahead of anything put from here on."""
        if self.closed:
            return
        self.slots.fill_steps(steps)
        if self.scope.base:
            self.home.writer.after_commit(lambda: self.home.remember(steps))
        if self.stream is not None:
            self.home.writer.after_commit(lambda: self._feed(steps))
        if self.decision is not None or self.slots.remaining == 0:
            self._close()

    def accept_failure(self, step: Step) -> None:
        if self.closed:
            return
        assert step.error is not None, "a failed step says why"
        step.completed_number = self.home.next_number()
        self.home.writer.put_steps([step])
        self.slots.fail(step.index, read_failure(step.error, step.id, step.attempt))
        self.slots.add_time(step.started_us, step.completed_us)
        if self.scope.base:
            self.home.writer.after_commit(lambda: self.home.remember([step]))
        if self.stream is not None:
            self.home.writer.after_commit(lambda: self._feed([step]))
        if (
            self.request.strategy is ErrorStrategy.FAIL_FAST
            and self.request.kind is not GroupKind.RACE
        ):
            self.decision, self.decided_index = FAILURE, step.index
            self._close()
        elif self.slots.remaining == 0:
            self._close()

    def refuse(self, step: Step) -> None:
        """Undo the step's success; the group's row, if it is on its way, is put right in place."""
        assert step.error is not None, "a refused step says why"
        failure = read_failure(step.error, step.id, step.attempt)
        slots = self._with_failure(step.index, failure)
        self.slots = slots
        if (
            self.request.strategy is ErrorStrategy.FAIL_FAST
            and self.request.kind is not GroupKind.RACE
            and self.decision is None
        ):
            self.decision, self.decided_index = FAILURE, step.index
            if not self.closed:
                self._close()
        elif self.decision == WINNER and self.decided_index == step.index:
            self.decision, self.decided_index = FAILURE, step.index
        if self.row is not None:
            self._fill_row(self.row)

    def _with_failure(self, index: int, failure: StepFailed) -> Slots:
        slots = Slots(len(self.slots))
        failures = {**self.slots.failures, index: failure}
        for place, value in enumerate(self.slots.values):
            if place in failures:
                slots.fail(place, failures[place])
            elif self.slots.settled(place):
                slots.fill(place, value)
        return slots

    def restore(self, step: Step, stored: StoredStep) -> None:
        super().restore(step, stored)
        if stored.status == "completed":
            self.slots.values[step.index] = stored.output

    def _time_out(self) -> None:
        if not self.closed:
            self.decision = TIMEOUT
            self._close()

    # --- the end ----------------------------------------------------------------------------

    def _close(self) -> None:
        """Nothing more is accepted: stop the rest, write the group's row, settle when durable."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self.slots.remaining:
            self.home.withdraw(self.steps())
        self._close_row()
        self.home.writer.after_commit(self._settle)

    def _close_row(self) -> None:
        request, scope = self.request, self.scope
        self.row = GroupRow(
            run_id=self.home.run_id,
            path=self.path,
            id=UUID(bytes=self.group_id),
            kind=request.kind.value,
            size=len(request.ids),
            strategy=request.strategy.value,
            group_limit=request.limit,
            parent_step_id=scope.base or None,
            decision=None,
            decided_index=None,
            cached=self.cached,
            succeeded=0,
            failed=0,
            started_at=at_us(self.started_us),
            completed_at=at_us(self.started_us),
            wall_s=0.0,
            steps_s=0.0,
            longest_s=0.0,
            call_number=self.call_number,
            completed_number=self.home.next_number(),
        )
        self._fill_row(self.row)
        self.home.writer.put_group(self.row)

    def _fill_row(self, row: GroupRow) -> None:
        slots = self.slots
        now_us = time.time_ns() // 1000
        row.decision, row.decided_index = self.decision, self.decided_index
        row.succeeded, row.failed = slots.succeeded, slots.failed
        row.completed_at = at_us(now_us)
        row.wall_s = (now_us - self.started_us) / 1e6
        row.steps_s = slots.busy_us / 1e6
        row.longest_s = slots.longest_us / 1e6

    def _settle(self) -> None:
        """Hand over the outcome that is durable now."""
        if self.stream is not None:
            self.stream.end()
            self._end()
            return
        slots, request = self.slots, self.request
        failures = slots.failures
        if self.decision == TIMEOUT:
            assert request.timeout_s is not None or self.home.recorded_groups, "a recorded decision"
            self._mark_visible([], of_group=True)
            self.hand_over(error=GroupTimeout(self.path, request.timeout_s or 0.0))
        elif self.decision == FAILURE:
            assert self.decided_index is not None, "a failure has an index"
            self._mark_visible([self.decided_index])
            self.hand_over(error=failures[self.decided_index])
        else:
            self._mark_visible(failures)
            self.hand_over(GroupOutcome(slots.values, failures, self.decided_index))

    def _mark_visible(self, indexes: Iterable[int], of_group: bool = False) -> None:
        home = self.home
        for index in indexes:
            if self.request.ids[index] not in home.recorded_steps:
                home.writer.put_mark(Mark(home.run_id, self.request.ids[index], home.number, False))
        if of_group and self.path not in home.recorded_groups:
            home.writer.put_mark(Mark(home.run_id, self.path, home.number, True))

    # --- in order of completion -------------------------------------------------------------

    def _feed(self, steps: list[Step]) -> None:
        assert self.stream is not None, "only a streamed group is fed"
        for step in steps:
            failure = self.slots.failures.get(step.index)
            self.stream.put(step.index, step.output if failure is None else failure)

    def results(self) -> AsyncGenerator[tuple[int, Any], None]:
        """(index, output or failure), the recorded ones first, in the order they were recorded in.

        What is not recorded starts only when the recorded ones are used up, so a replay of a loop
        that was left early starts nothing.
        """
        self.stream = Stream(self.home.loop)
        return self._results(self.stream)

    async def _results(self, stream: Stream) -> AsyncGenerator[tuple[int, Any], None]:
        try:
            failures = self.slots.failures
            for index in self._recorded_order:
                yield index, failures.get(index) or self.slots.values[index]
            if not self.closed:
                self._submit()
            async for item in stream:
                yield item
        finally:
            self.withdraw()


class Stream:
    """A queue from the writer to one reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

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
