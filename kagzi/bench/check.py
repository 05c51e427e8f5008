"""Counts against those that were committed: more than a factor above them is a regression.

Times never fail here: they are the machine's. Counts are the program's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from kagzi.bench.measure import Figure

FACTOR = 1.3
SLACK = {
    # How many batches a group falls into depends a little on the machine.
    "statements": 3.0,
    "round trips": 3.0,
    "transactions": 3.0,
    "write transactions": 2.0,
    "rows": 0.0,
    # A page's first change after a checkpoint of the server is written whole.
    "WAL": 8192.0,
}

Counts = dict[str, dict[str, float]]


class UnreadableCounts(Exception):
    """A file of counts is none."""


def counts_of(figures: list[Figure]) -> Counts:
    """Of the benchmark `counts`: scenario, counter, value."""
    counts: Counts = {}
    for figure in figures:
        scenario, _, counter = figure.name.rpartition(": ")
        counts.setdefault(scenario, {})[counter] = figure.median
    return counts


def written(counts: Counts) -> bytes:
    """A file to commit."""
    whole = {
        scenario: {counter: round(value) for counter, value in values.items()}
        for scenario, values in counts.items()
    }
    return orjson.dumps(
        {"factor": FACTOR, "counts": whole},
        option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
    )


def read(file: Path) -> tuple[float, Counts]:
    """The factor and the counts that were committed.

    Raises:
        UnreadableCounts: It is not such a file.
    """
    try:
        found: Mapping[str, Any] = orjson.loads(file.read_bytes())
        counts = {
            str(scenario): {str(counter): float(value) for counter, value in values.items()}
            for scenario, values in found["counts"].items()
        }
        return float(found["factor"]), counts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableCounts(
            f"{str(file)!r} holds no counts: {type(error).__name__}: {error}"
        ) from None


def regressions(counts: Counts, factor: float, committed: Counts) -> list[str]:
    """What is more than was committed allows, each in a line."""
    found = [f"{scenario}: was not committed" for scenario in counts.keys() - committed.keys()]
    for scenario, values in committed.items():
        for counter, before in values.items():
            now = counts.get(scenario, {}).get(counter)
            if now is None:
                found.append(f"{scenario}: {counter} is not counted any more")
            elif now > before * factor + SLACK.get(counter, 0.0):
                found.append(f"{scenario}: {now:,.0f} {counter}, committed {before:,.0f}")
    return sorted(found)
