"""What is known of a step or workflow function, and a call: a step bound to its arguments.

Names of functions are `module.qualname` unless given, and a script's own functions count under the
script's file name, so that `python shop.py` and `kagzi worker shop` agree.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

from kagzi._core import LANE_ASYNC, LANE_CPU, LANE_THREAD
from kagzi.codec import ArgumentsCodec, Codec, codec_for
from kagzi.errors import InvalidDefinition, InvalidInput
from kagzi.model import (
    DEFAULT_QUEUE,
    MAX_NAME_BYTES,
    ContextBase,
    check_count,
    check_duration_s,
    check_name,
)
from kagzi.names import MAIN, recorded_module
from kagzi.retry import Retry

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Where = Literal["pool", "coordinator"]
MemoScope = Literal["workflow", "global"]
Durability = Literal["strict", "relaxed"]
ChildPolicy = Literal["cancel", "abandon"]
ChildMode = Literal["run", "start", "result"]


class CallOptions:
    """What one call may set for itself; None leaves it to the step or the group."""

    __slots__ = ("child", "limit", "priority", "retry", "timeout_s")

    def __init__(
        self,
        priority: int | None = None,
        limit: int | None = None,
        retry: Retry | None = None,
        timeout_s: float | None = None,
        child: ChildOptions | None = None,
    ) -> None:
        self.priority = priority
        self.limit = limit
        self.retry = retry
        self.timeout_s = timeout_s
        self.child = child


class ChildOptions(NamedTuple):
    """What a child run is started with, besides its arguments."""

    id: str | None = None
    priority: int | None = None
    on_parent_cancel: ChildPolicy = "cancel"
    queue: str = DEFAULT_QUEUE
    key: str = ""  # empty: none


class Call(Generic[T_co]):
    """A step function bound to its arguments, not started. Immutable."""

    __slots__ = ("args", "choices", "definition", "kwargs")

    def __init__(
        self,
        definition: Definition,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        choices: CallOptions | None = None,
    ) -> None:
        self.definition = definition
        self.args = args
        self.kwargs = kwargs
        self.choices = choices

    def options(
        self,
        *,
        priority: int | None = None,
        limit: int | None = None,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        queue: str | None = None,
        key: str | None = None,
    ) -> Call[T_co]:
        """The same call with options of its own.

        Args:
            priority: Higher begins first among ready steps of the worker.
            limit: At most this many bodies of the function at once in the worker.
            retry: Replaces the step's retry policy. Its `on` must be exception types.
            timeout: Seconds for each attempt.
            queue: Where a child run waits (a call of a workflow). Default: the default queue.
            key: What the queue's limit per key counts by.
        """
        child = None
        if queue is not None or key is not None:
            if not isinstance(self.definition, ChildDefinition):
                raise InvalidInput(
                    f"queue and key belong to child runs, and {self.definition.name!r} is a step: "
                    "its bodies are bounded by limit="
                )
            child = ChildOptions(**check_line(queue, key))
        if retry is not None and not isinstance(retry, Retry):
            raise InvalidInput(f"retry must be a kagzi.Retry, got {retry!r}")
        if retry is not None and callable(retry.on) and not isinstance(retry.on, type):
            raise InvalidInput(
                "a call's retry policy cannot carry a predicate function: "
                "give exception types here, or put the policy on @kagzi.step"
            )
        if priority is not None and (type(priority) is not int or abs(priority) > 2**31 - 1):
            raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
        choices = CallOptions(
            priority,
            None if limit is None else check_count("limit", limit),
            retry,
            None if timeout is None else check_duration_s("timeout", timeout),
            child,
        )
        return Call(self.definition, self.args, self.kwargs, choices)

    def __repr__(self) -> str:
        return f"<call of {self.definition.name}>"


class Definition:
    """All that is known of a step function; shared by every call of it."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        cpu: bool = False,
        where: Where | None = None,
        limit: int | None = None,
        memo: MemoScope | None = None,
        memo_ttl: float | timedelta | None = None,
        memo_version: str | int = "",
        transaction: bool = False,
        durability: Durability = "strict",
        registered: bool = True,
    ) -> None:
        if not callable(function):
            raise InvalidDefinition(f"a step must be a function, got {function!r}")
        target = unwrapped(function)
        if inspect.isasyncgenfunction(target) or inspect.isgeneratorfunction(target):
            raise InvalidDefinition(
                f"{located(function)} is a generator: a step returns one value; return a list"
            )
        self.function = function
        self.is_async = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - asked for its kind, not called
        )
        self.reference = reference_of(target)
        self.registered = registered
        self.name = check_name("step name", name) if name is not None else full_name(target)
        self.short_name = check_name(
            "step name", name if name is not None else short_name_of(target)
        )
        self.retry = retry if retry is not None else Retry.none()
        if not isinstance(self.retry, Retry):
            raise InvalidDefinition(f"retry must be a kagzi.Retry, got {retry!r}")
        self.timeout_s = None if timeout is None else check_duration_s("timeout", timeout)
        self.timeout_us = 0 if self.timeout_s is None else max(1, int(self.timeout_s * 1e6))
        self.limit = None if limit is None else check_count("limit", limit)
        if where not in (None, "pool", "coordinator"):
            raise InvalidDefinition(f"where must be 'pool' or 'coordinator', got {where!r}")
        if memo not in (None, "workflow", "global"):
            raise InvalidDefinition(f"memo must be 'workflow' or 'global', got {memo!r}")
        if memo is None and (memo_ttl is not None or memo_version != ""):
            raise InvalidDefinition("memo_ttl and memo_version need memo='workflow' or 'global'")
        self.memo = memo
        self.cpu = bool(cpu)
        self.memo_ttl_s = None if memo_ttl is None else check_duration_s("memo_ttl", memo_ttl)
        self.memo_version = str(memo_version)
        self.wants_context = wants_context(function)
        if self.wants_context and not self.is_async:
            raise InvalidDefinition(
                f"{located(function)} is a sync function with a Context parameter: "
                "a step that opens groups must be `async def`"
            )
        if self.cpu:
            self.lane = LANE_CPU
        else:
            self.lane = LANE_ASYNC if self.is_async else LANE_THREAD
        if durability not in ("strict", "relaxed"):
            raise InvalidDefinition(f"durability must be 'strict' or 'relaxed', got {durability!r}")
        self.relaxed = durability == "relaxed"
        self.transaction = bool(transaction)
        if self.transaction:
            self._check_transaction(where)
            where = "coordinator"
        if where == "pool" and self.reference is None:
            raise InvalidDefinition(
                f"{located(function)} cannot be imported by a pool process: "
                "move it to the top level of a module, or leave out where='pool'"
            )
        self.in_pool = registered and self.reference is not None and where != "coordinator"
        skip_first = self.wants_context or self.transaction
        self.arguments = ArgumentsCodec(function, skip_first=skip_first)

    def _check_transaction(self, where: Where | None) -> None:
        """Raise `InvalidDefinition` unless the body can write in its checkpoint's transaction."""
        name = located(self.function)
        parameters = list(inspect.signature(self.function).parameters.values())
        if not self.is_async or not parameters:
            raise InvalidDefinition(
                f"{name} must be `async def` with a connection as its first parameter: a step with "
                "transaction=True writes over the psycopg.AsyncConnection that it is given"
            )
        if self.wants_context:
            raise InvalidDefinition(
                f"{name} asks for a Context, but a step with transaction=True gets a connection"
            )
        if where == "pool" or self.cpu or self.memo is not None:
            raise InvalidDefinition(
                f"{name}: a step with transaction=True runs in the worker's own process, where its "
                "connection is; leave out where='pool', cpu and memo"
            )

    @functools.cached_property
    def returns(self) -> Codec[Any]:
        """Made at the first use: an annotation may name a class further down in its module."""
        return self.arguments.returns

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        return self.arguments.encode(args, kwargs)

    def __repr__(self) -> str:
        return f"<step {self.name}>"


