"""Cancellation that arrives: one can be lost, and nobody asks a second time.

`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes in the moment of its result
(mended in 3.12), and psycopg waits with it. A task that is ended by cancelling it would go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 1.0


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks until they have ended, whatever with."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at: nobody else will
