"""The marks that a pool process leaves for its coordinator."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kagzi.pool.marks import Marks, make_cells, read_marks, read_running
from kagzi.pool.wire import CELL_FIRST_BODY, CELLS


@pytest.fixture
def cells() -> Iterator[memoryview]:
    descriptor, made = make_cells()
    os.close(descriptor)
    yield made
    made.release()


def test_marks_tell_what_runs_from_what_has_begun(cells: memoryview) -> None:
    marks = Marks(cells)
    begun, thread = marks.begin(7), marks.begin_thread(8)
    assert read_marks(cells) == ([8], [7])
    with marks.on_behalf_of(7):
        assert read_running(cells) == [7, 8]
        with marks.on_behalf_of(9):
            assert read_running(cells) == [9, 8]
        assert read_running(cells) == [7, 8]
    marks.end(begun)
    marks.end(thread)
    assert read_marks(cells) == ([], [])


def test_marks_of_more_bodies_than_there_are_cells_are_left_out(cells: memoryview) -> None:
    """Bodies that wait for inner groups are many at times."""
    marks = Marks(cells)
    room = CELLS - CELL_FIRST_BODY
    taken = [marks.begin(number) for number in range(1, room + 100)]
    assert len(read_marks(cells)[1]) == room
    for cell in taken:
        marks.end(cell)
    assert read_marks(cells) == ([], [])
    assert marks.begin(7) != marks.begin(8)
    assert sorted(read_marks(cells)[1]) == [7, 8]
    assert marks.begin_thread(9) < CELL_FIRST_BODY
    assert read_running(cells) == [9]


async def test_coroutine_is_marked_only_while_its_code_runs(cells: memoryview) -> None:
    marks = Marks(cells)
    seen = []

    async def body() -> str:
        seen.append(read_running(cells))
        return "value"

    coroutine = marks.on_loop(body(), 5)
    with pytest.raises(StopIteration, match="value"):
        coroutine.send(None)
    assert seen == [[5]]
    assert read_running(cells) == []