class StepFunction(Generic[Q, P, R, T_co]):
    """A registered step: callable as the function it wraps, and bindable.

    Type parameters: arguments of the function, arguments of `bind` (the same without a Context),
    what calling returns, what the step's result is.
    """

    def __init__(self, function: Callable[Q, R], definition: Definition) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.definition = definition

    def __call__(self, *args: Q.args, **kwargs: Q.kwargs) -> R:
        return self._function(*args, **kwargs)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Call[T_co]:
        """A call of this step with these arguments, without the Context if it takes one."""
        return Call(self.definition, args, kwargs)

    def __repr__(self) -> str:
        return f"<step {self.definition.name}>"


class Workflow(Generic[P, T]):
    """A registered workflow function under (name, version)."""

    def __init__(
        self, function: Callable[..., Coroutine[Any, Any, T]], name: str | None, version: str
    ) -> None:
        if not inspect.iscoroutinefunction(function):
            raise InvalidDefinition(
                f"{located(function)} is not `async def`: a workflow awaits its steps"
            )
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise InvalidDefinition(
                f"{located(function)} takes no context: its first parameter is `ctx: Context`"
            )
        first = parameters[0]
        known = (inspect.Parameter.empty, Any, "Any", "typing.Any")
        if first.annotation not in known and not wants_context(function):
            raise InvalidDefinition(
                f"{located(function)}: its first parameter, {first.name!r}, is annotated "
                f"{inspect.formatannotation(first.annotation)}, and a workflow's is `ctx: Context`"
            )
        functools.update_wrapper(self, function)
        self.function = function
        self.name = check_name("workflow name", name) if name is not None else full_name(function)
        self.version = check_name("version", version)
        self.reference = reference_of(function)
        self.arguments = ArgumentsCodec(function, skip_first=True)
        self._steps: dict[ChildMode, ChildDefinition] = {}

    @functools.cached_property
    def returns(self) -> Codec[Any]:
        """Made at the first use, as a step's."""
        return self.arguments.returns

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """A run of this workflow as a call, for groups: a child of the run that begins it."""
        return Call(self.as_step("run"), args, kwargs)

    def as_step(self, mode: ChildMode) -> ChildDefinition:
        """A child run as a step of its parent: the whole of it, its start, or its result."""
        made = self._steps.get(mode)
        if made is None:
            made = self._steps[mode] = ChildDefinition(self, mode)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name} version {self.version}>"


