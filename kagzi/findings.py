"""What a check of recorded runs against today's code finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from kagzi.model import RunStatus


class CheckProblem(StrEnum):
    """Why a recorded run would break under today's code."""

    NON_DETERMINISM = "non_determinism"  # asks for other work than what is recorded under an id
    MISSING_STEP = "missing_step"  # ended, and now asks for a step that is not recorded
    UNUSED_STEP = "unused_step"  # no longer asks for a step that is recorded
    OTHER_RESULT = "other_result"  # completed, and now returns something else
    EXCEPTION = "exception"  # workflow code raises
    NO_END = "no_end"  # completed, and now waits for something outside of steps
    UNKNOWN_WORKFLOW = "unknown_workflow"
    UNKNOWN_VERSION = "unknown_version"


@dataclass(frozen=True, slots=True)
class BrokenRun:
    """A recorded run that today's code would break.

    Attributes:
        step_id: Of the step or group where it breaks; None where it is none.
        recorded, asked: What is on record there, and what the code does now.
        message: All of it on one line.
    """

    id: str
    run_id: UUID
    workflow: str
    version: str
    status: RunStatus
    problem: CheckProblem
    message: str
    step_id: str | None = None
    recorded: str | None = None
    asked: str | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check of recorded runs found.

    Attributes:
        checked: Runs that were looked at.
        same: Runs that had ended, and end the same way.
        goes_on: Runs that go on behind what is recorded.
        without_code: Runs that had ended, of workflows or versions that are not registered here.
        broken: Those that would break, the newest first.
    """

    checked: int
    same: int
    goes_on: int
    without_code: int
    broken: list[BrokenRun]

    @property
    def is_success(self) -> bool:
        return not self.broken
