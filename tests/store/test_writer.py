"""The checkpoint writer over a fake store whose commits wait until a test lets them go."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kagzi._core import Step, StoredStep
from kagzi.errors import LeaseLost
from kagzi.store.checkpoints import (
    LARGE_BYTES,
    MOST_BYTES,
    MOST_ROWS,
    MOST_UNWRITTEN,
    CheckpointWriter,
    ContentRefused,
)
from kagzi.store.rows import Batch
from tests.store.samples import (
    RUN,
    attempt_row,
    group_row,
    mark,
    memo_row,
    release,
    settled,
    settled_many,
)

Stored = list[tuple[Step, StoredStep]]


class FakeStore:
    """Takes batches; commits each when it is let go, or at once if `held` is False."""

    def __init__(self, held: bool = True) -> None:
        self.held = held
        self.begun: list[Batch] = []
        self.committed: list[Batch] = []
        self.refuses: Callable[[Step], bool] = lambda _: False
        self.fails: BaseException | None = None
        self.on_begin: Callable[[Batch], None] = lambda _: None
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def write(self, batch: Batch) -> Stored:
        self.begun.append(batch)
        self.on_begin(batch)
        if self.held:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(gate)
            await gate
        if self.fails is not None:
            raise self.fails
        if any(step.status == "completed" and self.refuses(step) for step in batch.steps):
            raise ContentRefused("a row of this batch")
        self.committed.append(batch)
        return []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def let_go(self) -> bool:
        """Commit the batch that has waited longest."""
        if not self._waiting:
            return False
        self._waiting.popleft().set_result(None)
        return True

    def open(self) -> None:
        self.held = False
        while self.let_go():
            pass

    @property
    def ids(self) -> list[str]:
        return [step.id for batch in self.committed for step in batch.steps]


class Bench:
    """A writer over two fake stores, and what it told."""

    def __init__(self, held: bool = True) -> None:
        self.store = FakeStore(held)
        self.large = FakeStore(held)
        self.stored: list[str] = []
        self.refused: list[str] = []
        self.lost: list[BaseException] = []
        self.full: list[bool] = []
        self.on_refused: Callable[[Step], None] = lambda _: None
        self.writer = CheckpointWriter(
            self.store.write,
            self.large.write,
            lambda step, _: self.stored.append(step.id),
            self._refuse,
            self.lost.append,
            self.full.append,
        )

    def _refuse(self, step: Step, reason: Exception) -> None:
        self.refused.append(step.id)
        step.status, step.output, step.error = "failed", None, str(reason).encode()
        self.on_refused(step)

    async def finish(self) -> None:
        self.store.open()
        self.large.open()
        await self.writer.drain()


async def turns(count: int = 10) -> None:
    """Let the loop go round, so that everything that can go on has done so."""
    for _ in range(count):
        await asyncio.sleep(0)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """One hypothesis example in a loop of its own."""
    asyncio.run(main())


counts = st.one_of(st.integers(1, 5), st.integers(1, 1500), st.sampled_from([511, 512, 513, 1024]))
pauses = st.integers(0, 3)


# --- batches --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(counts, pauses), min_size=1, max_size=12))
def test_answers_make_few_batches_while_a_commit_is_held_whatever_their_timing(
    plan: list[tuple[int, int]],
) -> None:
    async def main() -> None:
        bench = Bench()
        expected = []
        for place, (count, pause) in enumerate(plan):
            steps = settled_many(count, f"g{place}")
            expected += [step.id for step in steps]
            bench.writer.put_steps(steps)
            await turns(pause)
        await bench.finish()
        assert bench.store.ids == expected
        assert len(bench.store.committed) <= 2 + len(expected) / MOST_ROWS
        assert bench.writer.batches == len(bench.store.committed)
        assert bench.writer.rows == len(expected)

    run(main)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(counts, st.just("commit"), st.just("turn")), max_size=40))
def test_each_batch_takes_all_that_waits_up_to_its_cap_at_any_timing_of_commits(
    plan: list[Any],
) -> None:
    async def main() -> None:
        bench = Bench()
        put = begun = 0
        fullness: list[tuple[int, int]] = []

        def on_begin(batch: Batch) -> None:
            nonlocal begun
            fullness.append((len(batch.steps), min(MOST_ROWS, put - begun)))
            begun += len(batch.steps)

        bench.store.on_begin = on_begin
        for place, action in enumerate(plan):
            if action == "commit":
                bench.store.let_go()
            elif action == "turn":
                await turns(3)
            else:
                bench.writer.put_steps(settled_many(action, f"g{place}"))
                put += action
            assert bench.store.waiting <= 1, "one write at a time"
        await bench.finish()
        assert all(taken == waited for taken, waited in fullness), fullness
        assert begun == put

    run(main)


async def test_writer_tells_when_much_is_unwritten_and_when_half_of_it_is_not() -> None:
    bench = Bench()
    big = LARGE_BYTES - 1000
    enough = MOST_UNWRITTEN // big + 1
    for place in range(enough):
        assert bench.full == []
        bench.writer.put_steps([settled(f"big/{place}", output=b"x" * big)])
    assert bench.full == [True]
    while bench.full == [True]:
        before = bench.writer.unwritten_bytes
        assert before > MOST_UNWRITTEN // 2
        bench.store.let_go()
        await turns()
    assert bench.full == [True, False]
    await bench.finish()
    assert bench.writer.unwritten_bytes == 0


async def test_large_values_count_as_unwritten_too() -> None:
    bench = Bench()
    for place in range(3):
        step = settled(f"huge/{place}", output=b"x" * (MOST_UNWRITTEN // 2))
        bench.writer.put_large(step, lambda: None)
    assert bench.full == [True]
    await bench.finish()
    assert bench.full == [True, False]
    assert bench.writer.unwritten_bytes == 0


async def test_a_lost_writer_holds_nobody_back() -> None:
    bench = Bench(held=False)
    bench.store.fails = LeaseLost("it was ended")
    bench.writer.put_steps(settled_many(3, "huge", output=b"x" * MOST_UNWRITTEN))
    assert bench.full == [True]
    await turns()
    assert bench.lost
    assert bench.full == [True, False]


async def test_batch_is_capped_by_its_bytes() -> None:
    bench = Bench()
    bench.writer.put_steps([settled("first")])
    await turns()
    big = LARGE_BYTES - 1000
    for place in range(10):
        bench.writer.put_steps([settled(f"big/{place}", output=b"x" * big)])
    bench.writer.put_steps(settled_many(10, "more", output=b"x" * big))
    await bench.finish()
    sizes = [batch.nbytes for batch in bench.store.committed]
    assert max(sizes) < MOST_BYTES + LARGE_BYTES
    assert len(sizes) == 1 + math.ceil(20 / math.ceil(MOST_BYTES / big))


async def test_single_step_is_written_at_once_when_nothing_is_in_flight() -> None:
    bench = Bench()
    bench.writer.put_steps([settled("a")])
    await turns(2)
    assert bench.store.waiting == 1
    await bench.finish()


# --- order ----------------------------------------------------------------------------------

kinds = st.sampled_from(["steps", "attempt", "clear", "group", "memo", "mark", "run", "after"])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(kinds, st.integers(1, 300), st.booleans(), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_nothing_overtakes_what_was_put_before_it(
    plan: list[tuple[str, int, bool, bool]],
) -> None:
    """Each row is in the batch of the row before it, or a later one; callbacks come behind both."""

    async def main() -> None:
        bench = Bench()
        writer = bench.writer
        places: list[tuple[str, Any]] = []
        called: list[int] = []
        early: list[int] = []

        def batch_of(kind: str, item: Any) -> int | None:
            for number, batch in enumerate(bench.store.committed):
                rows: Any = getattr(batch, kind)
                if any(row is item or row == item for row in rows):
                    return number
            return None

        def callback(place: int, before: list[tuple[str, Any]]) -> None:
            if any(batch_of(kind, item) is None for kind, item in before):
                early.append(place)
            called.append(place)

        for place, (kind, count, turn, commit) in enumerate(plan):
            if kind == "steps":
                steps = settled_many(count, f"s{place}")
                writer.put_steps(steps)
                places += [("steps", steps[0]), ("steps", steps[-1])]
            elif kind == "attempt":
                attempt = attempt_row(f"a{place}")
                writer.put_attempt(attempt)
                places.append(("attempts", attempt))
            elif kind == "clear":
                writer.put_clear(RUN, f"c{place}")
                places.append(("clears", (RUN, f"c{place}")))
            elif kind == "group":
                group = group_row(f"g{place}")
                writer.put_group(group)
                places.append(("groups", group))
            elif kind == "memo":
                memo = memo_row(settled(f"m{place}"))
                writer.put_memo(memo)
                places.append(("memos", memo))
            elif kind == "mark":
                seen = mark(f"v{place}")
                writer.put_mark(seen)
                places.append(("marks", seen))
            elif kind == "run":
                row = release(epoch=place)
                writer.put_run(row)
                places.append(("runs", row))
            else:
                before = list(places)
                writer.after_commit(
                    lambda place=place, before=before: callback(place, before)  # type: ignore[misc]
                )
            if turn:
                await turns(3)
            if commit:
                bench.store.let_go()
        await bench.finish()
        numbers = [batch_of(kind, item) for kind, item in places]
        assert None not in numbers
        assert numbers == sorted(numbers)  # type: ignore[type-var]
        assert called == [place for place, (kind, *_) in enumerate(plan) if kind == "after"]
        assert early == []

    run(main)


async def test_callback_comes_only_after_its_own_batch_is_committed() -> None:
    bench = Bench()
    called: list[str] = []
    bench.writer.put_steps([settled("a")])
    bench.writer.after_commit(lambda: called.append("a"))
    await turns()
    bench.writer.put_steps([settled("b")])
    bench.writer.after_commit(lambda: called.append("b"))
    await turns()
    assert called == []
    bench.store.let_go()
    await turns()
    assert called == ["a"]
    bench.store.let_go()
    await turns()
    assert called == ["a", "b"]


async def test_callback_may_put_more_and_that_is_written_too() -> None:
    bench = Bench(held=False)
    done = asyncio.Event()

    def more() -> None:
        bench.writer.put_steps([settled("b")])
        bench.writer.after_commit(done.set)

    bench.writer.put_steps([settled("a")])
    bench.writer.after_commit(more)
    await asyncio.wait_for(done.wait(), 60)
    assert bench.store.ids == ["a", "b"]


async def test_callback_without_rows_waits_for_what_is_in_flight() -> None:
    bench = Bench()
    called: list[int] = []
    bench.writer.put_steps([settled("a")])
    await turns()
    bench.writer.after_commit(lambda: called.append(1))
    await turns()
    assert called == []
    await bench.finish()
    assert called == [1]


# --- large values ---------------------------------------------------------------------------


async def test_large_value_in_flight_delays_no_other_row() -> None:
    bench = Bench()
    bench.store.held = False
    events: list[str] = []
    bench.writer.put_large(
        settled("huge", output=b"x" * LARGE_BYTES * 2), lambda: events.append("huge")
    )
    await turns()
    assert bench.large.waiting == 1
    for place in range(5):
        bench.writer.put_steps([settled(f"small/{place}")])
        bench.writer.after_commit(lambda place=place: events.append(f"small/{place}"))  # type: ignore[misc]
        await turns()
    assert events == [f"small/{place}" for place in range(5)]
    bench.large.let_go()
    await turns()
    assert events[-1] == "huge"


@pytest.mark.parametrize("in_flight", [True, False])
async def test_large_value_is_not_durable_before_what_was_put_earlier(in_flight: bool) -> None:
    bench = Bench()
    done: list[str] = []
    if in_flight:
        bench.writer.put_steps([settled("first")])
        await turns()
    bench.writer.put_steps([settled("before")])
    bench.writer.put_large(settled("huge"), lambda: done.append("huge"))
    bench.writer.put_steps([settled("behind")])
    await turns()
    assert (bench.store.waiting, bench.large.waiting) == (1, 0)
    while "before" not in bench.store.ids:
        assert bench.large.waiting == 0
        assert bench.store.let_go()
        await turns()
    assert bench.large.waiting == 1
    await bench.finish()
    assert done == ["huge"]


async def test_large_value_put_during_a_write_waits_for_that_write_alone() -> None:
    bench = Bench()
    bench.writer.put_steps([settled("before")])
    await turns()
    bench.writer.put_large(settled("huge"), lambda: None)
    bench.writer.put_steps([settled("behind")])
    await turns()
    assert bench.large.waiting == 0
    bench.store.let_go()
    await turns()
    assert bench.large.waiting == 1
    assert bench.store.waiting == 1, "what came later is still on its way"
    assert bench.store.ids == ["before"]
    await bench.finish()


async def test_who_waits_for_what_was_put_does_not_wait_when_it_is_durable() -> None:
    bench = Bench()
    await bench.writer.caught_up()
    assert bench.store.begun == []
    bench.writer.put_steps([settled("before")])
    waiting = asyncio.ensure_future(bench.writer.caught_up())
    await turns()
    bench.writer.put_steps([settled("behind")])
    await turns()
    assert not waiting.done()
    bench.store.let_go()
    await turns()
    assert waiting.done()
    assert bench.store.ids == ["before"]
    await bench.finish()
    await bench.writer.caught_up()


async def test_large_values_go_one_at_a_time() -> None:
    bench = Bench()
    done: list[int] = []
    for place in range(4):
        bench.writer.put_large(settled(f"huge/{place}"), lambda place=place: done.append(place))  # type: ignore[misc]
    for place in range(4):
        await turns()
        assert bench.large.waiting == 1
        assert done == list(range(place))
        bench.large.let_go()
    await turns()
    assert done == [0, 1, 2, 3]


async def test_refused_large_value_fails_its_step_alone() -> None:
    bench = Bench(held=False)
    bench.large.refuses = lambda step: step.id == "bad"
    done: list[str] = []
    bench.writer.put_large(settled("bad"), lambda: done.append("bad"))
    bench.writer.put_large(settled("good"), lambda: done.append("good"))
    await bench.writer.drain()
    assert bench.refused == ["bad"]
    assert bench.large.committed[-1].steps[0].id == "good"
    assert done == ["bad", "good"], "the failure is durable too"
    assert bench.lost == []


# --- letting go of a run --------------------------------------------------------------------


async def test_run_is_let_go_only_after_its_large_values_and_holds_up_no_other_run() -> None:
    bench = Bench()
    bench.store.held = False
    events: list[str] = []
    bench.writer.put_large(settled("huge"), lambda: events.append("huge"))
    await turns()
    bench.writer.put_run(release(), lambda: events.append("left"))
    bench.writer.put_steps([settled("other")])
    bench.writer.after_commit(lambda: events.append("other"))
    await turns()
    assert events == ["other"]
    assert not any(batch.runs for batch in bench.store.committed)
    bench.large.let_go()
    await turns()
    assert events == ["other", "huge", "left"]
    assert [row.run_id for batch in bench.store.committed for row in batch.runs] == [RUN]


# --- refused rows ---------------------------------------------------------------------------


class Drawn:
    """Stands for `st.data()` with answers that are known."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)

    def draw(self, _: Any) -> Any:
        return next(self._answers)


