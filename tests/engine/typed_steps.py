"""One step per annotation that takes a value of that type and returns it: in the pool, and here."""

from __future__ import annotations

import datetime as dt
import typing
import uuid
import zoneinfo
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

import kagzi
from tests.unit.codec_values import (
    Box,
    Color,
    Level,
    Model,
    Movie,
    Page,
    Pair,
    Point,
    Struct,
    Tree,
    UserId,
)

_DAY = dt.datetime(2026, 11, 23, 12, 30, 15, 123456, tzinfo=dt.UTC)
_BERLIN = dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1)

CASES: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "bool": (bool, True),
    "int": (int, -7),
    "big_int": (int, 2**90),
    "float": (float, 0.1),
    "whole_float": (float, 3.0),
    "str": (str, "naïve \U0001f600 \x00"),
    "bytes": (bytes, b"\x00\xff"),
    "list": (list[int], [1, 2]),
    "big_ints": (list[int], [1, 2**80]),
    "dict": (dict[str, float], {"b": 1.0, "a": 2.5}),
    "int_keys": (dict[int, str], {2: "b", 1: "a"}),
    "uuid_keys": (dict[uuid.UUID, int], {uuid.UUID(int=5): 1}),
    "tuple": (tuple[int, str], (1, "a")),
    "tuples": (tuple[Point, ...], (Point(1, 2), Point(3, 4))),
    "empty_tuple": (tuple[()], ()),
    "set": (set[str], {"b", "a", "c"}),
    "frozenset": (frozenset[int], frozenset({3, 1})),
    "dataclass": (Page, Page("t", 1, 0.5, ["a"])),
    "frozen": (Point, Point(1, 2)),
    "tree": (Tree, Tree(1, [Tree(2, [])])),
    "generic": (Box[str], Box("x")),
    "named_tuple": (Pair, Pair(1, None)),
    "typed_dict": (Movie, {"title": "t", "when": dt.date(2026, 1, 1)}),
    "struct": (Struct, Struct(uuid.UUID(int=1), (Point(1, 2),))),
    "model": (Model, Model(name="n", when=_DAY, inner=[Model(name="m")])),
    "datetime": (dt.datetime, _DAY),
    "zone": (dt.datetime, _BERLIN),
    "date": (dt.date, dt.date(2026, 2, 28)),
    "time": (dt.time, dt.time(1, 2, 3)),
    "timedelta": (dt.timedelta, dt.timedelta(days=-1, microseconds=1)),
    "uuid": (uuid.UUID, uuid.UUID(int=2**100)),
    "decimal": (Decimal, Decimal("1.10")),
    "enum": (Color, Color.GREEN),
    "int_enum": (Level, Level.HIGH),
    "new_type": (UserId, 5),
    "optional": (typing.Optional[Point], None),  # noqa: UP045 - both spellings count
    "union": (int | str | Point, Point(1, 2)),
    "nested": (dict[str, list[tuple[int, Decimal | None]]], {"a": [(1, None), (2, Decimal("0"))]}),
    "numpy_float": (np.float64, np.float64(0.25)),
    "numpy_int": (np.int32, np.int32(-3)),
    "any": (Any, {"a": [1, 2.5, None, "x", {"b": True}]}),
}


def _returning(name: str, annotation: Any, kind: str) -> Callable[..., Any]:
    if kind == "sync":

        def function(value):  # type: ignore[no-untyped-def]
            return value
    else:

        async def function(value):  # type: ignore[no-untyped-def]
            return value

    function.__annotations__ = {"value": annotation, "return": annotation}
    function.__name__ = function.__qualname__ = f"return_{kind}_{name}"
    return function


IN_POOL: dict[str, Any] = {}
SYNC_IN_POOL: dict[str, Any] = {}
CLOSURES: dict[str, Any] = {}
for _name, (_annotation, _) in CASES.items():
    IN_POOL[_name] = kagzi.step(_returning(_name, _annotation, "async"))
    SYNC_IN_POOL[_name] = kagzi.step(_returning(_name, _annotation, "sync"))
    CLOSURES[_name] = _returning(_name, _annotation, "closure")
