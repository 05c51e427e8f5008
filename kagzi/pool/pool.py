"""The pool, coordinator's side: starts processes, sends frames, notices deaths, replaces.

A process is reached over one socket pair. Its death is the end of that stream; which step killed it
is read from the marks it left in shared memory. Where they do not name one, the suspects run again
one at a time in a process of their own, and the one that dies alone is it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
import time
from collections import deque
from multiprocessing.reduction import DupFd
from typing import Any

from kagzi._core import LANE_ALONE, Step
from kagzi.errors import MissingMainGuard, PoolStartFailed, StepCrashed, StepTimeout
from kagzi.failures import describe_exception
from kagzi.pool import child, wire
from kagzi.pool.link import Answers, Feeder, PoolLink
from kagzi.pool.marks import make_cells, read_marks

logger = logging.getLogger("kagzi.pool")

START_TIMEOUT_S = 60.0
NEIGHBOUR_GRACE_S = 2.0
WATCH_S = 0.25


class Pool:
    """Keeps a number of pool processes up.

    Args:
        size: How many.
        executor: Whose links they become.
        answers: Told how bodies end.
        make_context: Importable; makes the Context of a body in a pool process.
        modules: Imported by each process at its start.
    """

    def __init__(
        self,
        size: int,
        executor: Feeder,
        answers: Answers,
        make_context: Any,
        modules: tuple[str, ...] = (),
    ) -> None:
        self.size = size
        self.answers = answers
        self.executor = executor
        self._make_context = make_context
        self._modules = modules
        self._loop = asyncio.get_running_loop()
        self._links: set[PoolLink] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects: deque[Step] = deque()
        self._quarantine: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._failures = 0
        self.started = 0
        self.deaths = 0

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
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links = list(self._links)
        for link in links:
            link.kill()
            link.close()
        await asyncio.gather(
            *(asyncio.to_thread(_reap, link.process) for link in links if link.process is not None)
        )
        self._links.clear()

    @property
    def process_ids(self) -> list[int]:
        return [link.process_id for link in self._links if link.process_id]

    # --- starting ---------------------------------------------------------------------------

    async def _start(self, alone: bool = False) -> PoolLink:
        link = PoolLink(self, self.executor, alone)
        self._links.add(link)
        ours, theirs = socket.socketpair()
        descriptor, link.cells = make_cells()
        try:
            link.process = await asyncio.to_thread(
                _spawn, theirs, descriptor, self._make_context, self._modules
            )
        except Exception as error:
            ours.close()
            self._links.discard(link)
            raise PoolStartFailed(f"a pool process could not be started: {error}") from error
        finally:
            theirs.close()
            os.close(descriptor)
        ours.setblocking(False)
        await self._loop.connect_accepted_socket(lambda: link, ours)
        try:
            await asyncio.wait_for(asyncio.shield(link.ready), START_TIMEOUT_S)
        except (TimeoutError, PoolStartFailed) as error:
            link.kill()
            link.close()
            await asyncio.to_thread(_reap, link.process)
            if link.process.exitcode == child.NO_GUARD:
                raise MissingMainGuard(
                    "the script starts kagzi when it is imported, and pool processes import it: "
                    'put what starts kagzi under `if __name__ == "__main__":`'
                ) from None
            raise PoolStartFailed(
                f"a pool process was not ready: {error or 'no answer'} (exit code "
                f"{link.process.exitcode}); what it said itself is on the standard error stream"
            ) from None
        self.started += 1
        self.executor.add_link(link)
        return link

    def _start_another(self) -> None:
        if self._closing:
            return
        task = self._loop.create_task(self._restart())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self) -> None:
        pause_s = 0.1
        while True:
            try:
                await self._start()
                return
            except PoolStartFailed as error:
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
            return
        if self._closing:
            return
        self.deaths += 1
        self._loop.run_in_executor(None, _reap, link.process)
        self.executor.remove_link(link)
        steps, link.steps = link.steps, {}
        for step in steps.values():
            link.finish(step)
        assert link.cells is not None, "a process that was ready has its cells"
        running, begun = read_marks(link.cells)
        if link.leaving:
            # Killed by us: whoever overstayed has been told already.
            self.answers.again(list(steps.values()))
            return
        if not link.alone:
            self._start_another()
        suspects = [steps.pop(number) for number in running if number in steps]
        if not suspects:
            suspects = [steps.pop(number) for number in begun if number in steps]
        self.answers.again(list(steps.values()))
        if link.alone or len(suspects) == 1:
            for step in suspects:
                logger.warning(
                    "pool process %d died while running step %r", link.process_id, step.id
                )
                self._fail(link, step, _crash(link))
        elif suspects:
            self._suspects.extend(suspects)
            if self._quarantine is None:
                self._quarantine = self._loop.create_task(self._try_suspects())

    def _fail(self, link: PoolLink, step: Step, error: Exception) -> None:
        now_us = time.time_ns() // 1000
        wanted = step.definition.retry.wants(error)
        self.answers.failed(
            step, describe_exception(error), wanted, now_us, now_us, link.process_id
        )

    async def _try_suspects(self) -> None:
        """Run suspects one at a time in a process of their own."""
        link: PoolLink | None = None
        try:
            while self._suspects:
                step = self._suspects.popleft()
                if step.group.closed:
                    continue
                if link is None or link not in self._links or link.leaving:
                    link = await self._start(alone=True)
                step.lane = LANE_ALONE
                self.executor.submit([step])
                await self.executor.ending(step)
        finally:
            self._quarantine = None
            if link is not None and link in self._links:
                link.leaving = True
                link.kill()

    # --- bodies that block their loop -------------------------------------------------------

    async def _watch_timeouts(self) -> None:
        """Kill a process whose loop one body with a timeout has blocked well past it."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for link in list(self._links):
                if link.cells is None or link.leaving or not link.steps:
                    continue
                number = link.cells[wire.CELL_LOOP]
                step = link.steps.get(number)
                if step is None or not step.timeout_us:
                    link.culprit = None
                    continue
                if link.culprit is None or link.culprit != number:
                    link.culprit = number
                    link.blocked_since = now
                elif now - link.blocked_since > step.timeout_us / 1e6 + child.CANCEL_GRACE_S:
                    del link.steps[number]
                    link.finish(step)
                    seconds = step.timeout_us / 1e6
                    self._fail(link, step, StepTimeout(f"no result within {seconds:g} s"))
                    self.replace(link, f"step {step.id!r} blocks its event loop")


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
    process.start()
    return process


def _reap(process: Any) -> None:
    process.join(5)


def _crash(link: PoolLink) -> StepCrashed:
    return StepCrashed(
        f"pool process {link.process_id} died while running it (a crash, os._exit, a kill, or "
        "out of memory)"
    )
