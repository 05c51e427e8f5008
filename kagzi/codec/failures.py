"""Errors as JSON, and back as errors of kagzi. No recorded exception is ever rebuilt by its name.

`describe_exception` looks at an exception without trusting it: whatever its methods, attributes or
classes do, the answer is a record. Reading gives a `StepFailed` or a `RunFailed` with the recorded
names and texts. Only kagzi's own classes come back as themselves, from a fixed table.
"""

from __future__ import annotations

import os
import traceback as tb_module
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import orjson

from kagzi import errors
from kagzi.errors import AllStepsFailed, GroupTimeout, KagziError, RunFailed, StepFailed
from kagzi.names import recorded_module

MAX_MESSAGE_CHARS = 8_000
MAX_TRACEBACK_CHARS = 16_000
MAX_NAME_CHARS = 500
MAX_CAUSES = 8  # links of a cause chain, or members of a group, that are described
MAX_VISITED = 100_000  # exceptions looked at for failed steps
_FIRST_FRAMES, _LAST_FRAMES = 15, 40

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep

_OWN_ERRORS: dict[str, type[KagziError]] = {
    f"{errors.__name__}.{name}": cls
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, KagziError)
}

# Attributes of kagzi's errors that their JSON keeps, beside `path` of CodecError and GroupTimeout.
_KEPT = (
    *("step_id", "type", "message", "traceback", "attempts", "mro"),
    *("path", "timeout_s", "host", "database"),
)


# --- looking at exceptions ------------------------------------------------------------------
# The type's own descriptors, so that no property or metaclass of the user's runs.

_mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_module_of = type.__dict__["__module__"].__get__
_qualname_of = type.__dict__["__qualname__"].__get__
_cause_of = BaseException.__dict__["__cause__"].__get__
_context_of = BaseException.__dict__["__context__"].__get__
_suppressed_of = BaseException.__dict__["__suppress_context__"].__get__
_traceback_of = BaseException.__dict__["__traceback__"].__get__
_group_text = BaseExceptionGroup.__dict__["message"].__get__
_members_of = BaseExceptionGroup.__dict__["exceptions"].__get__


def _text(value: object, most: int) -> str:
    """`value` as a plain str of at most `most` characters, valid as UTF-8."""
    text = value if isinstance(value, str) else str(value)
    text = str.encode(text, "utf-8", "backslashreplace").decode("utf-8")
    if len(text) > most:
        text = f"{text[:most]}… ({len(text):,} characters)"
    return text


def _class_name(cls: type) -> str:
    try:
        return _text(f"{recorded_module(_module_of(cls))}.{_qualname_of(cls)}", MAX_NAME_CHARS)
    except Exception:
        return "unknown"


def _message(error: BaseException) -> str:
    try:
        return _text(str(error), MAX_MESSAGE_CHARS)
    except BaseException:  # a broken __str__ may raise anything
        try:
            return _text(BaseException.__str__(error), MAX_MESSAGE_CHARS)
        except BaseException:
            return f"<{_class_name(type(error))} whose text cannot be had>"


def _notes(error: BaseException) -> list[str]:
    try:
        notes = BaseException.__getattribute__(error, "__dict__").get("__notes__", ())
        return [_text(note, 1_000) for note in list(notes)[:20]] if type(notes) is list else []
    except BaseException:
        return []


def _is(error: BaseException, cls: type) -> bool:
    return cls in _mro_of(type(error))


def _next(error: BaseException) -> BaseException | None:
    """What a traceback would show above this one: its cause, else its context unless suppressed."""
    cause = _cause_of(error)
    if cause is None and not _suppressed_of(error):
        cause = _context_of(error)
    return cause  # type: ignore[no-any-return]


def _members(error: BaseException) -> Sequence[BaseException]:
    return _members_of(error) if _is(error, BaseExceptionGroup) else ()


