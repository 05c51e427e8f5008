"""Runs a workflow function over what is recorded of a run, and nothing else: to see where it goes.

The run is a `LiveRun` like a worker's, whose writer writes nothing and whose steps never begin. Its
event loop is one of its own, which tells when nothing can happen any more; its clock jumps to the
next timer, so nothing is waited for.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from kagzi._core import Gate, Step
from kagzi.definition import CallOptions, Definition, Workflow
from kagzi.elsewhere import Room
from kagzi.engine.clock import StoreClock
from kagzi.engine.group import Group
from kagzi.engine.patches import PATCHED
from kagzi.engine.runner import LiveRun
from kagzi.engine.tasks import install_factory, scope_of
from kagzi.engine.timers import Timer, Timers
from kagzi.engine.work import Work
from kagzi.scope import is_below
from kagzi.store.recorded import ClaimedRun
from kagzi.store.rows import RunRow

MOST_SKIPS = 1_000
PATIENCE_S = 1.0
NOBODY = UUID(int=0)


@dataclass(slots=True)
class Replayed:
    """Where the code went.

    Attributes:
        row: How the run would end; None if it waits.
        doom: What ended it from outside of the workflow function, a `NonDeterminism`.
        waits_for: (id, function) of what it waits for that is not recorded, in order of the calls;
            the function is "" where there is none.
        left: Ids of steps and groups that are recorded, and that it did not ask for.
    """

    row: RunRow | None = None
    doom: BaseException | None = None
    waits_for: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Replayer:
    """Replays runs, one at a time. For one thread at a time; `close` it."""

    def __init__(self, clock: StoreClock) -> None:
        self.worker_id = NOBODY
        self.clock = clock
        self.room = Room()
        self.processes = 0
        self.max_crashes = 2**31
        self.writer: Any = _Writer(self._row_put)
        self.executor: Any = _Executor()
        self.store: Any = None  # asked by the bodies of steps alone
        self._own_loop = _Loop(self._idle)
        self.loop: asyncio.AbstractEventLoop = self._own_loop
        self.loop.set_exception_handler(lambda *_: None)  # what a cut-off task leaves behind
        self._tasks: list[asyncio.Task[Any]] = []
        self.loop.set_task_factory(self._make_task)
        install_factory(self.loop)
        self._run: _Run | None = None
        self._row: RunRow | None = None
        self._interrupted: list[str] = []
        self._skips = 0
        self._patience_s = 0.0

    def close(self) -> None:
        with suppress(RuntimeError):  # one that would wait for ever
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def replay(self, claimed: ClaimedRun, workflow: Workflow[..., Any], over: bool) -> Replayed:
        """Run the workflow function until it ends, or waits for what is not recorded.

        Args:
            over: The run has ended: `ctx.patched` without a recorded answer is False.
        """
        run = self._run = _Run(self, claimed, workflow)
        run.patches.all_passed = over
        self._row, self._interrupted, self._tasks = None, [], []
        self._skips, self._patience_s = MOST_SKIPS, PATIENCE_S
        self.loop.call_soon(run.start)
        self.loop.run_forever()
        if self._row is None:
            self._see_interrupted(run, all_open=False)
        found = Replayed(self._row, run.doomed)
        if self._row is None:
            found.waits_for = run.waits_for()
        found.left = run.left(self._interrupted)
        self._clean_up(run)
        return found

    def _clean_up(self, run: _Run) -> None:
        """End what is left of the run's tasks."""
        self._run = None
        self.loop.call_soon(run.stop)
        for task in self._tasks:
            task.cancel()
        self.loop.run_forever()
        self._tasks = []

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        self._tasks.append(task)
        return task

    def _row_put(self, row: RunRow) -> None:
        """The workflow function has ended; what its other tasks had still to ask for, is open."""
        if self._run is not None and self._row is None:
            self._row = row
            self._see_interrupted(self._run, all_open=True)
            self.loop.stop()

    def _see_interrupted(self, run: _Run, all_open: bool) -> None:
        """Note the branches that were cut off: a replay may do that sooner than it was."""
        for task in self._tasks:
            scope = scope_of(task)
            cut_off = task.cancelled() if task.done() else all_open
            if cut_off and scope is not None and scope.path != scope.base:
                self._interrupted.append(scope.path)

    def _idle(self, timeout: float | None) -> float:
        """Nothing is ready; seconds to wait for something from outside, a thread for one."""
        run = self._run
        if run is None or self._row is not None or run.has_open_works():
            self.loop.stop()
        elif timeout is not None and self._skips:
            self._skips -= 1
            self._own_loop.ahead_s += timeout
        elif self._patience_s > 0:
            wait_s = min(0.05, self._patience_s)
            self._patience_s -= wait_s
            return wait_s
        else:
            self.loop.stop()
        return 0.0

    # What a live run asks of its worker.

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None:
        return None

    def begin(self, steps: list[Step]) -> None:
        raise AssertionError("no step begins in a replay")

    def run_left(self, run: LiveRun, row: RunRow) -> None:
        raise AssertionError("nothing becomes durable in a replay")

    def children_changed(self) -> None:
        raise AssertionError("no child is started in a replay")

    def is_crowded(self) -> bool:
        return False


