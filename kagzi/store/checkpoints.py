"""The checkpoint writer: one ordered stream of rows per worker, written in natural batches.

When nothing is being written, what is put is written at once; while a write is under way the next
batch grows. So there is no timer: an idle worker adds no delay and a busy one writes large batches.
How a batch reaches Postgres is `fenced.py`'s business.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from uuid import UUID

from kagzi._core import Step, StoredStep, row_bytes
from kagzi.background import begin_apart, cancel_all
from kagzi.errors import KagziError
from kagzi.store.rows import AttemptRow, Batch, GroupRow, Mark, MemoRow, RunRow

logger = logging.getLogger("kagzi.store")

MOST_ROWS = 512
MOST_BYTES = 2 << 20
LARGE_BYTES = 256 << 10
MOST_UNWRITTEN = 8 << 20

Write = Callable[[Batch], Awaitable[list[tuple[Step, StoredStep]]]]


class ContentRefused(KagziError):
    """Postgres refused a row for what it holds; writing it again cannot help."""


class CheckpointWriter:
    """Collects rows of all runs of a worker and writes them in order.

    Args:
        write: Commits a batch; returns the steps of it that were stored before, with what is
            stored. Raises `ContentRefused` when a row cannot be stored, anything else for good.
        write_large: The same over a connection of its own, for values that would hold up others.
        on_stored: Told of a step that was stored before.
        on_refused: Told of a step whose row was refused; makes it a failed one.
        on_lost: Told once of the error after which nothing can be written any more.
        on_full: Told when more than `MOST_UNWRITTEN` bytes wait to be written, and with False when
            less than half of that do. What makes more of them should wait meanwhile, as far as
            nothing that is written waits for it.
    """

    def __init__(
        self,
        write: Write,
        write_large: Write,
        on_stored: Callable[[Step, StoredStep], None],
        on_refused: Callable[[Step, Exception], None],
        on_lost: Callable[[BaseException], None],
        on_full: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._write = write
        self._write_large = write_large
        self._on_stored = on_stored
        self._on_refused = on_refused
        self._on_lost = on_lost
        self._on_full = on_full
        self._open = Batch()
        self._full: deque[Batch] = deque()
        self._task: asyncio.Task[None] | None = None
        self._writing: Batch | None = None
        self._large: set[asyncio.Task[None]] = set()
        self._large_turn = asyncio.Lock()
        self._large_of: Counter[bytes] = Counter()  # in flight, by run
        self._held_back: dict[bytes, tuple[RunRow, Callable[[], None] | None]] = {}
        self.lost: BaseException | None = None
        self.unwritten_bytes = 0  # of steps
        self.is_full = False
        self.batches = 0
        self.rows = 0

    # --- putting ----------------------------------------------------------------------------

    def put_steps(self, steps: list[Step]) -> None:
        """Append settled steps. None of them larger than `LARGE_BYTES`."""
        start = 0
        while start < len(steps):
            batch = self._room()
            before = batch.nbytes
            start = batch.take_steps(steps, start, MOST_ROWS, MOST_BYTES)
            self.unwritten_bytes += batch.nbytes - before
        if self.unwritten_bytes > MOST_UNWRITTEN:
            self._look_how_full()
        self._start()

    def put_large(self, step: Step, committed: Callable[[], None]) -> None:
        """Write one large step on its own, not before what was put earlier is durable.

        `committed` is called when it is durable itself. What is put meanwhile does not wait for it.
        """
        if self.lost is not None:
            return
        self._large_of[step.run_id] += 1
        self.unwritten_bytes += row_bytes(step)
        self._look_how_full()

        def start() -> None:
            task = begin_apart(self._commit_large(step, committed))
            self._large.add(task)
            task.add_done_callback(self._large.discard)

        self.when_durable(start)  # a row put before may be one that this step rests on

    def put_attempt(self, row: AttemptRow) -> None:
        self._room().attempts.append(row)
        self._start()

    def put_clear(self, run_id: UUID, step_id: str) -> None:
        self._room().clears.append((run_id, step_id))
        self._start()

    def put_drop(self, run_id: UUID, path: str, of_group: bool) -> None:
        """Remove one checkpoint, or the row of one group."""
        self._room().drops.append((run_id, path, of_group))
        self._start()

    def put_group(self, row: GroupRow) -> None:
        # Not `_room`: a group's row belongs to the batch of the step that closed it.
        self._open.groups.append(row)
        self._start()

    def put_memo(self, row: MemoRow) -> None:
        self._open.memos.append(row)
        self._start()

    def put_mark(self, row: Mark) -> None:
        self._room().marks.append(row)
        self._start()

    def put_run(self, row: RunRow, left: Callable[[], None] | None = None) -> None:
        """Let go of a run, behind all that was put of it; `left` is called when that is durable."""
        if self._large_of[row.run_id.bytes]:
            self._held_back[row.run_id.bytes] = row, left
            return
        self._room().runs.append(row)
        if left is not None:
            self.after_commit(left)
        self._start()

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call back when everything put so far is durable."""
        self._open.after.append(callback)
        self._start()

    def when_durable(self, callback: Callable[[], None]) -> None:
        """The same, at once if it is; what is put from here on is not waited for."""
        if self._open or self._full:
            self._open.after.append(callback)
        elif self._writing is not None:
            self._writing.after.append(callback)
        else:
            callback()

    async def caught_up(self) -> None:
        """Wait until everything put so far is durable."""
        future = asyncio.get_running_loop().create_future()
        self.when_durable(lambda: None if future.done() else future.set_result(None))
        await future

    async def drain(self) -> None:
        """Wait until nothing is left to write."""
        while self._task is not None or self._large:
            pending = [*self._large, *([self._task] if self._task is not None else [])]
            await asyncio.wait(pending)

    async def close(self) -> None:
        """Stop writing at once; what is not committed is dropped."""
        await cancel_all([*self._large, *([self._task] if self._task is not None else [])])

    # --- writing ----------------------------------------------------------------------------

    def _room(self) -> Batch:
        if len(self._open.steps) >= MOST_ROWS or self._open.nbytes >= MOST_BYTES:
            self._full.append(self._open)
            self._open = Batch()
        return self._open

    def _start(self) -> None:
        if self._task is None and self.lost is None:
            self._task = begin_apart(self._run())

    async def _run(self) -> None:
        try:
            while self._full or self._open:
                if self._full:
                    batch = self._full.popleft()
                else:
                    batch, self._open = self._open, Batch()
                self._writing = batch
                await self._commit(batch, self._write)
                self._writing = None
                self.unwritten_bytes -= batch.nbytes
                if self.is_full:
                    self._look_how_full()
                for callback in batch.after:
                    callback()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lose(error)
        finally:
            self._task = None

    def _lose(self, error: BaseException) -> None:
        if self.lost is None:
            self.lost = error
            self._full.clear()
            self._open = Batch()
            self.unwritten_bytes = 0
            self._look_how_full()
            self._on_lost(error)

    def _look_how_full(self) -> None:
        most = MOST_UNWRITTEN // 2 if self.is_full else MOST_UNWRITTEN
        is_full = self.unwritten_bytes > most and self.lost is None
        if is_full != self.is_full:
            self.is_full = is_full
            self._on_full(is_full)

    async def _commit(self, batch: Batch, write: Write) -> None:
        if batch.memos:  # a step may have been refused in a batch before
            batch.memos = [memo for memo in batch.memos if memo.step.status == "completed"]
        try:
            stored = await write(batch)
        except ContentRefused as error:
            stored = await self._commit_halved(batch, write, error)
        self.batches += 1
        self.rows += len(batch.steps)
        for step, row in stored:
            self._on_stored(step, row)

    async def _commit_halved(
        self, batch: Batch, write: Write, error: ContentRefused
    ) -> list[tuple[Step, StoredStep]]:
        """Write the steps in halves until the refused rows stand alone, then all that is left."""
        stored: list[tuple[Step, StoredStep]] = []
        refused: list[Step] = []
        todo = [batch.steps]
        while todo:
            steps = todo.pop()
            half = len(steps) // 2
            part = Batch()
            part.add_steps(steps)
            try:
                if len(steps) > 0 and not (len(steps) == len(batch.steps) and len(steps) > 1):
                    stored += await write(part)
                elif half:
                    todo += [steps[half:], steps[:half]]
            except ContentRefused as reason:
                if half:
                    todo += [steps[half:], steps[:half]]
                else:
                    self._on_refused(steps[0], reason)
                    refused.append(steps[0])
        if not batch.steps:
            raise error
        rest = Batch()
        rest.add_steps(refused)
        rest.attempts, rest.groups, rest.marks = batch.attempts, batch.groups, batch.marks
        rest.memos = [memo for memo in batch.memos if memo.step.status == "completed"]
        rest.runs, rest.clears, rest.drops = batch.runs, batch.clears, batch.drops
        return stored + await write(rest)

    async def _commit_large(self, step: Step, committed: Callable[[], None]) -> None:
        batch = Batch()
        batch.add_steps([step])
        try:
            async with self._large_turn:
                if self.lost is None:
                    await self._commit(batch, self._write_large)
                    self.unwritten_bytes -= batch.nbytes
                    self._look_how_full()
                    committed()
                    self._large_through(step.run_id)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._lose(error)

    def _large_through(self, run_id: bytes) -> None:
        self._large_of[run_id] -= 1
        if not self._large_of[run_id]:
            del self._large_of[run_id]
            if run_id in self._held_back:
                self.put_run(*self._held_back.pop(run_id))
