"""The exception tree. One root, typed attributes; nobody has to parse a message.

Two things here are not errors: `RunSuspended` and `RunCancelled` are control flow and derive from
`BaseException`, so that a workflow's `except Exception` cannot swallow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kagzi.names import class_name


class KagziError(Exception):
    """Root of every error that kagzi raises."""


# --- what a user gets wrong -----------------------------------------------------------------


class InvalidInput(KagziError, ValueError):
    """A name, number or option that kagzi refuses; nothing was written."""


class InvalidDsn(InvalidInput):
    """The connection string cannot be read."""


class InvalidName(InvalidInput):
    """A workflow, step or group name, an id or a key that cannot be stored."""


class InvalidArguments(InvalidInput, TypeError):
    """A workflow or step function cannot be called with these arguments."""


class InvalidDefinition(InvalidInput, TypeError):
    """A function that cannot be registered as it stands."""


class DuplicateName(InvalidDefinition):
    """Two functions ask for one registered name."""


class UnknownWorkflow(KagziError, LookupError):
    """No workflow is registered under this name (and version)."""


class UnknownStep(KagziError, LookupError):
    """No step of this run, or no registered step function, has this name."""


class RunEnded(KagziError, RuntimeError):
    """Something was sent to a run that has ended."""


class UnknownRun(KagziError, LookupError):
    """No run has this id."""


class UnknownSchedule(KagziError, LookupError):
    """No schedule has this id."""


class MissingMainGuard(KagziError, RuntimeError):
    """A script starts kagzi while a pool process imports it: it lacks the `__main__` guard."""


class OutsideRun(KagziError, RuntimeError):
    """Used where no run or step is: a Context outside its run, `current_step()` outside a step."""


class CodecError(KagziError, TypeError):
    """A value that cannot be stored so that it comes back equal in value and type.

    Attributes:
        path: Where in the value, e.g. `$.pages[3].title`.
    """

    def __init__(self, message: str, path: str = "$") -> None:
        super().__init__(message)
        self.path = path


class PayloadTooLarge(CodecError):
    """An encoded value above the limit."""


# --- what a run meets -----------------------------------------------------------------------


class StepConflict(KagziError):
    """One explicit step id asks for two different pieces of work."""


class NonDeterminism(KagziError):
    """The code asked for another step than the one recorded under this id.

    Attributes:
        step_id: Of the step, or path of the group.
        recorded, asked: What is on record under it, and what the code asks for now.
    """

    def __init__(
        self, message: str = "", step_id: str = "", recorded: str = "", asked: str = ""
    ) -> None:
        super().__init__(message)
        self.step_id = step_id
        self.recorded = recorded
        self.asked = asked


class NestingTooDeep(KagziError, RecursionError):
    """Groups inside groups beyond the limit."""


class StepFailed(KagziError):
    """A step's last attempt failed. The same live and on replay.

    Attributes:
        step_id: Path of the step in its run.
        type: Qualified name of the exception, e.g. `builtins.ValueError`.
        message: Its text.
        traceback: Formatted traceback of the body, or "".
        attempts: Executions counted against the retry policy.
        mro: Qualified names of the exception's classes, its own first.
    """

    def __init__(
        self,
        step_id: str,
        type: str,  # noqa: A002 - the public attribute has this name
        message: str,
        traceback: str = "",
        attempts: int = 1,
        mro: Sequence[str] = (),
    ) -> None:
        super().__init__(f"step {step_id!r} failed after {attempts} attempt(s): {type}: {message}")
        self.step_id = step_id
        self.type = type
        self.message = message
        self.traceback = traceback
        self.attempts = attempts
        self.mro = tuple(mro) or (type,)

    def is_a(self, exception_type: type[BaseException] | str) -> bool:
        """Whether the step raised this exception or a subclass of it.

        Compared by qualified name: the exception itself is not rebuilt.
        """
        if isinstance(exception_type, str):
            return any(n == exception_type or n.endswith(f".{exception_type}") for n in self.mro)
        return class_name(exception_type) in self.mro

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.step_id, self.type, self.message, self.traceback, self.attempts, self.mro)
        return (StepFailed, fields)


class AllStepsFailed(KagziError, ExceptionGroup[StepFailed]):
    """No step of a race succeeded; `exceptions` holds a `StepFailed` for each, in order."""

    def derive(self, excs: Sequence[Exception], /) -> AllStepsFailed:  # type: ignore[override]
        """A group of some of its failures, for `split` and `except*`."""
        return AllStepsFailed(self.message, list(excs))  # type: ignore[arg-type]


class StepCrashed(KagziError):
    """The process that ran the step's body died under it."""


