"""Deletes what has been kept for long enough, a little at a time. Every worker has one.

Of all workers one deletes at a time, and rests for several times as long as that took: what others
write at that moment hardly notices.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from datetime import timedelta

from kagzi.errors import InvalidInput, StoreError
from kagzi.model import check_duration_s
from kagzi.store.retention import Expiry
from kagzi.store.store import Store
from kagzi.store.workers import delete_old_workers
from kagzi.worker.telling import Telling

logger = logging.getLogger("kagzi.worker")

REST = 4.0  # times what the last deletion took
LONG_REST = 50.0  # times what it took to find nothing
LEAST_REST_S = 0.02
LONGEST_S = 1000 * 365 * 86_400.0


def check_retention(retain_s: float | timedelta | None) -> float | None:
    """Seconds to keep finished runs; None: for ever. Raises `InvalidInput`."""
    if retain_s is None:
        return None
    seconds = check_duration_s("retain_s", retain_s)
    if seconds > LONGEST_S:
        raise InvalidInput(f"retain_s may be up to 1,000 years, got {retain_s!r}; None is for ever")
    return seconds


class Janitor:
    """Looks for what has expired.

    Args:
        retain_s: How long finished runs are kept; None: for ever.
        look_s: Between looks, more or less, when nothing is left to delete.
    """

    def __init__(self, store: Store, retain_s: float | None, look_s: float) -> None:
        self._store = store
        self._expiry = Expiry(store, retain_s)
        self._look_s = look_s

    async def clean_for_ever(self) -> None:
        waiting = Telling(logger, "deleting what has expired waits: %s")
        busy_s, total = 0.0, 0  # since the last long rest
        while True:
            rest_s = self._look_s * random.uniform(0.5, 1.5)  # so that workers take turns
            try:
                began_at = time.monotonic()
                deleted, more = await self._expiry.delete_some()
                more = await delete_old_workers(self._store) or more
                took_s = time.monotonic() - began_at
                busy_s, total = busy_s + took_s, total + deleted
                if more:
                    rest_s = max(LEAST_REST_S, REST * took_s)
                else:
                    if total:
                        logger.debug("%d runs were deleted", total)
                    else:  # there was much that may not go yet: no hurry to look again
                        rest_s = max(rest_s, LONG_REST * busy_s)
                    busy_s, total = 0.0, 0
                waiting.clear()
            except StoreError as error:
                waiting.tell(error)
            except Exception:
                logger.exception("deleting what has expired failed, and is tried again")
            await asyncio.sleep(rest_s)
