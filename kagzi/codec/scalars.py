"""Plans for library types that are one JSON value each: bytes, numbers, times, paths, numpy."""

from __future__ import annotations

import datetime as dt
import pathlib
import uuid
import zoneinfo
from base64 import b64decode, b64encode
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, Flag
from math import isfinite
from types import NoneType
from typing import Any

from kagzi.codec.plans import (
    BOOL,
    FLOAT,
    INT,
    NONE,
    STR,
    Plan,
    Refused,
    mismatch,
    scalar_plan,
    type_name,
)


def scalar_for(cls: type) -> Plan | None:
    """The plan of a class that needs no other plan, None for other classes."""
    if cls in _FIXED:
        return _FIXED[cls]
    if issubclass(cls, Enum):
        return _enum_plan(cls)
    if cls.__module__ == "numpy":
        return _numpy_plan(cls)
    return None


# --- bytes, Decimal, complex, Path ----------------------------------------------------------


def _b64(value: bytes | bytearray) -> str:
    return b64encode(value).decode("ascii")


def _enc_decimal(value: Decimal) -> str:
    if value.is_finite():
        return str(value)
    raise Refused("a Decimal that is NaN or infinite has no equal to come back as; use None")


def _complex_plan() -> Plan:
    def enc(value: Any) -> Any:
        if type(value) is not complex:
            if type(value) in FLOAT.kinds:
                return FLOAT.enc(value)
            raise mismatch("complex", value, (complex,))
        if isfinite(value.real) and isfinite(value.imag):
            return [value.real, value.imag]
        raise Refused("a complex number that is not finite has no JSON form")

    def dec(tree: Any) -> Any:
        return complex(*tree) if type(tree) is list else tree

    accepts = (complex, float, int, bool)
    return Plan("complex", enc, dec, accepts, (list, float, int, bool))


def _path_plan(cls: type[pathlib.PurePath], name: str) -> Plan:
    # Path() is a PosixPath or a WindowsPath
    exact = type(cls()) if cls in (pathlib.Path, pathlib.PurePath) else cls
    return scalar_plan(name, exact, str, exact)


# --- times ----------------------------------------------------------------------------------


_FOLD, _PYDANTIC = "[fold=1]", "[tz=pydantic]"


def _tags(tz: dt.tzinfo | None, fold: int) -> str:
    """What ISO 8601 leaves out, in brackets: zone, fold, name of a fixed offset (last).

    Source: RFC 9557, section 3 (time zone suffix and tags).
    """
    cls = type(tz)
    zone = name_tag = ""
    if tz is None:
        pass
    elif cls is zoneinfo.ZoneInfo:
        zone = f"[{_known_key(tz)}]"
    elif cls is dt.timezone:
        name = tz.tzname(None)
        if tz is not dt.UTC and name != dt.timezone(_offset(tz)).tzname(None):
            name_tag = f"[name={name}]"
    elif type_name(cls) == "pydantic_core._pydantic_core.TzInfo":
        zone = _PYDANTIC
    else:
        raise Refused(
            f"a time zone of type {type_name(cls)}; use zoneinfo.ZoneInfo or datetime.timezone, "
            "or .astimezone(datetime.timezone.utc)"
        )
    return f"{zone}{_FOLD if fold else ''}{name_tag}"


def _offset(tz: dt.tzinfo) -> dt.timedelta:
    return tz.utcoffset(None) or dt.timedelta(0)


def _known_key(tz: Any) -> str:
    try:
        return str(zoneinfo.ZoneInfo(tz.key).key)
    except (zoneinfo.ZoneInfoNotFoundError, TypeError, ValueError, OSError):
        raise Refused("a ZoneInfo without a key that is known here; use ZoneInfo(key)") from None


def _iso(value: dt.datetime | dt.time) -> str:
    text = value.isoformat()
    if value.tzinfo is dt.UTC:
        return f"{text.removesuffix('+00:00')}Z{_tags(value.tzinfo, value.fold)}"
    if value.tzinfo is None and not value.fold:
        return text
    return text + _tags(value.tzinfo, value.fold)


def _from_iso(cls: type[dt.datetime] | type[dt.time]) -> Callable[[Any], Any]:
    def dec(text: Any) -> Any:
        if text[-1:] != "]":
            return cls.fromisoformat(text)
        iso, _, tags = text.partition("[")
        tags, _, name = f"[{tags}".partition("[name=")
        value = cls.fromisoformat(iso)
        zone = tags.removesuffix(_FOLD)
        return value.replace(tzinfo=_zone(value, zone, name[:-1]), fold=tags.endswith(_FOLD))

    return dec