def _reachable(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what its chain and its groups hold, each once."""
    seen: set[int] = set()
    stack = [error]
    while stack and len(seen) < MAX_VISITED:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        following = _next(one)
        if following is not None:
            stack.append(following)
        stack.extend(reversed(_members(one)))


# --- writing --------------------------------------------------------------------------------


def describe_exception(
    error: BaseException, *, traceback: bool = True, skip_frames: Sequence[str] = (_OWN_FOLDER,)
) -> bytes:
    """The exception as a JSON object. Never raises.

    Keys: `type` and `mro` (qualified names), `message`, `traceback` (text, "" unless asked for),
    and where there are any: `notes`; `causes` (the chain and the members of groups, nested, a few
    of them); `steps` (ids of every `StepFailed` in the chain and in groups, all of them); `groups`
    (paths of every `GroupTimeout` there); `kagzi` (attributes of an error of kagzi's own).

    Args:
        skip_frames: Prefixes of file names; frames of these files above the first other one are
            left out of the traceback.
    """
    try:
        return orjson.dumps(_describe(error, traceback, tuple(skip_frames)))
    except BaseException:
        name = _class_name(type(error))
        return orjson.dumps(
            {"type": name, "message": "<the error could not be described>", "mro": [name]}
        )


def _describe(error: BaseException, traceback: bool, skip: tuple[str, ...]) -> dict[str, Any]:
    record = _short(error)
    record["traceback"] = _formatted(error, skip) if traceback else ""
    steps: list[str] = []
    groups: list[str] = []
    for one in _reachable(error):
        if _is(one, RunFailed):
            continue  # its ids belong to another run
        if _is(one, StepFailed):
            _collect(one, "step_id", steps)
        elif _is(one, GroupTimeout):
            _collect(one, "path", groups)
    if steps:
        record["steps"] = list(dict.fromkeys(steps))
    if groups:
        record["groups"] = list(dict.fromkeys(groups))
    causes = _causes(error, MAX_CAUSES, {id(error)})
    if causes:
        record["causes"] = causes
    return record


def _collect(error: BaseException, name: str, into: list[str]) -> None:
    try:
        into.append(_text(getattr(error, name), 2_000))
    except BaseException:
        return


def _short(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    record: dict[str, Any] = {
        "type": _class_name(cls),
        "message": _message(error),
        "mro": [_class_name(base) for base in _mro_of(cls)[:50] if base is not object],
    }
    notes = _notes(error)
    if notes:
        record["notes"] = notes
    own = next((name for name in record["mro"] if name in _OWN_ERRORS), None)
    if own is not None:
        record["kagzi"] = _own_attributes(error)
        if _is(error, AllStepsFailed):
            record["kagzi"]["message"] = _text(_group_text(error), MAX_MESSAGE_CHARS)
            record["members"] = [_member(i, one) for i, one in enumerate(_members(error))]
    return record


def _member(index: int, error: BaseException) -> dict[str, Any]:
    """A failed step of a race; of the 21st and later ones no traceback and a short message."""
    record = _short(error)
    if index >= _FULL_MEMBERS:
        record["message"] = record["message"][:300]
        kept = record.get("kagzi", {})
        kept.pop("traceback", None)
        kept["message"] = kept.get("message", "")[:300]
    return record


_FULL_MEMBERS = 20


def _own_attributes(error: BaseException) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    try:
        attributes = BaseException.__getattribute__(error, "__dict__")
        for name in _KEPT:
            value = attributes.get(name)
            if isinstance(value, str):
                limit = MAX_TRACEBACK_CHARS if name == "traceback" else MAX_MESSAGE_CHARS
                kept[name] = _text(value, limit)
            elif type(value) is int or type(value) is float:
                kept[name] = value
            elif type(value) is tuple:
                kept[name] = [_text(one, MAX_NAME_CHARS) for one in value[:50]]
    except BaseException:
        return kept
    return kept


def _causes(error: BaseException, most: int, seen: set[int]) -> list[dict[str, Any]]:
    """The next link of the chain and the members, as short records with causes of their own."""
    found: list[dict[str, Any]] = []
    for one in [_next(error), *_members(error)[:MAX_CAUSES]]:
        if one is None or id(one) in seen or most <= 0:
            continue
        seen.add(id(one))
        record = _short(one)
        record.pop("members", None)
        deeper = _causes(one, most - 1 - len(found), seen)
        if deeper:
            record["causes"] = deeper
        found.append(record)
    return found


def _formatted(error: BaseException, skip: tuple[str, ...]) -> str:
    """Like `traceback.format_exception`, oldest first, but on our terms: bounded and unfailing."""
    chain: list[BaseException] = []
    joints: list[str] = []
    one: BaseException | None = error
    while one is not None and len(chain) < MAX_CAUSES and not any(one is e for e in chain):
        chain.append(one)
        caused = _cause_of(one) is not None
        joints.append(_CAUSED if caused else _DURING)
        one = _next(one)
    parts: list[str] = []
    for index in range(len(chain) - 1, -1, -1):
        parts.append(_formatted_one(chain[index], skip))
        if index:
            parts.append(joints[index - 1])
    text = "".join(parts)
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        cut = len(text) - 2 * half
        text = f"{text[:half]}\n  … ({cut:,} characters left out) …\n{text[-half:]}"
    return text


_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"


def _formatted_one(error: BaseException, skip: tuple[str, ...], indent: str = "") -> str:
    try:
        frames = _frames(_traceback_of(error), skip)
    except BaseException:
        frames = ["  (the frames could not be read)\n"]
    lines = ["Traceback (most recent call last):\n", *frames] if frames else []
    message = _message(error)
    name = _class_name(type(error)).removeprefix("builtins.")
    lines.append(f"{name}: {message}\n" if message else f"{name}\n")
    lines += [f"{note}\n" for note in _notes(error)]
    text = _text("".join(lines), MAX_TRACEBACK_CHARS)
    if indent:
        text = "".join(f"{indent}{line}\n" for line in text.splitlines())
    elif members := _members(error):
        for index, member in enumerate(members[:MAX_CAUSES]):
            text += f"  + member {index + 1} of {len(members)}\n"
            text += _formatted_one(member, skip, "  | ")
    return text


def _frames(first: TracebackType | None, skip: tuple[str, ...]) -> list[str]:
    links: list[TracebackType] = []
    link = first
    while link is not None and skip and link.tb_frame.f_code.co_filename.startswith(skip):
        link = link.tb_next
    if link is None:
        link = first  # all of them are ours: the error is too
    while link is not None:
        links.append(link)
        link = link.tb_next
    if len(links) <= _FIRST_FRAMES + _LAST_FRAMES:
        return _format_links(links)
    cut = len(links) - _FIRST_FRAMES - _LAST_FRAMES
    return [
        *_format_links(links[:_FIRST_FRAMES]),
        f"  … ({cut:,} frames left out) …\n",
        *_format_links(links[-_LAST_FRAMES:]),
    ]


def _format_links(links: Sequence[TracebackType]) -> list[str]:
    pairs = [(link.tb_frame, link.tb_lineno) for link in links]
    return tb_module.StackSummary.extract(iter(pairs), capture_locals=False).format()


# --- reading --------------------------------------------------------------------------------


def read_failure(data: bytes, step_id: str, attempts: int) -> StepFailed:
    """The `StepFailed` of a step whose last attempt left this record."""
    record = _record(data)
    return StepFailed(
        step_id,
        _string(record, "type", "unknown"),
        _string(record, "message"),
        _string(record, "traceback"),
        attempts,
        _strings(record, "mro"),
    )


def failed_steps(data: bytes) -> list[str]:
    """Ids of the steps whose failures are in the cause of this recorded error, in its order."""
    return _strings(_record(data), "steps")


def timed_out_groups(data: bytes) -> list[str]:
    """Paths of the groups whose timeouts are in the cause of this recorded error."""
    return _strings(_record(data), "groups")


def kagzi_error_from(data: bytes, run_id: str = "") -> RunFailed:
    """What `handle.result()` raises for a run that left this record.

    Of class `RunFailed`; and when the recorded exception was one of kagzi's own, of that class too,
    with its attributes. `type`, `message`, `traceback`, `attempts` and `mro` are then those of the
    failed step (for `StepFailed`), else those of the exception that left the workflow function.
    """
    record = _record(data)
    own = next((_OWN_ERRORS[n] for n in _strings(record, "mro") if n in _OWN_ERRORS), None)
    cls = _run_failed_class(own)
    name, message = _string(record, "type", "unknown"), _string(record, "message")
    text = message if name in _OWN_ERRORS else f"{name}: {message}"
    kept = record.get("kagzi")
    attributes: dict[str, Any] = {"type": name, "message": message}
    attributes |= {"traceback": _string(record, "traceback"), "mro": _strings(record, "mro")}
    if isinstance(kept, dict):
        attributes |= {key: value for key, value in kept.items() if key in _KEPT}
    error: Any
    if issubclass(cls, BaseExceptionGroup):
        error = cls.__new__(cls, str(attributes.pop("message")), _rebuilt_members(record))
    else:
        error = cls.__new__(cls, text)
    for key, value in attributes.items():
        setattr(error, key, tuple(value) if type(value) is list else value)
    error.text = text
    error.run_id = run_id
    error.steps = tuple(_strings(record, "steps"))
    error.recorded = bytes(data)
    for note in _strings(record, "notes"):
        error.add_note(note)
    return error  # type: ignore[no-any-return]


_classes: dict[type[KagziError] | None, type[RunFailed]] = {}


def _run_failed_class(own: type[KagziError] | None) -> type[RunFailed]:
    """`RunFailed` that is also `own`; made once."""
    if own not in _classes:
        bases: tuple[type, ...] = (RunFailed,)
        if own is not None and not issubclass(RunFailed, own):
            bases = (own,) if issubclass(own, RunFailed) else (RunFailed, own)
        name = "RunFailed" if len(bases) == 1 else f"RunFailed[{bases[1].__name__}]"
        body = {
            "__init__": lambda self, *args: None,
            "__str__": lambda self: self.text,
            "__reduce__": lambda self: (kagzi_error_from, (self.recorded, self.run_id)),
            "__module__": errors.__name__,
            "__qualname__": name,
        }
        return _classes.setdefault(own, type(name, bases, body))
    return _classes[own]


def _rebuilt_members(record: dict[str, Any]) -> list[StepFailed]:
    members = [_rebuilt_step(one) for one in record.get("members", ()) if isinstance(one, dict)]
    return members or [StepFailed("?", "unknown", "the members were not recorded")]


def _rebuilt_step(record: dict[str, Any]) -> StepFailed:
    kept = record.get("kagzi")
    kept = kept if isinstance(kept, dict) else {}
    attempts = kept.get("attempts")
    return StepFailed(
        _string(kept, "step_id"),
        _string(kept, "type", _string(record, "type", "unknown")),
        _string(kept, "message", _string(record, "message")),
        _string(kept, "traceback"),
        attempts if type(attempts) is int else 1,
        _strings(kept, "mro"),
    )


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(data)
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    return {"type": "unknown", "message": f"the record cannot be read: {bytes(data[:200])!r}"}


def _string(record: dict[str, Any], key: str, default: str = "") -> str:
    value = record.get(key)
    return value if isinstance(value, str) else default


def _strings(record: dict[str, Any], key: str) -> list[str]:
    value = record.get(key)
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
