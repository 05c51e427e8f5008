"""The pool, coordinator's side: starts processes, sends frames, notices deaths, replaces.

A process is reached over one socket pair. Its death is the end of that stream; which step killed it
is read from the marks it left in shared memory. Where they do not name one, the suspects run again
one at a time in a process of their own, and the one that dies alone is it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import multiprocessing.util  # its own clearing up at exit is set up before ours, so it comes after
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any

from kagzi._core import ENDED, LANE_ALONE, WAITING, Step
from kagzi.background import cancel_all
from kagzi.codec.failures import describe_exception
from kagzi.errors import MissingMainGuard, PoolStartFailed, StepCrashed, StepTimeout
from kagzi.pool import child
from kagzi.pool.link import Answers, Feeder, PoolLink
from kagzi.pool.marks import make_cells, read_marks, read_running

logger = logging.getLogger("kagzi.pool")

START_TIMEOUT_S = 60.0
NEIGHBOUR_GRACE_S = 2.0
WATCH_S = 0.25
MOST_CUT_OFF = 5
REAP_S = 5.0
LOOK_S = 0.005


class Pool:
    """Keeps a number of pool processes up.

    Args:
        size: How many.
        executor: Whose links they become.
        answers: Told how bodies end.
        make_context: Importable; makes the Context of a body in a pool process.
        modules: Imported by each process at its start.
        on_lost: Told of each process that ended before its time, and why.
    """

    def __init__(
        self,
        size: int,
        executor: Feeder,
        answers: Answers,
        make_context: Any,
        modules: tuple[str, ...] = (),
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.size = size
        self.answers = answers
        self.executor = executor
        self._make_context = make_context
        self._modules = modules
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._links: set[PoolLink] = set()
        self._unreaped: set[Any] = set()  # processes, also such as have no link any more
        self._tasks: set[asyncio.Task[Any]] = set()
        self._suspects: set[Step] = set()
        self._suspects_moved = asyncio.Event()
        self._cut_off: dict[Step, int] = {}  # how often by another's crash
        self._quarantine: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._is_held = False
        self.started = 0
        self.deaths = 0
        _pools.add(self)

    async def open(self) -> None:
        """Start the processes; returns when all are ready.

        Raises:
            PoolStartFailed: One ended before it was ready.
        """
        await asyncio.gather(*(self._start() for _ in range(self.size)))
        self._watch = self._loop.create_task(self._watch_timeouts())

    async def close(self) -> None:
        """Kill the processes and wait until they are gone."""
        self._closing = True
        tasks = [*self._tasks]
        if self._watch is not None:
            tasks.append(self._watch)
        if self._quarantine is not None:
            tasks.append(self._quarantine)
        await cancel_all(tasks)
        links = list(self._links)
        for link in links:
            link.kill()
            link.close()
        await asyncio.gather(*(asyncio.to_thread(_reap, process) for process in self._unreaped))
        self._unreaped.clear()
        for link in links:
            link.cells = None
        self._links.clear()

    def hold(self, held: bool) -> None:
        """Take nothing from the processes while `held`; soon they begin no more bodies either."""
        self._is_held = held
        for link in self._links:
            if link.joined:
                link.hold(held)

    @property
    def process_ids(self) -> list[int]:
        return [link.process_id for link in self._links if link.process_id]

    # --- starting ---------------------------------------------------------------------------

    async def _start(self, alone: bool = False) -> PoolLink:
        link = PoolLink(self, self.executor, alone)
        self._links.add(link)
        ours, theirs = socket.socketpair()
        descriptor, link.cells = make_cells()
        spawning = self._loop.run_in_executor(
            None, _spawn, theirs, descriptor, self._make_context, self._modules
        )
        try:
            link.process = await asyncio.shield(spawning)
        except BaseException as error:
            ours.close()
            self._links.discard(link)
            link.cells = None
            if not isinstance(error, Exception):
                await _end_unwanted(spawning)
                raise
            raise PoolStartFailed(f"a pool process could not be started: {error}") from error
        finally:
            theirs.close()
            os.close(descriptor)
        self._unreaped.add(link.process)
        ours.setblocking(False)
        await self._loop.connect_accepted_socket(lambda: link, ours)
        try:
            await asyncio.wait_for(asyncio.shield(link.ready), START_TIMEOUT_S)
        except (TimeoutError, PoolStartFailed) as error:
            link.kill()
            link.close()
            code = await self._reap(link.process)
            if code == child.NO_GUARD:
                raise MissingMainGuard(
                    "the script starts kagzi when it is imported, and pool processes import it: "
                    'put what starts kagzi under `if __name__ == "__main__":`'
                ) from None
            raise PoolStartFailed(
                f"a pool process was not ready: {error or 'no answer'} (exit code {code}); what it "
                "said itself is on the standard error stream"
            ) from None
        if link not in self._links:
            await self._reap(link.process)
            raise PoolStartFailed("a pool process ended as soon as it was ready")
        self.started += 1
        link.joined = True
        link.hold(self._is_held)
        self.executor.add_link(link)
        return link

    async def _reap(self, process: Any) -> int | None:
        """Wait for the end of one; its exit code."""
        code = await asyncio.to_thread(_reap, process)
        self._unreaped.discard(process)
        return code

    def _start_another(self) -> None:
        if self._closing:
            return
        task: asyncio.Task[Any] = self._loop.create_task(self._restart())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self, alone: bool = False) -> PoolLink:
        pause_s = 0.1
        while True:
            try:
                return await self._start(alone)
            except (PoolStartFailed, MissingMainGuard) as error:
                logger.error("%s; trying again in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 10.0)

    # --- deaths -----------------------------------------------------------------------------

    def replace(self, link: PoolLink, reason: str) -> None:
        """Let a process finish what it can for a moment, then kill it; another one takes over."""
        if link.leaving or self._closing:
            return
        link.leaving = True
        link.place.open = False
        logger.warning("pool process %d is replaced: %s", link.process_id, reason)
        self._on_lost(f"process {link.process_id} is replaced: {reason}")
        if not link.alone:
            self._start_another()
        task = self._loop.create_task(self._retire(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, link: PoolLink) -> None:
        endings = [self.executor.ending(step) for step in link.steps.values()]
        if endings:
            await asyncio.wait(endings, timeout=NEIGHBOUR_GRACE_S)
        link.kill()

    def lost(self, link: PoolLink) -> None:
        """A process is gone: find out whose fault it was, and let the others run again."""
        self._links.discard(link)
        if not link.ready.done():
            link.ready.set_exception(PoolStartFailed("it ended before it was ready"))
            link.ready.exception()
        if self._closing or not link.joined:
            link.cells = None
            return
        self.deaths += 1
        task = self._loop.create_task(self._reap(link.process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.executor.remove_link(link)
        steps, link.steps = link.steps, {}
        for step in steps.values():
            link.finish(step)
        assert link.cells is not None, "a process that was ready has its cells"
        running, begun = read_marks(link.cells)
        link.cells = None
        if link.leaving:
            # Killed by us: whoever overstayed has been told already.
            self.answers.again(list(steps.values()))
            return
        if not link.alone:
            self._start_another()
        suspects = [steps.pop(number) for number in running if number in steps]
        if not suspects:
            suspects = [steps.pop(number) for number in begun if number in steps]
        if link.alone and not suspects:
            suspects, steps = list(steps.values()), {}
        named = link.alone or len(suspects) == 1
        names = ", ".join(repr(step.id) for step in suspects[:5]) or "no step"
        self._on_lost(f"process {link.process_id} died while running {names}")
        again, often = self._cut_off_again(steps.values())
        self.answers.again(again)
        if named:
            for step in suspects:
                logger.warning(
                    "pool process %d died while running step %r", link.process_id, step.id
                )
                self._fail(link, step, _crash(link))
            suspects = []
        self._suspect([*suspects, *often])
        self._suspects_moved.set()

    def _cut_off_again(self, steps: Iterable[Step]) -> tuple[list[Step], list[Step]]:
        """Apart: those that were cut off many times. One of these may kill where no mark tells."""
        counts = {step: count for step, count in self._cut_off.items() if step.state != ENDED}
        again: list[Step] = []
        often: list[Step] = []
        for step in steps:
            counts[step] = count = self._cut_off.get(step, 0) + 1
            (again if count < MOST_CUT_OFF else often).append(step)
        self._cut_off = counts
        return again, often

    def _fail(self, link: PoolLink, step: Step, error: Exception) -> None:
        now_us = time.time_ns() // 1000
        wanted = step.definition.retry.wants(error)
        self.answers.failed(
            step, describe_exception(error), wanted, now_us, now_us, link.process_id
        )

    # --- suspects ---------------------------------------------------------------------------

    def _suspect(self, steps: list[Step]) -> None:
        """Let these run one at a time, each without neighbours: the one that dies alone is it."""
        steps = self.answers.cut_off(steps)
        for step in steps:
            step.lane = LANE_ALONE
            self._suspects.add(step)
        self.executor.submit(steps)
        for step in steps:
            self.executor.ending(step).add_done_callback(partial(self._suspect_ended, step))
        if self._suspects and self._quarantine is None:
            self._quarantine = self._loop.create_task(self._run_suspects())

    def _suspect_ended(self, step: Step, _: object) -> None:
        self._suspects.discard(step)
        self._suspects_moved.set()

    def suspect_waits(self, link: PoolLink) -> None:
        """Others go on in another process meanwhile: they may be what it waits for."""
        link.place.open = False
        self._suspects_moved.set()

    async def _run_suspects(self) -> None:
        """Keep a process for them, as long as there are any."""
        try:
            while self._suspects:
                self._suspects_moved.clear()
                links = [link for link in self._links if link.alone and not link.leaving]
                for link in links:
                    if not link.place.open and not link.steps:
                        self._dismiss(link)
                waiting = any(step.state == WAITING for step in self._suspects)
                if waiting and not any(link.place.open for link in links):
                    await self._restart(alone=True)
                else:
                    await self._suspects_moved.wait()
        finally:
            self._quarantine = None
            for link in [link for link in self._links if link.alone]:
                self._dismiss(link)

    def _dismiss(self, link: PoolLink) -> None:
        link.leaving = True
        link.kill()

    # --- bodies that block their process ----------------------------------------------------

    async def _watch_timeouts(self) -> None:
        """Replace a process in which a body runs well past its timeout.

        The process sees to timeouts itself, unless that body blocks its loop, or (compiled code
        that keeps the interpreter's lock) everything.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for link in list(self._links):
                if link.cells is not None and not link.leaving:
                    self._look_at(link, link.cells, now)

    def _look_at(self, link: PoolLink, cells: memoryview, now: float) -> None:
        before = link.seen_running
        link.seen_running = {
            number: before.get(number, now)
            for number in read_running(cells)
            if number in link.steps and link.steps[number].timeout_us
        }
        for number, since in link.seen_running.items():
            timeout_s = link.steps[number].timeout_us / 1e6
            if now - since > timeout_s + child.CANCEL_GRACE_S:
                step = link.steps.pop(number)
                link.finish(step)
                self._fail(link, step, StepTimeout(f"no result within {timeout_s:g} s"))
                self.replace(link, f"step {step.id!r} blocks it past its timeout")
                return


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()

# For multiprocessing's objects. Two threads that read how a process ended both read its descriptor;
# by then it may be that of a process that is being started, which would wait for ever for its pid.
_one_at_a_time = threading.Lock()


@atexit.register
def _kill_left() -> None:
    """A program that ends without closing its workers takes their processes with it.

    SIGTERM, which multiprocessing would send, pool processes leave to their coordinator.
    """
    for pool in _pools:
        for link in pool._links:
            link.kill()


class _Descriptor:
    """A file descriptor that travels to a process while it is started."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        return _detach, (DupFd(self._descriptor),)


def _detach(travelled: Any) -> int:
    return int(travelled.detach())


def _spawn(
    channel: socket.socket, descriptor: int, make_context: Any, modules: tuple[str, ...]
) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kagzi.pool.child", make_context.__module__])
    process = context.Process(
        target=child.main,
        args=(channel, _Descriptor(descriptor), make_context, modules),
        daemon=True,
    )
    with _one_at_a_time:
        process.start()
        # Else whoever starts a process of any kind looks after ours, too, in a thread of its own.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return process


async def _end_unwanted(spawning: asyncio.Future[Any]) -> None:
    """Nobody waits any more for a process that is being started, which cannot be stopped."""
    with suppress(Exception):
        process = await spawning
        process.kill()
        await asyncio.to_thread(_reap, process)


def _reap(process: Any) -> int | None:
    """Wait for a process that was killed or has ended; its exit code, None if that takes long."""
    until_s = time.monotonic() + REAP_S
    while True:
        with _one_at_a_time:
            try:
                code: int | None = process.exitcode
                if code is not None:
                    process.close()  # its descriptors, which a cycle would keep for a while
                    return code
            except ValueError:  # closed already: somebody has waited for it meanwhile
                return None
        if time.monotonic() > until_s:
            return None
        time.sleep(LOOK_S)


def _crash(link: PoolLink) -> StepCrashed:
    return StepCrashed(
        f"pool process {link.process_id} died while running it (a crash, os._exit, a kill, or "
        "out of memory)"
    )
