"""A step or group that code of a live run waits for, and what it needs of that run.

Work is told of its steps' answers before they are durable, says which of them are written, and
hands its outcome to its callers once they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from kagzi._core import Gate, Step, StoredStep, hash_input
from kagzi.codec.failures import read_failure
from kagzi.definition import CallOptions, Definition
from kagzi.elsewhere import Room
from kagzi.errors import NonDeterminism
from kagzi.host import StepFuture, StepRequest
from kagzi.scope import Scope
from kagzi.store.checkpoints import LARGE_BYTES, CheckpointWriter
from kagzi.store.recorded import StoredGroup
from kagzi.store.rows import GroupRow

Settle = Callable[[Any], Any]


class Home(Protocol):
    """What work needs of the run that it belongs to."""

    run_id: UUID
    run_key: bytes
    worker_key: bytes
    loop: asyncio.AbstractEventLoop
    writer: CheckpointWriter
    room: Room
    number: int
    recorded_steps: dict[str, StoredStep]
    recorded_groups: dict[str, StoredGroup]

    def next_number(self) -> int:
        """Number of the next event of the run: a call, or a completion."""

    def lane_of(self, definition: Definition) -> int:
        """The scheduler's lane for a step: in the pool, or in the worker's own process."""

    def submit(self, steps: list[Step]) -> None:
        """Let steps begin."""

    def withdraw(self, steps: Iterable[Step]) -> None:
        """Stop steps whose results nobody waits for any more."""

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None:
        """The permits that a function's `limit` shares in this worker."""

    def set_timer(
        self, delay_s: float, callback: Callable[[], None], at: datetime | None = None
    ) -> Any:
        """Call back later; `at` is when, by the store's clock. The handle has `cancel()`."""

    def settle_down(self) -> None:
        """Something has begun to wait for what may take long."""

    async def pass_deadlines(self, scope: Scope, recorded: StoredStep | None) -> None:
        """On replay: wait here if a block's time was up before this was recorded."""

    def hand_over(self, work: Work, deliver: Callable[[], None]) -> None:
        """Deliver an outcome, when the code that waits for it has its permits again."""

    def work_ended(self, work: Work) -> None:
        """Its outcome was handed over, or nobody wants it."""

    def remember(self, steps: list[Step]) -> None:
        """Steps inside another step's body are durable: its next attempt finds them recorded."""

    def remember_group(self, row: GroupRow) -> None:
        """The same of a group inside a body."""

    def count_recalled(self, count: int) -> bool:
        """So many more steps were recalled; whether there is time to go on at once."""

    def take_breath(self, settle: Callable[[], None]) -> None:
        """Call back when others had their turn."""

    def recall(self, ids: list[str], deliver: Callable[[list[bytes]], None]) -> None:
        """Call back with recorded results that were left in the store."""

    async def fetch(self, ids: list[str]) -> list[bytes]:
        """Results of steps that are not in memory, in the order of the ids."""

    def mark_visible(self, path: str, of_group: bool = False) -> None:
        """The workflow is about to see this failure; note when, in the run's own count."""

    def doom(self, error: BaseException) -> None:
        """The run cannot go on: end it as failed with this error."""


def changed(what: str, path: str, recorded: str, asked: str) -> NonDeterminism:
    """The error of code that asks for something else than what is recorded."""
    return NonDeterminism(
        f"{what} was recorded as {recorded}, and the code now asks for {asked}. Put the code back "
        "and retry the run. To change code under runs that are under way, ask ctx.patched() there, "
        "or register it as another version=; `kagzi check` names the runs that a change would "
        "break. If the code is the same, something outside of steps decides: a clock, chance, a "
        "file, the order of a set, which task was first",
        path,
        recorded,
        asked,
    )


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
        self.cached = 0  # steps answered without their body
        self.closed = False
        self.ended = False
        self.withdrawn = False
        self.waiting = False
        self.outcome: tuple[Any, BaseException | None] | None = None
        self._held: tuple[Any, BaseException | None] | None = None  # until it is delivered
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
        """Its callers are gone, but will be back: it goes on without them.

        An outcome that waited for the body's permits is settled now. Nobody hands it over any more,
        and who asks for this again finds it recorded.
        """
        self.callers = []
        self.waiting = False
        if self._held is not None:
            self._deliver(*self._held)

    @property
    def awaited(self) -> bool:
        return any(future.awaited for future, _ in self.callers)

    def begin(self) -> None:
        """Recall what is recorded of it, and start the rest."""
        raise NotImplementedError

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
        callers, self.callers = self.callers, []
        for future, _ in callers:
            future.cancel()  # a task that still waits for it ends with it

    def hand_over(self, outcome: Any = None, error: BaseException | None = None) -> None:
        """Give the durable outcome to every caller."""
        if self.ended:
            return
        self._held = (outcome, error)
        self.home.hand_over(self, lambda: self._deliver(outcome, error))

    def _deliver(self, outcome: Any, error: BaseException | None) -> None:
        self.outcome, self._held = (outcome, error), None
        callers, self.callers = self.callers, []
        for future, settle in callers:
            if future.done():
                continue
            if error is not None:
                future.fail(error)
                continue
            try:
                value = settle(self._own(outcome))
            except Exception as failure:
                future.fail(failure)
            else:
                future.settle(value)
        self._end()

    def _settle_recalled(self, count: int, settle: Callable[[], None]) -> None:
        """Settle what is recorded: at once, unless much was. A deadline would not wait for us."""
        if self.home.count_recalled(count) or self.scope.deadlines:
            settle()
        else:
            self.home.take_breath(lambda: None if self.ended else settle())

    def _own(self, outcome: Any) -> Any:
        """The outcome as one caller may have it, to use up."""
        return outcome

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
            home.lane_of(definition),
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
            recorded, asked = repr(stored.function), repr(definition.name)
        else:
            recorded = f"{stored.function!r} with one input"
            asked = "the same with another"
        error = changed(f"step {step_id!r}", step_id, recorded, asked)
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
        if stored.is_elsewhere:
            self.home.recall([self.path], self._recalled)
        else:
            self._settle_recalled(1, self._settle)

    def _recalled(self, outputs: list[bytes]) -> None:
        if not self.ended:
            self.step.output = outputs[0]
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
        self.home.mark_visible(step.id)
        self.hand_over(error=read_failure(step.error, step.id, step.attempt))
