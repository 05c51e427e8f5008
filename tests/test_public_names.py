"""What a user may import is listed, explained, and has the names and parameters it is known by.

The compiled core and its typed signature are compared in `unit/test_core_names.py`.
"""

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import click
import pytest

import kagzi
from kagzi import errors
from kagzi.cli import main

NAMES = [name for name in kagzi.__all__ if name != "__version__"]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(kagzi, name))]


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Without `self` and what only collects the rest."""
    kept = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            kept.append(parameter.name)
    return kept


def own_methods(cls: type) -> set[str]:
    """Public methods that the class or one of kagzi's above it defines."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("kagzi.")]
    members = {name: value for base in bases for name, value in vars(base).items()}
    kinds = (types.FunctionType, classmethod, staticmethod)
    return {n for n, value in members.items() if n[0] != "_" and isinstance(value, kinds)}


def test_all_lists_every_public_name_once() -> None:
    public = {
        name
        for name, value in vars(kagzi).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert len(kagzi.__all__) == len(set(kagzi.__all__))
    assert set(NAMES) == public


def test_every_error_is_exported_and_has_the_one_root() -> None:
    made = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
    raised = {
        name
        for name, cls in made.items()
        if issubclass(cls, Exception) and cls.__module__ == errors.__name__
    }
    assert raised <= set(kagzi.__all__)
    assert all(issubclass(made[name], kagzi.KagziError) for name in raised)


def test_leaving_a_workflow_is_not_an_error_that_user_code_may_swallow() -> None:
    assert not issubclass(errors.RunSuspended, Exception)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name: str) -> None:
    value = getattr(kagzi, name)
    text = inspect.getdoc(value) if not inspect.isclass(value) else value.__doc__
    assert text
    if dataclasses.is_dataclass(value):
        assert not text.startswith(f"{name}("), "that is what dataclasses make up"


# StepFuture is an asyncio.Future; its own methods are for those who settle it.
@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"StepFuture"}))
def test_public_method_has_a_docstring(name: str) -> None:
    cls = getattr(kagzi, name)
    assert [member for member in own_methods(cls) if not inspect.getdoc(getattr(cls, member))] == []


CALLABLES: dict[Callable[..., Any], list[str]] = {
    kagzi.connect: ["dsn", "schema"],
    kagzi.run: ["workflow", "args", "id", "processes"],
    kagzi.current_step: [],
    kagzi.Client.start: [
        *("workflow", "args", "id", "priority", "version", "queue", "key", "connection")
    ],
    kagzi.Client.start_many: [
        *("workflow", "inputs", "ids", "priority", "version", "queue", "keys", "connection")
    ],
    kagzi.Client.set_queue: ["name", "concurrency", "concurrency_per_key", "rate", "paused"],
    kagzi.Client.queues: [],
    kagzi.AesGcm: ["keys", "current"],
    kagzi.Client.get: ["run"],
    kagzi.Client.describe: ["run"],
    kagzi.Client.runs: ["status", "workflow", "limit"],
    kagzi.Client.retry: ["run", "steps"],
    kagzi.Client.versions: ["workflow"],
    kagzi.Client.check: ["status", "workflow", "limit", "progress"],
    kagzi.Client.set_default_version: ["workflow", "version"],
    kagzi.Client.delete: ["run"],
    kagzi.Client.schedule: [
        *("workflow", "cron", "args", "id", "timezone", "catch_up", "overlap", "priority")
    ],
    kagzi.Client.schedules: [],
    kagzi.Client.unschedule: ["id"],
    kagzi.Client.pause_schedule: ["id"],
    kagzi.Client.resume_schedule: ["id"],
    kagzi.Client.worker: ["processes", "concurrency", "lease_s", "heartbeat_s", "poll_s"],
    kagzi.RunHandle.result: ["timeout"],
    kagzi.RunHandle.describe: [],
    kagzi.Context.step: ["function", "args", "id", "name", "priority", "limit", "retry", "timeout"],
    kagzi.Context.parallel: ["name", "calls", "on_error", "limit", "priority", "timeout"],
    kagzi.Context.parallel_vec: [
        *("name", "calls", "keys", "on_error", "limit", "priority", "timeout")
    ],
    kagzi.Context.map: [
        *("name", "function", "items", "key", "on_error", "limit", "priority", "timeout")
    ],
    kagzi.Context.race: ["name", "calls", "limit", "priority", "timeout"],
    kagzi.Context.as_completed: ["name", "calls", "keys", "limit", "priority"],
    kagzi.Context.sleep: ["duration"],
    kagzi.Context.sleep_until: ["at"],
    kagzi.Context.timeout: ["duration"],
    kagzi.Context.patched: ["id"],
    kagzi.Context.now: [],
    kagzi.Context.random: [],
    kagzi.Context.uuid4: [],
    kagzi.StepFunction.bind: ["args"],
    kagzi.Call.options: ["priority", "limit", "retry", "timeout"],
    kagzi.Retry: ["max_attempts", "initial", "factor", "max_delay", "jitter", "on"],
    kagzi.Retry.fixed: ["max_attempts", "delay", "on"],
    kagzi.Retry.none: [],
    kagzi.StepFailed.is_a: ["exception_type"],
    kagzi.ParallelResult.into_result: [],
}


