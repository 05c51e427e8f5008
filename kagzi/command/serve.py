"""What drives runs for the command line: until a signal comes, or until one run has ended."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kagzi.client import Client
from kagzi.definition import Workflow
from kagzi.errors import StoreError
from kagzi.handle import RunHandle
from kagzi.registry import registry

logger = logging.getLogger("kagzi.worker")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PROGRESS_POLL_S = 0.25


class Stopped(Exception):
    """A signal ended the wait.

    Attributes:
        number: The signal.
        run_id: External id of the run that was given back.
    """

    def __init__(self, number: int, run_id: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.run_id = run_id


class Stops:
    """The first and the second SIGTERM or SIGINT; a third ends the process as it always does.

    Attributes:
        first, second: Futures of the signal's number.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.first: asyncio.Future[int] = loop.create_future()
        self.second: asyncio.Future[int] = loop.create_future()

    def heard(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
        elif not self.second.done():
            self.second.set_result(number)
            self.stop_listening()

    def listen(self) -> None:
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self.heard, number)

    def stop_listening(self) -> None:
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)


@contextmanager
def _stops() -> Iterator[Stops]:
    stops = Stops(asyncio.get_running_loop())
    stops.listen()
    try:
        yield stops
    finally:
        stops.stop_listening()


async def serve(client: Client, drain_s: float, **options: Any) -> None:
    """Be a worker until SIGTERM or SIGINT; then finish what is held, up to `drain_s`.

    What is not finished by then, or at a second signal, is given back.

    Args:
        options: As `Client.worker` takes them.

    A worker that has lost its lease begins anew.
    """
    async with client.worker(**options) as worker:
        with _stops() as stops:
            names = sorted({name for name, _ in registry.names()})
            logger.info("serving %s; SIGTERM or Ctrl-C drains", ", ".join(names))
            await stops.first
            if worker.lost is None and drain_s > 0:
                draining = asyncio.create_task(worker.drain(drain_s))
                await asyncio.sleep(0)  # from here on nothing is claimed
                logger.info(
                    "draining: up to %g s for %d run(s); signal again to stop at once",
                    drain_s,
                    len(worker.runs),
                )
                await _first_of(draining, stops.second)
                draining.cancel()
            if worker.runs:
                logger.info("%d run(s) are given back", len(worker.runs))


async def drive(
    client: Client,
    workflow: Workflow[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    run_id: str | None,
    report: Callable[[RunHandle[Any], int, int], None] | None = None,
    **options: Any,
) -> Any:
    """Start a run, or find the one with this id, and drive it here; its result.

    Args:
        report: Told the run, and its completed and failed checkpoints, every now and then.
        options: As `Client.worker` takes them.

    Raises:
        Stopped: By a signal; the run was given back.
        RunFailed, RunWasCancelled, and what `Client.start` raises.
    """
    handle = await client.start(workflow, *args, id=run_id, **kwargs)
    if (await handle.status()).is_terminal:
        return await handle.result()
    async with client.worker(**options):
        with _stops() as stops:
            result = asyncio.create_task(handle.result())
            telling = asyncio.create_task(_tell(handle, report)) if report is not None else None
            try:
                await _first_of(result, stops.first)
            finally:
                for task in (result, telling):
                    if task is not None and not task.done():
                        task.cancel()
    if result.cancelled() or not result.done():
        raise Stopped(stops.first.result(), handle.id)
    if report is not None:
        report(handle, *await handle.progress())
    return result.result()


async def _tell(handle: RunHandle[Any], report: Callable[[RunHandle[Any], int, int], None]) -> None:
    while True:
        with suppress(StoreError):  # the next look may find the store again
            report(handle, *await handle.progress())
        await asyncio.sleep(PROGRESS_POLL_S)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