@settings(max_examples=80, deadline=None)
@given(st.data())
@example(Drawn(MOST_ROWS, {0}))  # its memo comes in the next batch
def test_refused_rows_hurt_their_own_steps_alone(data: Any) -> None:
    count = data.draw(st.integers(1, MOST_ROWS))
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=4))

    async def main() -> None:
        bench = Bench(held=False)
        steps = settled_many(count)
        wrong = {steps[place].id for place in bad}
        bench.store.refuses = lambda step: step.id in wrong
        group = group_row(succeeded=count)
        called: list[int] = []

        def put_right(step: Step) -> None:
            group.succeeded -= 1
            group.failed += 1

        bench.on_refused = put_right
        bench.writer.put_steps(steps)
        bench.writer.put_attempt(attempt_row("x"))
        bench.writer.put_mark(mark("y"))
        bench.writer.put_memo(memo_row(steps[0]))
        bench.writer.put_memo(memo_row(steps[-1]))
        bench.writer.put_clear(RUN, "z")
        bench.writer.put_group(group)
        bench.writer.after_commit(lambda: called.append(1))
        bench.writer.put_steps([settled("after")])
        await bench.writer.drain()

        assert set(bench.refused) == wrong
        assert len(bench.refused) == len(wrong)
        assert sorted(bench.store.ids) == sorted([step.id for step in steps] + ["after"])
        assert [step.status for step in steps].count("failed") == len(wrong)
        for batch in bench.store.committed:
            assert all(step.status == "failed" for step in batch.steps if step.id in wrong)
        last = max(n for n, batch in enumerate(bench.store.committed) if batch.groups)
        written = bench.store.committed[last]
        assert [(row.succeeded, row.failed) for row in written.groups] == [
            (count - len(wrong), len(wrong))
        ]
        assert len(written.attempts) == len(written.marks) == len(written.clears) == 1
        memos = [memo.step.id for batch in bench.store.committed for memo in batch.memos]
        assert memos == [step.id for step in (steps[0], steps[-1]) if step.id not in wrong]
        # What names a group is written no earlier than all of its steps.
        assert all(not batch.groups for batch in bench.store.committed[:last])
        assert called == [1]
        assert bench.lost == []
        tries = 4 + 2 * len(wrong) * (1 + math.ceil(math.log2(count or 1)))
        assert len(bench.store.begun) <= tries

    run(main)


