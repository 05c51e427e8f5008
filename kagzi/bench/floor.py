"""The same work by plain scripts that recall, retry and fence nothing: the floor.

Each runs in a thread with an event loop of its own, since a worker's loop has a task factory.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Any, TypeVar
from uuid import UUID, uuid4

import orjson
import psycopg
import uvloop
from psycopg import sql

from kagzi._core import STEP_COLUMNS
from kagzi.bench.work import burn

T = TypeVar("T")

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_MOMENT = struct.pack(">q", 800_000_000_000_000)
_NUMBER = struct.pack(">i", 1)
_PIECE_BYTES = 1 << 20
_LEFT: tuple[bytes | None, ...] = (b"kagzi.bench.work.nothing", b"completed")
_RIGHT: tuple[bytes | None, ...] = (
    None,
    b"[0]",  # input
    bytes(16),
    _NUMBER,
    bytes(16),
    None,
    _MOMENT,
    _MOMENT,
    _NUMBER,
    _NUMBER,
    bytes(16),
    _NUMBER,
)


class PlainScript:
    """`asyncio.gather` over coroutines, and their rows in one binary COPY or in INSERTs.

    Args:
        conninfo: Of the database.
        schema: Where `step_runs` is; a table like it is made beside it.
    """

    def __init__(self, conninfo: str, schema: str) -> None:
        self._connection = psycopg.connect(
            conninfo, autocommit=True, application_name="kagzi-bench-floor"
        )
        self._thread = ThreadPoolExecutor(1, "kagzi-bench-floor")
        self._loop = uvloop.new_event_loop()
        table = sql.Identifier(schema, "floor")
        columns = sql.SQL(", ").join(map(sql.Identifier, STEP_COLUMNS))
        self._connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
        self._connection.execute(
            sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                table, sql.Identifier(schema, "step_runs")
            )
        )
        self._copy = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, columns)
        self._insert = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            table, columns, sql.SQL(", ").join([sql.Placeholder()] * len(STEP_COLUMNS))
        )

    def close(self) -> None:
        self._thread.shutdown()
        self._loop.close()
        self._connection.close()

    async def group(self, size: int, seconds: float = 0.0, nbytes: int = 1) -> float:
        """Seconds for a group of coroutines and one COPY of as many rows.

        Args:
            seconds: Each sleeps so long.
            nbytes: Length of what each gives.
        """
        return await self._on_thread(self._group, size, seconds, nbytes)

    async def rows(self, count: int) -> float:
        """Seconds for as many coroutines, and an INSERT and commit of each, one after the other."""
        return await self._on_thread(self._rows, count)

    async def decoded(self, size: int) -> float:
        """Seconds for a group of coroutines that each decode what was stored."""
        return await self._on_thread(self._decoded, size)

    async def _on_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._thread.submit(function, *args))

    def _group(self, size: int, seconds: float, nbytes: int) -> float:
        began = time.perf_counter()
        self._loop.run_until_complete(_gather(size, lambda index: _value(seconds, nbytes)))
        with self._connection.cursor() as cursor, cursor.copy(self._copy) as copy:
            for piece in _pieces(os.urandom(16), size, nbytes):
                copy.write(piece)
        return time.perf_counter() - began

    def _rows(self, count: int) -> float:
        at, nobody = datetime.now(UTC), UUID(int=0)
        began = time.perf_counter()
        for _ in range(count):
            row = [
                *(uuid4(), "nothing", "kagzi.bench.work.nothing", "completed", b"0", None, b"[0]"),
                *(bytes(16), 1, None, None, at, at, 1, 2, nobody, 1),
            ]
            self._loop.run_until_complete(_value(0.0, 1))
            self._connection.execute(self._insert, row, prepare=True)
        return time.perf_counter() - began

    def _decoded(self, size: int) -> float:
        async def decode(index: int) -> Any:
            return orjson.loads(b"%d" % index)

        began = time.perf_counter()
        self._loop.run_until_complete(_gather(size, decode))
        return time.perf_counter() - began


class PlainProcesses:
    """`ProcessPoolExecutor` over functions that compute."""

    def __init__(self, processes: int) -> None:
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("forkserver"))
        list(self._pool.map(burn, [0.01] * processes * 2))

    def close(self) -> None:
        self._pool.shutdown()

    async def map(self, size: int, cpu_s: float) -> float:
        """Seconds for `size` calls that take `cpu_s` of a core each."""
        began = time.perf_counter()
        futures = [self._pool.submit(burn, cpu_s) for _ in range(size)]
        await asyncio.gather(*map(asyncio.wrap_future, futures))
        return time.perf_counter() - began


async def _value(seconds: float, nbytes: int) -> str:
    if seconds:
        await asyncio.sleep(seconds)
    return "0" * nbytes


def _gather(size: int, body: Callable[[int], Awaitable[Any]]) -> Coroutine[Any, Any, list[Any]]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*(body(index) for index in range(size)))

    return gather()


def _pieces(run_id: bytes, size: int, nbytes: int) -> Iterator[bytes]:
    """Rows of one run as a COPY stream: what differs is the step's id.

    Source: PostgreSQL manual, COPY, "Binary Format".
    """
    output = b"0" if nbytes == 1 else orjson.dumps("0" * nbytes)
    before = struct.pack(">h", len(STEP_COLUMNS)) + _field(run_id)
    after = b"".join(map(_field, (*_LEFT, output, *_RIGHT)))
    at_once = max(1, _PIECE_BYTES // (len(before) + len(after) + 20))
    yield _HEADER
    for start in range(0, size, at_once):
        ids = range(start, min(size, start + at_once))
        yield b"".join([before + _field(b"nothings/%d" % index) + after for index in ids])
    yield _TRAILER


def _field(value: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if value is None else struct.pack(">i", len(value)) + value
