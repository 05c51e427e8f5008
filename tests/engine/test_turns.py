"""Bodies that are held back before they begin, and let in some at a time."""

from __future__ import annotations

import asyncio

from kagzi.engine.turns import AT_ONCE, Turns


async def rounds(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_those_who_wait_are_let_in_in_order_and_some_at_a_time() -> None:
    turns = Turns(asyncio.get_running_loop())
    turns.hold(True)
    begun: list[int] = []

    async def body(number: int) -> None:
        if turns.held:
            await turns.wait()
        begun.append(number)

    tasks = [asyncio.create_task(body(number)) for number in range(3 * AT_ONCE)]
    await rounds(3)
    assert begun == []
    turns.hold(False)
    await rounds(1)
    assert begun == list(range(AT_ONCE))
    await asyncio.gather(*tasks)
    assert begun == list(range(3 * AT_ONCE))


async def test_who_is_let_in_can_hold_back_the_others_again() -> None:
    turns = Turns(asyncio.get_running_loop())
    turns.hold(True)
    begun: list[int] = []

    async def body(number: int) -> None:
        await turns.wait()
        begun.append(number)
        turns.hold(True)

    tasks = [asyncio.create_task(body(number)) for number in range(5)]
    for count in range(1, 6):
        await rounds(3)
        assert len(begun) == count - 1
        turns.hold(False)
        await rounds(3)
        assert len(begun) == count
    await asyncio.gather(*tasks)
    assert sorted(begun) == list(range(5))


async def test_one_that_is_cancelled_while_it_waits_takes_nobodys_turn() -> None:
    turns = Turns(asyncio.get_running_loop())
    turns.hold(True)
    tasks = [asyncio.create_task(turns.wait()) for _ in range(2 * AT_ONCE)]
    await rounds(2)
    for task in tasks[:AT_ONCE]:
        task.cancel()
    turns.hold(False)
    await asyncio.gather(*tasks[AT_ONCE:])
    assert all(task.cancelled() for task in tasks[:AT_ONCE])