async def test_row_that_is_no_steps_and_refused_ends_the_writer() -> None:
    bench = Bench(held=False)
    bench.store.fails = ContentRefused("an attempt")
    bench.writer.put_attempt(attempt_row())
    await bench.writer.drain()
    assert len(bench.lost) == 1


# --- stored before --------------------------------------------------------------------------


async def test_step_that_was_stored_before_is_told_before_the_callback() -> None:
    bench = Bench(held=False)
    events: list[str] = []
    row = StoredStep("completed", "f", b"", b"9", None, 1, 1, 1, 1, 1, None)

    async def write(batch: Batch) -> Stored:
        return [(batch.steps[0], row)]

    writer = CheckpointWriter(
        write,
        write,
        lambda step, stored: events.append(f"{step.id} is {stored.output!r}"),
        lambda *_: None,
        bench.lost.append,
    )
    writer.put_steps([settled("a")])
    writer.after_commit(lambda: events.append("durable"))
    await writer.drain()
    assert events == ["a is b'9'", "durable"]


# --- the end --------------------------------------------------------------------------------


async def test_lost_lease_is_told_once_and_nothing_more_is_written() -> None:
    bench = Bench()
    called: list[int] = []
    bench.writer.put_large(settled("huge"), lambda: called.append(2))
    for place in range(3):
        bench.writer.put_steps(settled_many(400, f"g{place}"))
        bench.writer.after_commit(lambda: called.append(1))
        await turns()
    bench.writer.put_large(settled("huge, and behind"), lambda: called.append(5))
    await turns()
    bench.store.fails = bench.large.fails = LeaseLost("ended")
    await bench.finish()
    assert [type(error) for error in bench.lost] == [LeaseLost]
    assert bench.writer.lost is bench.lost[0]
    bench.writer.put_steps([settled("late")])
    bench.writer.put_large(settled("late and large"), lambda: called.append(3))
    bench.writer.put_run(release(), lambda: called.append(4))
    await bench.writer.drain()
    assert called == []
    assert bench.store.committed == []
    assert bench.large.committed == []
    assert len(bench.store.begun) == 1
    assert len(bench.large.begun) == 1
    assert len(bench.lost) == 1


