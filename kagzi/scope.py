"""Step ids: names, numbers, and where a name is counted.

A scope is the place in which names are numbered: a run's root, a task created inside it, or the
body of a step. Numbers are given at the call, never at completion, so they do not depend on which
step is faster. Nothing here knows tasks or loops; the runner says which scope is whose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from kagzi.errors import InvalidName, NestingTooDeep, StepConflict
from kagzi.model import MAX_NESTING, MAX_STEP_ID_BYTES, NUMBER_SIGN, SEPARATOR, check_name

_KEY_ESCAPES = re.compile(r"[/#%\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Scope:
    """Numbers the names used in one place.

    Args:
        base: Path of the step whose body this belongs to; "" in workflow code. Explicit ids
            count from here, whatever task they are used in.
        path: Prefix of the ids made here; below `base`.
        depth: Steps of groups around this place.
    """

    __slots__ = (
        "_counts",
        "_explicit",
        "_unnamed",
        "base",
        "deadlines",
        "depth",
        "owner",
        "path",
        "root",
        "run",
    )

    def __init__(self, base: str = "", path: str | None = None, depth: int = 0) -> None:
        self.base = base
        self.path = base if path is None else path
        self.depth = depth
        self.root = self  # where explicit ids belong, for every branch of this place
        self.owner: Any = None  # the step whose body this is, if any
        self.run: Any = None
        self.deadlines: list[Any] = []  # of the blocks around the code that runs here
        self._counts: dict[str, int] = {}
        self._explicit: dict[str, object] = {}
        self._unnamed: Branch | None = None

    def next_id(self, name: str) -> str:
        """Id of the next step or group of this name: `name`, then `name#2` and so on.

        Raises:
            StepConflict: The name is in use as an explicit id.
        """
        self.settle_branch()
        if name in self._explicit:
            raise StepConflict(
                f"{joined(self.path, name)!r} would be the id of an unnamed step or group, and is "
                "in use as an explicit id; give one of them another"
            )
        return joined(self.path, self._numbered(name))

    def explicit_id(self, name: str, work: object = None) -> str:
        """Id that `id=name` stands for: the same from every task of a run or step body.

        Args:
            work: What is to be done under it, for comparison.

        Raises:
            StepConflict: The id is in use for other work.
        """
        path = joined(self.base, check_name("step id", name, MAX_STEP_ID_BYTES))
        root = self.root
        if name in root._counts:
            raise StepConflict(
                f"step id {path!r} is in use for an unnamed step or group of this name; "
                "give one of them another"
            )
        if root._explicit.setdefault(name, work) != work:
            raise StepConflict(
                f"step id {path!r} is in use with another function or input; "
                "give one of them another id"
            )
        return path

    def has_given(self, name: str) -> bool:
        """Whether a step, group or task here has this name (with its number) by now."""
        bare, _, number = name.partition(NUMBER_SIGN)
        if self._counts.get(bare, 0) >= int(number or 1):
            return True
        return self.path == self.base and name in self.root._explicit

    def branch(self, name: Callable[[], str]) -> Branch:
        """Scope of a task made here. `name` is asked at the next event, when the task has one."""
        self.settle_branch()
        self._unnamed = Branch(self, name)
        return self._unnamed

    def settle_branch(self) -> None:
        """Number the task made last, now that its name is known."""
        branch, self._unnamed = self._unnamed, None
        if branch is not None:
            name = re.sub(r"[/#\s\x00-\x1f]", "_", branch.name()) or "task"
            branch.scope = Scope(
                self.base, joined(self.path, self._numbered(name[:120])), self.depth
            )
            branch.scope.owner, branch.scope.run = self.owner, self.run
            branch.scope.root = self.root
            branch.scope.deadlines = [block for block in self.deadlines if block.inside]
            branch.name = str  # the task's coroutine is not kept alive

    def check_depth(self, path: str) -> None:
        """Raises `NestingTooDeep` if no group may be opened here."""
        if self.depth >= MAX_NESTING:
            raise NestingTooDeep(
                f"group {path!r} would be {self.depth + 1} groups deep; at most {MAX_NESTING} "
                "are allowed: does a step start itself without an end?"
            )

    def _numbered(self, name: str) -> str:
        count = self._counts.get(name, 0) + 1
        self._counts[name] = count
        return name if count == 1 else f"{name}{NUMBER_SIGN}{count}"


class Branch:
    """A task's scope that is numbered as soon as anything else happens."""

    __slots__ = ("name", "parent", "scope")

    def __init__(self, parent: Scope, name: Callable[[], str]) -> None:
        self.parent = parent
        self.name = name
        self.scope: Scope | None = None

    def get(self) -> Scope:
        if self.scope is None:
            self.parent.settle_branch()
        assert self.scope is not None, "a branch is settled by its parent before it is replaced"
        return self.scope


def joined(prefix: str, name: str) -> str:
    """`prefix/name`. Raises `InvalidName` beyond the length that is stored."""
    path = f"{prefix}{SEPARATOR}{name}" if prefix else name
    if len(path) * 4 > MAX_STEP_ID_BYTES and len(path.encode()) > MAX_STEP_ID_BYTES:
        raise InvalidName(
            f"step id {path[:80]!r}… has {len(path.encode())} bytes; at most {MAX_STEP_ID_BYTES} "
            "are stored: use shorter names or keys"
        )
    return path


def member_ids(path: str, size: int) -> list[str]:
    """Ids of a group's steps by their place."""
    joined(path, str(size))
    prefix = path + SEPARATOR
    return [f"{prefix}{index}" for index in range(size)]


def keyed_ids(path: str, keys: Iterable[object]) -> list[str]:
    """Ids of a group's steps by their keys, with `/`, `#`, `%` and control characters escaped.

    Raises:
        InvalidName: A key that is not a non-empty str, comes twice, or is too long.
    """
    ids = []
    seen = set()
    for key in keys:
        if not isinstance(key, str) or not key:
            raise InvalidName(f"a key of group {path!r} must be a non-empty str, got {key!r}")
        if key in seen:
            raise InvalidName(f"key {key!r} comes twice in group {path!r}; keys must be unique")
        seen.add(key)
        try:
            key.encode()
        except UnicodeEncodeError:
            raise InvalidName(f"key {key!r} holds half of a surrogate pair") from None
        escaped = _KEY_ESCAPES.sub(lambda found: f"%{ord(found.group()):02X}", key)
        ids.append(joined(path, escaped))
    return ids


def is_below(step_id: str, prefix: str) -> bool:
    """Whether a path lies strictly below another. Everything lies below ""."""
    return not prefix or step_id.startswith(prefix + SEPARATOR)
