"""What is recorded of runs, as their worker gets it at a claim."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import psycopg

from kagzi._core import StoredStep, take_stored
from kagzi.elsewhere import LEAST_BYTES
from kagzi.model import GroupKind

MANY_ROWS = 1000
ANY_BYTES = 2**31 - 1
DEADLINE = "kagzi.timeout"

Take = Callable[[list[tuple[Any, ...]]], object]


class Ask(Protocol):
    """Gives the rows of the statement of a name; with `take`, that is given some at a time."""

    async def __call__(
        self, name: str, take: Take | None = None, **parameters: Any
    ) -> list[tuple[Any, ...]]: ...


@dataclass(slots=True)
class StoredGroup:
    """A closed group, as a replay needs it."""

    kind: str
    size: int
    decision: str | None
    decided_index: int | None
    completed_number: int
    call_number: int = 0
    visible_number: int | None = None
    failed: int = 0

    @property
    def is_streamed(self) -> bool:
        """A part of a map with all its results: they are loaded when they are asked for."""
        return self.kind == GroupKind.STREAM and self.decision is None and not self.failed


@dataclass(slots=True)
class StoredAttempts:
    """Failed attempts of a step without a checkpoint."""

    counted: int
    last: int
    retry_at: datetime | None


@dataclass(slots=True)
class ClaimedRun:
    """A run that this worker owns now, with all that is recorded of it."""

    run_id: UUID
    external_id: str
    workflow: str
    version: str
    priority: int
    epoch: int
    input: bytes
    crash_count: int  # this claim included
    created_at: datetime
    scheduled_at: datetime | None = None
    news: int = 0
    parent_run_id: UUID | None = None
    is_whole: bool = False  # what was streamed is among the steps, too
    number: int = 0  # the highest in its own count
    steps: dict[str, StoredStep] = field(default_factory=dict)
    groups: dict[str, StoredGroup] = field(default_factory=dict)
    attempts: dict[str, StoredAttempts] = field(default_factory=dict)

    @property
    def is_suspect(self) -> bool:
        """Whether two workers in a row, or more, ended abruptly while they held it."""
        return self.crash_count > 2


class Claims(list[ClaimedRun]):
    """Runs claimed at once.

    Attributes:
        moved: Runs that went to the line of their queue instead.
        again_s: After so many seconds it is worth looking again, though nobody calls.
    """

    moved: int = 0
    again_s: float | None = None


# --- loading ---------------------------------------------------------------------------------


async def take_rows(cursor: psycopg.AsyncCursor[Any], take: Take) -> list[tuple[Any, ...]]:
    """Hand all rows on, some at a time; gives none."""
    while rows := await cursor.fetchmany(MANY_ROWS):
        take(rows)
        if len(rows) == MANY_ROWS:
            await asyncio.sleep(0)
    return []


async def load_checkpoints(ask: Ask, runs: dict[UUID, ClaimedRun], whole: bool = False) -> None:
    """Fill in what is recorded of these runs.

    Args:
        whole: With the steps of a map's complete parts, and with large outputs. Else these are
            left in the store, but for runs with deadlines: what such a run sees must come before
            the end of a block that ends anew, so at once.
    """
    known = list(runs)
    steps: list[dict[str, StoredStep]] = [run.steps for run in runs.values()]
    numbers, elsewhere = [0] * len(steps), 0

    def take(rows: list[tuple[Any, ...]]) -> None:
        nonlocal elsewhere
        elsewhere += take_stored(rows, steps, numbers)

    await ask("load_steps", take, run_ids=known, whole=whole, most_bytes=LEAST_BYTES)
    for run, number in zip(runs.values(), numbers, strict=True):
        run.is_whole = whole
        run.number = number
    if elsewhere:
        timed = [run for run in runs.values() if any(map(_is_deadline, run.steps.values()))]
        if timed:
            lines = [runs[run.run_id].steps for run in timed]
            await ask(
                "load_steps",
                lambda rows: take_stored(rows, lines, [0] * len(lines)),
                run_ids=[run.run_id for run in timed],
                whole=whole,
                most_bytes=ANY_BYTES,
            )
    for run_id, path, *group in await ask("load_groups", run_ids=known):
        run = runs[run_id]
        stored = run.groups[path] = StoredGroup(*group)
        seen = stored.visible_number or 0
        run.number = max(run.number, stored.call_number, stored.completed_number, seen)
    for run_id, step_id, *attempts in await ask("load_attempts", run_ids=known):
        runs[run_id].attempts[step_id] = StoredAttempts(*attempts)


def _is_deadline(stored: StoredStep) -> bool:
    return stored.function == DEADLINE
