"""Rows that the checkpoint writer carries besides steps, and the batch that holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from kagzi._core import Step, row_bytes

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def at_us(microseconds: int) -> datetime:
    """A moment given in microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


@dataclass(slots=True)
class AttemptRow:
    """A failed attempt of a step."""

    run_id: UUID
    step_id: str
    attempt: int
    started_at: datetime
    completed_at: datetime
    error: bytes
    process_id: int
    retry_at: datetime | None


@dataclass(slots=True)
class GroupRow:
    """A group that is closed, with what completion order decided. Absolute values throughout."""

    run_id: UUID
    path: str
    id: UUID
    kind: str
    size: int
    strategy: str
    group_limit: int | None
    parent_step_id: str | None
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
    call_number: int
    completed_number: int


@dataclass(slots=True)
class MemoRow:
    """A result for other runs. `step` is the step that made it."""

    key: bytes
    step: Step
    lifetime_s: float | None


@dataclass(slots=True)
class RunRow:
    """A run that its worker lets go of: finished, parked or given back.

    Attributes:
        news: How much had been heard from outside; with more than that it is not parked but due.
        refused: It was taken over or deleted before: nothing was changed.
    """

    run_id: UUID
    epoch: int
    status: str
    output: bytes | None = None
    error: bytes | None = None
    wake_at: datetime | None = None
    news: int = 0
    refused: bool = False


@dataclass(slots=True)
class Mark:
    """The call number at which a failure became visible to the workflow."""

    run_id: UUID
    path: str
    number: int
    of_group: bool


class Batch:
    """What one transaction of the writer commits, and whom to tell afterwards."""

    __slots__ = (
        "after",
        "attempts",
        "clears",
        "drops",
        "groups",
        "marks",
        "memos",
        "nbytes",
        "runs",
        "steps",
    )

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.attempts: list[AttemptRow] = []
        self.groups: list[GroupRow] = []
        self.memos: list[MemoRow] = []
        self.runs: list[RunRow] = []
        self.marks: list[Mark] = []
        self.clears: list[tuple[UUID, str]] = []  # failures below this step are removed
        self.drops: list[tuple[UUID, str, bool]] = []  # steps (or groups: True) are removed
        self.nbytes = 0
        self.after: list[Callable[[], None]] = []

    @property
    def only_steps(self) -> bool:
        return not (
            self.attempts
            or self.groups
            or self.memos
            or self.runs
            or self.marks
            or self.clears
            or self.drops
        )

    @property
    def is_one_run(self) -> bool:
        """Whether it holds one run that is let go of, and nothing else."""
        others = (self.steps, self.attempts, self.groups, self.memos, self.marks)
        return len(self.runs) == 1 and not (any(others) or self.removes)

    @property
    def is_one_group(self) -> bool:
        """Whether it holds one group, steps, and nothing else."""
        others = (self.attempts, self.runs, self.memos, self.marks)
        return len(self.groups) == 1 and not (any(others) or self.removes)

    @property
    def removes(self) -> bool:
        """Whether it takes statements of its own to remove rows."""
        return bool(self.clears or self.drops)

    def __bool__(self) -> bool:
        return bool(self.steps) or bool(self.after) or not self.only_steps

    def add_steps(self, steps: list[Step]) -> None:
        self.steps += steps
        for step in steps:
            self.nbytes += row_bytes(step)

    def take_steps(self, steps: list[Step], start: int, most_rows: int, most_bytes: int) -> int:
        """Add `steps[start:]` until there are enough rows or bytes; where the rest begins."""
        end = min(len(steps), start + most_rows - len(self.steps))
        nbytes = self.nbytes
        for place in range(start, end):
            nbytes += row_bytes(steps[place])
            if nbytes >= most_bytes:
                end = place + 1
                break
        self.nbytes = nbytes
        self.steps += steps if end - start == len(steps) else steps[start:end]
        return end