class StepTimeout(KagziError, TimeoutError):
    """A step's body did not finish within its `timeout`."""


class GroupTimeout(KagziError, TimeoutError):
    """A group did not finish within its `timeout`.

    Attributes:
        path: Path of the group in its run.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__(f"group {path!r} did not finish within {timeout_s:g} s")
        self.path = path
        self.timeout_s = timeout_s


class ChildFailed(KagziError):
    """A child run failed, or was cancelled. Its parent's step fails with this."""


class EventTimeout(KagziError, TimeoutError):
    """No event of the topic came within the `timeout` of `ctx.wait_event`."""


class RunFailed(KagziError):
    """A run ended as failed; what `handle.result()` raises.

    When the workflow let a `StepFailed` (or another error of kagzi) through, the exception is of
    that class too, so one `except StepFailed` serves inside and outside of workflows.

    Attributes:
        run_id: External id of the run.
        type, message, traceback, mro: Of the exception that left the workflow function; of the
            failed step where it was a `StepFailed`.
        steps: Ids of the failed steps in its cause.
    """

    run_id: str
    type: str
    message: str
    traceback: str
    mro: tuple[str, ...]
    steps: tuple[str, ...]


class RunCrashed(KagziError):
    """One worker after the other ended abruptly while it held this run."""


class RunConflict(KagziError):
    """The id belongs to a run that was started with another input."""


class RunWasCancelled(KagziError):
    """The run whose result was asked for ended as cancelled."""


# --- what the surroundings do ---------------------------------------------------------------


class StoreError(KagziError):
    """Postgres refused something."""


class StoreUnavailable(StoreError, ConnectionError):
    """No connection to Postgres.

    Attributes:
        host, database: Where it was looked for (never the password).
    """

    def __init__(self, message: str, host: str = "", database: str = "") -> None:
        super().__init__(message)
        self.host = host
        self.database = database


class StoreForbidden(StoreError, PermissionError):
    """The database role lacks a right that kagzi needs."""


class ServerTooOld(StoreError):
    """The server is older than PostgreSQL 14."""


class SchemaTooNew(StoreError):
    """The database schema was made by a newer kagzi."""


class SchemaChanged(StoreError):
    """A migration was applied here whose file has another content now."""


class SchemaMissing(StoreError):
    """The schema is not there, or older than the code, and migrating was not allowed."""


class PayloadKeyError(StoreError):
    """A payload is encrypted with a key that is not here, or that is another one here.

    Attributes:
        key_id: Name of the key; "" where there are several.
    """

    def __init__(self, message: str, key_id: str = "") -> None:
        super().__init__(message)
        self.key_id = key_id


class PostgresNotFound(StoreError):
    """No DSN was given and no Postgres programs were found to start an embedded server."""


class EmbeddedServerFailed(StoreError):
    """The embedded Postgres did not start, or did not come up in time."""


class LeaseLost(KagziError):
    """A worker's lease was ended by another, or cannot be trusted; it stops its runs.

    Attributes:
        by_store: The store was away or is another one now: not the fault of what the worker ran.
    """

    def __init__(self, message: str, *, by_store: bool = False) -> None:
        super().__init__(message)
        self.by_store = by_store


class ServerReplaced(LeaseLost):
    """The server is another one now, or has another history: its runs are to be loaded again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, by_store=True)


class PoolStartFailed(KagziError):
    """A pool process could not be started."""


class StaleExtension(KagziError, ImportError):
    """The compiled core is older than its source."""


# --- control flow ---------------------------------------------------------------------------


class RunSuspended(BaseException):
    """Leaves a workflow function when its run is parked; never catch it."""
