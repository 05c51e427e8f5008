"""Statuses, legal transitions, the records a client gets, and checks of names and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar
from uuid import UUID

from kagzi.errors import InvalidInput, InvalidName, StepFailed

T = TypeVar("T")

MAX_NAME_BYTES = 250
MAX_STEP_ID_BYTES = 1000
MAX_NESTING = 16
DEFAULT_QUEUE = "default"
SEPARATOR = "/"
NUMBER_SIGN = "#"


class ContextBase:
    """Base of every Context; a step whose first parameter is annotated so receives one."""

    __slots__ = ()


class RunStatus(StrEnum):
    """Where a run stands. See docs/architecture.md for the arrows between them."""

    PENDING = "pending"
    RUNNING = "running"
    SLEEPING = "sleeping"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED})

# From each status, the ones it may turn into. Only a person's retry leaves a terminal status.
TRANSITIONS: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.CANCELLED}),
    RunStatus.RUNNING: frozenset(set(RunStatus) - {RunStatus.RUNNING}),
    RunStatus.SLEEPING: frozenset(
        {RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.CANCELLED, RunStatus.PENDING}
    ),
    RunStatus.PAUSED: frozenset({RunStatus.PENDING, RunStatus.CANCELLED}),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset({RunStatus.PENDING}),
    RunStatus.CANCELLED: frozenset({RunStatus.PENDING}),
}


class ErrorStrategy(StrEnum):
    """What a group does when a step of it fails."""

    FAIL_FAST = "fail_fast"
    COLLECT_ALL = "collect_all"


class GroupKind(StrEnum):
    """How a group's outcome comes from its steps'."""

    PARALLEL = "parallel"
    RACE = "race"
    STREAM = "stream"  # a part of a `map` over items that come one by one


class CatchUp(StrEnum):
    """Which of the ticks run that a schedule missed, because no worker was there."""

    LAST = "last"
    ALL = "all"
    NONE = "none"


class Overlap(StrEnum):
    """What a schedule does at a tick when an earlier run of it is not finished."""

    ALLOW = "allow"
    SKIP = "skip"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class ParallelResult(Generic[T]):
    """What a COLLECT_ALL group gives.

    Attributes:
        values: One per call, in order; None where the step failed.
        errors: Index to `StepFailed`, ascending.
        keys: The keys of the calls if the group was given as a dict, else None.
    """

    values: list[T | None]
    errors: dict[int, StepFailed] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None

    @property
    def is_success(self) -> bool:
        return not self.errors

    @property
    def first_error(self) -> StepFailed | None:
        """Of the lowest index, or None."""
        return next(iter(self.errors.values()), None)

    def into_result(self) -> list[T]:
        """The values, if no step failed.

        Raises:
            ExceptionGroup: Of every `StepFailed`, in order.
        """
        if self.errors:
            count, size = len(self.errors), len(self.values)
            raise ExceptionGroup(f"{count} of {size} steps failed", list(self.errors.values()))
        return self.values  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Winner(Generic[T]):
    """The first step of a race to succeed.

    Attributes:
        id: Its step id.
        index: Its place among the calls, from 0.
        value: Its result.
    """

    id: str
    index: int
    value: T


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a step body can know of itself.

    Attributes:
        run_id: Of the run, the database's id.
        step_id: Path of the step in the run.
        attempt: From 1; rises with every counted attempt.
    """

    run_id: UUID
    step_id: str
    attempt: int

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this step, different for every other step."""
        return f"{self.run_id}:{self.step_id}"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A checkpoint, as `describe` shows it. Times are UTC; `duration_s` is the body's."""

    id: str
    function: str
    status: str
    attempts: int
    started_at: datetime
    completed_at: datetime
    group_path: str | None
    parent_step_id: str | None
    process_id: int
    error: StepFailed | None
    output_bytes: int

    @property
    def duration_s(self) -> float:
        return (self.completed_at - self.started_at).total_seconds()


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A finished parallel group. `speedup` is the sum of its steps' seconds over its wall."""

    path: str
    kind: str
    size: int
    strategy: str
    limit: int | None
    decision: str | None
    decided_index: int | None
    cached: int
    succeeded: int
    failed: int
    started_at: datetime
    completed_at: datetime
    wall_s: float
    steps_s: float
    longest_s: float

    @property
    def speedup(self) -> float:
        return self.steps_s / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A failed attempt."""

    step_id: str
    attempt: int
    started_at: datetime
    completed_at: datetime
    error: StepFailed
    process_id: int
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """A queue with its limits, over all workers, and its runs.

    Attributes:
        concurrency: Most runs that workers hold at once; None: no limit.
        concurrency_per_key: The same, of runs that share a key.
        rate: (n, seconds): at most n runs start in any time of that length.
        paused: No run of it is claimed.
        waiting: Runs that are due, and that no worker holds.
        sleeping: Runs whose time has not come.
        running: Runs that a worker holds.
    """

    name: str
    concurrency: int | None
    concurrency_per_key: int | None
    rate: tuple[int, float] | None
    paused: bool
    waiting: int
    sleeping: int
    running: int


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A row of the list of runs. `id` is the external id, `run_id` the database's."""

    id: str
    run_id: UUID
    workflow: str
    version: str
    status: RunStatus
    priority: int
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    wake_at: datetime
    error: str | None
    queue: str = DEFAULT_QUEUE
    key: str | None = None