@pytest.mark.parametrize("first", ["small", "large"])
async def test_error_nobody_expected_ends_the_writer_like_a_lost_lease(first: str) -> None:
    bench = Bench(held=False)
    store = bench.store if first == "small" else bench.large
    store.fails = RuntimeError("a bug")
    if first == "small":
        bench.writer.put_steps([settled("a")])
    else:
        bench.writer.put_large(settled("a"), lambda: None)
    await bench.writer.drain()
    assert [str(error) for error in bench.lost] == ["a bug"]


async def test_drain_waits_for_what_is_put_and_for_what_callbacks_put() -> None:
    bench = Bench()
    bench.writer.put_large(
        settled("huge"), lambda: bench.writer.put_group(group_row("behind the large one"))
    )
    bench.writer.put_steps([settled("a")])
    draining = asyncio.ensure_future(bench.writer.drain())
    await turns()
    bench.store.let_go()
    await turns()
    assert not draining.done()
    bench.large.let_go()
    await turns()
    assert not draining.done(), "the group's row is in flight"
    bench.store.let_go()
    await asyncio.wait_for(draining, 60)
    assert [row.path for row in bench.store.committed[-1].groups] == ["behind the large one"]


async def test_close_drops_what_is_not_committed() -> None:
    bench = Bench()
    called: list[int] = []
    bench.writer.put_steps([settled("a")])
    bench.writer.put_large(settled("huge"), lambda: called.append(1))
    bench.writer.after_commit(lambda: called.append(2))
    await turns()
    await asyncio.wait_for(bench.writer.close(), 60)
    assert called == []
    assert bench.store.committed == []
    assert bench.lost == []


async def test_cancelling_whoever_put_a_row_does_not_reach_the_writer() -> None:
    bench = Bench()

    async def run_of_a_workflow() -> None:
        bench.writer.put_steps([settled("a")])
        await asyncio.get_running_loop().create_future()

    task = asyncio.ensure_future(run_of_a_workflow())
    await turns()
    task.cancel()
    waited: Awaitable[Any] = asyncio.gather(task, return_exceptions=True)
    await waited
    await bench.finish()
    assert bench.store.ids == ["a"]
