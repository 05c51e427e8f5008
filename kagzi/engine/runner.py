"""Drives one run to its next durable state: finished, parked, or given back.

The live run is the host of its workflow's Context. It keeps what is recorded, gives work its place,
and lets go of the run by a row in the writer's ordered stream, behind its last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol
from uuid import UUID

from kagzi import faultpoints
from kagzi._core import LANE_OWN_ASYNC, Gate, Step, StoredStep, hash_input
from kagzi.codec.failures import describe_exception
from kagzi.context import Context
from kagzi.definition import CallOptions, ChildDefinition, Definition, Workflow
from kagzi.elsewhere import Elsewhere, Room
from kagzi.engine.attempts import number_attempt
from kagzi.engine.bodies import Bodies
from kagzi.engine.children import Children, patiently
from kagzi.engine.clock import StoreClock
from kagzi.engine.executor import Executor
from kagzi.engine.group import Group
from kagzi.engine.inbox import EventWait, Inbox
from kagzi.engine.parking import Parking
from kagzi.engine.patches import Patches
from kagzi.engine.recall import Recall
from kagzi.engine.sleeping import Deadline, Sleep
from kagzi.engine.tasks import assign_scope, current_scope
from kagzi.engine.timers import Timer, Timers
from kagzi.engine.work import Single, Work
from kagzi.errors import InvalidInput, OutsideRun, RunCrashed, RunSuspended, StepConflict
from kagzi.host import GroupRequest, StepFuture, StepRequest
from kagzi.model import RunStatus
from kagzi.scope import Scope
from kagzi.store.checkpoints import CheckpointWriter
from kagzi.store.operations import load_events, publish_value
from kagzi.store.recorded import ClaimedRun, StoredGroup
from kagzi.store.rows import GroupRow, Mark, RunRow
from kagzi.store.store import Store

logger = logging.getLogger("kagzi")

Checkpoint = StoredStep | StoredGroup

STOP_GRACE_S = 5.0
RECALL_MOST = 1000  # steps that are recalled before others have their turn


class Surroundings(Protocol):
    """What a live run needs of its worker."""

    loop: asyncio.AbstractEventLoop
    worker_id: UUID
    writer: CheckpointWriter
    clock: StoreClock
    executor: Executor
    store: Store
    room: Room
    processes: int
    max_crashes: int

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None: ...

    def begin(self, steps: list[Step]) -> None: ...

    def run_left(self, run: LiveRun, row: RunRow) -> None: ...

    def children_changed(self) -> None:
        """A child was started, or is to be cancelled: whoever drives it should hear of that."""

    def is_crowded(self) -> bool:
        """Whether due runs may be waiting for a place in this worker."""


class LiveRun:
    """One run, driven by this worker. See `group.Home` and `host.Host` for what it offers."""

    def __init__(
        self, worker: Surroundings, claimed: ClaimedRun, workflow: Workflow[..., Any]
    ) -> None:
        self.worker = worker
        self.claimed = claimed
        self.workflow = workflow
        self.run_id = claimed.run_id
        self.scheduled_at = claimed.scheduled_at
        self.run_key = claimed.run_id.bytes
        self.worker_key = worker.worker_id.bytes
        self.loop = worker.loop
        self.writer = worker.writer
        self.room = worker.room
        self.recorded_steps = claimed.steps
        self.recorded_groups = claimed.groups
        self.attempts = claimed.attempts
        self.number = claimed.number
        self.leaving = False
        self._doom: BaseException | None = None
        self._root = Scope()
        self._root.run = self
        self._works: set[Work] = set()
        self._shared: dict[str, Single] = {}
        self._inner: dict[str, Group] = {}
        self._retries: dict[str, Timer] = {}
        self._recalled = 0
        self._parking = Parking(self)
        self.timers = Timers(self.loop, self.settle_down)
        self.bodies = Bodies(self, worker.executor)
        self.news = claimed.news
        self._hearing: asyncio.Task[None] | None = None
        self._hear_again = False
        self._task: asyncio.Task[None] | None = None

    # What most runs have no use for is made when it is asked for.

    @cached_property
    def inbox(self) -> Inbox:
        store = self.worker.store
        return Inbox(lambda: load_events(store, self.run_id), self.recorded_steps, self._hear_now)

    @cached_property
    def children(self) -> Children:
        worker = self.worker
        return Children(
            worker.store,
            self.loop,
            self.run_id,
            worker.worker_id,
            self.claimed.epoch,
            self.settle_down,
            worker.children_changed,
        )

    @cached_property
    def patches(self) -> Patches:
        return Patches(self, self.worker.clock)

    @cached_property
    def _recall(self) -> Recall:
        return Recall(self)

    # --- driving ----------------------------------------------------------------------------

    def start(self) -> None:
        """Run the workflow function from the top, over what is recorded."""
        crashes = self.claimed.crash_count - 1  # this claim counts
        if crashes >= self.worker.max_crashes:
            error = describe_exception(
                RunCrashed(
                    f"{crashes} workers in a row ended abruptly while they held this run. See why "
                    "(memory? a crash in workflow code or in a step of the coordinator?), then "
                    "retry it"
                )
            )
            self._leave(self._row(RunStatus.FAILED, error=error))
            return
        self._task = self.loop.create_task(self._drive())
        assign_scope(self._task, self._root)

    async def _drive(self) -> None:
        workflow = self.workflow
        status, output, error = RunStatus.FAILED, None, None
        try:
            args, kwargs = workflow.arguments.decode(self.claimed.input)
            value = await workflow.function(Context(self), *args, **kwargs)
            output = workflow.returns.encode(value)
            status = RunStatus.COMPLETED
        except BaseException as raised:
            if not self.leaving:
                error = describe_exception(self._doom or raised)
        if self.leaving:
            return
        if self._doom is not None:
            status, output, error = RunStatus.FAILED, None, describe_exception(self._doom)
        elif status is RunStatus.COMPLETED:
            self._warn_of_unawaited()
        self._leave(self._row(status, output=output, error=error))

    def _leave(self, row: RunRow) -> None:
        """Stop everything and let go of the run; told to the worker when that is durable."""
        self.stop()
        if faultpoints.reach is not None:
            faultpoints.reach("run.leaves")
        self.writer.put_run(row, lambda: self.worker.run_left(self, row))

    def stop(self) -> None:
        """Stop everything; write nothing more. The run stays as it is in the store."""
        self.leaving = True
        self.timers.close()
        if "children" in self.__dict__:
            self.children.close()
        if "_recall" in self.__dict__:
            self._recall.close()
        self._parking.close()
        if self._hearing is not None:
            self._hearing.cancel()
        for work in list(self._works):
            work.withdraw()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def wait_stopped(self) -> None:
        """Wait until the workflow function has let go, but not for one that will not."""
        if self._task is not None:
            _, pending = await asyncio.wait([self._task], timeout=STOP_GRACE_S)
            if pending:
                logger.warning(
                    "workflow %s of run %s goes on although it was cancelled",
                    self.workflow.name,
                    self.claimed.external_id,
                )

    def give_back(self) -> None:
        """Let another worker go on with it."""
        if not self.leaving:
            self._leave(self._row(RunStatus.PENDING, wake_at=self.worker.clock.now()))

    def _row(self, status: RunStatus, **values: Any) -> RunRow:
        return RunRow(self.run_id, self.claimed.epoch, status.value, news=self.news, **values)

    # --- what comes from outside ------------------------------------------------------------

    def hear(self, request: str | None, news: int) -> None:
        """Somebody wants something of the run, or something that it may wait for has happened."""
        if self.leaving:
            return
        if request is not None and faultpoints.reach is not None:
            faultpoints.reach("request.heard")
        if request == "cancel":
            self._leave(self._row(RunStatus.CANCELLED))
        elif request == "pause":
            self._leave(self._row(RunStatus.PAUSED))
        elif news > self.news:
            self._hear_now()

    def _hear_now(self) -> None:
        if self._hearing is None:
            self._hearing = self.loop.create_task(self._take_in())
        else:
            self._hear_again = True

    async def _take_in(self) -> None:
        try:
            while True:
                self._hear_again = False
                await patiently(self._look)
                if not self._hear_again:
                    return
        finally:
            self._hearing = None
            self.settle_down()

    async def _look(self) -> None:
        """Read events, then ends of children: both are newer than the news that is noted."""
        news = await self.inbox.look()
        await self.children.look()
        self.news = max(self.news, news)

    def doom(self, error: BaseException) -> None:
        if self._doom is None:
            self._doom = error
            for work in list(self._works):
                work.withdraw()  # what fails from here on is not the run's history
            if self._task is not None:
                self.loop.call_soon(self._task.cancel)

    def _warn_of_unawaited(self) -> None:
        own = (work for work in self._works if not work.scope.base)  # not those of a loser, say
        names = sorted(work.path for work in own if not work.awaited)
        if names:
            logger.warning(
                "workflow %s of run %s returned without awaiting %s: cancelled",
                self.workflow.name,
                self.claimed.external_id,
                ", ".join(repr(name) for name in names[:20]),
            )

    # --- parking ----------------------------------------------------------------------------

    def open_works(self) -> Iterable[Work]:
        if self.leaving or self._doom is not None:
            return ()
        return self._works

    def is_waiting(self, step_id: str) -> bool:
        if step_id in self._retries:
            return True
        return "children" in self.__dict__ and step_id in self.children.waiting

    def is_crowded(self) -> bool:
        return self.worker.is_crowded()

    def settle_down(self) -> None:
        if not self.leaving:
            self._parking.consider()

    def park(self, wake_at: datetime) -> None:
        self._leave(self._row(RunStatus.SLEEPING, wake_at=wake_at))

    # --- host of the context ----------------------------------------------------------------

    def scope(self) -> Scope:
        if self.leaving or self._doom is not None:
            raise RunSuspended
        scope = current_scope()
        if scope is None or scope.run is not self:
            raise OutsideRun(
                "a Context works in its own run's tasks; this code runs in another task, thread or "
                "callback"
            )
        return scope

    def start_step(
        self, scope: Scope, request: StepRequest, settle: Callable[[bytes], Any]
    ) -> StepFuture[Any]:
        recorded = self.recorded_steps.get(request.id)
        known = self._shared.get(request.id)
        if known is not None:
            if not known.is_same(request.definition, request.input):
                raise StepConflict(
                    f"step id {request.id!r} is in use for {known.definition.name!r} with "
                    "another function or input; give one of them another id"
                )
            if self._put_off(scope, recorded, _nothing):
                return StepFuture(request.id, self.loop)
            return self._joined(known, scope, settle)
        if recorded is not None and self._is_plain(recorded, scope, request):
            self.number += 1
            return _settled(StepFuture(request.id, self.loop), settle, recorded.output)
        work = Single(self, scope, request)
        if request.explicit or scope.base:
            self._shared[request.id] = work
        return self._begun(work, scope, settle, recorded)

    def _is_plain(self, recorded: StoredStep, scope: Scope, request: StepRequest) -> bool:
        """Whether there is nothing about a recorded step but its result: most that are replayed."""
        return (
            recorded.status == "completed"
            and recorded.output is not None
            and not (request.explicit or scope.base or scope.deadlines)
            and self.count_recalled(1)
            and recorded.function == request.definition.name
            and recorded.input_hash == hash_input(request.definition.name, request.input)
        )

    def start_group(
        self, scope: Scope, request: GroupRequest, settle: Callable[[Any], Any]
    ) -> StepFuture[Any]:
        known = self._inner.get(request.path)
        if known is not None:
            return self._joined(known, scope, settle)
        work = Group(self, scope, request)
        if scope.base:
            self._inner[request.path] = work
        return self._begun(work, scope, settle, self.recorded_groups.get(request.path))

    def stream_group(
        self, scope: Scope, request: GroupRequest
    ) -> AsyncGenerator[tuple[int, Any], None]:
        work = Group(self, scope, request)
        self._take_up(work)
        results = work.results()
        work.begin()
        return results

    def sleep(
        self, scope: Scope, step_id: str, seconds: float | None, until: datetime | None
    ) -> StepFuture[None]:
        work = Sleep(self, scope, step_id, seconds, until, self.worker.clock)
        return self._begun(work, scope, lambda _: None, self.recorded_steps.get(step_id))

    def make_gate(self, limit: int) -> Gate:
        return Gate(limit)

    def streamed(self, path: str) -> int | None:
        recorded = self.recorded_groups.get(path)
        if recorded is None or not recorded.is_streamed or self.claimed.is_whole:
            return None
        return recorded.size

    async def recall_stream(self, path: str, ids: list[str]) -> list[bytes | Elsewhere]:
        outputs = await patiently(lambda: self.worker.store.load_outputs(self.run_id, path))
        return [outputs[step_id] for step_id in ids]

    def count_recalled(self, count: int) -> bool:
        self._recalled += count
        return self._recalled < RECALL_MOST

    def take_breath(self, settle: Callable[[], None]) -> None:
        self._recalled = 0
        self.loop.call_soon(settle)

    def recall(self, ids: list[str], deliver: Callable[[list[bytes]], None]) -> None:
        self._recall.ask(ids, deliver)

    async def fetch(self, ids: list[str]) -> list[bytes]:
        return await patiently(lambda: self.worker.store.fetch_outputs(self.run_id, ids))

    def wait_event(
        self,
        scope: Scope,
        path: str,
        topic: str,
        seconds: float | None,
        settle: Callable[[bytes], Any],
    ) -> StepFuture[Any]:
        work = EventWait(self, scope, path, topic, seconds, self.worker.clock, self.inbox)
        return self._begun(work, scope, settle, self.recorded_steps.get(path))

    async def child(self, child_id: str | None = None) -> Any:
        """For the body of a step that has to do with a child run: what that step gives."""
        step = self.scope().owner
        definition: ChildDefinition = step.definition
        if definition.mode == "start":
            child, external_id = await self.children.start(step)
            return f"{child} {external_id}"
        if definition.mode == "run":
            output = await self.children.run(step)
        else:
            assert child_id is not None, "whose result is asked for"
            output = await self.children.output_of(step, UUID(child_id))
        return definition.workflow.returns.decode(output)

    async def publish(self, key: str, value: bytes) -> None:
        """For the body of a step that publishes a value."""
        step = self.scope().owner
        await patiently(
            lambda: publish_value(
                self.worker.store,
                self.run_id,
                self.worker.worker_id,
                self.claimed.epoch,
                key,
                value,
                step.call_number,
            )
        )
        self.worker.children_changed()

    def timeout(self, scope: Scope, path: str, seconds: float) -> Deadline:
        return Deadline(self, scope, path, seconds, self.worker.clock)

    def patched(self, scope: Scope, patch: str) -> bool:
        if scope.owner is not None:
            raise InvalidInput(
                "ctx.patched belongs into workflow code, not into a step's body: ask in the "
                "workflow, and give the step the answer as an argument"
            )
        return self.patches.answer(scope, patch)

    def _begun(
        self, work: Work, scope: Scope, settle: Any, recorded: Checkpoint | None
    ) -> StepFuture[Any]:
        future = work.join(settle)
        self._take_up(work)
        self.bodies.wait_in(work, scope)
        if scope.deadlines and self._put_off(scope, recorded, lambda: self._begin_late(work)):
            return future
        try:
            work.begin()
        except BaseException:
            work.withdraw()
            raise
        return future

    def _joined(self, work: Work, scope: Scope, settle: Any) -> StepFuture[Any]:
        if not work.ended and not work.waiting:
            work.scope = scope
            self.bodies.wait_in(work, scope)
        return work.join(settle)

    def _put_off(
        self, scope: Scope, recorded: Checkpoint | None, action: Callable[[], None]
    ) -> bool:
        """On replay: put off what came after a block's time was up until the block has ended."""
        reached = [deadline for deadline in scope.deadlines if deadline.reached(recorded)]
        if not reached:
            return False
        min(reached, key=lambda deadline: deadline.expired_number).put_off(action)
        return True

    def _take_up(self, work: Work) -> None:
        self._works.add(work)
        self.bodies.take_up(work)

    def _begin_late(self, work: Work) -> None:
        if not work.ended:
            try:
                work.begin()
            except Exception as error:
                work.hand_over(error=error)

    async def pass_deadlines(self, scope: Scope, recorded: Checkpoint | None) -> None:
        """On replay: wait here if a block's time was up before this was recorded."""
        if not scope.deadlines:
            return
        passed: asyncio.Future[None] = self.loop.create_future()

        def go_on() -> None:
            if not passed.done():
                passed.set_result(None)

        if self._put_off(scope, recorded, go_on):
            await passed

    # --- home of its work -------------------------------------------------------------------

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None:
        return self.worker.function_gate(definition, choices)

    def set_timer(
        self, delay_s: float, callback: Callable[[], None], at: datetime | None = None
    ) -> Timer:
        return self.timers.set(delay_s, callback, at)

    def lane_of(self, definition: Definition) -> int:
        if definition.in_pool and self.worker.processes:
            return definition.lane
        return definition.lane + LANE_OWN_ASYNC

    def submit(self, steps: list[Step]) -> None:
        if self.attempts:
            due = []
            for step in steps:
                delay_s = number_attempt(step, self.attempts, self.store_now())
                if delay_s > 0:
                    self.retry_later(step, delay_s)
                else:
                    due.append(step)
            steps = due
        self.worker.begin(steps)

    def withdraw(self, steps: Iterable[Step]) -> None:
        for step in steps:
            timer = self._retries.pop(step.id, None)
            if timer is not None:
                timer.cancel()
            self.worker.executor.withdraw(step)

    def store_now(self) -> datetime:
        return self.worker.clock.now()

    def retry_later(self, step: Step, delay_s: float) -> None:
        if step.group.closed:
            return
        due = self.attempts[step.id].retry_at
        self._retries[step.id] = self.set_timer(delay_s, lambda: self._retry(step), due)

    def _retry(self, step: Step) -> None:
        self._retries.pop(step.id, None)
        if not step.group.closed:
            number_attempt(step, self.attempts, self.store_now())
            self.worker.begin([step])

    def remember(self, steps: list[Step]) -> None:
        for step in steps:
            self.recorded_steps[step.id] = StoredStep(
                step.status,
                step.function,
                step.input_hash,
                step.output,
                step.error,
                step.attempt,
                step.call_number,
                step.completed_number,
                None,
                step.index >= 0,
            )

    def remember_group(self, row: GroupRow) -> None:
        self.recorded_groups[row.path] = StoredGroup(
            row.kind,
            row.size,
            row.decision,
            row.decided_index,
            row.completed_number,
            row.call_number,
        )

    def mark_visible(self, path: str, of_group: bool = False) -> None:
        known: Any = (self.recorded_groups if of_group else self.recorded_steps).get(path)
        if known is None or known.visible_number is None:
            self.writer.put_mark(Mark(self.run_id, path, self.number, of_group))
        if of_group and known is not None:
            self.recorded_groups[path] = replace(known, visible_number=self.number)
        elif known is not None:
            self.recorded_steps[path] = known.seen(self.number)

    def hand_over(self, work: Work, deliver: Callable[[], None]) -> None:
        self.bodies.hand_over(work, deliver)

    def stop_below(self, step: Step, again: bool, then: Callable[[], None]) -> None:
        self.bodies.stop_below(step, again, then)

    def work_ended(self, work: Work) -> None:
        self._works.discard(work)
        if isinstance(work, Single):
            if (work.withdrawn or work.scope.base) and self._shared.get(work.path) is work:
                del self._shared[work.path]
        elif self._inner.get(work.path) is work:
            del self._inner[work.path]
        self.bodies.ended(work)
        if self._works and (self.timers.next_s() is not None or self.hears):
            self.settle_down()

    @property
    def hears(self) -> bool:
        """Whether it waits for an event or a child."""
        made = self.__dict__
        return ("inbox" in made and self.inbox.in_use) or (
            "children" in made and self.children.in_use
        )


def _settled(
    future: StepFuture[Any], settle: Callable[[bytes], Any], output: bytes | None
) -> StepFuture[Any]:
    assert output is not None, "a completed step has an output"
    try:
        future.settle(settle(output))
    except Exception as failure:
        future.fail(failure)
    return future


def _nothing() -> None:
    pass
