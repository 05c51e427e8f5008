"""The lines in which runs wait: which of them a worker looks at, and in what order."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from uuid import UUID

from kagzi.errors import InvalidInput
from kagzi.model import DEFAULT_QUEUE, check_name
from kagzi.store.queues import any_queues, claim_apart, declare_queues
from kagzi.store.recorded import Claims
from kagzi.store.store import Store

MOVES_EVERY = 10  # looks


class Lines:
    """Claims for one worker, from the common line and from those of queues that stand apart.

    Neither kind starves the other: whichever comes second in one claim is first in the next.

    Args:
        store: An open store.
        worker_id: Who claims.
        served: Queues to claim from; None: all.
        look_s: How old may be what is known of the queues.
    """

    def __init__(
        self, store: Store, worker_id: UUID, served: Sequence[str] | None, look_s: float
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._served = served
        self._look_s = look_s
        self._loop = asyncio.get_running_loop()
        self._looked_at: float | None = None
        self._any_apart = False
        self._moved_at: float | None = None
        self._apart_first = False

    async def open(self) -> None:
        """Give the queues served, if they are named, lines of their own: so they are quick to find.

        The default queue needs none.
        """
        named = [name for name in self._served or () if name != DEFAULT_QUEUE]
        if named:
            await declare_queues(self._store, named)

    @property
    def any_apart(self) -> bool:
        """Whether there are queues with limits, as far as is known."""
        return self._any_apart

    def serves(self, queue: str) -> bool:
        """Whether runs of this queue are claimed at all."""
        return self._served is None or queue in self._served

    def forget(self) -> None:
        """Look at the queues again at the next claim."""
        self._looked_at = None

    async def claim(self, names: Sequence[tuple[str, str]], most: int, suspects: int) -> Claims:
        """Take up to `most` runs, of which `suspects` may be such."""
        if self._age_s() >= 3 * self._look_s:
            await self._look()
        claims = Claims()
        self._apart_first = not self._apart_first
        for apart in (self._apart_first, not self._apart_first):
            await self._add(claims, apart, names, most, suspects)
        if not claims and self._age_s() >= self._look_s:  # there is time for it now
            known = self._any_apart
            await self._look()
            if self._any_apart and not known:
                await self._add(claims, True, names, most, suspects)
        if claims.moved:
            self.forget()
            claims.again_s = 0.0
        return claims

    def _age_s(self) -> float:
        return math.inf if self._looked_at is None else self._loop.time() - self._looked_at

    async def _look(self) -> None:
        now = self._loop.time()
        self._any_apart = await any_queues(self._store, self._served)
        self._looked_at = now

    async def _add(
        self,
        claims: Claims,
        apart: bool,
        names: Sequence[tuple[str, str]],
        most: int,
        suspects: int,
    ) -> None:
        room = most - len(claims)
        suspects = max(0, suspects - sum(run.is_suspect for run in claims))
        if room <= 0:
            return
        found = await self._claim_from(apart, names, room, suspects)
        claims += found
        claims.moved += found.moved
        if found.again_s is not None:
            claims.again_s = found.again_s

    async def _claim_from(
        self, apart: bool, names: Sequence[tuple[str, str]], most: int, suspects: int
    ) -> Claims:
        store, worker_id, served = self._store, self._worker_id, self._served
        if apart:
            if not self._any_apart:
                return Claims()
            return await claim_apart(store, worker_id, names, most, suspects, served)
        if served is not None and DEFAULT_QUEUE not in served:
            # Nothing there is for this worker, unless it came before its queue had its own line.
            now = self._loop.time()
            if self._moved_at is not None and now < self._moved_at + MOVES_EVERY * self._look_s:
                return Claims()
            found = await store.claim_runs(worker_id, names, most, 0, served)
            self._moved_at = None if found.moved else now
            return found
        return await store.claim_runs(worker_id, names, most, suspects, served)


def check_queues(queues: object) -> tuple[str, ...] | None:
    """The names of queues that a worker serves. Raises `InvalidInput`."""
    if queues is None:
        return None
    if isinstance(queues, str) or not isinstance(queues, Sequence):
        raise InvalidInput(f'queues must be a tuple of names, got {queues!r}; write ("name",)')
    if not queues:
        raise InvalidInput("queues is empty: a worker serves at least one queue, or None for all")
    return tuple(dict.fromkeys(check_name("queue", name, in_path=False) for name in queues))
