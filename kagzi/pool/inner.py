"""Inner work of bodies in pool processes, as it travels between process and coordinator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from kagzi import errors
from kagzi._core import FrameReader, FrameWriter
from kagzi.definition import CallOptions, Definition
from kagzi.errors import GroupTimeout, KagziError, StepFailed
from kagzi.host import GroupOutcome, GroupRequest, StepRequest
from kagzi.model import ErrorStrategy, GroupKind
from kagzi.names import class_name
from kagzi.retry import Retry

CALL = 1
VALUE = 2
FAILURE = 3


def pack_request(request: StepRequest | GroupRequest) -> tuple[bytes, bytes]:
    """Head and body of the message that asks for a step or group."""
    frames = FrameWriter()
    names: dict[str, int] = {}
    if isinstance(request, StepRequest):
        options: dict[str, Any] = {"id": request.id, "explicit": request.explicit}
        ids, definitions, inputs = [request.id], [request.definition], [request.input]
        choices: list[CallOptions | None] = [request.choices]
    else:
        options = {
            "path": request.path,
            "kind": request.kind,
            "strategy": request.strategy,
            "limit": request.limit,
            "priority": request.priority,
            "timeout_s": request.timeout_s,
        }
        ids, definitions, inputs = request.ids, request.definitions, request.inputs
        choices = request.choices or [None] * len(ids)
    for index, (step_id, definition, payload) in enumerate(
        zip(ids, definitions, inputs, strict=True)
    ):
        place = names.setdefault(definition.name, len(names))
        frames.add(CALL, index, place, 0, step_id.encode(), payload)
    options["functions"] = list(names)
    if any(choice is not None for choice in choices):
        options["choices"] = [_pack_choices(choice) for choice in choices]
    return orjson.dumps(options), frames.take()


def unpack_request(
    head: bytes, body: bytes, find: Callable[[str], Definition]
) -> StepRequest | GroupRequest:
    """The other way round. Raises `UnknownStep` for a function this process does not know."""
    options = orjson.loads(head)
    functions = [find(name) for name in options["functions"]]
    calls = FrameReader().feed(body)
    ids = [call[4].decode() for call in calls]
    definitions = [functions[call[2]] for call in calls]
    inputs = [call[5] for call in calls]
    choices = None
    if "choices" in options:
        choices = [_unpack_choices(choice) for choice in options["choices"]]
    if "id" in options:
        choice = None if choices is None else choices[0]
        return StepRequest(ids[0], definitions[0], inputs[0], choice, options["explicit"])
    return GroupRequest(
        options["path"],
        GroupKind(options["kind"]),
        ErrorStrategy(options["strategy"]),
        ids,
        definitions,
        inputs,
        choices,
        options["limit"],
        options["priority"],
        options["timeout_s"],
    )


def pack_outcome(outcome: bytes | GroupOutcome) -> bytes:
    """A step's output, or a group's outcome, as the body of a message."""
    frames = FrameWriter()
    if isinstance(outcome, GroupOutcome):
        winner = -1 if outcome.winner is None else outcome.winner
        frames.add(VALUE, 0, len(outcome.values), winner)
        for index, value in enumerate(outcome.values):
            if value is not None:
                frames.add(VALUE, index, 0, 0, b"", value)
        for index, failure in outcome.failures.items():
            frames.add(FAILURE, index, 0, 0, b"", pack_error(failure))
    else:
        frames.add(VALUE, 0, 0, 0, b"", outcome)
    return frames.take()


def unpack_step(body: bytes) -> bytes:
    return FrameReader().feed(body)[0][5]


def unpack_group(body: bytes) -> GroupOutcome:
    frames = FrameReader().feed(body)
    _, _, size, winner, _, _ = frames[0]
    outcome = GroupOutcome([None] * size, {}, None if winner < 0 else winner)
    for kind, index, _, _, _, content in frames[1:]:
        if kind == VALUE:
            outcome.values[index] = content
        else:
            failure = unpack_error(content)
            assert isinstance(failure, StepFailed), "a group's failures are failed steps"
            outcome.failures[index] = failure
    return outcome


def pack_error(error: BaseException) -> bytes:
    if isinstance(error, StepFailed):
        fields = [
            error.step_id,
            error.type,
            error.message,
            error.traceback,
            error.attempts,
            error.mro,
        ]
        return orjson.dumps({"class": "StepFailed", "fields": fields})
    if isinstance(error, GroupTimeout):
        return orjson.dumps({"class": "GroupTimeout", "fields": [error.path, error.timeout_s]})
    name = type(error).__name__ if isinstance(error, KagziError) else "KagziError"
    return orjson.dumps({"class": name, "fields": [str(error)]})


def unpack_error(data: bytes) -> Exception:
    """An error of kagzi's own, of the classes that `errors` defines."""
    packed = orjson.loads(data)
    made = getattr(errors, packed["class"], KagziError)
    if not (isinstance(made, type) and issubclass(made, KagziError)):
        made = KagziError
    error: Exception = made(*packed["fields"])
    return error


def _pack_choices(choices: CallOptions | None) -> Any:
    if choices is None:
        return None
    retry = choices.retry
    policy = None
    if retry is not None:
        kinds = retry.on if isinstance(retry.on, tuple) else () if retry.on is None else (retry.on,)
        policy = {
            "max_attempts": retry.max_attempts,
            "initial": retry.initial,
            "factor": retry.factor,
            "max_delay": retry.max_delay,
            "jitter": retry.jitter,
            "on": [class_name(kind) for kind in kinds if isinstance(kind, type)],
        }
    return [choices.priority, choices.limit, choices.timeout_s, policy]


def _unpack_choices(packed: Any) -> CallOptions | None:
    if packed is None:
        return None
    priority, limit, timeout_s, policy = packed
    retry = None
    if policy is not None:
        names = policy.pop("on")
        retry = Retry(**policy, on=_OneOf(names) if names else None)
    return CallOptions(priority, limit, retry, timeout_s)


class _OneOf:
    """A retry predicate: errors of the classes with these names."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __call__(self, error: BaseException) -> bool:
        if isinstance(error, StepFailed):
            return any(error.is_a(name) for name in self._names)
        mro = [class_name(cls) for cls in type(error).__mro__]
        return any(name in mro for name in self._names)
