"""What is registered: workflow and step functions under their names.

A decorated function stays callable as it was; `.bind` makes a call, a step function bound to its
arguments and not started. Names of functions are `module.qualname` unless given, and a script's own
functions count under the script's file name, so that `python shop.py` and `kagzi worker shop` agree.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from kagzi._core import LANE_ASYNC, LANE_CPU, LANE_THREAD
from kagzi.codec import ArgumentsCodec, Codec
from kagzi.errors import (
    DuplicateName,
    InvalidDefinition,
    InvalidInput,
    UnknownStep,
    UnknownWorkflow,
)
from kagzi.model import (
    MAX_NAME_BYTES,
    ContextBase,
    check_count,
    check_duration_s,
    check_name,
)
from kagzi.retry import Retry

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
C = TypeVar("C", bound=ContextBase)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Where = Literal["pool", "coordinator"]
MemoScope = Literal["workflow", "global"]


class CallOptions:
    """What one call may set for itself; None leaves it to the step or the group."""

    __slots__ = ("limit", "priority", "retry", "timeout_s")

    def __init__(
        self,
        priority: int | None = None,
        limit: int | None = None,
        retry: Retry | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.priority = priority
        self.limit = limit
        self.retry = retry
        self.timeout_s = timeout_s


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
    ) -> Call[T_co]:
        """The same call with options of its own.

        Args:
            priority: Higher begins first among ready steps of the worker.
            limit: At most this many bodies of the function at once in the worker.
            retry: Replaces the step's retry policy. Its `on` must be exception types.
            timeout: Seconds for each attempt.
        """
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
        registered: bool = True,
    ) -> None:
        if not callable(function):
            raise InvalidDefinition(f"a step must be a function, got {function!r}")
        target = _unwrapped(function)
        if inspect.isasyncgenfunction(target) or inspect.isgeneratorfunction(target):
            raise InvalidDefinition(
                f"{_describe(function)} is a generator: a step returns one value; return a list"
            )
        self.function = function
        self.is_async = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - asked for its kind, not called
        )
        self.reference = reference_of(target)
        self.registered = registered
        self.name = check_name("step name", name) if name is not None else full_name(target)
        self.short_name = check_name("step name", name if name is not None else _short_name(target))
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
        self.memo_ttl_s = None if memo_ttl is None else check_duration_s("memo_ttl", memo_ttl)
        self.memo_version = str(memo_version)
        self.wants_context = wants_context(target)
        if self.wants_context and not self.is_async:
            raise InvalidDefinition(
                f"{_describe(function)} is a sync function with a Context parameter: "
                "a step that opens groups must be `async def`"
            )
        self.cpu = bool(cpu)
        if self.cpu:
            self.lane = LANE_CPU
        else:
            self.lane = LANE_ASYNC if self.is_async else LANE_THREAD
        if where == "pool" and self.reference is None:
            raise InvalidDefinition(
                f"{_describe(function)} cannot be imported by a pool process: "
                "move it to the top level of a module, or leave out where='pool'"
            )
        self.in_pool = registered and self.reference is not None and where != "coordinator"
        self.arguments = ArgumentsCodec(target, skip_first=self.wants_context)
        self.returns: Codec[Any] = self.arguments.returns

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
                f"{_describe(function)} is not `async def`: a workflow awaits its steps"
            )
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise InvalidDefinition(
                f"{_describe(function)} takes no context: its first parameter is `ctx: Context`"
            )
        functools.update_wrapper(self, function)
        self.function = function
        self.name = check_name("workflow name", name) if name is not None else full_name(function)
        self.version = check_name("version", version)
        self.reference = reference_of(function)
        self.arguments = ArgumentsCodec(function, skip_first=True)
        self.returns: Codec[Any] = self.arguments.returns

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name} version {self.version}>"


class Registry:
    """Names to functions. The package has one; tests may have their own."""

    def __init__(self) -> None:
        self._steps: dict[str, Definition] = {}
        self._workflows: dict[str, dict[str, Workflow[..., Any]]] = {}

    def add_step(self, definition: Definition) -> None:
        """Register a step.

        Raises:
            DuplicateName: Another function has the name.
        """
        known = self._steps.get(definition.name)
        if known is not None:
            _refuse_other(definition.name, known.function, definition.function)
        self._steps[definition.name] = definition

    def add_workflow(self, workflow: Workflow[..., Any]) -> None:
        """Register a workflow under (name, version). Raises `DuplicateName` as `add_step`."""
        versions = self._workflows.setdefault(workflow.name, {})
        if workflow.version in versions:
            _refuse_other(workflow.name, versions[workflow.version].function, workflow.function)
        versions[workflow.version] = workflow

    def step(self, name: str) -> Definition:
        """Raises `UnknownStep`."""
        try:
            return self._steps[name]
        except KeyError:
            raise UnknownStep(f"no step is registered as {name!r}") from None

    def has(self, name: str, version: str) -> bool:
        return version in self._workflows.get(name, ())

    def workflow(self, name: str, version: str | None = None) -> Workflow[..., Any]:
        """The workflow of that full name, or of that last part of a name if only one has it.

        Without a version: the one registered last.

        Raises:
            UnknownWorkflow: None, or several, match.
        """
        versions = self._workflows.get(name)
        if versions is None:
            matches = [n for n in self._workflows if n.endswith(f".{name}")]
            if len(matches) != 1:
                known = ", ".join(sorted(self._workflows)) or "none"
                reason = "several workflows end in" if matches else "no workflow is registered as"
                raise UnknownWorkflow(
                    f"{reason} {name!r}; registered: {known}. Import its module first"
                )
            versions = self._workflows[matches[0]]
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise UnknownWorkflow(
                f"workflow {name!r} has no version {version!r}; registered: {', '.join(versions)}"
            )
        return versions[version]

    def names(self) -> list[tuple[str, str]]:
        """Every registered (workflow, version)."""
        return [(n, v) for n, versions in self._workflows.items() for v in versions]


registry = Registry()


@overload
def step(
    function: Callable[Concatenate[C, P], Coroutine[Any, Any, T]], /
) -> StepFunction[Concatenate[C, P], P, Coroutine[Any, Any, T], T]: ...
@overload
def step(
    function: Callable[P, Coroutine[Any, Any, T]], /
) -> StepFunction[P, P, Coroutine[Any, Any, T], T]: ...
@overload
def step(function: Callable[P, T], /) -> StepFunction[P, P, T, T]: ...
@overload
def step(
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
) -> _StepDecorator: ...
def step(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Register a function as a step.

    Args:
        name: Registered name; default `module.qualname`. Also the step's name in ids.
        retry: Policy after a failed attempt; default one attempt.
        timeout: Seconds (or timedelta) for each attempt.
        cpu: The body computes: one at a time in each pool process.
        where: "pool", or "coordinator" for a body that must run in the worker's own process.
            Default: the pool, if its processes can import the function.
        limit: At most this many bodies of the function at once in a worker.
        memo: "workflow" or "global": answer from an earlier run of the same workflow, or of any,
            with the same input. Only for steps whose result depends on their input alone.
        memo_ttl: Seconds (or timedelta) for which a memo answers; default for ever.
        memo_version: Change it when the function's meaning changes.

    Raises:
        DuplicateName: Another function has the name.
        InvalidDefinition: The function or an option is of no use as it stands.
    """
    if function is None:
        return lambda decorated: step(decorated, **options)  # type: ignore[call-overload]
    definition = Definition(function, **options)
    registry.add_step(definition)
    return StepFunction(function, definition)


