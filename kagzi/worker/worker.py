"""A worker: claims and drives runs, keeps its lease, rescues the runs of workers that are gone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from kagzi._core import Gate, Step, StoredStep
from kagzi.background import cancel_all
from kagzi.codec.failures import describe_exception
from kagzi.context import Context
from kagzi.definition import CallOptions, Definition
from kagzi.elsewhere import Room
from kagzi.engine.answers import Answers
from kagzi.engine.clock import StoreClock
from kagzi.engine.executor import Executor
from kagzi.engine.local import LocalPlace
from kagzi.engine.memos import Memos
from kagzi.engine.runner import LiveRun
from kagzi.engine.tasks import assign_scope, install_factory
from kagzi.errors import InvalidInput, KagziError, LeaseLost, StoreError
from kagzi.ids import uuid7
from kagzi.model import RunStatus, check_count, check_duration_s
from kagzi.pool.pool import Pool
from kagzi.pool.remote import make_context
from kagzi.registry import registry
from kagzi.store.announcer import Announcer
from kagzi.store.checkpoints import CheckpointWriter
from kagzi.store.fenced import FencedConnection
from kagzi.store.history import History
from kagzi.store.listener import done_channel, due_channel, news_channel
from kagzi.store.operations import read_news, tell_ends
from kagzi.store.recorded import ClaimedRun
from kagzi.store.rows import RunRow
from kagzi.store.store import Store
from kagzi.store.transactions import Body, Transactions
from kagzi.worker.claiming import Claiming
from kagzi.worker.diary import DRAINING, Diary
from kagzi.worker.garbage import search_as_before, search_less
from kagzi.worker.heartbeat import Heartbeat
from kagzi.worker.incarnation import boot_id, host_name, process_start
from kagzi.worker.janitor import Janitor, check_retention
from kagzi.worker.loop_watch import LoopWatch
from kagzi.worker.rescuer import Rescuer
from kagzi.worker.ticker import Ticker

logger = logging.getLogger("kagzi.worker")

LOOKS = 20  # for due runs, between looks for expired ones
LAST_WORD_S = 5.0


class Worker:
    """One incarnation of a worker. Opened once, closed once.

    Args:
        store: An open store.
        processes: Pool processes; None: one per processor; 0: bodies run in this process.
        concurrency: Most runs held at once.
        lease_s: Its runs go to others when it was not heard of for so long.
        heartbeat_s: Between renewals of the lease.
        poll_s: Between looks for due runs when nothing is heard.
        max_crashes: A run that so many workers in a row did not survive is ended as failed.
        queues: Whose runs it drives; None: of all queues.
        retain_s: Deletes runs that ended so long ago; None: keeps them for ever.
        modules: Imported by each pool process at its start.
        run_left: Told of each run that this worker let go of, with what it left.
    """

    def __init__(
        self,
        store: Store,
        *,
        processes: int | None = None,
        concurrency: int = 1000,
        lease_s: float = 30.0,
        heartbeat_s: float = 10.0,
        poll_s: float = 1.0,
        max_crashes: int = 5,
        queues: Sequence[str] | None = None,
        retain_s: float | timedelta | None = None,
        modules: tuple[str, ...] = (),
        run_left: Callable[[RunRow], None] | None = None,
    ) -> None:
        if processes is None:
            processes = os.cpu_count() or 1
        if type(processes) is not int or not 0 <= processes <= 1024:
            raise InvalidInput(
                f"processes must be a whole number from 0 to 1024, got {processes!r}"
            )
        self.processes = processes
        self.concurrency = check_count("concurrency", concurrency)
        self.lease_s = check_duration_s("lease_s", lease_s)
        self.heartbeat_s = check_duration_s("heartbeat_s", heartbeat_s)
        self.poll_s = check_duration_s("poll_s", poll_s)
        self.max_crashes = check_count("max_crashes", max_crashes)
        if self.heartbeat_s * 2 > self.lease_s:
            raise InvalidInput(
                f"heartbeat_s={heartbeat_s!r} leaves no second try within lease_s={lease_s!r}; "
                "make it at most half of the lease"
            )
        self.loop = asyncio.get_running_loop()
        self.store = store
        self.worker_id = uuid7()
        self.clock = StoreClock()
        self.room = Room()
        self.runs: dict[UUID, LiveRun] = {}
        self.lost: BaseException | None = None
        self.held_when_lost: list[UUID] = []
        self.ended = self.loop.create_future()
        self.claiming = Claiming(self, queues)
        self._config = {
            "processes": self.processes,
            "concurrency": self.concurrency,
            "lease_s": self.lease_s,
            "queues": None if queues is None else sorted(set(queues)),
        }
        self._diary = Diary(store, self.worker_id)
        self._run_left = run_left
        self._modules = modules
        self._gates: dict[tuple[str, int], Gate] = {}
        self._draining = False
        self.is_closed = False
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._announcer = Announcer(store)
        connector = store.connector
        self.history = History(connector.schema)
        self._fenced = FencedConnection(connector, self.worker_id, self.history)
        self._fenced_large = FencedConnection(connector, self.worker_id, self.history)
        self.writer = CheckpointWriter(
            self._fenced.write,
            self._fenced_large.write,
            _restore,
            _refuse,
            self.lose,
            self._hold,
        )
        self._transactions = Transactions(connector, self.worker_id, self.history, self.lose)
        self.answers = Answers(self)
        self.executor = Executor(self.loop)
        self._memos = Memos(store, self.answers, self.executor.submit)
        self._local_place = LocalPlace(
            self.loop,
            lambda task, step: assign_scope(task, step.run.bodies.scope(step)),
            lambda step: Context(step.run),
            self._transact,
            self.answers.returned,
            self._local_failed,
            self.executor.finish,
        )
        self.pool: Pool | None = None
        self._watch = LoopWatch(self.loop)
        self._ticker = Ticker(store, self.poll_s, self.children_changed)
        self._janitor = Janitor(store, check_retention(retain_s), LOOKS * self.poll_s)
        self.heartbeat = Heartbeat(
            connector,
            self.worker_id,
            self.lease_s,
            self.heartbeat_s,
            self.clock.set,
            lambda error: self._call(self.lose, error),
            self.history,
        )
        self._rescuer = Rescuer(
            store,
            self.worker_id,
            min(self.heartbeat_s, self.lease_s / 3),
            self.heartbeat,
            self.heartbeat_s,
            self.claiming.wake,
        )

    # --- life -------------------------------------------------------------------------------

    async def open(self) -> None:
        """Register, start the pool, begin to claim.

        Raises:
            PoolStartFailed: Pool processes do not start.
            StoreUnavailable: No connection.
        """
        install_factory(self.loop)
        self.executor.add_link(self._local_place)
        if self.processes:
            self.pool = Pool(
                self.processes,
                self.executor,
                self.answers,
                make_context,
                self._modules,
                lambda text: self._diary.note("pool process lost", text),
            )
        try:
            if self.pool is not None:
                await self.pool.open()
            async with self.store.connection() as connection:
                await self.history.check(connection)
            await self._rescuer.end_earlier_incarnations()
            await self.claiming.lines.open()
            asked_at = datetime.now().timestamp()
            store_now = await self.store.register_worker(
                self.worker_id,
                host_name(),
                boot_id(),
                os.getpid(),
                process_start(os.getpid()) or "",
                self._config,
                self.lease_s,
            )
            self.clock.set(store_now, asked_at, datetime.now().timestamp())
        except BaseException:
            if self.pool is not None:
                await self.pool.close()
            await self._local_place.close()
            raise
        search_less()
        self.heartbeat.start()
        self._watch.start()
        self._tasks = [
            self.loop.create_task(self.claiming.claim_for_ever()),
            self.loop.create_task(self._hear_for_ever()),
            self.loop.create_task(self._rescuer.rescue_for_ever()),
            self.loop.create_task(self._ticker.tick_for_ever()),
            self.loop.create_task(self._janitor.clean_for_ever()),
            self.loop.create_task(self._watch_heartbeat()),
        ]
        logger.info("worker %s started with %d pool processes", self.worker_id, self.processes)

    async def drain(self, within_s: float) -> None:
        """Stop claiming; wait up to `within_s` until every run that is held has left."""
        if not self._draining:
            self._diary.note(DRAINING)
        self._draining = True
        try:
            async with asyncio.timeout(within_s):
                await self._until_idle()
        except TimeoutError:
            pass

    async def close(self, drain_s: float = 0.0) -> None:
        """Stop claiming, wait for the runs held up to `drain_s`, give the others back, and end."""
        if drain_s > 0 and self.runs and self.lost is None:
            await self.drain(drain_s)
        self._draining = True
        await cancel_all(self._tasks)
        self.is_closed = True
        stopped = list(self.runs.values())
        for run in stopped:
            run.give_back() if self.lost is None else run.stop()
        await asyncio.gather(*(run.wait_stopped() for run in stopped))
        answers = self.lost is not None or await self._drain_writer()
        await self.writer.close()
        await self._memos.close()
        await self._local_place.close()
        if self.pool is not None:
            await self.pool.close()
        self._watch.stop()
        await asyncio.to_thread(self.heartbeat.stop)
        await self._announcer.close()
        await self._fenced.close()
        await self._fenced_large.close()
        await self._transactions.close()
        await self._diary.close(LAST_WORD_S if answers else 0.0)
        if answers:
            try:
                async with asyncio.timeout(LAST_WORD_S):
                    reason = "closed" if self.lost is None else f"lost: {self.lost}"
                    await self.store.rescue(self.worker_id, reason, forced=True)
            except Exception as error:  # whatever it is: the program that ends has no use for it
                logger.warning("the lease could not be ended, it will run out: %s", error)
        search_as_before()
        if not self.ended.done():
            self.ended.set_result(None)
        logger.info("worker %s ended", self.worker_id)

    async def _drain_writer(self) -> bool:
        """Wait until all that was put is written; False if the store does not answer."""
        try:
            async with asyncio.timeout(self.lease_s):
                await self.writer.drain()
        except TimeoutError:
            logger.warning("the store does not answer: what is held goes on when the lease ends")
            return False
        return True

    async def _until_idle(self) -> None:
        while self.runs:
            self._idle.clear()
            await self._idle.wait()

    @property
    def is_draining(self) -> bool:
        """It claims nothing any more."""
        return self._draining

    @property
    def lost_to_store(self) -> bool:
        """Whether the store is to blame, not what ran here."""
        return isinstance(self.lost, LeaseLost) and self.lost.by_store

    def wake(self) -> None:
        """A run may be due."""
        self.claiming.wake()

    def look_at_queues(self) -> None:
        """Limits of a queue may have changed."""
        self.claiming.look_at_queues()

    def hear(self) -> None:
        """Somebody may want something of a run that is held here."""
        self._news.set()

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed already
            logger.warning("the loop of worker %s is closed", self.worker_id)

    def _hold(self, held: bool) -> None:
        """Let results wait where they are made, while so many here are not written yet."""
        self._local_place.hold(held)
        if self.pool is not None:
            self.pool.hold(held)

    def lose(self, error: BaseException) -> None:
        """Nothing can be written any more: stop every run where it is."""
        if self.lost is not None:
            return
        self.lost = error
        self._draining = True
        logger.error("worker %s stops its runs: %s", self.worker_id, error)
        self.held_when_lost = list(self.runs)
        for run in list(self.runs.values()):
            run.stop()
        self.runs.clear()
        self._idle.set()
        if not isinstance(error, LeaseLost):
            self._tasks.append(self.loop.create_task(self._end_lease(str(error))))
        if not self.ended.done():
            self.ended.set_result(None)

    async def _end_lease(self, reason: str) -> None:
        """Let others go on with the runs of this worker, though its process lives."""
        while True:
            try:
                await self.store.rescue(self.worker_id, reason, forced=True)
                return
            except Exception as error:
                logger.warning("the lease is not ended yet: %s", error)
            await asyncio.sleep(self.poll_s)

    # --- runs -------------------------------------------------------------------------------

    def drive(self, claimed: ClaimedRun) -> None:
        """It holds this run now."""
        run = LiveRun(self, claimed, registry.workflow(claimed.workflow, claimed.version))
        self.runs[claimed.run_id] = run
        run.start()

    def run_left(self, run: LiveRun, row: RunRow) -> None:
        """A run's last row is committed: it is somebody else's now, or nobody's."""
        self.claiming.left()
        self.runs.pop(run.run_id, None)
        if self._run_left is not None and not row.refused:
            self._run_left(row)
        self._idle.set()
        status = RunStatus(row.status)
        if run.claimed.parent_run_id is not None or status is RunStatus.CANCELLED:
            self._news.set()  # others are to hear of it
        if status.is_terminal:
            self._announcer.say(done_channel)

    def is_crowded(self) -> bool:
        return len(self.runs) >= self.concurrency

    def children_changed(self) -> None:
        """Runs that belong to runs held here were started or changed: look, here and elsewhere."""
        self.claiming.wake()
        self._news.set()
        self._announcer.say(due_channel, news_channel)

    async def _hear_for_ever(self) -> None:
        """Look what others want of the runs held here, and let others hear of runs that ended."""
        while True:
            self._news.clear()
            try:
                if self.runs:
                    for run_id, request, news in await read_news(self.store, self.worker_id):
                        run = self.runs.get(run_id)
                        if run is not None:
                            run.hear(request, news)
                if await tell_ends(self.store):
                    self.children_changed()
                    continue
            except StoreError as error:
                logger.debug("hearing waits: %s", error)
            except Exception:
                logger.exception("hearing failed, and is tried again")
            try:
                async with asyncio.timeout(self.poll_s):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _watch_heartbeat(self) -> None:
        """Stop trusting the lease when a renewal has no answer, not even an error, for as long.

        Counted in turns, so that a pause of this whole process does not count.
        """
        tries, silent_s, turn_s = -1, 0.0, self.heartbeat_s / 2
        while silent_s <= self.lease_s:
            await asyncio.sleep(turn_s)
            silent_s = silent_s + turn_s if self.heartbeat.tries == tries else 0.0
            tries = self.heartbeat.tries
        self.lose(LeaseLost("the store does not answer", by_store=True))

    # --- steps ------------------------------------------------------------------------------

    def begin(self, steps: list[Step]) -> None:
        """Let steps begin, where they belong. Steps with memos are looked up first."""
        if not steps:
            return
        memo = [step for step in steps if step.definition.memo is not None]
        if memo:
            self._memos.look_up(memo)
            steps = [step for step in steps if step.definition.memo is None]
        self.executor.submit(steps)

    def function_gate(self, definition: Definition, choices: CallOptions | None) -> Gate | None:
        limit = definition.limit
        if choices is not None and choices.limit is not None:
            limit = choices.limit
        if limit is None:
            return None
        key = definition.name, limit
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = Gate(limit)
        return gate

    async def _transact(self, step: Step, body: Body) -> Any:
        """Run a step's body that commits its own checkpoint: not ahead of what that rests on."""
        await self.writer.caught_up()  # an answer of `ctx.patched`
        return await self._transactions.run(step, body)

    def _local_failed(self, step: Step, error: bytes, wanted: bool) -> None:
        self.answers.failed(step, error, wanted, step.started_us, step.completed_us, 0)


def _restore(step: Step, stored: StoredStep) -> None:
    if step.group is not None:
        step.group.restore(step, stored)


def _refuse(step: Step, reason: Exception) -> None:
    """A row that Postgres refuses becomes a failed step that says so."""
    error = KagziError(f"Postgres refused the result: {reason}")
    step.status, step.output, step.error = "failed", None, describe_exception(error)
    if step.group is not None:
        step.group.refuse(step)
