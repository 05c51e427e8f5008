"""What a workflow has to do with others: child runs, events, and values that it publishes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

from kagzi.codec import codec_for
from kagzi.definition import (
    Call,
    CallOptions,
    ChildMode,
    ChildOptions,
    ChildPolicy,
    Workflow,
    check_line,
)
from kagzi.errors import InvalidInput
from kagzi.host import Host, StepFuture, StepRequest
from kagzi.model import ContextBase, check_duration_s, check_name
from kagzi.registry import step

T = TypeVar("T")

ANY = codec_for(Any)


class ChildHandle(Generic[T]):
    """A child run, as its parent sees it.

    Attributes:
        id: Its external id: the one it was started with, else one made of the parent's.
        run_id: The database's id.
        workflow: Full name of its workflow.
    """

    def __init__(self, relations: Relations, workflow: Workflow[..., T], ids: str) -> None:
        run_id, _, self.id = ids.partition(" ")
        self._relations = relations
        self._workflow = workflow
        self.run_id = UUID(run_id)
        self.workflow = workflow.name

    def result(self) -> StepFuture[T]:
        """Wait for its end; a step of the parent.

        Raises:
            StepFailed: When awaited: the child failed (`is_a(kagzi.ChildFailed)`).
        """
        call: Call[T] = Call(self._workflow.as_step("result"), (str(self.run_id),), {})
        return self._relations._begin(call)

    def __repr__(self) -> str:
        return f"<child run {self.id!r} of {self.workflow}>"


class Relations(ContextBase):
    """The part of a Context that reaches beyond its own run."""

    __slots__ = ("_host",)

    _host: Host

    # --- children ---------------------------------------------------------------------------

    def run_child(
        self,
        workflow: Workflow[..., T],
        /,
        *args: Any,
        id: str | None = None,  # noqa: A002 - the public option has this name
        priority: int | None = None,
        queue: str | None = None,
        key: str | None = None,
        on_parent_cancel: ChildPolicy = "cancel",
        **kwargs: Any,
    ) -> StepFuture[T]:
        """Run another workflow and wait for its result; any worker may drive it.

        In groups: `workflow.bind(*args)` as one of the calls. While it waits the parent holds
        nothing. A child that nobody waits for any more (a lost race, a cancelled task) is
        cancelled.

        Args:
            id: The child's id, unique per workflow. Default: made of the parent's and the step's.
            priority: Default: the parent's.
            queue: Where it waits, for a limit over all workers. Default: the default queue.
            key: What the queue's limit per key counts by, such as a customer.
            on_parent_cancel: "cancel" ends it when the parent is cancelled; "abandon" does not.

        Raises:
            StepFailed: When awaited: the child failed (`is_a(kagzi.ChildFailed)`).
            RunConflict: When awaited: the id belongs to a run that is no child of this step.
        """
        options = _options(id, priority, queue, key, on_parent_cancel)
        return self._begin(_child(workflow, "run", args, kwargs, options))

    def start_child(
        self,
        workflow: Workflow[..., T],
        /,
        *args: Any,
        id: str | None = None,  # noqa: A002 - the public option has this name
        priority: int | None = None,
        queue: str | None = None,
        key: str | None = None,
        on_parent_cancel: ChildPolicy = "cancel",
        **kwargs: Any,
    ) -> StepFuture[ChildHandle[T]]:
        """Start another workflow; awaits to its handle as soon as the start is durable.

        See `run_child` for the arguments.
        """
        options = _options(id, priority, queue, key, on_parent_cancel)
        call = _child(workflow, "start", args, kwargs, options)
        return self._begin(call, lambda ids: ChildHandle(self, workflow, ids))

    def _begin(self, call: Call[Any], shape: Any = None) -> StepFuture[Any]:
        scope = self._host.scope()
        definition = call.definition
        data = definition.encode(call.args, call.kwargs)
        request = StepRequest(
            scope.next_id(definition.short_name), definition, data, call.choices, False
        )
        decode = definition.returns.decode
        settle = decode if shape is None else lambda output: shape(decode(output))
        return self._host.start_step(scope, request, settle)

    # --- events -----------------------------------------------------------------------------

    @overload
    def wait_event(
        self, topic: str, /, *, timeout: float | timedelta | None = ...
    ) -> StepFuture[Any]: ...
    @overload
    def wait_event(
        self, topic: str, /, *, type: type[T], timeout: float | timedelta | None = ...
    ) -> StepFuture[T]: ...
    def wait_event(
        self,
        topic: str,
        /,
        *,
        type: Any = Any,  # noqa: A002 - the public option has this name
        timeout: float | timedelta | None = None,
    ) -> StepFuture[Any]:
        """Wait for the next event of a topic that `client.send` has sent, or will send.

        Each event goes to one wait, in the order sent; a replay gives each wait what it had.
        While nothing else runs the run holds nothing.

        Args:
            type: Annotation that the value is decoded by.
            timeout: Seconds or timedelta, kept over crashes.

        Raises:
            EventTimeout: When awaited: nothing came in time.
            CodecError: When awaited: the value does not fit `type`.
        """
        check_name("topic", topic)
        seconds = None if timeout is None else check_duration_s("timeout", timeout)
        codec = ANY if type is Any else codec_for(type)
        scope = self._host.scope()
        path = scope.next_id(f"event:{topic}")
        future: StepFuture[Any] = self._host.wait_event(scope, path, topic, seconds, codec.decode)
        return future

    # --- values -----------------------------------------------------------------------------

    def publish(self, key: str, value: Any) -> StepFuture[None]:
        """Let clients see `value` under `key` (`handle.published()`, `handle.follow()`).

        The latest value under each key is kept. Awaits until it is durable.

        Raises:
            CodecError: The value cannot be stored.
        """
        check_name("key", key, in_path=False)
        data = encode_plain(value)
        scope = self._host.scope()
        payload = PUBLISH.encode((key, data.decode()), {})
        request = StepRequest(scope.next_id("publish"), PUBLISH, payload, None, False)
        return self._host.start_step(scope, request, PUBLISH.returns.decode)


def encode_plain(value: Any) -> bytes:
    """JSON of a value whose type is known from itself: plain data, or a class with fields."""
    plain = value is None or isinstance(value, str | int | float | bool | list | dict)
    return (ANY if plain else codec_for(type(value))).encode(value)


def _child(
    workflow: Any,
    mode: ChildMode,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ChildOptions,
) -> Call[Any]:
    if not isinstance(workflow, Workflow):
        raise InvalidInput(f"a child run needs a workflow, got {workflow!r}")
    return Call(workflow.as_step(mode), args, kwargs, CallOptions(child=options))


def _options(
    id: str | None,  # noqa: A002 - as above
    priority: int | None,
    queue: str | None,
    key: str | None,
    on_parent_cancel: ChildPolicy,
) -> ChildOptions:
    if on_parent_cancel not in ("cancel", "abandon"):
        raise InvalidInput(
            f"on_parent_cancel must be 'cancel' or 'abandon', got {on_parent_cancel!r}"
        )
    if priority is not None and (type(priority) is not int or abs(priority) > 2**31 - 1):
        raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
    if id is not None:
        check_name("run id", id, in_path=False)
    return ChildOptions(id, priority, on_parent_cancel, **check_line(queue, key))


# Its name is in every recorded run: it stays when the function moves.


@step(name="kagzi.publish", where="coordinator")
async def _publish(ctx: ContextBase, key: str, text: str) -> None:
    await ctx._host.publish(key, text.encode())  # type: ignore[attr-defined]


PUBLISH = _publish.definition
