"""Maps over items that come one by one: a window at a time, in order, on from where they were."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, InvalidInput, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def noted(folder: str, size: int) -> Iterator[tuple[str, int]]:
    """Items that note when they are taken."""
    for number in range(size):
        Witness(folder).note(f"item {number}")
        yield folder, number


async def later(size: int) -> AsyncIterator[int]:
    for number in range(size):
        yield number


@kagzi.step
async def take(item: tuple[str, int]) -> int:
    folder, number = item
    Witness(folder).note(f"step {number}")
    return number * 10


@kagzi.step
async def take_behind(item: tuple[str, int]) -> int:
    folder, number = item
    Witness(folder).note(f"step {number}")
    await Witness(folder).pass_gate("go")
    return number


@kagzi.step
async def odd_fails(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


@kagzi.workflow
async def summed(ctx: Context, folder: str, size: int, window: int) -> list[int]:
    total, count = 0, 0
    async for value in ctx.map("all", take, noted(folder, size), window=window):
        total, count = total + value, count + 1
    await ctx.step(steps.note, folder, "summed")
    return [total, count]


@kagzi.workflow
async def listed(ctx: Context, size: int) -> list[int]:
    return await ctx.map("all", steps.square, later(size), window=3)


@kagzi.workflow
async def behind_gate(ctx: Context, folder: str, limit: int | None) -> int:
    async for _ in ctx.map("all", take_behind, noted(folder, 100), window=4, limit=limit):
        pass
    return 0


@kagzi.workflow
async def from_a_place(ctx: Context, folder: str, size: int) -> int:
    def rest(place: int) -> Iterator[tuple[str, int]]:
        Witness(folder).note(f"from {place}")
        return iter([(folder, number) for number in range(place, size)])

    total = 0
    async for value in ctx.map("all", take, rest, window=4):
        total += value
    return total


@kagzi.workflow
async def with_failures(ctx: Context, collect: bool) -> list[Any]:
    if collect:
        done = await ctx.map(
            "all", odd_fails, iter(range(7)), window=2, on_error=ErrorStrategy.COLLECT_ALL
        )
        return [done.values, sorted(done.errors)]
    seen = []
    try:
        async for value in ctx.map("all", odd_fails, iter(range(0, 7)), window=1):
            seen.append(value)
    except StepFailed as error:
        return [seen, error.message]
    return seen


@kagzi.workflow
async def keyed(ctx: Context) -> list[int]:
    return await ctx.map("all", steps.square, iter([1, 2, 3]), key=str, window=2)


@kagzi.workflow
async def left_early(ctx: Context, folder: str) -> list[int]:
    values = ctx.map("all", take, noted(folder, 1000), window=5)
    seen = []
    async for value in values:
        seen.append(value)
        if len(seen) == 3:
            break
    await ctx.step(steps.note, folder, "left")
    return seen


# --- results --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "window"), [(0, 3), (1, 3), (3, 3), (10, 3), (40, 1)])
async def test_results_come_in_order_and_are_the_same_on_replay(
    engine: Engine, witness: Witness, size: int, window: int
) -> None:
    expected = [10 * sum(range(size)), size]
    result, handle = await engine.drive(summed, witness.folder, size, window)
    assert result == expected
    assert sum(entry.startswith("step") for entry in witness.entries) == size
    for keep in (None, *(await engine.numbers(handle))[:: max(1, size // 4)]):
        assert await engine.replay(handle, keep) == expected


async def test_awaited_it_gives_a_list(engine: Engine) -> None:
    result, handle = await engine.drive(listed, 8)
    assert result == [0, 1, 4, 9, 16, 25, 36, 49]
    assert set(await engine.ids(handle)) == {f"all/{n // 3}/{n % 3}" for n in range(8)}
    assert await engine.replay(handle) == result


async def test_keys_name_the_steps(engine: Engine) -> None:
    result, handle = await engine.drive(keyed)
    assert result == [1, 4, 9]
    assert set(await engine.ids(handle)) == {"all/0/1", "all/0/2", "all/1/3"}
    assert await engine.replay(handle) == result


# --- windows --------------------------------------------------------------------------------


async def test_no_more_than_two_windows_of_items_are_taken(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(behind_gate, witness.folder, None)
    await until(lambda: sum(entry.startswith("step") for entry in witness.entries) == 8)
    assert [entry for entry in witness.entries if entry.startswith("item")] == [
        f"item {number}" for number in range(8)
    ]
    await handle.cancel()
    await engine.settled()


async def test_a_limit_holds_over_all_windows(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(behind_gate, witness.folder, 3)
    await until(lambda: sum(entry.startswith("step") for entry in witness.entries) == 3)
    scheduler = engine.worker.executor.scheduler
    assert scheduler.waiting() == 5
    await handle.cancel()
    await engine.settled()


async def test_loop_that_is_left_takes_no_more(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(left_early, witness.folder)
    assert result == [0, 10, 20]
    assert sum(entry.startswith("item") for entry in witness.entries) == 10
    assert await engine.replay(handle) == result


# --- after a crash --------------------------------------------------------------------------


async def test_complete_windows_are_neither_loaded_nor_run_again(
    engine: Engine, witness: Witness
) -> None:
    _, handle = await engine.drive(summed, witness.folder, 20, 4)
    before = len(witness.entries)
    load = engine.client._store.queries["load_steps"]
    loaded = await engine.rows(load, run_ids=[handle.run_id], whole=False, most_bytes=0)
    assert [row[1] for row in loaded] == ["note"]
    assert await engine.replay(handle) == [1900, 20]
    again = witness.entries[before:]
    assert not [entry for entry in again if entry.startswith("step")]


async def test_function_is_asked_to_go_on_behind_what_is_recorded(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(from_a_place, witness.folder, 10)
    assert result == 450
    assert await engine.replay(handle) == 450
    groups = await engine.rows(
        "SELECT max(completed_number) FROM kagzi.parallel_groups WHERE run_id = %(id)s"
        " AND path IN ('all/0', 'all/1')",
        id=handle.run_id,
    )
    assert await engine.replay(handle, groups[0][0]) == 450
    asked = [entry for entry in witness.entries if entry.startswith("from")]
    assert asked[:2] == ["from 0", "from 10"]
    assert asked[2] in ("from 8", "from 10"), "the third window may have been quicker"


# --- failures -------------------------------------------------------------------------------


async def test_failure_comes_at_its_place(engine: Engine) -> None:
    result, handle = await engine.drive(with_failures, False)
    assert result == [[0], "1 is odd"]
    assert await engine.replay(handle) == result


async def test_failures_are_collected(engine: Engine) -> None:
    result, handle = await engine.drive(with_failures, True)
    assert result == [[0, None, 2, None, 4, None, 6], [1, 3, 5]]
    assert await engine.replay(handle) == result


@kagzi.workflow
async def bad_maps(ctx: Context) -> list[str]:
    said = []
    for options in (
        {"window": 0},
        {"window": "many"},
        {"timeout": 3.0},
        {"limit": 0},
        {"on_error": "ignore"},
    ):
        try:
            await ctx.map("m", steps.square, iter([1]), **options)  # type: ignore[call-overload]
        except InvalidInput as error:
            said.append(str(error))
    try:
        await ctx.map("m", steps.square, lambda place: iter([place]), key=str)
    except InvalidInput as error:
        said.append(str(error))
    once = ctx.map("m", steps.square, iter([1]))
    await once
    try:
        await once
    except InvalidInput as error:
        said.append(str(error))
    return said


async def test_bad_options_are_refused(engine: Engine) -> None:
    handle = await engine.start(bad_maps)
    said = await handle.result(PATIENCE_S)
    assert len(said) == 7
    assert len(await engine.ids(handle)) == 1


@kagzi.workflow
async def loops_over_a_list(ctx: Context, size: int) -> str:
    try:
        async for _ in ctx.map("m", steps.add, [1] * size, key=str):  # type: ignore[attr-defined]
            pass
    except TypeError as error:
        return str(error)
    return ""


async def test_loop_over_a_map_of_a_list_says_what_to_do(engine: Engine) -> None:
    assert "await it" in await engine.run(loops_over_a_list, 0)
