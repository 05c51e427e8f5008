"""The benchmarks' page: one file that needs nothing else, well-formed, with every figure in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kagzi.bench import charts
from kagzi.bench.counters import Cost
from kagzi.bench.measure import Figure, at_least, below
from kagzi.bench.page import page_of

AROUND = {
    "at": "2026-01-01T00:00:00+00:00",
    "kagzi": "0",
    "python": "CPython",
    "platform": "a <machine>",
    "cores": 2,
    "load": 0.5,
    "postgres": {"server_version": "18", "fsync": "on", "synchronous_commit": "on"},
}
VOID = {"meta", "br", "link"}


class Nesting(HTMLParser):
    """Raises on tags that are not closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page() -> str:
    cost = Cost(12, 9, 5, 3000, 0.1, 0.2, 0.3, 1.0, 2.0)
    sizes = (10, 100, 1000)
    figures = [
        Figure("over<head>", n, "µs/step", [9.0, 7.0, 8.0], below(50), below(1), [4.0], [2.0], cost)
        for n in sizes
    ]
    return page_of(
        AROUND,
        {
            "coordination": [*figures, Figure("speed-up", 20, "x", [18.0], at_least(2))],
            "counts": [Figure("one run: statements", None, "", [8.0])],
        },
        quick=True,
    )


def test_page_is_well_formed_and_shows_all_figures() -> None:
    text = page()
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    assert {"svg", "polyline", "rect", "table"} <= set(parser.seen)
    assert "over&lt;head&gt;" in text
    assert "<head>" in text
    assert "over<head>" not in text
    assert "a &lt;machine&gt;" in text
    assert "not yet" in text
    assert "All 4 thresholds" in text
    assert "one run" in text


def test_page_asks_nothing_of_the_network() -> None:
    text = page().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", text)


def test_page_says_which_threshold_was_missed() -> None:
    figures = {"race": [Figure("over the winner", 10, "ms", [11.0], below(10))]}
    assert "1 of 1 thresholds missed: race: over the winner" in page_of(
        AROUND, figures, quick=False
    )


@pytest.mark.parametrize("values", [(1.0,), (1.0, 1.0), (0.001, 5.0), (3.0, 900_000.0), (0.0, 2.0)])
@pytest.mark.parametrize("logarithmic", [True, False])
def test_scale_keeps_values_and_ticks_within_its_ends(
    values: tuple[float, ...], logarithmic: bool
) -> None:
    scale = charts.Scale(values, 100, 500, logarithmic)
    assert all(100 <= scale(value) <= 500.001 for value in values)
    assert 1 <= len(scale.ticks()) <= 12
    assert all(100 <= scale(tick) <= 500.001 for tick in scale.ticks())


def test_numbers_have_the_digits_that_count() -> None:
    shown = {
        12345.6: "12,346",
        123.4: "123",
        12.34: "12.3",
        1.234: "1.23",
        0.01234: "0.012",
        2: "2",
    }
    assert {value: charts.number(value) for value in shown} == shown
