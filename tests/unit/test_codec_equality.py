"""Equal in value and type, at every depth: what the verification of a value rests on."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import zoneinfo
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagzi.codec.equality import check_same
from kagzi.codec.plans import Refused
from tests.unit import codec_values as v
from tests.unit.codec_values import shape

moment = dt.datetime(2024, 1, 2, tzinfo=dt.UTC)


class Row(NamedTuple):
    a: Any


class NoEq:
    pass


@pytest.mark.parametrize(
    ("one", "two", "path"),
    [
        (1, True, "$"),
        (1, 1.0, "$"),
        (0.0, -0.0, "$"),
        (Decimal("1.0"), Decimal("1.00"), "$"),
        ("a", v.Word.A, "$"),
        (v.Level.LOW, 1, "$"),
        ([1, [2]], [1, [2.0]], "$[1][0]"),
        ([1], (1,), "$"),
        ([1], [1, 2], "$"),
        ({"a": [1]}, {"a": [True]}, "$.a[0]"),
        ({1: "a"}, {True: "a"}, "$[int key]"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "$"),
        ({1}, {True}, "${item}"),
        ({1}, {1, 2}, "$"),
        ((1, "a"), (1, "b"), "$[1]"),
        (Row([1]), Row([1.0]), "$.a[0]"),
        (v.Point(1), v.Point(True), "$.x"),
        (v.Box(1), v.IntBox(1), "$"),
        (v.Model(name="a"), v.Model(name="a", inner=[]), "$"),
        (moment, moment.astimezone(dt.timezone(dt.timedelta(0), "X")), "$"),
        (moment, moment.astimezone(zoneinfo.ZoneInfo("UTC")), "$"),
        (moment, moment.replace(fold=1), "$"),
        (dt.time(1), dt.time(1, fold=1), "$"),
        (collections.deque([1]), collections.deque([2]), "$[0]"),
        (np.float32(1), np.float64(1), "$"),
        (np.zeros(2), np.zeros(2, dtype="f4"), "$"),
        (np.zeros(2), np.zeros((2, 1)), "$"),
        (np.array([0.0]), np.array([-0.0]), "$"),
        (NoEq(), NoEq(), "$"),
    ],
)
def test_difference_in_value_or_type_is_found_with_its_path(one: Any, two: Any, path: str) -> None:
    with pytest.raises(Refused):
        check_same(two, one)
    with pytest.raises(Refused) as caught:
        check_same(one, two)
    assert caught.value.path == path


everything = st.one_of(*v.LEAVES.values(), *v.OTHERS.values(), v.plain_json)


@given(everything, everything)
@settings(max_examples=200)
def test_check_agrees_with_a_comparison_of_shapes(one: Any, two: Any) -> None:
    check_same(one, one)
    if shape(one) != shape(two):
        with pytest.raises(Refused):
            check_same(one, two)


@dataclasses.dataclass
class Lazy:
    value: int


def test_attributes_beside_the_fields_of_a_dataclass_count() -> None:
    one, two = Lazy(1), Lazy(1)
    one.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(Refused):
        check_same(one, two)
