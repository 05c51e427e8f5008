"""What is checked and encoded of a start before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from kagzi.definition import Workflow
from kagzi.errors import InvalidInput, KagziError, RunConflict
from kagzi.ids import uuid7
from kagzi.model import check_count, check_duration_s, check_name
from kagzi.store.starts import NewRun, Starts

LONGEST_RATE_S = 366 * 86_400.0


def check_priority(priority: object) -> int:
    if type(priority) is not int or abs(priority) > 2**31 - 1:
        raise InvalidInput(f"priority must be a 32-bit int, got {priority!r}")
    return priority


def check_queue(queue: object) -> str:
    return check_name("queue", queue, in_path=False)


def check_key(key: object) -> str:
    """As it is stored: empty where there is none."""
    return "" if key is None else check_name("key", key, in_path=False)


class Unchanged(Enum):
    """Stands for an option that was not given."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED


def check_limits(
    concurrency: Any, concurrency_per_key: Any, rate: Any, paused: Any
) -> dict[str, Any]:
    """Those that are given, in the store's form. Raises `InvalidInput`."""
    counts = {"concurrency": concurrency, "concurrency_per_key": concurrency_per_key}
    changes: dict[str, Any] = {}
    for name, value in counts.items():
        if value is not UNCHANGED:
            changes[name] = None if value is None else check_count(name, value)
    if rate is not UNCHANGED:
        changes["rate"] = None if rate is None else _check_rate(rate)
    if paused is not UNCHANGED:
        if type(paused) is not bool:
            raise InvalidInput(f"paused must be True or False, got {paused!r}")
        changes["paused"] = paused
    return changes


def _check_rate(rate: Any) -> tuple[int, float]:
    if not isinstance(rate, tuple) or len(rate) != 2:
        raise InvalidInput(f"rate must be (starts, seconds) or None, got {rate!r}")
    window_s = check_duration_s("the rate's time", rate[1])
    if window_s > LONGEST_RATE_S:
        raise InvalidInput(f"the rate's time may be up to 366 days, got {rate[1]!r}")
    return check_count("the rate's starts", rate[0]), window_s


def new_run(payload: bytes, run_id: object, key: object) -> NewRun:
    own_id = uuid7()
    external_id = str(own_id) if run_id is None else check_name("run id", run_id, in_path=False)
    return NewRun(own_id, external_id, payload, check_key(key))


def prepare_many(
    workflow: Workflow[..., Any],
    inputs: Iterable[tuple[Any, ...]],
    ids: Sequence[str] | None,
    keys: Sequence[str | None] | str | None,
    *,
    queue: str,
    priority: int,
) -> tuple[Starts, list[int]]:
    """The runs to start, each id once, and for each input the place of its run among them.

    Raises:
        RunConflict: One id is given to two inputs that differ.
        InvalidInput, CodecError: The place of what is wrong is named.
    """
    starts = Starts(
        workflow.name, workflow.version, check_priority(priority), check_queue(queue), []
    )
    listed = list(inputs)
    ids = _as_many("ids", ids, len(listed))
    keys = [keys] * len(listed) if keys is None or isinstance(keys, str) else keys
    keys = _as_many("keys", keys, len(listed))
    known: dict[str, int] = {}
    places = []
    for place, args in enumerate(listed):
        if not isinstance(args, tuple):
            raise InvalidInput(
                f"inputs[{place}] must be a tuple of the workflow's arguments, got {args!r:.100}; "
                "write (value,) for one"
            )
        try:
            run = new_run(
                workflow.arguments.encode(args, {}),
                None if ids is None else ids[place],
                None if keys is None else keys[place],
            )
        except KagziError as error:
            error.args = (f"inputs[{place}]: {error.args[0]}", *error.args[1:])
            raise
        at = known.setdefault(run.external_id, len(starts.runs))
        if at == len(starts.runs):
            starts.runs.append(run)
        elif starts.runs[at].payload != run.payload:
            raise RunConflict(
                f"id {run.external_id!r} is given to two inputs that differ, the second of them "
                f"inputs[{place}]"
            )
        places.append(at)
    return starts, places


def _as_many(what: str, values: Any, count: int) -> list[Any] | None:
    if values is None:
        return None
    if isinstance(values, str):
        raise InvalidInput(f"{what} must be a list with one for each input, got {values!r}")
    listed = list(values)
    if len(listed) != count:
        raise InvalidInput(f"{what} has {len(listed)} entries for {count} inputs")
    return listed
