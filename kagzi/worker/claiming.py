"""How a worker comes to its runs: it claims due ones, and is given those started in its program."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from kagzi import faultpoints
from kagzi.errors import ServerReplaced, StoreError
from kagzi.registry import registry
from kagzi.store.recorded import ClaimedRun
from kagzi.store.store import Store
from kagzi.worker.lines import Lines, check_queues
from kagzi.worker.telling import Telling

logger = logging.getLogger("kagzi.worker")

CLAIM_MOST = 100
PROBATION_S = 30.0


class ClaimHome(Protocol):
    """What this module needs of the worker."""

    loop: asyncio.AbstractEventLoop
    store: Store
    worker_id: UUID
    concurrency: int
    lease_s: float
    poll_s: float
    lost: BaseException | None

    @property
    def runs(self) -> Mapping[UUID, object]:
        """What it holds."""

    @property
    def is_draining(self) -> bool: ...

    @property
    def is_closed(self) -> bool: ...

    def drive(self, run: ClaimedRun) -> None:
        """It holds this run now."""

    def lose(self, error: BaseException) -> None:
        """Nothing can be written any more."""


class Claiming:
    """Of one worker. For `desk.Desk` it is who takes runs.

    Args:
        queues: Whose runs are taken; None: of all queues.

    Attributes:
        lines: Where runs wait.
    """

    def __init__(self, home: ClaimHome, queues: Sequence[str] | None) -> None:
        self._home = home
        self.lines = Lines(home.store, home.worker_id, check_queues(queues), home.poll_s)
        self._wake = asyncio.Event()
        self._is_open = False
        self._doubtful_until = 0.0  # a claim may have been made unnoticed
        self._promised = 0  # runs that may be on their way here
        self._again_s: float | None = None  # a queue's limit may let runs go on then
        self._suspect: UUID | None = None
        self._probation_until = 0.0

    def wake(self) -> None:
        """A run may be due."""
        self._wake.set()

    def look_at_queues(self) -> None:
        """Limits of a queue may have changed."""
        self.lines.forget()
        self._wake.set()

    def left(self) -> None:
        """A run is about to leave the worker."""
        home = self._home
        if len(home.runs) >= home.concurrency or self.lines.any_apart:
            self._wake.set()  # there is room for another run, here or in its queue

    async def claim_for_ever(self) -> None:
        """Until the worker drains."""
        home = self._home
        self._is_open = True
        waiting = Telling(logger, "claiming waits: %s")
        while not home.is_draining:
            self._wake.clear()
            most = min(home.concurrency - len(home.runs), CLAIM_MOST)
            claimed, self._again_s = 0, None
            try:
                claimed = await self.claim(most)
                waiting.clear()
            except StoreError as error:
                self.doubt()
                waiting.tell(error)
            except Exception:
                self.doubt()
                logger.exception("claiming failed, and is tried again")
            if 0 < most == claimed or self._again_s == 0:
                continue
            try:
                async with asyncio.timeout(min(home.poll_s, self._again_s or home.poll_s)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def claim(self, most: int) -> int:
        """Take up to `most` due runs; how many."""
        home = self._home
        most -= self._promised
        if home.loop.time() < self._doubtful_until and not self._promised:
            # A claim may have been committed although its answer never came.
            freed = await home.store.free_strays(home.worker_id, list(home.runs))
            if freed:
                logger.warning("%d runs were claimed unnoticed, and are free again", freed)
        if most <= 0:
            return 0
        if faultpoints.reach is not None:
            faultpoints.reach("claim.before")
        claimed = await self.lines.claim(registry.names(), most, int(self._takes_suspects()))
        if claimed and faultpoints.reach is not None:
            faultpoints.reach("claim.after")
        if home.lost is not None:  # meanwhile; whoever ends its lease frees them
            return 0
        held = [run.external_id for run in claimed if run.run_id in home.runs]
        if held:  # no connection that asks has been made since
            reason = f"the server has forgotten that run {held[0]!r} is held here"
            home.lose(ServerReplaced(reason))
            return 0
        for run in claimed:
            if run.is_suspect:
                self._suspect = run.run_id
                self._probation_until = home.loop.time() + PROBATION_S
            home.drive(run)
        self._again_s = claimed.again_s
        return len(claimed)

    def _takes_suspects(self) -> bool:
        """Held one at a time, the innocent finish; one that harms nobody for a while has room."""
        home = self._home
        return self._suspect not in home.runs or home.loop.time() >= self._probation_until

    # --- runs that are started in this program ----------------------------------------------

    @property
    def worker_id(self) -> UUID:
        """Whose they are to be."""
        return self._home.worker_id

    def room_for_starts(self) -> int:
        """How many runs it can have now, besides those that it has or was promised."""
        home = self._home
        is_open = self._is_open and not home.is_draining and home.lost is None
        if not is_open or home.loop.time() < self._doubtful_until:
            return 0
        return home.concurrency - len(home.runs) - self._promised

    def takes(self, workflow: str, version: str, queue: str) -> bool:
        """Whether it serves such runs."""
        return registry.has(workflow, version) and self.lines.serves(queue)

    def promise(self, count: int) -> None:
        """So many runs may be on their way to it; negative: are no more."""
        self._promised += count

    def adopt(self, run: ClaimedRun) -> None:
        """It holds this run now; when it is leaving, its end frees the run."""
        if self._home.lost is None and not self._home.is_closed:
            self._home.drive(run)

    def doubt(self) -> None:
        """Runs may have been given to it although the answer never came."""
        self._doubtful_until = self._home.loop.time() + self._home.lease_s
