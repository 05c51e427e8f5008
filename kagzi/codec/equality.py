"""What "equal in value and type" means, at every depth. Not `==`: 1 is not True, 1.0 is not 1."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from kagzi.codec import records
from kagzi.codec.plans import Refused, key_segment, type_name


def check_same(value: Any, back: Any) -> None:
    """Raise `Refused` with the path where `back` is not `value` in value and type."""
    cls = type(value)
    if cls is not type(back):
        raise Refused(
            f"a value of type {type_name(cls)} came back as {type_name(type(back))}; annotate it "
            "with its exact type, or convert it"
        )
    if cls is list or cls is tuple or cls is deque:
        _check_items(value, back)
    elif issubclass(cls, dict):
        if list(value) != list(back):
            raise Refused("the keys of a dict came back different")
        for (key, one), (key_back, two) in zip(value.items(), back.items(), strict=True):
            _check_inside(key_segment(key), key, key_back)
            _check_inside(key_segment(key), one, two)
    elif cls is set or cls is frozenset:
        if value != back:
            raise Refused("a set came back different")
        found = {one: one for one in back}
        for one in value:
            _check_inside("{item}", one, found[one])
    elif issubclass(cls, tuple):
        for name, one, two in zip(value._fields, value, back, strict=True):
            _check_inside(f".{name}", one, two)
    else:
        _check_object(cls, value, back)


def _check_items(value: Any, back: Any) -> None:
    if len(value) != len(back):
        raise Refused("an array came back with another length")
    for index, (one, two) in enumerate(zip(value, back, strict=True)):
        _check_inside(f"[{index}]", one, two)


def _check_inside(segment: str, one: Any, two: Any) -> None:
    try:
        check_same(one, two)
    except Refused as refused:
        raise refused.at(segment) from None


def _check_object(cls: Any, value: Any, back: Any) -> None:
    kind = records.record_kind(cls)
    if kind == "dataclass":
        for spec in dataclasses.fields(cls):
            _check_inside(f".{spec.name}", getattr(value, spec.name), getattr(back, spec.name))
        check_same(records.extra_state(value), records.extra_state(back))
    elif kind == "struct":
        for name in cls.__struct_fields__:
            _check_inside(f".{name}", getattr(value, name), getattr(back, name))
    elif kind == "pydantic":
        for name in cls.model_fields:
            _check_inside(f".{name}", value.__dict__.get(name), back.__dict__.get(name))
        check_same(value.__pydantic_extra__, back.__pydantic_extra__)
        check_same(value.__pydantic_private__, back.__pydantic_private__)
        if value.model_fields_set != back.model_fields_set:
            raise Refused("the set of given fields came back different")
    elif cls.__module__ == "numpy" and hasattr(value, "tobytes"):
        if (value.dtype, value.shape, value.tobytes()) != (back.dtype, back.shape, back.tobytes()):
            raise Refused("a numpy value came back different")
    elif _EXACT.get(cls, _itself)(value) != _EXACT.get(cls, _itself)(back):
        raise Refused(f"a {type_name(cls)} came back different")
    elif (value == back) is not True:
        raise Refused(
            f"a value of type {type_name(cls)} did not come back equal; its class must define "
            "__eq__, and its JSON form must hold all of it"
        )


def _itself(value: Any) -> Any:
    return None


def _exact_time(value: dt.datetime | dt.time) -> Any:
    zone = value.tzinfo
    return value.replace(tzinfo=None), value.fold, type(zone), str(zone)


# `==` overlooks the sign of zero, trailing zeros, the zone behind an offset, and fold
_EXACT: dict[Any, Callable[[Any], Any]] = {
    float: repr,
    complex: repr,
    Decimal: str,
    dt.datetime: _exact_time,
    dt.time: _exact_time,
}
