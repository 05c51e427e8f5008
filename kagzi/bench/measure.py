"""What is made of samples: medians, thresholds and verdicts; the server's counters."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import psycopg


@dataclass(frozen=True, slots=True)
class Limit:
    """What a median has to keep to: below `value`, or at least it."""

    value: float
    below: bool

    def holds(self, value: float) -> bool:
        return value < self.value if self.below else value >= self.value

    def slackened(self, factor: float) -> Limit:
        """So many times easier to keep."""
        return replace(self, value=self.value * factor if self.below else self.value / factor)

    def __str__(self) -> str:
        return f"{'<' if self.below else '≥'} {self.value:,g}"


def below(value: float) -> Limit:
    return Limit(value, True)


def at_least(value: float) -> Limit:
    return Limit(value, False)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report.

    Attributes:
        name: What was measured.
        size: Steps of the group or run; None where that has no meaning.
        threshold: The specification's; a benchmark that misses one has failed.
        goal: Ours; only reported.
    """

    name: str
    size: int | None
    unit: str
    samples: Sequence[float]
    threshold: Limit | None = None
    goal: Limit | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def ok(self) -> bool:
        """False if a threshold is missed."""
        return self.threshold is None or self.threshold.holds(self.median)

    def slackened(self, factor: float) -> Figure:
        threshold = None if self.threshold is None else self.threshold.slackened(factor)
        return replace(self, threshold=threshold)

    def as_dict(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "name": self.name,
            "size": self.size,
            "unit": self.unit,
            "median": self.median,
            "low_quartile": low,
            "high_quartile": high,
            "samples": list(self.samples),
            "threshold": None if self.threshold is None else str(self.threshold),
            "ok": self.ok,
            "goal": None if self.goal is None else str(self.goal),
            "goal_reached": None if self.goal is None else self.goal.holds(self.median),
        }


class Samples:
    """Collects samples by size, and keeps them in the order in which they came."""

    def __init__(self) -> None:
        self._samples: dict[int, list[float]] = {}

    def add(self, size: int, value: float) -> None:
        self._samples.setdefault(size, []).append(value)

    def of(self, size: int, scale: float = 1.0) -> list[float]:
        return [value * scale for value in self._samples[size]]

    def median(self, size: int) -> float:
        return statistics.median(self._samples[size])

    def over(self, other: Samples, size: int) -> list[float]:
        """Quotients round by round: what the machine did meanwhile falls out of them."""
        pairs = zip(self._samples[size], other._samples[size], strict=True)
        return [mine / theirs for mine, theirs in pairs]


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
        row = self._connection.execute(query, parameters or None).fetchone()
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


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version() -> str:
    try:
        return metadata.version("kagzi")
    except metadata.PackageNotFoundError:
        return "of this checkout"


def surroundings(conninfo: str) -> dict[str, Any]:
    """What figures depend on besides the code."""
    names = ("server_version", "fsync", "synchronous_commit", "wal_level", "shared_buffers")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        settings = {
            name: connection.execute("SELECT current_setting(%s)", [name]).fetchone()
            for name in names
        }
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kagzi": _version(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "postgres": {name: value[0] for name, value in settings.items() if value is not None},
    }
