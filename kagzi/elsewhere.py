"""Large results that are durable need not stay in memory: they are read again when asked for.

How much of them may wait in a worker's memory for code that takes its time, and the reading ahead
of what that code is about to ask for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

LEAST_BYTES = 4 << 10  # what is smaller stays in memory
ROOM_BYTES = 48 << 20
FETCH_BYTES = 4 << 20
FETCH_MOST = 1000


@dataclass(slots=True, frozen=True)
class Elsewhere:
    """In place of a result that is not in memory."""

    nbytes: int


class Room:
    """How many bytes of results may wait in this process's memory."""

    def __init__(self, nbytes: int = ROOM_BYTES) -> None:
        self.left = nbytes


class Shelf:
    """The part of a room that the results of one group take."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._used = 0

    def take(self, nbytes: int, always: bool = False) -> bool:
        """Whether there is room for so much; then it is taken. `always`: room or not."""
        if nbytes > self._room.left and not always:
            return False
        self._room.left -= nbytes
        self._used += nbytes
        return True

    def give(self, nbytes: int) -> None:
        """So much was used, and waits no more; what was never counted does not count now."""
        nbytes = min(nbytes, self._used)
        self._room.left += nbytes
        self._used -= nbytes

    def __del__(self) -> None:
        self._room.left += self._used


class Ahead:
    """Reads results that are elsewhere, each with some of those that come next.

    Args:
        fetch: Reads the results of these steps, in their order.
    """

    def __init__(self, fetch: Callable[[list[str]], Awaitable[list[bytes]]]) -> None:
        self._fetch = fetch
        self._read: dict[str, bytes] = {}

    async def get(self, step_id: str, found: Elsewhere, coming: Iterable[tuple[str, Any]]) -> bytes:
        """A step's result; `coming`: ids and results, or where they are, of what comes next."""
        known = self._read.pop(step_id, None)
        if known is not None:
            return known
        ids, nbytes = [step_id], found.nbytes
        for other, value in islice(coming, FETCH_MOST):
            if type(value) is Elsewhere:
                nbytes += value.nbytes
                if nbytes > FETCH_BYTES:
                    break
                ids.append(other)
        self._read = dict(zip(ids, await self._fetch(ids), strict=True))
        return self._read.pop(step_id)
