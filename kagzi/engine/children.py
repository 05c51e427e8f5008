"""Runs that a run has started, and the steps whose bodies wait for them.

A child's id is made of its parent's and of the step that starts it, so starting it again finds it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import TypeVar
from uuid import UUID

from kagzi import faultpoints
from kagzi._core import Step
from kagzi.codec.failures import read_failure
from kagzi.definition import ChildDefinition, ChildOptions
from kagzi.errors import ChildFailed, StoreUnavailable
from kagzi.model import MAX_NAME_BYTES, RunStatus
from kagzi.store.operations import change_run, insert_child, read_ends
from kagzi.store.store import Store

logger = logging.getLogger("kagzi")

T = TypeVar("T")
End = tuple[RunStatus, bytes | None, bytes | None]

PAUSE_S = 1.0


class Children:
    """Of one live run.

    Args:
        changed: Called when a step begins to wait.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        run_id: UUID,
        worker_id: UUID,
        epoch: int,
        changed: Callable[[], None],
        started: Callable[[], None],
    ) -> None:
        self._store = store
        self._loop = loop
        self._run_id = run_id
        self._worker_id = worker_id
        self._epoch = epoch
        self._changed = changed
        self._started = started
        self._waits: dict[UUID, asyncio.Future[End]] = {}
        self.waiting: set[str] = set()  # ids of steps
        self.leaving = False

    @property
    def in_use(self) -> bool:
        return bool(self._waits)

    async def start(self, step: Step) -> tuple[UUID, str]:
        """Start the child of a step, or find it; both its ids. Durable on return."""
        definition: ChildDefinition = step.definition
        workflow = definition.workflow
        options: ChildOptions = getattr(step.extra, "child", None) or ChildOptions()
        child_id = child_id_of(self._run_id, step.id)
        external_id = options.id
        if external_id is None:
            external_id = f"{self._run_id}/{step.id}"
            if len(external_id.encode()) > MAX_NAME_BYTES:
                external_id = str(child_id)
        if faultpoints.reach is not None:
            faultpoints.reach("child.before")
        await patiently(
            lambda: insert_child(
                self._store,
                child_id=child_id,
                external_id=external_id,
                workflow=workflow.name,
                version=workflow.version,
                payload=step.input,
                priority=options.priority,
                queue=options.queue,
                queue_key=options.key,
                policy=options.on_parent_cancel,
                worker_id=self._worker_id,
                parent_id=self._run_id,
                epoch=self._epoch,
                step_id=step.id,
            )
        )
        if faultpoints.reach is not None:
            faultpoints.reach("child.after")
        self._started()
        return child_id, external_id

    async def run(self, step: Step) -> bytes:
        """Start a step's child and wait for its output; nobody waiting any more cancels it."""
        child_id, _ = await self.start(step)
        try:
            return await self.output_of(step, child_id)
        except asyncio.CancelledError:
            if not self.leaving:
                await change_run(self._store, child_id, "cancel")
                self._started()
            raise

    async def output_of(self, step: Step, child_id: UUID) -> bytes:
        """Wait for a child's end.

        Raises:
            ChildFailed: It failed, or was cancelled.
        """
        wait = self._waits.get(child_id)
        if wait is None:
            wait = self._waits[child_id] = self._loop.create_future()
        await patiently(self.look)
        # Not before: parked without that look, the run would not hear of an end that is no news.
        self.waiting.add(step.id)
        try:
            self._changed()
            status, output, error = await asyncio.shield(wait)
        finally:
            self.waiting.discard(step.id)
        if status is RunStatus.COMPLETED:
            assert output is not None, "a completed run has an output"
            return output
        name = step.definition.workflow.name
        if error is None:
            raise ChildFailed(f"run {child_id} of {name!r} was {status.value}")
        failure = read_failure(error, "", 0)
        raise ChildFailed(f"run {child_id} of {name!r} failed: {failure.type}: {failure.message}")

    async def look(self) -> None:
        """See which of the children that are waited for have ended."""
        asked = list(self._waits)
        if not asked:
            return
        for child_id, status, output, error in await read_ends(self._store, asked):
            if not status.is_terminal:
                continue
            wait = self._waits.pop(child_id, None)
            if wait is not None and not wait.done():
                wait.set_result((status, output, error))

    def close(self) -> None:
        self.leaving = True


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` gives, however long the store is away: that is no failure of a step."""
    while True:
        try:
            return await ask()
        except StoreUnavailable as error:
            logger.warning("a step waits for the store: %s", error)
            await asyncio.sleep(PAUSE_S)


def child_id_of(run_id: UUID, step_id: str) -> UUID:
    """The database's id of the child that a step starts."""
    data = run_id.bytes + b"child" + step_id.encode()
    return UUID(bytes=blake2b(data, digest_size=16, usedforsecurity=False).digest())
