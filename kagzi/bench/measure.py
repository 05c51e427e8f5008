"""What is made of samples: medians, thresholds and verdicts; the surroundings."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import psycopg

from kagzi.bench.counters import Cost


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
        floor: The same work by a plain script that promises nothing, in the same unit.
        over_floor: Quotients to that, round by round.
        cost: What a round of it took besides time.
    """

    name: str
    size: int | None
    unit: str
    samples: Sequence[float]
    threshold: Limit | None = None
    goal: Limit | None = None
    floor: Sequence[float] = ()
    over_floor: Sequence[float] = ()
    cost: Cost | None = None

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
            "floor": statistics.median(self.floor) if self.floor else None,
            "over_floor": statistics.median(self.over_floor) if self.over_floor else None,
            "cost": None if self.cost is None else self.cost.as_dict(),
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

    def __contains__(self, size: int) -> bool:
        return size in self._samples

    def over(self, other: Samples, size: int) -> list[float]:
        """Quotients round by round: what the machine did meanwhile falls out of them."""
        pairs = zip(self._samples[size], other._samples[size], strict=True)
        return [mine / theirs for mine, theirs in pairs]


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
