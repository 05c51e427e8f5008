"""What a piece of work costs, read from outside it: the server's counters, processor time, memory.

What this machine or its server cannot tell is None, and left out of reports.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psycopg

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one round of some work took besides time.

    Attributes:
        statements: That the server ran, by its own answers.
        round_trips: Times that somebody waited for the server.
        commits: Transactions that wrote; those that only read have no number and are not counted.
        wal_bytes: Written ahead.
        coordinator_s: Processor seconds of the process with the client and the worker.
        pool_s: Of its pool processes.
        server_s: Of all processes of the Postgres server.
        peak_mib: The coordinator's largest resident memory, in MiB over what it had before.
        pool_peak_mib: The same of the pool processes, added up.
    """

    statements: float | None = None
    round_trips: float | None = None
    commits: float | None = None
    wal_bytes: float | None = None
    coordinator_s: float | None = None
    pool_s: float | None = None
    server_s: float | None = None
    peak_mib: float | None = None
    pool_peak_mib: float | None = None

    def as_dict(self) -> dict[str, float]:
        """What is known of it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def typical(costs: Sequence[Cost]) -> Cost:
    """Medians of each part over rounds."""
    parts = {}
    for field in fields(Cost):
        values = [getattr(cost, field.name) for cost in costs]
        known = [value for value in values if value is not None]
        parts[field.name] = statistics.median(known) if known else None
    return Cost(**parts)


@dataclass(frozen=True, slots=True)
class Count:
    """The server's counters at one moment; they count for everybody on the server.

    Attributes:
        transactions: Transactions given a number, which those that write are.
        wal_bytes: Written ahead so far.
    """

    transactions: int
    wal_bytes: int


class ServerCounters:
    """Reads the server's own counters over a connection of its own."""

    def __init__(self, conninfo: str) -> None:
        self._connection = psycopg.connect(
            conninfo, autocommit=True, application_name="kagzi-bench-counters"
        )

    def close(self) -> None:
        self._connection.close()

    def _row(self, query: bytes, *parameters: object) -> tuple[Any, ...]:
        row = self._connection.execute(query, parameters or None, prepare=True).fetchone()
        assert row is not None, "an aggregate or a function gives one row"
        return row

    def count(self) -> Count:
        """Exact at once, unlike pg_stat_database and pg_stat_wal."""
        numbered, wal_bytes = self._row(
            b"SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8,"
            b" (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8"
        )
        return Count(numbered, wal_bytes)

    def commits(self) -> int:
        """Of this database, reading ones included. A backend reports its own when it ends."""
        (commits,) = self._row(
            b"SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        )
        return int(commits)

    def backends(self) -> set[int]:
        (pids,) = self._row(
            b"SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = current_database()"
            b" AND application_name LIKE 'kagzi%'"
        )
        return set(pids)

    def wait_until_ended(self, backends: Iterable[int], most_s: float = 5.0) -> None:
        """Until these have ended, and so reported what they did."""
        until = time.monotonic() + most_s
        while self.backends() & set(backends) and time.monotonic() < until:
            time.sleep(0.02)

    def postmaster(self) -> int | None:
        """The server's first process, if it runs on this machine and can be seen."""
        (backend,) = self._row(b"SELECT pg_backend_pid()")
        with suppress(OSError, ValueError, IndexError):
            if (_PROC / str(backend) / "comm").read_text().startswith("postgres"):
                stat = (_PROC / str(backend) / "stat").read_text()
                return int(stat.rpartition(")")[2].split()[1])
        return None


def processor_s(pid: int) -> float | None:
    """Processor seconds of a process so far, to the nanosecond. Linux tells them of any process.

    Source: clock_getcpuclockid(3): a process's clock has the number `~pid << 3 | 2`.
    """
    if not _PROC.exists():
        return time.process_time() if pid == os.getpid() else None
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return None


def children_of(pid: int) -> list[int]:
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def resident_mib(pid: int, peak: bool = False) -> float | None:
    """Memory of a process; its peak since `reset_peak`."""
    word = "VmHWM:" if peak else "VmRSS:"
    with suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(word):
                return int(line.split()[1]) / 1024
    return None


def reset_peak(pid: int) -> None:
    with suppress(OSError):
        (_PROC / str(pid) / "clear_refs").write_text("5")


@dataclass(frozen=True, slots=True)
class _Reading:
    count: Count
    coordinator: dict[int, float]
    pool: dict[int, float]
    server: dict[int, float]
    resident: dict[int, float]


class Meter:
    """Reads counters before and after some work.

    Args:
        counters: Of the server.
        coordinator: Its process.
        pool: Gives the pool's processes.
    """

    def __init__(
        self, counters: ServerCounters, coordinator: int, pool: Callable[[], Iterable[int]]
    ) -> None:
        self._counters = counters
        self._coordinator = coordinator
        self._pool = pool
        self._postmaster = counters.postmaster()
        self._before: _Reading | None = None

    def start(self) -> None:
        for pid in (self._coordinator, *self._pool()):
            reset_peak(pid)
        self._before = self._read(peak=False)

    def stop(self) -> Cost:
        """What it took since `start`."""
        before, after = self._before, self._read(peak=True)
        assert before is not None, "it was started"
        pool = set(before.pool)
        return Cost(
            commits=after.count.transactions - before.count.transactions,
            wal_bytes=after.count.wal_bytes - before.count.wal_bytes,
            coordinator_s=_grown(before.coordinator, after.coordinator),
            pool_s=_grown(before.pool, after.pool),
            server_s=_grown(before.server, after.server),
            peak_mib=_grown(
                {p: m for p, m in before.resident.items() if p not in pool},
                {p: m for p, m in after.resident.items() if p not in pool},
            ),
            pool_peak_mib=_grown(
                {p: m for p, m in before.resident.items() if p in pool},
                {p: m for p, m in after.resident.items() if p in pool},
            ),
        )

    def _read(self, peak: bool) -> _Reading:
        pool = list(self._pool())
        server = [] if self._postmaster is None else children_of(self._postmaster)
        return _Reading(
            self._counters.count(),
            _known(processor_s, [self._coordinator]),
            _known(processor_s, pool),
            _known(processor_s, server),
            _known(lambda pid: resident_mib(pid, peak), [self._coordinator, *pool]),
        )


def _known(read: Callable[[int], float | None], pids: Iterable[int]) -> dict[int, float]:
    values = {pid: read(pid) for pid in pids}
    return {pid: value for pid, value in values.items() if value is not None}


def _grown(before: dict[int, float], after: dict[int, float]) -> float | None:
    """What was added, by processes that were there all the time."""
    grown = [after[pid] - value for pid, value in before.items() if pid in after]
    return sum(grown) if grown else None
