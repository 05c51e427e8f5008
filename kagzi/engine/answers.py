"""What comes back from bodies, wherever they ran, and where it goes."""

from __future__ import annotations

import asyncio
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

from kagzi import faultpoints
from kagzi._core import Step
from kagzi.engine.attempts import attempt_failed
from kagzi.errors import KagziError
from kagzi.host import GroupRequest
from kagzi.pool import wire
from kagzi.pool.inner import pack_error, pack_outcome, unpack_request
from kagzi.registry import registry
from kagzi.store.rows import MemoRow

if TYPE_CHECKING:
    from kagzi.pool.link import Message, PoolLink


class AnswersHome(Protocol):
    """What this module needs of the worker."""

    writer: Any

    def begin(self, steps: list[Step]) -> None: ...


class Answers:
    """Hands answers to the work that they belong to, in the order in which they came."""

    def __init__(self, worker: AnswersHome) -> None:
        self._worker = worker
        self.uses_memos = False
        self._inner: dict[tuple[int, int], asyncio.Future[Any]] = {}

    def completed(self, steps: list[Step]) -> None:
        """Bodies returned. Consecutive steps of one group go to it together."""
        if faultpoints.reach is not None:
            faultpoints.reach("answers.in")
        start, count = 0, len(steps)
        while start < count:
            work = steps[start].group
            end = start + 1
            while end < count and steps[end].group is work:
                end += 1
            part = steps if end - start == count else steps[start:end]
            start = end
            inside = part[0].run.bodies.inside
            if inside:
                for step in part:
                    if step.id in inside:
                        step.run.bodies.left(step)
            if work.closed:
                continue
            work.accept(part)
            if self.uses_memos:
                for step in part:
                    if step.definition.memo is not None:
                        self._put_memo(step)

    def returned(self, step: Step) -> None:
        self.completed([step])

    def failed(
        self,
        step: Step,
        error: bytes,
        wanted: bool,
        started_us: int,
        completed_us: int,
        process_id: int,
    ) -> None:
        """A body raised, ran out of time, or took its process down."""
        if step.group.closed:
            step.run.bodies.left(step)
        else:
            attempt_failed(step, error, wanted, started_us, completed_us, process_id)

    def cut_off(self, steps: list[Step]) -> list[Step]:
        """Bodies ended with their process; those that are still wanted, to be begun again."""
        for step in steps:
            if step.group.closed:
                step.run.bodies.left(step)  # so what it had open is not wanted either
        wanted = [step for step in steps if not step.group.closed]
        for step in wanted:
            step.run.bodies.cut_off(step)
            for key in [key for key in self._inner if key[0] == step.number]:
                del self._inner[key]
        return wanted

    def again(self, steps: list[Step]) -> None:
        """Bodies were cut off by a neighbour's end; the attempt does not count."""
        self._worker.begin(self.cut_off(steps))

    # --- inner work -------------------------------------------------------------------------

    def inner(self, link: PoolLink, step: Step, message: Message) -> None:
        """A body in a pool process asks for inner work, or takes that back."""
        kind, number, request, _, head, body = message
        if kind == wire.INNER_CANCEL:
            future = self._inner.pop((number, request), None)
            if future is not None:
                future.cancel()
            return
        if step.group.closed:
            return
        try:
            future = self._start(step, head, body)
        except (KagziError, ValueError, LookupError) as error:
            link.send(wire.OUTCOME, number, request, 1, b"", pack_error(error))
            return
        self._inner[number, request] = future

        def answer(done: asyncio.Future[Any]) -> None:
            self._inner.pop((number, request), None)
            if done.cancelled():
                return
            error = done.exception()
            if error is None:
                link.send(wire.OUTCOME, number, request, 0, b"", pack_outcome(done.result()))
            else:
                link.send(wire.OUTCOME, number, request, 1, b"", pack_error(error))

        asyncio.Future.add_done_callback(future, answer)

    def _start(self, step: Step, head: bytes, body: bytes) -> asyncio.Future[Any]:
        request = unpack_request(head, body, registry.step)
        run = step.run
        scope = run.bodies.scope(step)
        future: asyncio.Future[Any]
        if isinstance(request, GroupRequest):
            scope.check_depth(request.path)
            future = run.start_group(scope, request, _as_it_is)
        else:
            future = run.start_step(scope, request, _as_it_is)
        return future

    # --- memos ------------------------------------------------------------------------------

    def _put_memo(self, step: Step) -> None:
        self._worker.writer.put_memo(MemoRow(memo_key(step), step, step.definition.memo_ttl_s))

    def answered_by_memo(self, step: Step, output: bytes) -> None:
        """A step whose result an earlier run left."""
        step.status, step.output = "completed", output
        step.started_us = step.completed_us = time.time_ns() // 1000
        step.process_id = -1
        if not step.group.closed:
            step.group.cached += 1
            step.group.accept([step])


def memo_key(step: Step) -> bytes:
    """What a result depends on: scope, function, its version, and the input."""
    definition = step.definition
    scope = step.run.workflow.name if definition.memo == "workflow" else ""
    digest = blake2b(digest_size=32)
    for part in (scope, definition.name, definition.memo_version):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    digest.update(step.input)
    return digest.digest()


def _as_it_is(outcome: Any) -> Any:
    return outcome
