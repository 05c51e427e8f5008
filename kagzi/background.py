"""Tasks of the engine's own: begun outside of every run, and cancelled so that they end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

AGAIN_S = 1.0


def begin_apart(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that is no branch of the run whose code happens to have caused it.

    Not by the loop's factory: that would look for a scope, number a branch there, and keep it.
    """
    return asyncio.Task(coroutine, loop=asyncio.get_running_loop())


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks until they have ended, whatever with.

    One cancellation can be lost, and nobody asks a second time: `asyncio.wait_for` of Python 3.11
    swallows one that comes in the moment of its result (mended in 3.12), and psycopg waits with it.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at: nobody else will
