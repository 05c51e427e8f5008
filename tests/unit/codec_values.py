"""Types and values for the tests of the codec; and an equality that looks at types everywhere."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import pathlib
import typing
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import pydantic
from hypothesis import strategies as st
from pydantic_core import TzInfo

T = TypeVar("T")


class Color(enum.Enum):
    RED = "r"
    GREEN = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    A = "a"
    B = "b"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Page:
    url: str
    size: int
    score: float
    tags: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


@dataclasses.dataclass
class Tree:
    value: int
    children: list[Tree]


@dataclasses.dataclass
class Box(Generic[T]):
    item: T


@dataclasses.dataclass
class IntBox(Box[int]):
    label: str = ""


@dataclasses.dataclass(kw_only=True)
class Named:
    name: str
    at: dt.datetime | None = None


@dataclasses.dataclass
class Doubled:
    """Its constructor changes what it is given."""

    value: int
    total: int = dataclasses.field(init=False)
    factor: dataclasses.InitVar[int] = 2

    def __post_init__(self, factor: int) -> None:
        self.value *= factor
        self.total = self.value + 1


class Pair(NamedTuple):
    left: int
    right: Point | None = None


class Movie(typing.TypedDict, total=False):
    title: typing.Required[str]
    when: dt.date


class Struct(msgspec.Struct):
    id: uuid.UUID
    points: tuple[Point, ...] = ()


class Model(pydantic.BaseModel):
    name: str
    when: dt.datetime | None = None
    inner: list[Model] = []


UserId = typing.NewType("UserId", int)

ZONES = ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"]


def shape(value: Any) -> Any:
    """Something that is equal for two values only when they are equal in value and type."""
    cls = type(value)
    if cls is float:
        return cls, value.hex()
    if cls in (list, tuple, collections.deque):
        return cls, [shape(one) for one in value]
    if issubclass(cls, dict):
        return cls, [(shape(key), shape(one)) for key, one in value.items()]
    if cls in (set, frozenset):
        return cls, sorted((shape(one) for one in value), key=repr)
    if dataclasses.is_dataclass(cls):
        return cls, [shape(getattr(value, f.name)) for f in dataclasses.fields(cls)]
    if issubclass(cls, tuple):
        return cls, [shape(one) for one in value]
    if issubclass(cls, msgspec.Struct):
        return cls, [shape(getattr(value, name)) for name in cls.__struct_fields__]
    if issubclass(cls, pydantic.BaseModel):
        return cls, shape(value.__dict__), value.model_fields_set
    if cls is dt.datetime or cls is dt.time:
        zone = value.tzinfo
        zone_name = zone.key if isinstance(zone, zoneinfo.ZoneInfo) else repr(zone)
        return cls, value.replace(tzinfo=None), value.fold, type(zone), zone_name
    if cls is Decimal:
        return cls, value.as_tuple()
    if isinstance(value, (np.ndarray, np.generic)):
        return cls, value.dtype.str, value.shape, value.tobytes()
    return cls, value


# --- strategies of (annotation, value) ------------------------------------------------------

text = st.text(max_size=8)
integers = st.integers() | st.integers(-(2**70), 2**70)
floats = st.floats(allow_nan=False, allow_infinity=False)
offsets = st.integers(-1439, 1439).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))
zones = st.none() | offsets | st.sampled_from([zoneinfo.ZoneInfo(name) for name in ZONES])
parsed = st.integers(-1439, 1439).map(lambda minutes: TzInfo(minutes * 60))
named = st.builds(
    dt.timezone, st.integers(-1439, 1439).map(lambda m: dt.timedelta(minutes=m)), text.filter(bool)
)
datetimes = st.builds(
    lambda moment, tz, fold: moment.replace(tzinfo=tz, fold=fold),
    st.datetimes(dt.datetime(1900, 1, 2), dt.datetime(2100, 1, 1)),
    zones | named | parsed,
    st.integers(0, 1),
)
points = st.builds(Point, integers, integers)
trees = st.recursive(
    st.builds(Tree, integers, st.just([])),
    lambda inner: st.builds(Tree, integers, st.lists(inner, max_size=3)),
    max_leaves=5,
)
movies = st.fixed_dictionaries({"title": text}, optional={"when": st.dates()})
models = st.recursive(
    st.builds(Model, name=text),
    lambda inner: st.builds(
        Model,
        name=text,
        when=datetimes | st.none(),
        inner=st.lists(inner, max_size=2),
    ),
    max_leaves=3,
)

LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    None: st.none(),
    bool: st.booleans(),
    int: integers | st.booleans(),
    float: floats | integers | st.booleans(),
    str: text,
    bytes: st.binary(max_size=8),
    complex: st.complex_numbers(allow_nan=False, allow_infinity=False),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False),
    uuid.UUID: st.uuids(),
    dt.datetime: datetimes,
    dt.time: st.builds(lambda t, tz: t.replace(tzinfo=tz), st.times(), zones),
    dt.date: st.dates(),
    dt.timedelta: st.timedeltas(),
    pathlib.Path: text.filter(lambda t: "\0" not in t).map(pathlib.Path),
    Color: st.sampled_from(Color),
    Level: st.sampled_from(Level),
    Word: st.sampled_from(Word),
    Rights: st.sampled_from([Rights(0), Rights.READ, Rights.READ | Rights.WRITE]),
    Literal["a", 1, True, None]: st.sampled_from(["a", 1, True, None]),
    UserId: integers,
    Point: points,
    Pair: st.builds(Pair, integers, points | st.none()),
    typing.Annotated[int, "metres"]: integers,
}
OTHERS: dict[Any, st.SearchStrategy[Any]] = {
    Page: st.builds(Page, text, integers, floats, st.lists(text, max_size=3)),
    Tree: trees,
    Box[str]: st.builds(Box, text),
    Box[list[Point]]: st.builds(Box, st.lists(points, max_size=2)),
    IntBox: st.builds(IntBox, integers, text),
    Named: st.builds(Named, name=text, at=datetimes | st.none()),
    Doubled: st.builds(Doubled, integers),
    Movie: movies,
    Struct: st.builds(Struct, st.uuids(), st.lists(points, max_size=2).map(tuple)),
    Model: models,
    np.float64: floats.map(np.float64),
    np.int32: st.integers(-(2**31), 2**31 - 1).map(np.int32),
    bytearray: st.binary(max_size=8).map(bytearray),
}
plain_json = st.recursive(
    st.none() | st.booleans() | integers | floats | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)

Typed = tuple[Any, st.SearchStrategy[Any]]


def _grow(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    hashable = st.sampled_from(list(LEAVES.items()))
    return st.one_of(
        inner.map(lambda t: (list[t[0]], st.lists(t[1], max_size=3))),
        inner.map(lambda t: (tuple[t[0], ...], st.lists(t[1], max_size=3).map(tuple))),
        st.lists(inner, max_size=3).map(
            lambda ts: (
                tuple[tuple(t[0] for t in ts)] if ts else tuple[()],
                st.tuples(*(t[1] for t in ts)),
            )
        ),
        hashable.map(lambda t: (set[t[0]], st.sets(t[1], max_size=3))),
        hashable.map(lambda t: (frozenset[t[0]], st.frozensets(t[1], max_size=3))),
        st.builds(
            lambda k, t: (dict[k[0], t[0]], st.dictionaries(k[1], t[1], max_size=3)),
            hashable,
            inner,
        ),
        st.builds(lambda a, b: (typing.Union[a[0], b[0]], a[1] | b[1]), inner, inner),  # noqa: UP007
        inner.map(lambda t: (typing.Optional[t[0]], t[1] | st.none())),  # noqa: UP045
        inner.map(
            lambda t: (
                collections.abc.Sequence[t[0]],
                st.lists(t[1], max_size=3) | st.lists(t[1], max_size=3).map(tuple),
            )
        ),
        inner.map(lambda t: (Box[t[0]], t[1].map(Box))),
    )


any_type: st.SearchStrategy[Typed] = st.recursive(
    st.sampled_from([*LEAVES.items(), *OTHERS.items(), (Any, plain_json)]), _grow, max_leaves=4
)
