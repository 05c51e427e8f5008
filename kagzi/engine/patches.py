"""Changes of workflow code under runs that are under way: which run takes the new code.

The answer is a row in the writer's ordered stream, so every checkpoint behind it implies it. It
needs no wait: what is not committed yet, nobody has seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import orjson

from kagzi.engine.clock import StoreClock
from kagzi.engine.sleeping import TimeRow
from kagzi.engine.work import Home
from kagzi.model import SEPARATOR
from kagzi.scope import Scope

if TYPE_CHECKING:
    from kagzi.store.recorded import StoredAttempts

PATCHED = "kagzi.patched"


class PatchHome(Home, Protocol):
    """What this module needs of the run."""

    attempts: dict[str, StoredAttempts]


class Patches:
    """What `ctx.patched` answers in one life of a run.

    Attributes:
        all_passed: The run is over: whatever it has no answer for came after it.
    """

    def __init__(self, home: PatchHome, clock: StoreClock) -> None:
        self._home = home
        self._clock = clock
        self._answers: dict[tuple[str, str], bool] = {}
        self._below: dict[str, list[str]] | None = None
        self._at_base: list[str] = []
        self.all_passed = False

    def answer(self, scope: Scope, patch: str) -> bool:
        """One answer for all that asks in one scope. Raises `NonDeterminism`."""
        known = self._answers.get((scope.path, patch))
        if known is None:
            known = self._answers[scope.path, patch] = self._decide(scope, patch)
        return known

    def _decide(self, scope: Scope, patch: str) -> bool:
        path = scope.next_id(f"patched:{patch}")
        self._home.next_number()
        row = TimeRow(self._home, scope, path, PATCHED, patch)
        stored = row.recorded()
        if stored is not None:
            assert stored.output is not None, "an answer is recorded with its value"
            return bool(orjson.loads(stored.output))
        patched = not (self.all_passed or self._has_passed(scope))
        row.write(self._clock.now(), patched)
        return patched

    def _has_passed(self, scope: Scope) -> bool:
        """Whether something is recorded here that the code has not asked for yet in this life.

        Then an earlier life was further on. In doubt the answer is yes: the old code is right for
        every run that was started with it.
        """
        if self._below is None:
            self._below = self._names_below()
        if _is_one_left(self._below.get(scope.path), scope):
            return True
        # Explicit ids belong to the whole run, whichever of its tasks asked for them.
        return scope.path != scope.base and _is_one_left(self._at_base, scope.root)

    def _names_below(self) -> dict[str, list[str]]:
        """For each place, the names of what is recorded directly or further down in it."""
        home = self._home
        steps: list[str] = []
        for path, stored in home.recorded_steps.items():
            if stored.function == PATCHED:
                continue  # a call that was removed since asks no more
            steps.append(path.rpartition(SEPARATOR)[0] if stored.in_group else path)
            if not stored.in_group and SEPARATOR not in path:
                self._at_base.append(path)
        self._at_base += [path for path in home.attempts if SEPARATOR not in path]
        return _children(chain(steps, home.recorded_groups, home.attempts))


def _children(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for path in paths:
        while path:
            above, _, name = path.rpartition(SEPARATOR)
            names = found.setdefault(above, {})
            if name in names:
                break  # and what is above it is there, too
            names[name] = None
            path = above
    return {above: list(names) for above, names in found.items()}


def _is_one_left(names: list[str] | None, scope: Scope) -> bool:
    """Whether one of the names was not given out yet; those that were are dropped for good."""
    while names:
        if not scope.has_given(names[-1]):
            return True
        names.pop()
    return False
