"""The Context of a step inside a pool process: what it asks for goes up to the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from typing import Any

from kagzi.context import Context
from kagzi.definition import ChildDefinition
from kagzi.elsewhere import Elsewhere
from kagzi.engine.tasks import assign_scope, current_scope
from kagzi.errors import InvalidInput, OutsideRun
from kagzi.host import GroupOutcome, GroupRequest, StepFuture, StepRequest
from kagzi.pool import wire
from kagzi.pool.body import Body
from kagzi.pool.child import PoolProcess, current_body
from kagzi.pool.inner import pack_request, unpack_error, unpack_group, unpack_step
from kagzi.scope import Scope


def make_context(process: PoolProcess, body: Body) -> Context:
    """The Context for a body; its task gets the body's scope."""
    host = RemoteHost(process, body)
    body.extra = host
    return Context(host)


class RemoteHost:
    """See `host.Host`. Inner work has ids below the step's own."""

    def __init__(self, process: PoolProcess, body: Body) -> None:
        self._process = process
        self._body = body
        self.run_id = body.info.run_id
        self.loop = asyncio.get_running_loop()
        self._root = Scope(body.info.step_id)
        self._root.run = self
        self._requests: dict[int, tuple[StepFuture[Any], Callable[[bytes], Any]]] = {}
        self._next = 0
        assert body.task is not None, "only async bodies get a Context"
        assign_scope(body.task, self._root)

    def scope(self) -> Scope:
        scope = current_scope()
        if scope is None or scope.run is not self or current_body() is not self._body:
            raise OutsideRun(
                "a step's Context works in the tasks of its own body; this code runs elsewhere"
            )
        return scope

    def start_step(
        self, scope: Scope, request: StepRequest, settle: Callable[[bytes], Any]
    ) -> StepFuture[Any]:
        _check_travels(request.definition)
        return self._ask(request.id, *pack_request(request), lambda body: settle(unpack_step(body)))

    def start_group(
        self, scope: Scope, request: GroupRequest, settle: Callable[[GroupOutcome], Any]
    ) -> StepFuture[Any]:
        for definition in set(request.definitions):
            _check_travels(definition)
        return self._ask(
            request.path, *pack_request(request), lambda body: settle(unpack_group(body))
        )

    def stream_group(
        self, scope: Scope, request: GroupRequest
    ) -> AsyncGenerator[tuple[int, Any], None]:
        raise _workflow_only("ctx.as_completed")

    def sleep(self, scope: Scope, step_id: str, seconds: Any, until: datetime | None) -> Any:
        raise _workflow_only("ctx.sleep", "; a step may use asyncio.sleep")

    def make_gate(self, limit: int) -> Any:
        raise _workflow_only("ctx.map over an iterator", "; give it a list")

    def streamed(self, path: str) -> int | None:
        raise _workflow_only("ctx.map over an iterator", "; give it a list")

    async def recall_stream(self, path: str, ids: list[str]) -> list[bytes | Elsewhere]:
        raise _workflow_only("ctx.map over an iterator", "; give it a list")

    async def fetch(self, ids: list[str]) -> list[bytes]:
        raise _workflow_only("ctx.map over an iterator", "; give it a list")

    @property
    def scheduled_at(self) -> datetime | None:
        raise _workflow_only("ctx.scheduled_at", "; give it to the step as an argument")

    def wait_event(self, *_: Any) -> StepFuture[Any]:
        raise _workflow_only("ctx.wait_event")

    async def publish(self, key: str, value: bytes) -> None:
        raise _workflow_only("ctx.publish")

    def store_now(self) -> datetime:
        raise _workflow_only("the store's clock")

    def timeout(self, scope: Scope, path: str, seconds: float) -> Any:
        raise _workflow_only("ctx.timeout", "; a step may use asyncio.timeout")

    def patched(self, scope: Scope, patch: str) -> bool:
        raise _workflow_only(
            "ctx.patched", ": ask in the workflow, and give the step the answer as an argument"
        )

    def _ask(
        self, path: str, head: bytes, body: bytes, settle: Callable[[bytes], Any]
    ) -> StepFuture[Any]:
        self._next += 1
        request = self._next
        future: StepFuture[Any] = StepFuture(path, self.loop)
        self._requests[request] = future, settle
        asyncio.Future.add_done_callback(
            future, lambda done: self._withdraw(request) if done.cancelled() else None
        )
        self._process.send(wire.INNER, self._body.number, request, 0, head, body)
        return future

    def _withdraw(self, request: int) -> None:
        if self._requests.pop(request, None) is not None:
            self._process.send(wire.INNER_CANCEL, self._body.number, request)

    def outcome(self, message: tuple[int, int, int, int, bytes, bytes]) -> None:
        """What became of a request."""
        _, _, request, failed, _, content = message
        known = self._requests.pop(request, None)
        if known is None:
            return
        future, settle = known
        if failed:
            future.fail(unpack_error(content))
            return
        try:
            value = settle(content)
        except Exception as error:
            future.fail(error)
        else:
            future.settle(value)

    def close(self) -> None:
        """The body has ended: nobody waits for its inner work any more."""
        for request in list(self._requests):
            self._withdraw(request)


def _check_travels(definition: Any) -> None:
    if isinstance(definition, ChildDefinition):
        raise _workflow_only("a child run")
    if not definition.registered:
        raise InvalidInput(
            f"{definition.short_name!r} is not a registered step: a step that runs in a pool "
            "process can start registered steps only. Decorate it with @kagzi.step at the top "
            "level of a module, or declare the outer step with where='coordinator'"
        )


def _workflow_only(what: str, instead: str = "") -> InvalidInput:
    return InvalidInput(f"{what} belongs into workflow code, not into a step's body{instead}")