class _StepDecorator(Protocol):
    """What `@kagzi.step(...)` is to a type checker."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[C, P], Coroutine[Any, Any, T]], /
    ) -> StepFunction[Concatenate[C, P], P, Coroutine[Any, Any, T], T]: ...
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]], /
    ) -> StepFunction[P, P, Coroutine[Any, Any, T], T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> StepFunction[P, P, T, T]: ...


class _WorkflowDecorator(Protocol):
    def __call__(
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /
    ) -> Workflow[P, T]: ...


@overload
def workflow(
    function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /
) -> Workflow[P, T]: ...
@overload
def workflow(*, name: str | None = None, version: str = "1") -> _WorkflowDecorator: ...
def workflow(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Register an async function, whose first parameter is the Context, as a workflow.

    Args:
        name: Registered name; default `module.qualname`.
        version: Runs keep the version that they were started with.

    Raises:
        DuplicateName: Another function has that name and version.
        InvalidDefinition: The function is not async, or takes no context.
    """
    if function is None:
        return lambda decorated: workflow(decorated, **options)  # type: ignore[call-overload]
    made: Workflow[..., Any] = Workflow(function, options.get("name"), options.get("version", "1"))
    registry.add_workflow(made)
    return made


def definition_of(target: object) -> Definition:
    """The definition of a step function, or an unregistered one for a plain callable.

    Raises:
        InvalidDefinition: Neither; a coroutine, for one, cannot be run again.
    """
    if isinstance(target, StepFunction):
        return target.definition
    if inspect.iscoroutine(target) or inspect.isawaitable(target):
        close = getattr(target, "close", None)
        if close is not None:
            close()
        raise InvalidDefinition(
            "a coroutine runs only once and cannot be retried: pass the function and its "
            "arguments, as in ctx.step(fetch, url) or fetch.bind(url)"
        )
    if isinstance(target, Workflow):
        raise InvalidDefinition(f"{target!r} is a workflow, not a step")
    if not callable(target):
        raise InvalidDefinition(f"a step must be a function, got {target!r}")
    return Definition(target, registered=False)