def _zone(value: dt.datetime | dt.time, zone: str, name: str) -> dt.tzinfo | None:
    if zone == _PYDANTIC:
        from pydantic_core import TzInfo

        return TzInfo((value.utcoffset() or dt.timedelta(0)).total_seconds())
    if zone:
        return zoneinfo.ZoneInfo(zone[1:-1])
    if name:
        return dt.timezone(value.utcoffset() or dt.timedelta(0), name)
    return value.tzinfo


_MICROSECOND = dt.timedelta(microseconds=1)


def _timedelta_us(value: dt.timedelta) -> int:
    return value // _MICROSECOND


def _from_us(tree: Any) -> dt.timedelta:
    # timedelta(microseconds=n) goes through floats for large n
    days, rest = divmod(tree, 86_400_000_000)
    return dt.timedelta(days=days, microseconds=rest)


# --- Enum -----------------------------------------------------------------------------------


def _enum_plan(cls: type[Enum]) -> Plan:
    if issubclass(cls, Flag):
        return scalar_plan(type_name(cls), cls, lambda flag: flag._value_, cls, (int,))
    members, full = cls.__members__, type_name(cls)

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(full, value, (cls,))
        name = value._name_
        if members.get(name) is not value:
            raise Refused(f"{cls.__name__} has no member named {name!r} that is this value")
        return name

    return Plan(full, enc, members.__getitem__, (cls,), (str,))


# --- numpy ----------------------------------------------------------------------------------


def _numpy_plan(cls: Any) -> Plan | None:
    import numpy as np

    if cls is np.ndarray:
        return _ndarray_plan()
    if cls not in set(np.sctypeDict.values()):
        return None
    name = f"numpy.{cls.__name__}"
    if issubclass(cls, np.bool_):
        return scalar_plan(name, cls, bool, cls, (bool,))
    if issubclass(cls, np.integer) and cls is not np.timedelta64:
        return scalar_plan(name, cls, int, cls, (int,))
    if issubclass(cls, np.floating) and np.dtype(cls).itemsize <= 8:
        return scalar_plan(name, cls, _enc_numpy_float, cls, (float,))
    if issubclass(cls, np.str_):
        return scalar_plan(name, cls, str.__str__, cls, (str,))
    if cls in (np.void, np.object_):
        return None

    # complex, long double, datetime64, bytes_: dtype (with its unit) and the bytes themselves
    def enc(value: Any) -> Any:
        return [value.dtype.str, _b64(value.tobytes())]

    def dec(tree: Any) -> Any:
        return np.frombuffer(b64decode(tree[1]), dtype=tree[0])[0]

    plan = scalar_plan(name, cls, enc, dec, (list,))
    plan.verify = True  # numpy pads and strips bytes_
    return plan


def _enc_numpy_float(value: Any) -> float:
    if isfinite(value):
        return float(value)
    raise Refused("a numpy float that is NaN or infinite has no JSON form; use None")


def _ndarray_plan() -> Plan:
    import numpy as np

    def enc(value: Any) -> Any:
        if value.dtype.kind not in "biufcmMSU" or not value.dtype.itemsize:
            raise Refused(f"an array of dtype {value.dtype}; use plain numbers, or value.tolist()")
        return {
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "data": _b64(value.tobytes()),
        }

    def dec(tree: Any) -> Any:
        flat = np.frombuffer(b64decode(tree["data"]), dtype=tree["dtype"])
        return flat.reshape(tree["shape"]).copy()

    return scalar_plan("numpy.ndarray", np.ndarray, enc, dec, (dict,))


_FIXED: dict[type, Plan] = {
    NoneType: NONE,
    bool: BOOL,
    int: INT,
    float: FLOAT,
    str: STR,
    bytes: scalar_plan("bytes", bytes, _b64, b64decode),
    bytearray: scalar_plan("bytearray", bytearray, _b64, lambda t: bytearray(b64decode(t))),
    complex: _complex_plan(),
    Decimal: scalar_plan("Decimal", Decimal, _enc_decimal, Decimal),
    uuid.UUID: scalar_plan("UUID", uuid.UUID, str, uuid.UUID),
    dt.datetime: scalar_plan("datetime", dt.datetime, _iso, _from_iso(dt.datetime)),
    dt.time: scalar_plan("time", dt.time, _iso, _from_iso(dt.time)),
    dt.date: scalar_plan("date", dt.date, dt.date.isoformat, dt.date.fromisoformat),
    dt.timedelta: scalar_plan("timedelta", dt.timedelta, _timedelta_us, _from_us, (int,)),
    pathlib.Path: _path_plan(pathlib.Path, "Path"),
    pathlib.PurePath: _path_plan(pathlib.PurePath, "PurePath"),
    pathlib.PurePosixPath: _path_plan(pathlib.PurePosixPath, "PurePosixPath"),
    pathlib.PureWindowsPath: _path_plan(pathlib.PureWindowsPath, "PureWindowsPath"),
    type(pathlib.Path()): _path_plan(pathlib.Path, "Path"),
}