@dataclass(frozen=True, slots=True)
class RunDetails:
    """All that the store knows of one run."""

    summary: RunSummary
    input: Any
    steps: list[StepRecord]
    groups: list[GroupRecord]
    attempts: list[AttemptRecord]

    @property
    def id(self) -> str:
        return self.summary.id

    @property
    def run_id(self) -> UUID:
        return self.summary.run_id

    @property
    def workflow(self) -> str:
        return self.summary.workflow

    @property
    def status(self) -> RunStatus:
        return self.summary.status

    @property
    def error(self) -> str | None:
        return self.summary.error


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """A worker: one incarnation, from its registration to the end of its lease.

    Attributes:
        status: `active`, `draining` (it claims nothing any more) or `ended`.
        heartbeat_age_s: Since its lease was last renewed.
        lease_left_s: Until its lease runs out; below zero: it has, and nobody has rescued its runs.
        runs: How many it holds.
        queues: Whose runs it drives; None: of all.
        event, event_at, event_detail: The last thing that happened to it.
    """

    id: UUID
    host: str
    pid: int
    status: str
    started_at: datetime
    ended_at: datetime | None
    heartbeat_age_s: float | None
    lease_left_s: float | None
    runs: int
    processes: int | None
    concurrency: int | None
    queues: tuple[str, ...] | None
    event: str | None
    event_at: datetime | None
    event_detail: str | None

    @property
    def is_expired(self) -> bool:
        """Not heard of for longer than its lease."""
        return self.lease_left_s is not None and self.lease_left_s <= 0


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version of a workflow, with its runs counted.

    Attributes:
        is_default: New runs get it when no version is named.
        is_registered: This process has its code.
        unfinished, finished: Runs.
        latest_start: When its newest run was started; None without runs.
    """

    workflow: str
    version: str
    is_default: bool
    is_registered: bool
    unfinished: int
    finished: int
    latest_start: datetime | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """A workflow that starts by the clock.

    Attributes:
        input: Arguments of its runs, as recorded.
        next_at: Its next tick; None when none is left.
        last_at: The newest tick that has a run.
        runs: How many ticks have had one.
        skipped: How many have not, because an earlier run went on (`Overlap.SKIP`).
    """

    id: str
    workflow: str
    version: str
    cron: str
    timezone: str
    catch_up: CatchUp
    overlap: Overlap
    queue: str
    key: str | None
    priority: int
    input: Any
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    runs: int
    skipped: int
    created_at: datetime

    def run_id_at(self, tick: datetime) -> str:
        """Id of the run for a tick."""
        return scheduled_run_id(self.id, tick)

    @property
    def last_run_id(self) -> str | None:
        """Id of the newest run."""
        return None if self.last_at is None else self.run_id_at(self.last_at)


def scheduled_run_id(schedule_id: str, tick: datetime) -> str:
    """Id of a schedule's run for a tick, as in `nightly@2026-11-23T02:00:00Z`."""
    return f"{schedule_id}@{tick.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def check_name(
    what: str, value: object, most_bytes: int = MAX_NAME_BYTES, *, in_path: bool = True
) -> str:
    """`value`, if it can be a name: printable text, not too long; in a path without `/` and `#`.

    Raises:
        InvalidName: Says what is wrong with it.
    """
    if not isinstance(value, str):
        raise InvalidName(f"{what} must be a str, got {value!r}")
    shown = repr(value if len(value) <= 60 else value[:57] + "...")
    if not value or value != value.strip():
        raise InvalidName(f"{what} {shown} is empty or has white space around it")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidName(f"{what} {shown} holds half of a surrogate pair") from None
    if size > most_bytes:
        raise InvalidName(f"{what} {shown} has {size} bytes; at most {most_bytes} are stored")
    if not value.isprintable():
        raise InvalidName(f"{what} {shown} has characters that cannot be printed; leave them out")
    if in_path and (SEPARATOR in value or NUMBER_SIGN in value):
        raise InvalidName(
            f"{what} {shown} has a '/' or '#', which separate and number step ids; use ':' or '-'"
        )
    return value


def check_duration_s(what: str, value: object) -> float:
    """Seconds of a number or timedelta, positive and finite. Raises `InvalidInput`."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidInput(f"{what} must be seconds or a timedelta, got {value!r}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidInput(f"{what} must be a finite time above 0 s, got {value!r}")
    return float(seconds)


def check_count(what: str, value: object) -> int:
    """A whole number of at least 1. Raises `InvalidInput`."""
    if type(value) is not int or value < 1 or value > 2**31 - 1:
        raise InvalidInput(f"{what} must be a whole number of at least 1, got {value!r}")
    return value
