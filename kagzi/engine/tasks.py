"""Which task works in which scope: a task factory that gives tasks made inside a run their own.

So branches under `asyncio.gather` or a `TaskGroup` number their steps apart, however they
interleave. The scope belongs to the task, not to its context variables, so that tasks which share a
`context=` stay apart too.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

from kagzi.scope import Branch, Scope

_scopes: WeakKeyDictionary[asyncio.Task[Any], Scope | Branch] = WeakKeyDictionary()
# Python 3.13.0 names a task that a factory made, and nobody named, "None".
_DEFAULT_NAME = re.compile(r"Task-\d+|None")
_WAIT_FOR = asyncio.wait_for.__code__
_MAKES_A_TASK = sys.version_info < (3, 12)

Wrap = Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]


def install_factory(loop: asyncio.AbstractEventLoop, wrap: Wrap | None = None) -> None:
    """Make the loop give scopes to tasks that are created inside a scope.

    A factory that is there already still makes the tasks. Installing twice changes nothing.

    Args:
        wrap: Applied to each coroutine of a task that is made.
    """
    previous = loop.get_task_factory()
    if isinstance(previous, _Factory):
        return
    loop.set_task_factory(_Factory(previous, wrap))


def assign_scope(task: asyncio.Task[Any], scope: Scope) -> None:
    _scopes[task] = scope


def current_scope() -> Scope | None:
    """Scope of the task that runs now, if it has one."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    return None if task is None else scope_of(task)


def scope_of(task: asyncio.Task[Any]) -> Scope | None:
    """Scope of a task, if it has one."""
    found = _scopes.get(task)
    return found if found is None or isinstance(found, Scope) else found.get()


class _Factory:
    def __init__(self, previous: Any, wrap: Wrap | None) -> None:
        self._previous = previous
        self._wrap = wrap

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Future[Any]:
        if isinstance(coroutine, asyncio.Future):
            coroutine = _wait(coroutine)
        original = coroutine
        if self._wrap is not None:
            coroutine = self._wrap(coroutine)
        task: asyncio.Task[Any]
        if self._previous is not None:
            task = self._previous(loop, coroutine, **options)
        else:
            task = asyncio.Task(coroutine, loop=loop, **options)
        if _scopes:
            parent = current_scope()
            if parent is not None:
                if _MAKES_A_TASK and _called_by_wait_for():
                    _scopes[task] = parent
                else:
                    _scopes[task] = parent.branch(partial(_task_name, ref(task), original))
        return task


def _task_name(reference: ref[asyncio.Task[Any]], coroutine: Any) -> str:
    task = reference()
    name = "Task-0" if task is None else task.get_name()
    if _DEFAULT_NAME.fullmatch(name):
        name = getattr(coroutine, "__qualname__", None) or type(coroutine).__name__
    return name


def _called_by_wait_for() -> bool:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code is _WAIT_FOR:
            return True
        frame = frame.f_back
    return False


async def _wait(future: asyncio.Future[Any]) -> Any:
    return await future
