"""Large results: how much of them waits in memory, who waits for whom, and what a resume reads."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy
from kagzi.elsewhere import FETCH_BYTES, LEAST_BYTES
from kagzi.store import checkpoints
from kagzi.store.store import Store
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
BYTES = 100_000
MOST_BODIES = 400


@kagzi.step
async def numbered(index: int, size: int) -> str:
    return f"{index:08}" + "x" * (size - 8)


@kagzi.step
async def wide(index: int) -> str:
    return f"{index:08}" + "x" * (BYTES - 8)


@kagzi.step
async def noted(folder: str, index: int) -> str:
    Witness(folder).note(f"{index}")
    return f"{index:08}" + "x" * (BYTES - 8)


@kagzi.step
def noted_in_thread(folder: str, index: int) -> str:
    Witness(folder).note(f"{index}")
    return f"{index:08}" + "x" * (BYTES - 8)


@kagzi.workflow
async def completed(ctx: Context, count: int, size: int) -> list[int]:
    places = []
    async for done in ctx.as_completed("all", [numbered.bind(n, size) for n in range(count)]):
        assert len(done.value) == size
        places.append(int(done.value[:8]))
        assert places[-1] == done.index
    return places


@kagzi.workflow
async def mapped(ctx: Context, count: int, window: int) -> list[int]:
    return [
        int(value[:8]) async for value in ctx.map("all", wide, iter(range(count)), window=window)
    ]


@kagzi.workflow
async def map_listed(ctx: Context, count: int, window: int) -> list[int]:
    values = await ctx.map("all", wide, iter(range(count)), window=window)
    return [int(value[:8]) for value in values]


@kagzi.workflow
async def mapped_within_time(ctx: Context, count: int, window: int) -> list[int]:
    async with ctx.timeout(600):
        values = ctx.map("all", wide, iter(range(count)), window=window)
        return [int(value[:8]) async for value in values]


@kagzi.workflow
async def left_early(ctx: Context, count: int) -> int:
    seen = 0
    async for _ in ctx.as_completed("all", [numbered.bind(n, BYTES) for n in range(count)]):
        seen += 1
        if seen == 3:
            break
    return seen


@kagzi.workflow
async def listed(ctx: Context, count: int, size: int, collect: bool) -> list[int]:
    calls = [numbered.bind(n, size) for n in range(count)]
    if collect:
        done = await ctx.parallel_vec("all", calls, on_error=ErrorStrategy.COLLECT_ALL)
        return [int(value[:8]) for value in done.values if value is not None]
    return [int(value[:8]) for value in await ctx.parallel_vec("all", calls)]


@kagzi.workflow
async def one_by_one(ctx: Context, count: int, size: int) -> list[int]:
    return [int((await ctx.step(numbered, n, size))[:8]) for n in range(count)]


@kagzi.workflow
async def raced(ctx: Context, size: int) -> list[Any]:
    won = await ctx.race("all", [numbered.bind(n, size) for n in range(3)])
    return [won.index, int(won.value[:8])]


@kagzi.workflow
async def within_time(ctx: Context, count: int, size: int) -> int:
    total = 0
    async with ctx.timeout(600):
        for n in range(count):
            total += len(await ctx.step(numbered, n, size))
    return total


@kagzi.workflow
async def all_noted(ctx: Context, folder: str, count: int, in_thread: bool) -> int:
    body = noted_in_thread if in_thread else noted
    values = await ctx.parallel_vec("all", [body.bind(folder, n) for n in range(count)])
    return sum(int(value[:8]) for value in values)


@kagzi.step
async def nested(ctx: Context, depth: int) -> str:
    if depth == 0:
        return "x" * BYTES
    inner = await ctx.parallel_vec("in", [nested.bind(depth - 1) for _ in range(3)])
    return "x" * sum(map(len, inner))


@kagzi.workflow
async def nest(ctx: Context, count: int, depth: int) -> int:
    return sum(map(len, await ctx.parallel_vec("all", [nested.bind(depth) for _ in range(count)])))


@kagzi.workflow
async def closures(ctx: Context, count: int) -> int:
    async def outer(n: int) -> str:
        inner = await ctx.parallel("in", lambda: "x" * BYTES, lambda: "y" * BYTES)
        return f"{n}" + "".join(inner)

    done = await ctx.parallel_vec("all", [lambda n=n: outer(n) for n in range(count)])
    return len(done)


class Fetches:
    """What was read again, statement by statement."""

    def __init__(self) -> None:
        self.ids: list[list[str]] = []


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    found, fetch = Fetches(), Store.fetch_outputs

    async def noting(self: Store, run_id: Any, ids: list[str]) -> list[bytes]:
        found.ids.append(ids)
        return await fetch(self, run_id, ids)

    monkeypatch.setattr(Store, "fetch_outputs", noting)
    return found


@pytest.fixture
def no_room(engine: Engine) -> Iterator[None]:
    """Nothing that is durable may wait in the worker's memory."""
    room = engine.worker.room
    left, room.left = room.left, 0
    yield
    room.left += left