class _Run(LiveRun):
    """A live run that only recalls."""

    def __init__(
        self, replayer: Replayer, claimed: ClaimedRun, workflow: Workflow[..., Any]
    ) -> None:
        claimed.steps = self._steps = _Recall(claimed.steps)
        claimed.groups = self._groups = _Recall(claimed.groups)
        super().__init__(replayer, claimed, workflow)
        self.doomed: BaseException | None = None

    def submit(self, steps: list[Step]) -> None:
        pass

    def set_timer(
        self, delay_s: float, callback: Callable[[], None], at: datetime | None = None
    ) -> Timer:
        # A timer that is not over is where the record ends. It is never set.
        return Timer(Timers(self.loop, _nothing), callback, at)

    def doom(self, error: BaseException) -> None:
        if self.doomed is None:
            self.doomed = error
        super().doom(error)

    def settle_down(self) -> None:
        pass  # it is never parked

    def _hear_now(self) -> None:
        pass  # what it was sent and has not taken yet is beyond the record

    def _warn_of_unawaited(self) -> None:
        pass

    def has_open_works(self) -> bool:
        """Whether something is waited for that is not recorded."""
        return any(not work.ended and _is_awaited(work) for work in self._works)

    def waits_for(self) -> list[tuple[str, str]]:
        """What is not recorded, and open: steps with their functions, else what asked."""
        found: list[tuple[str, str]] = []
        works = [work for work in self._works if not work.ended]
        for work in sorted(works, key=lambda work: (not _is_awaited(work), work.call_number)):
            steps = [(step.id, step.function) for step in work.steps()]
            found += steps if steps else [(work.path, "")]
        return found

    def left(self, interrupted: Iterable[str]) -> list[str]:
        """What is recorded and was not asked for; not of branches that were cut off.

        Nor what lies below a step that was asked for: its body does not run here.
        """
        asked = self._steps.asked
        cut_off = list(interrupted)
        found = [
            path
            for path, stored in self._steps.items()
            if path not in asked and stored.function != PATCHED
        ]
        found += [path for path in self._groups if path not in self._groups.asked]
        return [
            path
            for path in found
            if not any(above in asked for above in _above(path))
            and not any(is_below(path, branch) for branch in cut_off)
        ]


class _Recall(dict[str, Any]):
    """What is recorded, and which of it, or not of it, was asked for."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        super().__init__(recorded)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


class _Writer:
    """Takes rows as the checkpoint writer does, and writes none."""

    def __init__(self, row_put: Callable[[RunRow], None]) -> None:
        self._row_put = row_put

    def put_run(self, row: RunRow, left: object = None) -> None:
        self._row_put(row)

    def after_commit(self, callback: Callable[[], None]) -> None:
        pass  # what would be committed here is beyond the record

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("put_"):
            return _nothing
        raise AttributeError(name)


class _Executor:
    """Begins nothing, so it has nothing to withdraw."""

    def withdraw(self, step: Step) -> None:
        pass


class _Loop(asyncio.SelectorEventLoop):
    """Tells when nothing is ready, instead of waiting.

    Attributes:
        ahead_s: How far its clock was put forward.
    """

    def __init__(self, idle: Callable[[float | None], float]) -> None:
        self.ahead_s = 0.0
        super().__init__(_Selector(idle))

    def time(self) -> float:
        return super().time() + self.ahead_s


class _Selector(selectors.DefaultSelector):
    """Asks what to do where the loop would wait."""

    def __init__(self, idle: Callable[[float | None], float]) -> None:
        super().__init__()
        self._idle = idle

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or timeout == 0:
            return found
        return super().select(self._idle(timeout))


def _is_awaited(work: Work) -> bool:
    return work.awaited or (isinstance(work, Group) and work.stream is not None)


def _above(path: str) -> Iterable[str]:
    above = path.rpartition("/")[0]
    while above:
        yield above
        above = above.rpartition("/")[0]


def _nothing(*_: object) -> None:
    pass
