"""Replays recorded runs against today's code, and tells which would break. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import orjson

from kagzi.codec.failures import failed_steps, read_failure
from kagzi.definition import Workflow
from kagzi.engine.clock import StoreClock
from kagzi.engine.replay import Replayed, Replayer
from kagzi.errors import InvalidInput, NonDeterminism
from kagzi.findings import BrokenRun, CheckProblem, CheckReport
from kagzi.model import RunStatus, check_count
from kagzi.registry import registry
from kagzi.store.checks import RecordedRun, count_runs, read_runs
from kagzi.store.store import Store

Progress = Callable[[int, int], None]

# Errors of kagzi's own that end a run from outside of its workflow function.
_FROM_OUTSIDE = ("kagzi.errors.NonDeterminism", "kagzi.errors.RunCrashed")
_OF_STEPS = (
    *("kagzi.errors.StepFailed", "kagzi.errors.AllStepsFailed", "kagzi.errors.GroupTimeout"),
)


@dataclass
class _Counts:
    checked: int = 0
    same: int = 0
    goes_on: int = 0
    without_code: int = 0
    broken: list[BrokenRun] = field(default_factory=list)


async def check_runs(
    store: Store,
    status: RunStatus | str | Iterable[RunStatus | str] | None,
    workflow: Workflow[..., Any] | str | None,
    limit: int | None,
    progress: Progress | None,
) -> CheckReport:
    """See `Client.check`."""
    statuses = _statuses(status)
    name = workflow.name if isinstance(workflow, Workflow) else workflow
    most = None if limit is None else check_count("limit", limit)
    total = await count_runs(store, statuses, name)
    if most is not None:
        total = min(total, most)
    clock = StoreClock()
    replayer = Replayer(clock)
    counts = _Counts()
    # In a thread, for the replay has an event loop of its own. One alone, so that it is closed
    # behind its last work also when the check is cancelled.
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "kagzi-check")
    try:
        async for batch in read_runs(store, statuses, name, most, clock):
            await loop.run_in_executor(thread, _check_batch, replayer, batch, counts)
            if progress is not None:
                progress(counts.checked, max(total, counts.checked))
    finally:
        await loop.run_in_executor(thread, replayer.close)
        thread.shutdown(wait=False)
    return CheckReport(
        counts.checked, counts.same, counts.goes_on, counts.without_code, counts.broken
    )


def _statuses(status: RunStatus | str | Iterable[RunStatus | str] | None) -> list[str] | None:
    if status is None:
        return None
    given = [status] if isinstance(status, str) else list(status)
    for one in given:
        if one not in tuple(RunStatus):
            raise InvalidInput(f"status {one!r} is none of {', '.join(RunStatus)}")
    return [RunStatus(one).value for one in given]


def _check_batch(replayer: Replayer, batch: list[RecordedRun], counts: _Counts) -> None:
    for run in batch:
        counts.checked += 1
        claimed = run.claimed
        if not registry.has(claimed.workflow, claimed.version):
            if run.status.is_terminal:
                counts.without_code += 1
            else:
                counts.broken.append(_without_code(run))
            continue
        code = registry.workflow(claimed.workflow, claimed.version)
        replayed = replayer.replay(claimed, code, run.status is RunStatus.COMPLETED)
        found = _compare(run, replayed)
        if found is not None:
            counts.broken.append(found)
        elif run.status.is_terminal and replayed.row is not None:
            counts.same += 1
        else:
            counts.goes_on += 1


def _compare(run: RecordedRun, replayed: Replayed) -> BrokenRun | None:
    """What would break, if anything; the reason that lies deepest first."""
    doom = replayed.doom
    if isinstance(doom, NonDeterminism):
        message = f"step {doom.step_id!r}: recorded {doom.recorded}, asked for {doom.asked}"
        problem = CheckProblem.NON_DETERMINISM
        return _broken(run, problem, message, doom.step_id, doom.recorded, doom.asked)
    left = sorted(replayed.left, key=lambda path: _call_number(run, path))
    if replayed.row is None:
        return _waiting(run, replayed, left)
    if replayed.row.status == RunStatus.FAILED:
        assert replayed.row.error is not None, "a failed run says why"
        return _failing(run, replayed.row.error, left)
    return _returning(run, replayed.row.output, left)


def _waiting(run: RecordedRun, replayed: Replayed, left: list[str]) -> BrokenRun | None:
    step_id, function = next(iter(replayed.waits_for), (None, ""))
    asked = None if step_id is None else f"{step_id!r}" + (f" ({function})" if function else "")
    if run.status is RunStatus.COMPLETED:
        if asked is None:
            message = "it had completed, and now waits for something that is no step"
            return _broken(run, CheckProblem.NO_END, message)
        message = f"it had completed, and now asks for step {asked}, which is not recorded"
        if left:
            message += f"; not asked for: {_named(left)}"
        recorded = _shown(run, left[0]) if left else None
        return _broken(run, CheckProblem.MISSING_STEP, message, step_id, recorded, asked)
    if left:
        return _unused(run, left, f"asks for {asked}" if asked else "waits", asked)
    return None


def _failing(run: RecordedRun, error: bytes, left: list[str]) -> BrokenRun | None:
    failure = read_failure(error, "", 0)
    if run.error is not None:
        known = read_failure(run.error, "", 0)
        if known.type == failure.type and failed_steps(run.error) == failed_steps(error):
            return None
        if known.type in _FROM_OUTSIDE and failure.type in _OF_STEPS and not left:
            return None
    elif run.status is not RunStatus.COMPLETED and failure.type in _OF_STEPS and not left:
        return None  # a recorded failure that ends it, and nothing is recorded behind that
    where = failure.traceback.rstrip().splitlines()
    places = [line.strip() for line in where if line.lstrip().startswith("File ")]
    message = f"workflow code raises {failure.type}: {failure.message}"
    if places:
        message += f" ({places[-1]})"
    if left:
        message += f"; not asked for: {_named(left)}"
    recorded = _shown(run, left[0]) if left else None
    step_id = left[0] if left else None
    return _broken(run, CheckProblem.EXCEPTION, message, step_id, recorded, failure.type)


def _returning(run: RecordedRun, output: bytes | None, left: list[str]) -> BrokenRun | None:
    if left:
        return _unused(run, left, "returns", "the end of the workflow")
    if run.status is RunStatus.COMPLETED and not _is_equal(run.output, output):
        recorded, asked = _excerpt(run.output), _excerpt(output)
        message = f"it had returned {recorded}, and now returns {asked}"
        return _broken(run, CheckProblem.OTHER_RESULT, message, None, recorded, asked)
    return None


def _is_equal(one: bytes | None, other: bytes | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    return bool(orjson.loads(one) == orjson.loads(other))  # the order of a dict's keys is free


def _unused(run: RecordedRun, left: list[str], does: str, asked: str | None) -> BrokenRun:
    message = f"the code {does}, and no longer asks for {_named(left)}, recorded before"
    recorded = _shown(run, left[0])
    return _broken(run, CheckProblem.UNUSED_STEP, message, left[0], recorded, asked)


def _without_code(run: RecordedRun) -> BrokenRun:
    name, version = run.claimed.workflow, run.claimed.version
    versions = registry.versions(name)
    if versions:
        message = f"version {version!r} is not registered here, but {', '.join(versions)}"
        return _broken(run, CheckProblem.UNKNOWN_VERSION, message)
    message = "its workflow is not registered here"
    return _broken(run, CheckProblem.UNKNOWN_WORKFLOW, message)


def _broken(
    run: RecordedRun,
    problem: CheckProblem,
    message: str,
    step_id: str | None = None,
    recorded: str | None = None,
    asked: str | None = None,
) -> BrokenRun:
    claimed = run.claimed
    return BrokenRun(
        claimed.external_id,
        claimed.run_id,
        claimed.workflow,
        claimed.version,
        run.status,
        problem,
        message,
        step_id,
        recorded,
        asked,
    )


def _call_number(run: RecordedRun, path: str) -> int:
    step = run.claimed.steps.get(path)
    return step.call_number if step is not None else run.claimed.groups[path].call_number


def _shown(run: RecordedRun, path: str) -> str:
    step = run.claimed.steps.get(path)
    return f"{path!r} ({step.function if step is not None else 'a group'})"


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(repr(path) for path in paths[:3]) + more


def _excerpt(output: bytes | None) -> str:
    text = "nothing" if output is None else output.decode()
    return text if len(text) <= 200 else f"{text[:200]}…"
