"""Groups of a live run: strategies, decisions, results in order.

What depends on the order of completion (the winner of a race, the first failure, a timeout) is
decided when the answer comes and written together with the row that decided it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any
from uuid import UUID

from kagzi import faultpoints
from kagzi._core import Gate, Slots, Step, StoredStep, hash_input
from kagzi.codec.failures import read_failure
from kagzi.elsewhere import LEAST_BYTES, Ahead, Elsewhere, Shelf
from kagzi.engine.stream import Stream
from kagzi.engine.work import Home, Work, changed
from kagzi.errors import GroupTimeout, StepFailed
from kagzi.host import GroupOutcome, GroupRequest
from kagzi.model import ErrorStrategy, GroupKind
from kagzi.scope import Scope
from kagzi.store.checkpoints import LARGE_BYTES
from kagzi.store.recorded import StoredGroup
from kagzi.store.rows import GroupRow, at_us

WINNER = "winner"
FAILURE = "failure"
TIMEOUT = "timeout"


class Group(Work):
    """Steps started together and joined together."""

    def __init__(self, home: Home, scope: Scope, request: GroupRequest) -> None:
        super().__init__(home, scope, request.path)
        self.request = request
        self.slots = Slots(len(request.ids))
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
        self._spills = request.spills and not scope.base
        self._elsewhere = False  # some results were left in the store
        self._shelf = Shelf(home.room)

    def begin(self) -> None:
        """Recall what is recorded; start the rest, unless a decision is recorded."""
        request = self.request
        recorded = self.home.recorded_groups.get(self.path)
        if recorded is not None:
            self._check_shape(recorded)
        self._recall()
        if recorded is not None and recorded.decision is not None:
            self._close_from(recorded)
        elif self._decided_by_record() or self.slots.remaining == 0:
            self.closed = True
            if recorded is None:
                self._close_row()
                self.home.writer.after_commit(self._settle)
            else:
                self._settle_recalled(self.cached, self._settle)
        elif self.stream is None:
            self._submit()
        if request.timeout_s is not None and not self.closed:
            self._timer = self.home.set_timer(request.timeout_s, self._time_out)

    def withdraw(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().withdraw()

    @property
    def is_timed(self) -> bool:
        """Its timeout runs: counted from when it began here, so the run stays here meanwhile."""
        return self._timer is not None

    def steps(self) -> Iterable[Step]:
        settled = self.slots.settled
        return [step for step in self._steps if not settled(step.index)]

    # --- recall -----------------------------------------------------------------------------

    def _check_shape(self, recorded: StoredGroup) -> None:
        request = self.request
        if recorded.kind != request.kind or recorded.size != len(request.ids):
            error = changed(
                f"group {self.path!r}",
                self.path,
                f"{recorded.kind} of {recorded.size} steps",
                f"{request.kind} of {len(request.ids)}",
            )
            self.home.doom(error)
            raise error

    def _recall(self) -> None:
        """Fill the slots of recorded steps, make steps of the rest."""
        request, home, slots = self.request, self.home, self.slots
        recorded = home.recorded_steps
        gate = request.gate
        if gate is None and request.limit is not None:
            gate = Gate(request.limit)
        group_id, priority = self.group_id, request.priority
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
            done.append((stored.completed_number, index))
            if stored.is_elsewhere:
                slots.fill(index, Elsewhere(stored.output_bytes))
                self._elsewhere = True
            elif stored.status == "completed":
                slots.fill(index, stored.output)
            else:
                assert stored.error is not None, "a failed step says why"
                slots.fail(index, read_failure(stored.error, step_id, stored.attempts))
        self._recorded_order = [index for _, index in sorted(done)]

    def _decided_by_record(self) -> bool:
        """Whether the recorded steps decide it, though its own row was lost."""
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
        self._settle_recalled(self.cached, self._settle)

    def _submit(self) -> None:
        if faultpoints.reach is not None:
            faultpoints.reach("group.start")
        if self._steps:
            self.home.submit(list(self._steps))

    # --- answers ----------------------------------------------------------------------------

    def accept(self, steps: list[Step]) -> None:
        if self.closed:
            return
        if self.request.kind is GroupKind.RACE:
            if self.decision is not None:
                return  # the winner's large result is being written
            steps = steps[:1]
            self.decision, self.decided_index = WINNER, steps[0].index
            if faultpoints.reach is not None:
                faultpoints.reach("race.decided")
        home = self.home
        small = steps
        heavy = False
        number = home.number
        for step in steps:
            number += 1
            step.completed_number = number
            output = step.output
            if output is None or len(output) < LEAST_BYTES:
                continue
            heavy = self._spills
            if len(output) > LARGE_BYTES and self.stream is None:
                # A stream gives results in the order of their numbers: there all go one way.
                small = [s for s in small if s is not step]
                home.writer.put_large(step, lambda step=step: self._count([step], self._spills))  # type: ignore[misc]
        home.number = number
        if small:
            home.writer.put_steps(small)
            self._count(small, heavy)
        elif self.request.kind is GroupKind.RACE:
            home.withdraw([step for step in self.steps() if step is not steps[0]])

    def _count(self, steps: list[Step], heavy: bool) -> None:
        """Answers whose rows are on their way, ahead of anything put from here on."""
        if self.closed:
            return
        self.slots.fill_steps(steps)
        if heavy and self.stream is None:
            self.home.writer.when_durable(lambda: self._shelve_all(steps))
        if self.scope.base:
            self.home.writer.after_commit(lambda: self.home.remember(steps))
        if self.stream is not None:
            self.home.writer.after_commit(lambda: self._feed(steps))
        if self.decision is not None or self.slots.remaining == 0:
            self._close()

    def _shelve_all(self, steps: list[Step]) -> None:
        """These are durable: keep in memory what there is room for, until it is handed over."""
        if self.ended:
            return
        for step in steps:
            if step.status == "completed":
                self.slots.values[step.index] = self._shelve(step)

    def _shelve(self, step: Step) -> bytes | Elsewhere | None:
        output = step.output
        if output is None or len(output) < LEAST_BYTES:
            return output
        step.output = None
        # What a broken server may have forgotten is not there to be read again.
        if self._shelf.take(len(output), always=step.definition.relaxed):
            return output
        return Elsewhere(len(output))

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
        if stored.status == "completed" and not self.ended:
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
        if self.scope.base and self.row is not None:
            self.home.remember_group(self.row)
        if self.stream is not None:
            self.stream.end()
            self._end()
            return
        slots, request = self.slots, self.request
        failures = slots.failures
        self._steps = []
        if self.decision == TIMEOUT:
            assert request.timeout_s is not None or self.home.recorded_groups, "a recorded decision"
            self.home.mark_visible(self.path, of_group=True)
            self.hand_over(error=GroupTimeout(self.path, request.timeout_s or 0.0))
        elif self.decision == FAILURE:
            assert self.decided_index is not None, "a failure has an index"
            self._mark_visible([self.decided_index])
            self.hand_over(error=failures[self.decided_index])
        elif self._elsewhere and not self._spills:
            self._read_back(slots.values)
        else:
            self._mark_visible(failures)
            outcome = GroupOutcome(slots.values, failures, self.decided_index, self._shelf)
            self.hand_over(outcome)

    def _read_back(self, values: list[Any]) -> None:
        """Settle when the recorded results that were left in the store are here."""
        self._elsewhere = False
        left = [index for index, value in enumerate(values) if type(value) is Elsewhere]
        if self.decision == WINNER:  # nobody asks for the others
            for index in left:
                values[index] = None
            left = [index for index in left if index == self.decided_index]
        if not left:
            self._settle()
            return

        def deliver(outputs: list[bytes]) -> None:
            for index, output in zip(left, outputs, strict=True):
                values[index] = output
            outputs.clear()
            if not self.ended:
                self._settle()

        ids = self.request.ids
        self.home.recall([ids[index] for index in left], deliver)

    def _own(self, outcome: GroupOutcome) -> GroupOutcome:
        # Only work inside of a step's body has callers besides the first, at once or later.
        if self.scope.base:
            return replace(outcome, values=list(outcome.values))
        return outcome

    def _end(self) -> None:
        super()._end()
        # Steps lead back here: what they and the slots hold would wait for the collector.
        self._steps = []
        if self.outcome is not None and not self.scope.base:
            self.outcome = None
            self.slots = Slots(0)

    def _mark_visible(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self.home.mark_visible(self.request.ids[index])

    # --- in order of completion -------------------------------------------------------------

    def _feed(self, steps: list[Step]) -> None:
        assert self.stream is not None, "only a streamed group is fed"
        if self.ended:
            return
        for step in steps:
            failure = self.slots.failures.get(step.index)
            if failure is None:
                self.slots.values[step.index] = None
                self.stream.put(step.index, self._shelve(step))
            else:
                self.stream.put(step.index, failure)

    def results(self) -> AsyncGenerator[tuple[int, Any], None]:
        """(index, output or failure), the recorded ones first, in the order they were recorded in.

        What is not recorded starts only when the recorded ones are used up, so a replay of a loop
        that was left early starts nothing.
        """
        self.stream = Stream(self.home.loop)
        return self._results(self.stream)

    async def _results(self, stream: Stream) -> AsyncGenerator[tuple[int, Any], None]:
        home, ids, failures = self.home, self.request.ids, self.slots.failures
        ahead = Ahead(home.fetch)
        try:
            values, order = self.slots.values, self._recorded_order
            for place, index in enumerate(order):
                await home.pass_deadlines(self.scope, home.recorded_steps.get(ids[index]))
                self._mark_visible([index] if index in failures else [])
                value, values[index] = failures.get(index) or values[index], None
                if type(value) is Elsewhere:
                    coming = (
                        (ids[other], values[other]) for other in islice(order, place + 1, None)
                    )
                    value = await ahead.get(ids[index], value, coming)
                yield index, value
            if self.slots.remaining:
                await home.pass_deadlines(self.scope, None)
            if not self.closed:
                self._submit()
            async for index, value in stream:
                self._mark_visible([index] if index in failures else [])
                if type(value) is Elsewhere:
                    coming = ((ids[other], waiting) for other, waiting in stream.items)
                    value = await ahead.get(ids[index], value, coming)
                elif type(value) is bytes and len(value) >= LEAST_BYTES:
                    self._shelf.give(len(value))
                yield index, value
        finally:
            self.withdraw()