@pytest.mark.parametrize(
    ("function", "known"), CALLABLES.items(), ids=[f.__qualname__ for f in CALLABLES]
)
def test_callable_has_the_parameters_it_is_known_by(
    function: Callable[..., Any], known: list[str]
) -> None:
    parameters = parameters_of(function)
    assert [name for name in parameters if name in known] == known


def test_decorators_take_the_options_they_are_known_by() -> None:
    options = {
        name: {p for overload in typing.get_overloads(decorator) for p in parameters_of(overload)}
        for name, decorator in (("step", kagzi.step), ("workflow", kagzi.workflow))
    }
    assert options["step"] == {
        *("function", "name", "retry", "timeout", "cpu", "where", "limit"),
        *("memo", "memo_ttl", "memo_version", "transaction", "durability"),
    }
    assert options["workflow"] == {"function", "name", "version"}


def test_retry_has_its_defaults() -> None:
    retry = kagzi.Retry()
    assert (retry.max_attempts, retry.initial, retry.factor) == (3, 1.0, 2.0)
    assert (retry.max_delay, retry.jitter, retry.on) == (60.0, True, None)


ATTRIBUTES: dict[type, set[str]] = {
    kagzi.Winner: {"id", "index", "value"},
    kagzi.ParallelResult: {"values", "errors", "is_success", "first_error"},
    kagzi.StepInfo: {"run_id", "step_id", "attempt", "idempotency_key"},
    kagzi.RunDetails: {"id", "run_id", "status", "input", "steps", "groups", "attempts", "error"},
    kagzi.GroupRecord: {"path", "size", "limit", "cached", "wall_s", "steps_s", "speedup"},
    kagzi.Schedule: {"id", "workflow", "cron", "timezone", "paused", "next_at", "last_run_id"},
    kagzi.CheckReport: {"checked", "same", "goes_on", "without_code", "broken", "is_success"},
    kagzi.BrokenRun: {"id", "status", "problem", "step_id", "recorded", "asked", "message"},
    kagzi.StepRecord: {"id", "function", "status", "attempts", "parent_step_id", "duration_s"},
}


@pytest.mark.parametrize(
    ("cls", "known"), ATTRIBUTES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_record_has_the_attributes_it_is_known_by(cls: type, known: set[str]) -> None:
    assert known <= set(dir(cls)) | {field.name for field in dataclasses.fields(cls)}


def test_failed_step_has_the_attributes_it_is_known_by() -> None:
    failure = kagzi.StepFailed("pages/3", "builtins.ValueError", "no", "Traceback", 2)
    assert (failure.step_id, failure.type, failure.message) == (
        "pages/3",
        "builtins.ValueError",
        "no",
    )
    assert (failure.traceback, failure.attempts) == ("Traceback", 2)
    assert failure.is_a(ValueError)


def test_statuses_and_strategies_are_what_the_tables_hold() -> None:
    def values(kind: type[enum.StrEnum]) -> list[str]:
        return [member.value for member in kind]

    statuses = "pending running sleeping paused completed failed cancelled"
    assert values(kagzi.RunStatus) == statuses.split()
    assert values(kagzi.ErrorStrategy) == ["fail_fast", "collect_all"]


def test_command_line_has_its_commands_and_each_explains_itself() -> None:
    assert {"demo", "worker", "run", "runs", "show", "retry", "migrate"} <= set(main.commands)
    for command in main.commands.values():
        assert isinstance(command, click.Command)
        assert command.help