def as_call(target: object) -> Call[Any]:
    """A call as it is; a function without arguments as a call of it."""
    if type(target) is Call:
        return target
    return Call(definition_of(target), (), {})


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
        found = getattr(function, "__globals__", {}).get(name)
        if not isinstance(found, type):
            return name == "Context" or name.endswith(".Context")
        annotation = found
    return isinstance(annotation, type) and issubclass(annotation, ContextBase)


def full_name(function: Callable[..., Any]) -> str:
    """`module.qualname`, with a script's file name (or `-m` name) for `__main__`."""
    module = getattr(function, "__module__", None) or "unknown"
    if module in ("__main__", "__mp_main__"):
        module = _main_name()
    name = getattr(function, "__qualname__", None) or _short_name(function)
    return re.sub(r"[/#\s]", "_", f"{module}.{name}")[-MAX_NAME_BYTES:]


def reference_of(function: Callable[..., Any]) -> str | None:
    """`module:qualname` by which another process can import it, or None."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not module or not qualname or "<" in qualname:
        return None
    if module in ("__main__", "__mp_main__"):
        path = getattr(sys.modules.get("__main__"), "__file__", None)
        if path is None or not Path(path).exists():
            return None
        module = "__main__"
    return f"{module}:{qualname}"


def _main_name() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name.removesuffix(".__main__"))
    path = getattr(main, "__file__", None)
    return Path(path).stem if path else "__main__"


def _short_name(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__name__", None) or type(inner).__name__
    return re.sub(r"[/#<>\s]", "", name) or "step"


def _unwrapped(function: Any) -> Any:
    return function.func if isinstance(function, functools.partial) else function


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", repr(function))
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)


def _refuse_other(name: str, known: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Raise `DuplicateName` unless `new` is `known` defined again (a module run a second time)."""
    old_code = getattr(_unwrapped(known), "__code__", None)
    new_code = getattr(_unwrapped(new), "__code__", None)
    if old_code is None or new_code is None:
        same = known is new
    else:
        interactive = reference_of(new) is None and getattr(new, "__module__", "") == "__main__"
        same = (interactive and known.__qualname__ == new.__qualname__) or (
            old_code.co_filename == new_code.co_filename
            and old_code.co_firstlineno == new_code.co_firstlineno
            and old_code.co_qualname == new_code.co_qualname
        )
    if not same:
        raise DuplicateName(
            f"{name!r} is registered twice: {_describe(known)} and {_describe(new)}; "
            "give one of them another name="
        )
