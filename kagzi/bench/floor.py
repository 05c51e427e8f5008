"""The same work by plain scripts that recall, retry and fence nothing: the floor.

Each runs in a thread with an event loop of its own, since a worker's loop has a task factory.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Coroutine
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Any
from uuid import UUID, uuid4

import psycopg
import uvloop
from psycopg import sql

from kagzi._core import STEP_COLUMNS
from kagzi.bench.work import burn

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_MOMENT = struct.pack(">q", 800_000_000_000_000)
_NUMBER = struct.pack(">i", 1)
_REST: tuple[bytes | None, ...] = (
    b"kagzi.bench.work.nothing",
    b"completed",
    b"0",  # output
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
    """`asyncio.gather` over no-op coroutines, and their rows in one binary COPY or INSERT.

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

    async def group(self, size: int) -> float:
        """Seconds for a group of no-op coroutines and one COPY of as many rows."""
        return await asyncio.wrap_future(self._thread.submit(self._group, size))

    async def row(self) -> float:
        """Seconds for one coroutine and one INSERT, committed."""
        return await asyncio.wrap_future(self._thread.submit(self._row))

    def _group(self, size: int) -> float:
        began = time.perf_counter()
        self._loop.run_until_complete(_gather(size))
        with self._connection.cursor() as cursor, cursor.copy(self._copy) as copy:
            copy.write(_rows(os.urandom(16), size))
        return time.perf_counter() - began

    def _row(self) -> float:
        at, nobody = datetime.now(UTC), UUID(int=0)
        row = [
            *(uuid4(), "nothing", "kagzi.bench.work.nothing", "completed", b"0", None, b"[0]"),
            *(bytes(16), 1, None, None, at, at, 1, 2, nobody, 1),
        ]
        began = time.perf_counter()
        self._loop.run_until_complete(_nothing(0))
        self._connection.execute(self._insert, row, prepare=True)
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


async def _nothing(index: int) -> int:
    return index


def _gather(size: int) -> Coroutine[Any, Any, list[int]]:
    async def gather() -> list[int]:
        return await asyncio.gather(*(_nothing(index) for index in range(size)))

    return gather()


def _rows(run_id: bytes, size: int) -> bytes:
    """Rows of one run as a COPY stream: what differs is the step's id.

    Source: PostgreSQL manual, COPY, "Binary Format".
    """
    before = struct.pack(">h", len(STEP_COLUMNS)) + _field(run_id)
    after = b"".join(map(_field, _REST))
    rows = [before + _field(b"nothings/%d" % index) + after for index in range(size)]
    return b"".join((_HEADER, *rows, _TRAILER))


def _field(value: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if value is None else struct.pack(">i", len(value)) + value
