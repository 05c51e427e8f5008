"""Which pool process is given what."""

from __future__ import annotations

import asyncio

import pytest

from kagzi._core import LANE_ASYNC, LANE_THREAD, Place, Step
from kagzi.engine.executor import Executor


class Process:
    """A link that notes what it is given."""

    def __init__(self) -> None:
        self.place = Place((1000, 8, 1), self)
        self.given: list[Step] = []

    def start(self, steps: list[Step]) -> None:
        self.given += steps

    def cancel(self, step: Step) -> None:
        raise AssertionError

    def suspended(self, step: Step) -> None:
        raise AssertionError


def ready_steps(count: int, lane: int = LANE_ASYNC) -> list[Step]:
    return [Step(None, b"r" * 16, f"s{n}", None, "f", b"", b"", lane) for n in range(count)]


async def given(bodies_took_us: int, count: int, lane: int = LANE_ASYNC) -> list[int]:
    """How many steps each of two processes got after bodies that took so long."""
    executor = Executor(asyncio.get_running_loop())
    for _ in range(20):
        done = ready_steps(1)
        done[0].started_us, done[0].completed_us = 1_000_000, 1_000_000 + bodies_took_us
        executor.finished(done)
    await asyncio.sleep(0)
    processes = [Process(), Process()]
    for process in processes:
        executor.add_link(process)
    executor.submit(ready_steps(count, lane))
    await asyncio.sleep(0)  # the executor feeds at the end of the turn
    await asyncio.sleep(0)
    return sorted(len(process.given) for process in processes)


@pytest.mark.parametrize(
    ("took_us", "count", "shares"),
    [(10, 20, [0, 20]), (10, 200, [100, 100]), (50_000, 2, [1, 1]), (50_000, 20, [10, 10])],
)
async def test_steps_go_to_one_process_if_they_take_less_than_a_moment(
    took_us: int, count: int, shares: list[int]
) -> None:
    assert await given(took_us, count) == shares


async def test_sync_steps_are_shared_however_short_async_ones_were() -> None:
    assert await given(10, 8, LANE_THREAD) == [4, 4]


async def test_steps_are_shared_before_anything_is_known_of_them() -> None:
    executor = Executor(asyncio.get_running_loop())
    processes = [Process(), Process()]
    for process in processes:
        executor.add_link(process)
    executor.submit(ready_steps(10))
    await asyncio.sleep(0)  # the executor feeds at the end of the turn
    await asyncio.sleep(0)
    assert [len(process.given) for process in processes] == [5, 5]
