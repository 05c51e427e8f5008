"""Marks in shared memory: which steps run in a pool process, readable after its death."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from kagzi.pool.wire import CELL_FIRST_BODY, CELL_FIRST_THREAD, CELL_LOOP, CELLS

SIZE_BYTES = CELLS * 8


def make_cells() -> tuple[int, memoryview]:
    """An anonymous file, as a descriptor to hand to a process, and its cells here."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("kagzi-marks", os.MFD_CLOEXEC)
    else:
        handle, path = tempfile.mkstemp(prefix="kagzi-marks-")
        os.unlink(path)
        descriptor = handle
    os.ftruncate(descriptor, SIZE_BYTES)
    return descriptor, map_cells(descriptor)


def map_cells(descriptor: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, SIZE_BYTES)).cast("Q")


class Marks:
    """The process's side: a cell for each open body, and one for what the loop runs now."""

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self._free = list(range(CELLS - 1, CELL_FIRST_BODY - 1, -1))
        self._free_threads = list(range(CELL_FIRST_BODY - 1, CELL_FIRST_THREAD - 1, -1))

    def begin(self, number: int) -> int:
        """Note a body on the loop; returns its cell, or 0 where so many wait that none is free."""
        if not self._free:
            return 0
        cell = self._free.pop()
        self._cells[cell] = number
        return cell

    def begin_thread(self, number: int) -> int:
        """Note a body in a thread; returns its cell."""
        cell = self._free_threads.pop()
        self._cells[cell] = number
        return cell

    def end(self, cell: int) -> None:
        if not cell:
            return
        self._cells[cell] = 0
        (self._free if cell >= CELL_FIRST_BODY else self._free_threads).append(cell)

    @contextmanager
    def on_behalf_of(self, number: int) -> Iterator[None]:
        """Mark what the loop does meanwhile as this step's."""
        before = self._cells[CELL_LOOP]
        self._cells[CELL_LOOP] = number
        try:
            yield
        finally:
            self._cells[CELL_LOOP] = before

    def on_loop(self, coroutine: Coroutine[Any, Any, Any], number: int) -> MarkedCoroutine:
        return MarkedCoroutine(coroutine, self._cells, number)


class MarkedCoroutine(Coroutine[Any, Any, Any]):
    """Drives a coroutine and marks the loop's cell whenever its code runs."""

    __slots__ = ("_cells", "_coroutine", "_number", "_send")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], cells: memoryview, number: int) -> None:
        self._coroutine = coroutine
        self._send = coroutine.send
        self._cells = cells
        self._number = number

    def send(self, value: Any) -> Any:
        self._cells[CELL_LOOP] = self._number
        try:
            return self._send(value)
        finally:
            self._cells[CELL_LOOP] = 0

    def throw(self, *error: Any) -> Any:
        self._cells[CELL_LOOP] = self._number
        try:
            return self._coroutine.throw(*error)
        finally:
            self._cells[CELL_LOOP] = 0

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()


def read_running(cells: memoryview) -> list[int]:
    """Steps whose code runs: on the loop, and in threads."""
    return [number for number in cells[CELL_LOOP:CELL_FIRST_BODY].tolist() if number]


def read_marks(cells: memoryview) -> tuple[list[int], list[int]]:
    """Of a dead process: steps whose code ran at the end, and all that had begun on its loop."""
    begun = [number for number in cells[CELL_FIRST_BODY:].tolist() if number]
    return read_running(cells), begun
