"""What is registered: workflow and step functions under their names, and the two decorators.

A decorated function stays callable as it was; `.bind` makes a call of it, not started.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable
from datetime import timedelta
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from kagzi.definition import (
    Call,
    Definition,
    Durability,
    MemoScope,
    StepFunction,
    Where,
    Workflow,
    located,
    reference_of,
    unwrapped,
)
from kagzi.errors import DuplicateName, InvalidDefinition, UnknownStep, UnknownWorkflow
from kagzi.model import ContextBase
from kagzi.retry import Retry

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=ContextBase)


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

    def versions(self, name: str) -> list[str]:
        """Registered versions of the workflow of that full name, in the order of registration."""
        return list(self._workflows.get(name, ()))

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
    durability: Durability = "strict",
) -> _StepDecorator: ...
@overload
def step(
    *,
    transaction: Literal[True],
    name: str | None = None,
    retry: Retry | None = None,
    timeout: float | timedelta | None = None,
    limit: int | None = None,
) -> _TransactionDecorator: ...
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
        durability: "relaxed": commits of such steps alone do not wait for the server's disk. If
            the server itself crashes, its last such commits, up to about a second of them, may be
            gone: these steps run again, and what a workflow had seen of them may change. A crash of
            anything else loses nothing.
        transaction: The body's first parameter is a `psycopg.AsyncConnection` within the
            transaction that commits its result: what it writes there is written exactly once. It
            runs in the worker's own process and must not commit or roll back by itself.

    Raises:
        DuplicateName: Another function has the name.
        InvalidDefinition: The function or an option is of no use as it stands.
    """
    if function is None:
        return lambda decorated: step(decorated, **options)
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


class _TransactionDecorator(Protocol):
    """What `@kagzi.step(transaction=True)` is to a type checker."""

    def __call__(
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /
    ) -> StepFunction[Concatenate[Any, P], P, Coroutine[Any, Any, T], T]: ...


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
        return lambda decorated: workflow(decorated, **options)
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
    if isinstance(target, Iterable):
        raise InvalidDefinition(
            f"a step must be a function or a call, got {target!r}; for a list of calls there is "
            "ctx.parallel_vec(name, calls)"
        )
    if not callable(target):
        raise InvalidDefinition(f"a step must be a function or a call, got {target!r}")
    return Definition(target, registered=False)


def as_call(target: object) -> Call[Any]:
    """A call as it is; a function without arguments as a call of it."""
    if type(target) is Call:
        return target
    return Call(definition_of(target), (), {})


def _refuse_other(name: str, known: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Raise `DuplicateName` unless `new` is `known` defined again (a module run a second time)."""
    old_code = getattr(unwrapped(known), "__code__", None)
    new_code = getattr(unwrapped(new), "__code__", None)
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
            f"{name!r} is registered twice: {located(known)} and {located(new)}; "
            "give one of them another name="
        )
