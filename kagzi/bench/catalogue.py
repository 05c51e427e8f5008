"""What a benchmark is. The modules `of_…` hold them, `suites` lists them all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from kagzi.bench.measure import Figure
from kagzi.bench.session import Bench

Measure = Callable[[Bench], Coroutine[Any, Any, list[Figure]]]


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark.

    Attributes:
        name: What it is selected by.
        title: What it shows, in a line.
        measure: Does it.
        note: What a reader of the figures must know.
        by_default: Whether it is run when none is named.
    """

    name: str
    title: str
    measure: Measure
    note: str = ""
    by_default: bool = True


class Suites(dict[str, Suite]):
    """Those of one module, by name."""

    def add(
        self, name: str, title: str, note: str = "", by_default: bool = True
    ) -> Callable[[Measure], Measure]:
        def added(measure: Measure) -> Measure:
            self[name] = Suite(name, title, measure, note, by_default)
            return measure

        return added
