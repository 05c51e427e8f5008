"""A task that drops a cancel ends all the same."""

from __future__ import annotations

import asyncio

from kagzi.background import cancel_all


async def drops(cancels: int) -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancels -= 1
            if cancels == 0:
                raise


async def fails() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise ValueError("on the way out") from None


async def test_tasks_have_ended_whatever_they_do_with_a_cancel() -> None:
    tasks = [asyncio.create_task(one) for one in (drops(1), drops(3), fails())]
    await asyncio.sleep(0)
    await cancel_all(tasks)
    assert [task.done() for task in tasks] == [True] * 3
    await cancel_all(tasks)
    await cancel_all([])
