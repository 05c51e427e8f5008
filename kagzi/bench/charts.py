"""Charts as inline SVG, from numbers alone. Colours are classes, set by the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 860
LABEL_WIDTH = 250
VALUE_WIDTH = 120
BAR = 16
GAP = 10


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its spread.

    Attributes:
        low, high: Quartiles.
        floor, goal: Marked beside it.
        look: A class of the style sheet, `side-…`.
    """

    label: str
    value: float
    low: float
    high: float
    floor: float | None = None
    goal: float | None = None
    look: str = "side-kagzi"


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, value, low, high) from left to right."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    look: str = "side-kagzi"


class Scale:
    """Values to pixels; logarithmic where they span much."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, logarithmic: bool
    ) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        self._log = logarithmic
        self._start, self._end = start, end
        if logarithmic:
            self.least = min(positive) / 1.15
            self.most = max(positive) * 1.15
        else:
            self.least, self.most = 0.0, max(positive) * 1.05

    def __call__(self, value: float) -> float:
        value = min(max(value, self.least), self.most)
        if self._log:
            part = math.log(value / self.least) / math.log(self.most / self.least)
        else:
            part = (value - self.least) / (self.most - self.least)
        return self._start + part * (self._end - self._start)

    def ticks(self, wanted: int = 6) -> list[float]:
        if not self._log:
            step = _round_step(self.most / wanted)
            return [step * index for index in range(int(self.most / step) + 1)]
        for steps in ((1, 2, 5), (1, 3), (1,)):
            exponents = range(
                math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1
            )
            ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
            ticks = [tick for tick in ticks if self.least <= tick <= self.most]
            if len(ticks) <= wanted + 2:
                break
        if len(ticks) > 1:
            return ticks
        step = _round_step((self.most - self.least) / 3)
        ticks = [step * index for index in range(1, int(self.most / step) + 1)]
        return [tick for tick in ticks if tick >= self.least]


def _round_step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)


def bars(rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars with whiskers over the quartiles; a tick for the floor, one for the goal."""
    values = [row.value for row in rows] + [row.floor for row in rows if row.floor]
    wide = max(values) > 40 * max(min(value for value in values), 1e-12)
    ends = values + [row.high for row in rows] + [row.goal for row in rows if row.goal]
    scale = Scale(
        ends + ([row.low for row in rows] if wide else []), LABEL_WIDTH, WIDTH - VALUE_WIDTH, wide
    )
    height = len(rows) * (BAR + GAP) + 34
    bottom = height - 28
    parts = [_open(height)]
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, number(tick), "tick", "middle"))
    parts.append(_text(WIDTH - VALUE_WIDTH + 8, bottom + 16, unit, "tick"))
    for place, row in enumerate(rows):
        top = 6 + place * (BAR + GAP)
        middle = top + BAR / 2
        end = scale(row.value)
        title = f"{row.label}: {number(row.value)} {unit}"
        parts.append(
            f"<g><title>{escape(title)}</title>"
            f"{_text(LABEL_WIDTH - 8, middle + 4, _fitting(row.label, 38), 'label', 'end')}"
            f'<rect class="bar {row.look}" x="{LABEL_WIDTH}" y="{top}" rx="2"'
            f' width="{max(end - LABEL_WIDTH, 1):.1f}" height="{BAR}"/></g>'
        )
        if row.high > row.low:
            parts.append(_whisker(scale(row.low), scale(row.high), middle))
        for value, look in ((row.floor, "floor"), (row.goal, "goal")):
            if value is not None:
                x = scale(value)
                parts.append(
                    f'<line class="mark {look}" x1="{x:.1f}" y1="{top - 3}"'
                    f' x2="{x:.1f}" y2="{top + BAR + 3}"/>'
                )
        beside = max(end, scale(row.high)) + 8
        parts.append(_text(beside, middle + 4, number(row.value), "value"))
    return "".join(parts) + "</svg>"


def _fitting(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def lines(series: Sequence[Line], x_label: str, unit: str) -> str:
    """Values over sizes, both axes logarithmic, with whiskers over the quartiles."""
    height, left, right, top, bottom = 250, 64, WIDTH - 190, 20, 206
    points = [point for line in series for point in line.points]
    across = Scale([point[0] for point in points], left, right, True)
    upward = Scale([value for point in points for value in point[1:]], bottom, top, True)
    parts = [_open(height)]
    for tick in upward.ticks():
        y = upward(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, number(tick), "tick", "end"))
    for size in sorted({point[0] for point in points}):
        x = across(size)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 18, f"{size:,.0f}", "tick", "middle"))
    parts.append(_text((left + right) / 2, height - 6, x_label, "tick", "middle"))
    parts.append(_text(left - 8, top - 4, unit, "tick", "end"))
    ends = _spread([upward(line.points[-1][1]) for line in series], 15)
    for line, end in zip(series, ends, strict=True):
        path = " ".join(f"{across(x):.1f},{upward(value):.1f}" for x, value, *_ in line.points)
        parts.append(f'<polyline class="line {line.look}" points="{path}"/>')
        for x, value, low, high in line.points:
            title = f"{line.name}, {x:,.0f}: {number(value)} {unit}"
            parts.append(
                f'<line class="whisker" x1="{across(x):.1f}" y1="{upward(low):.1f}"'
                f' x2="{across(x):.1f}" y2="{upward(high):.1f}"/>'
                f'<circle class="dot {line.look}" cx="{across(x):.1f}" cy="{upward(value):.1f}"'
                f' r="3.5"><title>{escape(title)}</title></circle>'
            )
        parts.append(_text(right + 12, end + 4, line.name, f"name {line.look}"))
    return "".join(parts) + "</svg>"


def stacks(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str) -> str:
    """Horizontal bars cut into named parts; each bar is a whole of its own."""
    height = len(rows) * (BAR + GAP) + 6
    parts = [_open(height)]
    for place, (label, pieces) in enumerate(rows):
        top = 4 + place * (BAR + GAP)
        total = sum(value for _, value in pieces) or 1.0
        parts.append(_text(LABEL_WIDTH - 8, top + BAR / 2 + 4, _fitting(label, 38), "label", "end"))
        x = float(LABEL_WIDTH)
        for name, value in pieces:
            width = value / total * (WIDTH - VALUE_WIDTH - LABEL_WIDTH)
            title = f"{label}, {name}: {number(value)} {unit}, {value / total:.0%}"
            parts.append(
                f'<rect class="bar part-{escape(name)}" x="{x:.1f}" y="{top}" width="{width:.1f}"'
                f' height="{BAR}"><title>{escape(title)}</title></rect>'
            )
            if width > 38:
                parts.append(
                    _text(x + width / 2, top + BAR / 2 + 4, number(value), "inside", "middle")
                )
            x += width
        parts.append(_text(x + 8, top + BAR / 2 + 4, f"{number(total)} {unit}", "value"))
    return "".join(parts) + "</svg>"


def _spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Places for labels near where they are wanted, none upon another."""
    placed = list(wanted)
    order = sorted(range(len(placed)), key=lambda index: placed[index])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + apart)
    return placed


def _open(height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'


def _text(x: float, y: float, text: str, look: str, anchor: str = "start") -> str:
    return (
        f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _whisker(low: float, high: float, middle: float) -> str:
    return (
        f'<path class="whisker" d="M{low:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}'
        f'M{high:.1f} {middle - 4}v8"/>'
    )