class ChildDefinition(Definition):
    """A step of the coordinator that has to do with a child run; its body asks the live run.

    Recorded as the workflow's own name ("run"), or with what it does before it.
    """

    def __init__(self, workflow: Workflow[..., Any], mode: ChildMode) -> None:
        super().__init__(_of_child if mode != "result" else _result_of_child, registered=False)
        self.workflow = workflow
        self.mode = mode
        self.name = workflow.name if mode == "run" else f"kagzi.child.{mode}:{workflow.name}"
        short = workflow.name.rpartition(".")[2]
        self.short_name = short if mode != "result" else f"{short}.result"
        if mode != "result":
            self.arguments = workflow.arguments

    @functools.cached_property
    def returns(self) -> Codec[Any]:
        return _ID if self.mode == "start" else self.workflow.returns


async def _of_child(ctx: ContextBase, *args: Any, **kwargs: Any) -> Any:
    return await ctx._host.child()  # type: ignore[attr-defined]


async def _result_of_child(ctx: ContextBase, child_id: str) -> Any:
    return await ctx._host.child(child_id)  # type: ignore[attr-defined]


_ID = codec_for(str)


def check_line(queue: object, key: object) -> dict[str, Any]:
    """Queue and key of a child run as they are stored. Raises `InvalidInput`."""
    line = {}
    if queue is not None:
        line["queue"] = check_name("queue", queue, in_path=False)
    if key is not None:
        line["key"] = check_name("key", key, in_path=False)
    return line


def wants_context(function: Callable[..., Any]) -> bool:
    """Whether the first parameter is annotated as a Context."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    if not parameters:
        return False
    annotation = parameters[0].annotation
    if isinstance(annotation, str):
        name = annotation.strip("'\" ")
        found = getattr(unwrapped(function), "__globals__", {}).get(name)
        if not isinstance(found, type):
            return name == "Context" or name.endswith(".Context")
        annotation = found
    return isinstance(annotation, type) and issubclass(annotation, ContextBase)


def full_name(function: Callable[..., Any]) -> str:
    """`module.qualname`, with a script's file name (or `-m` name) for `__main__`."""
    module = recorded_module(getattr(function, "__module__", None) or "unknown")
    name = getattr(function, "__qualname__", None) or short_name_of(function)
    return re.sub(r"[/#\s]", "_", f"{module}.{name}")[-MAX_NAME_BYTES:]


def reference_of(function: Callable[..., Any]) -> str | None:
    """`module:qualname` by which another process can import it, or None."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not module or not qualname or "<" in qualname:
        return None
    if module in MAIN:
        # In a pool process that imports the script, `__main__` itself is still another module.
        path = getattr(sys.modules.get(module), "__file__", None)
        if path is None or not Path(path).exists():
            return None
        module = "__main__"
    return f"{module}:{qualname}"


def short_name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__name__", None) or type(inner).__name__
    return re.sub(r"[/#<>\s]", "", name) or "step"


def unwrapped(function: Any) -> Any:
    return function.func if isinstance(function, functools.partial) else function


def located(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", repr(function))
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)