# --- what waits in memory -------------------------------------------------------------------


async def test_room_is_given_back(engine: Engine) -> None:
    left = engine.worker.room.left
    assert sorted(await engine.run(completed, 20, BYTES)) == list(range(20))
    assert await engine.run(mapped, 20, 5) == list(range(20))
    assert await engine.run(map_listed, 20, 5) == list(range(20))
    assert await engine.run(left_early, 40) == 3
    result, handle = await engine.drive(mapped_within_time, 20, 5)
    numbers = await engine.numbers(handle)
    assert await engine.replay(handle, numbers[8]) == result == list(range(20))
    await engine.settled()
    assert engine.worker.room.left == left


@pytest.mark.usefixtures("no_room")
async def test_results_without_room_are_read_again_when_they_are_asked_for(
    engine: Engine, fetches: Fetches
) -> None:
    result, handle = await engine.drive(completed, 100, BYTES)
    assert sorted(result) == list(range(100))
    at_once = FETCH_BYTES // BYTES
    assert sum(map(len, fetches.ids)) == 100
    assert max(map(len, fetches.ids)) <= at_once
    assert await engine.replay(handle) == result

    fetches.ids.clear()
    result, handle = await engine.drive(mapped, 100, 50)
    assert result == list(range(100))
    assert len(fetches.ids) == 2 * -(-50 // at_once)
    assert await engine.replay(handle) == result


@pytest.mark.usefixtures("no_room")
async def test_small_results_stay_in_memory(engine: Engine, fetches: Fetches) -> None:
    result, handle = await engine.drive(completed, 50, LEAST_BYTES - 10)
    assert sorted(result) == list(range(50))
    assert await engine.replay(handle) == result
    assert fetches.ids == []


@pytest.mark.parametrize("collect", [False, True])
async def test_a_list_is_the_same_on_replay(
    engine: Engine, fetches: Fetches, collect: bool
) -> None:
    result, handle = await engine.drive(listed, 60, BYTES, collect)
    assert result == list(range(60))
    assert fetches.ids == []
    assert await engine.replay(handle) == result
    assert len(fetches.ids) == -(-60 // (FETCH_BYTES // BYTES))


# --- who waits for whom ---------------------------------------------------------------------


async def all_quiet(witness: Witness) -> int:
    """Wait until no more bodies begin; how many have."""
    quiet, begun = 0, -1
    while quiet < 20:  # looks at which nothing more had begun
        await asyncio.sleep(0.02)
        quiet, begun = quiet + 1 if len(witness.entries) == begun else 0, len(witness.entries)
    return begun


@pytest.mark.parametrize("in_thread", [False, True])
async def test_bodies_wait_while_results_are_not_written(
    engine: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch, in_thread: bool
) -> None:
    monkeypatch.setattr(checkpoints, "MOST_UNWRITTEN", 2 << 20)
    writer = engine.worker.writer
    may_write = asyncio.Event()
    write = writer._write

    async def held(batch: Any) -> Any:
        await may_write.wait()
        return await write(batch)

    monkeypatch.setattr(writer, "_write", held)
    count = 2 * MOST_BODIES
    handle = await engine.start(all_noted, witness.folder, count, in_thread)
    await until(lambda: writer.is_full)
    begun = await all_quiet(witness)
    assert 20 < begun < MOST_BODIES, f"{begun} bodies ran ahead of the writer"
    may_write.set()
    assert await engine.outcome(handle) == sum(range(count))
    assert len(witness.entries) == count
    assert not writer.is_full
    assert writer.unwritten_bytes == 0


async def test_a_process_that_dies_while_its_results_wait_is_noticed(
    engine: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MOST_UNWRITTEN", 2 << 20)
    writer, pool = engine.worker.writer, engine.worker.pool
    assert pool is not None
    may_write = asyncio.Event()
    write = writer._write

    async def held(batch: Any) -> Any:
        await may_write.wait()
        return await write(batch)

    monkeypatch.setattr(writer, "_write", held)
    handle = await engine.start(all_noted, witness.folder, MOST_BODIES, False)
    await until(lambda: writer.is_full)
    await all_quiet(witness)  # a body that runs at this moment would be the culprit
    os.kill(pool.process_ids[0], 9)
    may_write.set()
    assert await engine.outcome(handle) == sum(range(MOST_BODIES))
    await until(lambda: len(pool.process_ids) == 2)


@pytest.mark.parametrize("most", [0, BYTES])
async def test_nests_come_to_their_end_however_little_may_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(checkpoints, "MOST_UNWRITTEN", most)
    assert await engine.run(nest, 4, 3) == 4 * 27 * BYTES
    assert await engine.run(closures, 20) == 20


# --- what a resume reads --------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, 200])
async def test_a_resume_reads_outputs_by_their_bytes_not_by_their_steps(
    engine: Engine, fetches: Fetches, count: int
) -> None:
    result, handle = await engine.drive(one_by_one, count, 2 * LEAST_BYTES)
    assert await engine.replay(handle) == result == list(range(count))
    assert len(fetches.ids) == 1
    assert len(fetches.ids[0]) == count


async def test_outputs_are_left_in_the_store_until_they_are_asked_for(
    engine: Engine, fetches: Fetches
) -> None:
    _, handle = await engine.drive(one_by_one, 3, 2 * LEAST_BYTES)
    runs = await engine.rows(
        "SELECT * FROM kagzi.step_runs WHERE run_id = %(id)s", id=handle.run_id
    )
    assert len(runs) == 3
    load = engine.client._store.queries["load_steps"]
    for most, left in ((LEAST_BYTES, 3), (3 * LEAST_BYTES, 0)):
        rows = await engine.rows(load, run_ids=[handle.run_id], whole=False, most_bytes=most)
        assert [row[5] is None for row in rows] == [left > 0] * 3
        assert all(row[-1] == 2 * LEAST_BYTES + 2 for row in rows)
    assert fetches.ids == []


async def test_of_a_race_only_the_winner_is_read(engine: Engine, fetches: Fetches) -> None:
    result, handle = await engine.drive(raced, 2 * LEAST_BYTES)
    assert await engine.replay(handle) == result
    assert [len(ids) for ids in fetches.ids] == [1]


async def test_what_stands_in_a_block_with_a_deadline_comes_at_once(
    engine: Engine, fetches: Fetches
) -> None:
    result, handle = await engine.drive(within_time, 5, 2 * LEAST_BYTES)
    assert await engine.replay(handle) == result == 5 * 2 * LEAST_BYTES
    assert fetches.ids == []


@pytest.mark.parametrize("keep", [1, 3])
async def test_a_resume_in_the_middle_goes_on_from_there(
    engine: Engine, fetches: Fetches, keep: int
) -> None:
    for workflow, args in ((completed, (8, 2 * LEAST_BYTES)), (one_by_one, (8, 2 * LEAST_BYTES))):
        result, handle = await engine.drive(workflow, *args)
        numbers = await engine.numbers(handle)
        assert sorted(await engine.replay(handle, numbers[keep])) == sorted(result)


@kagzi.workflow
async def many_groups(ctx: Context, groups: int, count: int) -> int:
    total = 0
    for _ in range(groups):
        total += sum(await ctx.parallel_vec("all", [steps.square.bind(1) for _ in range(count)]))
    return total


async def test_others_have_their_turn_while_a_run_is_replayed(engine: Engine) -> None:
    """Between two windows of recalled steps the loop goes round."""
    result, handle = await engine.drive(many_groups, 12, 500)
    rounds, over = 0, False

    async def count_rounds() -> None:
        nonlocal rounds
        while not over:
            if engine.worker.runs:
                rounds += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_rounds())
    before = rounds
    assert await engine.replay(handle) == result == 6000
    over = True
    await counting
    assert rounds - before >= 6


# --- memory ---------------------------------------------------------------------------------


async def grown(dsn: str, name: str, *args: Any) -> dict[str, float]:
    """MiB by which new processes grow over a run: the worker's, and the largest of its pool."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.engine.growth", dsn, name, json.dumps(args)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_memory_is_bounded_whatever_the_results_add_up_to(dsn: str) -> None:
    """A worker there keeps up to 4 MiB unwritten and 8 MiB unread."""
    for name, args in (("completed", (800, BYTES)), ("mapped", (1200, 300))):
        found = await grown(dsn, name, *args)
        assert found["worker"] < 55, (name, found)  # of 76 and 114 MiB
        assert found["pool"] < 30, (name, found)
    found = await grown(dsn, "listed", 600, BYTES, False)
    assert found["worker"] < 1.3 * 57 + 20, found
    assert found["pool"] < 30, found
