"""What goes on inside the bodies of a run's steps: their inner work, and its end with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol
from uuid import UUID

from kagzi._core import RESUMING, SUSPENDED, Step, StoredStep
from kagzi.engine.executor import Executor
from kagzi.engine.group import TIMEOUT
from kagzi.engine.work import Work
from kagzi.retrying import CallRecord, plan_retry
from kagzi.scope import Scope, is_below
from kagzi.store.checkpoints import CheckpointWriter
from kagzi.store.recorded import StoredGroup


class BodiesHome(Protocol):
    """What this module needs of the run."""

    run_id: UUID
    writer: CheckpointWriter
    leaving: bool
    recorded_steps: dict[str, StoredStep]
    recorded_groups: dict[str, StoredGroup]


class Bodies:
    """The bodies of one run that have, or had, work of their own under way.

    Attributes:
        inside: By step id: what its body has open.
    """

    def __init__(self, run: BodiesHome, executor: Executor) -> None:
        self._run = run
        self._executor = executor
        self._waits: dict[str, int] = {}
        self.inside: dict[str, set[Work]] = {}

    def take_up(self, work: Work) -> None:
        """Work was begun; if by a body, it belongs to that."""
        owner = work.scope.owner
        if owner is not None:
            self.inside.setdefault(owner.id, set()).add(work)

    def ended(self, work: Work) -> None:
        """Its outcome was handed over, or nobody wants it."""
        if work.waiting:
            self.leave_wait(work, None)
        owner = work.scope.owner
        if owner is not None:
            works = self.inside.get(owner.id)
            if works is not None:
                works.discard(work)
                if not works:
                    del self.inside[owner.id]

    def wait_in(self, work: Work, scope: Scope) -> None:
        """The body around this work gives up its shared permits until it has the outcome."""
        owner = scope.owner
        if owner is None:
            return
        work.waiting = True
        count = self._waits.get(owner.id, 0)
        self._waits[owner.id] = count + 1
        if count == 0:
            self._executor.suspend(owner)

    def hand_over(self, work: Work, deliver: Callable[[], None]) -> None:
        if work.waiting:
            self.leave_wait(work, deliver)
        else:
            deliver()

    def leave_wait(self, work: Work, deliver: Callable[[], None] | None) -> None:
        work.waiting = False
        owner = work.scope.owner
        count = self._waits.get(owner.id, 0) - 1
        if count > 0:
            self._waits[owner.id] = count
            if deliver is not None:
                deliver()
            return
        self._waits.pop(owner.id, None)
        if owner.state in (SUSPENDED, RESUMING):
            self._executor.resume(owner, deliver if deliver is not None else _nothing)
        elif deliver is not None:
            deliver()

    def scope(self, step: Step) -> Scope:
        """A new scope for one execution of a step's body."""
        work = step.group
        depth = work.scope.depth + (1 if step.index >= 0 else 0)
        scope = Scope(step.id, None, depth)
        scope.owner, scope.run = step, self._run
        return scope

    def cut_off(self, step: Step) -> None:
        """A body's process is gone, and it will run again: its inner work goes on meanwhile."""
        self._waits.pop(step.id, None)
        for work in list(self.inside.get(step.id, ())):
            work.detach()

    def stop_below(self, step: Step, again: bool, then: Callable[[], None]) -> None:
        """Stop what is under way inside a body whose attempt failed, and go on when it has ended.

        If the step will be tried `again`, the failures and decisions below it are removed, and what
        followed from them, by rows of the writer's stream put right before `then` is called.
        """
        endings = [self._executor.ending(begun) for begun in self._withdraw_below(step)]

        def clear(_: object = None) -> None:
            if self._run.leaving or step.group.closed:
                return
            if again:
                self._clear_below(step.id)
            then()

        if endings:
            asyncio.gather(*endings).add_done_callback(clear)
        else:
            clear()

    def left(self, step: Step) -> None:
        """A body has ended otherwise than by failing: nobody waits for what it left open."""
        if step.id in self.inside:
            self._withdraw_below(step)

    def _withdraw_below(self, step: Step) -> list[Step]:
        """Withdraw the work inside a body, and the work inside that; the steps of all of it."""
        found: list[Step] = []
        for work in list(self.inside.get(step.id, ())):
            inner = list(work.steps())
            found += inner
            work.waiting = False
            work.withdraw()
            for one in inner:
                if one.id in self.inside:
                    found += self._withdraw_below(one)
        self._waits.pop(step.id, None)
        return found

    def _clear_below(self, step_id: str) -> None:
        """Forget failures and decisions below a step, and what was called after they were seen."""
        steps = {
            path: CallRecord(
                path, one.status == "failed", one.in_group, one.call_number, one.visible_number
            )
            for path, one in self._run.recorded_steps.items()
            if is_below(path, step_id)
        }
        groups = {
            path: CallRecord(path, bool(one.decision), False, one.call_number, one.visible_number)
            for path, one in self._run.recorded_groups.items()
            if is_below(path, step_id)
        }
        failed = [path for path, one in steps.items() if one.failed]
        timed_out = [p for p in groups if self._run.recorded_groups[p].decision == TIMEOUT]
        dropped_steps, dropped_groups = plan_retry(steps, groups, failed, timed_out)
        self._run.writer.put_clear(self._run.run_id, step_id)
        for path in dropped_steps:
            del self._run.recorded_steps[path]
            if not steps[path].failed:
                self._run.writer.put_drop(self._run.run_id, path, False)
        for path in dropped_groups | {path for path, one in groups.items() if one.failed}:
            del self._run.recorded_groups[path]
            self._run.writer.put_drop(self._run.run_id, path, True)


def _nothing() -> None:
    pass
