"""What cannot come back equal is refused, with the path to it and a way out."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import pathlib
import threading
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pydantic
import pytest

from kagzi.codec import codec_for
from kagzi.codec.plans import Refused
from kagzi.errors import CodecError, PayloadTooLarge
from tests.unit import codec_values as v


class Text(str):
    pass


class Numbers(list[int]):
    pass


@dataclasses.dataclass
class BigPage(v.Page):
    extra: int = 0


@dataclasses.dataclass
class Shop:
    pages: list[v.Page]
    names: dict[str, v.Point]
    rest: Any = None


class Opaque:
    pass


def refusal(annotation: Any, value: Any) -> CodecError:
    with pytest.raises(CodecError) as caught:
        codec_for(annotation).encode(value)
    error = caught.value
    assert error.path in str(error)
    assert error.__suppress_context__ or error.__cause__ is not None
    return error


@pytest.mark.parametrize(
    ("value", "path", "advice"),
    [
        ((1, 2), "$", "tuple[int, ...]"),
        ({"a": [1, (2,)]}, "$.a[1]", "list(value)"),
        ([{1}], "$[0]", "set[int]"),
        ([{"x y": b"a"}], "$[0]['x y']", "annotate it as bytes"),
        (dt.datetime(2024, 1, 1), "$", "datetime"),
        ([v.Point(1)], "$[0]", "Point"),
        (v.Level.LOW, "$", "convert it to int"),
        (v.Word.A, "$", "convert it to str"),
        ([Text("a")], "$[0]", "convert it to str"),
        (Numbers(), "$", "convert it to list"),
        ([True, np.float64(1)], "$[1]", ".item()"),
        (np.zeros(2), "$", ".tolist()"),
        ([1.0, float("nan")], "$[1]", "None"),
        ({"a": float("-inf")}, "$.a", "None"),
        ({"a": {1: "b"}}, "$.a[int key]", "dict[int, Any]"),
        ({v.Word.A: 1}, "$[Word key]", "str keys"),
        ((n for n in ()), "$", "list(value)"),
        (range(3), "$", "list(value)"),
        (collections.OrderedDict(a=1), "$", "convert it to dict"),
        (Opaque(), "$", "Opaque"),
        (len, "$", "convert it to plain JSON types"),
        (["a", "\ud800"], "$[1]", "surrogateescape"),
        ({"a": {"\udfff": 1}}, "$.a['\\udfff']", "surrogateescape"),
        ([2**20_000], "$[0]", "bytes"),
    ],
)
def test_untyped_position_refuses_with_path_and_advice(value: Any, path: str, advice: str) -> None:
    error = refusal(Any, value)
    assert error.path == path
    assert advice in str(error)


@pytest.mark.parametrize(
    ("annotation", "value", "path"),
    [
        (int, "1", "$"),
        (int, v.Level.LOW, "$"),
        (int, np.int64(1), "$"),
        (bool, 1, "$"),
        (str, v.Word.A, "$"),
        (str, Text("a"), "$"),
        (str, "a\ud800", "$"),
        (float, np.float64(1), "$"),
        (float, float("inf"), "$"),
        (list[float], [1.0, 2.0, float("nan")], "$[2]"),
        (dict[str, float], {"a": 1.0, "b": float("inf")}, "$.b"),
        (list[int], (1, 2), "$"),
        (list[int], Numbers([1]), "$"),
        (tuple[int, str], (1,), "$"),
        (tuple[int, str], (1, 2), "$[1]"),
        (tuple[int, ...], (1, "a"), "$[1]"),
        (set[int], frozenset({1}), "$"),
        (dict[int, str], {"1": "a"}, "$.1" if "1".isidentifier() else "$['1']"),
        (dict[str, int], {"a": 1, "b": "c"}, "$.b"),
        (dict[str, int], collections.defaultdict(int), "$"),
        (v.Page, BigPage("u", 1, 1.0, []), "$"),
        (v.Page, v.Page("u", 1, 1.0, ["a", 5]), "$.tags[1]"),  # type: ignore[list-item]
        (v.Page, v.Page("u", 1, float("nan"), []), "$.score"),
        (Shop, Shop([v.Page("u", 1, 1.0, []), v.Page(b"", 1, 1.0, [])], {}), "$.pages[1].url"),  # type: ignore[arg-type]
        (Shop, Shop([], {"a b": v.Point("x")}), "$.names['a b'].x"),  # type: ignore[arg-type]
        (Shop, Shop([], {}, {"deep": [(1,)]}), "$.rest.deep[0]"),
        (v.Tree, v.Tree(1, [v.Tree(2, []), v.Tree("3", [])]), "$.children[1].value"),  # type: ignore[arg-type]
        (v.Pair, v.Pair(1, v.Point(None)), "$.right.x"),  # type: ignore[arg-type]
        (v.Movie, {"title": 1}, "$.title"),
        (v.Movie, {"title": "a", "other": (1,)}, "$.other"),
        (v.Struct, v.Struct(None), "$.id"),  # type: ignore[arg-type]
        (v.Box[int], v.Box("a"), "$.item"),
        (v.Box[v.Point], v.Box(v.Point(b"")), "$.item.x"),  # type: ignore[arg-type]
        (v.IntBox, v.IntBox("a"), "$.item"),  # type: ignore[arg-type]
        (v.Color, "RED", "$"),
        (v.Level, 1, "$"),
        (Literal["a", 1], "b", "$"),
        (Literal[1], True, "$"),
        (int | str, 1.5, "$"),
        (v.Page | v.Point | None, v.Point(1, None), "$.y"),  # type: ignore[arg-type]
        (dt.date, dt.datetime(2024, 1, 1), "$"),
        (dt.datetime, dt.date(2024, 1, 1), "$"),
        (Decimal, Decimal("NaN"), "$"),
        (complex, complex("nan"), "$"),
        (pathlib.PurePosixPath, pathlib.PureWindowsPath("a"), "$"),
        (pathlib.Path, pathlib.Path("a\udc80"), "$"),
        (Sequence[int], range(3), "$"),
        (Iterable[int], (n for n in range(3)), "$"),
        (collections.deque[int], collections.deque([1], maxlen=2), "$"),
        (np.float32, np.float64(1), "$"),
        (np.float64, np.float64("nan"), "$"),
        (np.ndarray, np.array([object()]), "$"),
        (np.ndarray, np.ma.array([1]), "$"),
        (np.ndarray, np.zeros(2, dtype=[("a", "i4")]), "$"),
        (Opaque, Opaque(), "$"),
        (list[Opaque], [Opaque()], "$[0]"),
        (threading.Lock, threading.Lock(), "$"),
        (type, int, "$"),
        ("Nowhere", v.Point(1), "$"),
    ],
)
def test_typed_position_refuses_with_path(annotation: Any, value: Any, path: str) -> None:
    assert refusal(annotation, value).path == path


def test_message_names_the_subclass_that_would_be_lost() -> None:
    message = str(refusal(v.Page, BigPage("u", 1, 1.0, [])))
    assert "BigPage" in message
    assert "would come back as" in message


def test_message_says_that_the_annotation_could_not_be_resolved() -> None:
    assert "'Nowhere' (a name that could not be resolved)" in str(refusal("Nowhere", v.Point(1)))


def test_float_is_looked_at_also_when_the_types_are_known_to_be_fine() -> None:
    codec = codec_for(v.Page)
    for _ in range(3):
        assert codec.encode(v.Page("u", 1, 1.0, []))
        assert codec_for(tuple[int, float]).encode((1, 1.0))
    assert refusal(v.Page, v.Page("u", 1, float("nan"), [])).path == "$.score"
    assert refusal(tuple[int, float], (1, float("inf"))).path == "$[1]"


class Zone(dt.tzinfo):
    def utcoffset(self, when: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(hours=1)


def test_time_zone_of_a_class_of_its_own_is_refused() -> None:
    error = refusal(dt.datetime, dt.datetime(2024, 1, 1, tzinfo=Zone()))
    assert "zoneinfo.ZoneInfo" in str(error)


@dataclasses.dataclass
class Loop:
    next: Loop | None = None
    items: list[Any] = dataclasses.field(default_factory=list)


def test_cyclic_values_are_refused() -> None:
    loop = Loop()
    loop.next = loop
    items: list[Any] = []
    items.append(items)
    mapping: dict[str, Any] = {}
    mapping["a"] = [mapping]
    assert "cyclic" in str(refusal(Loop, loop))
    assert "cyclic" in str(refusal(Any, items))
    assert "cyclic" in str(refusal(Any, mapping))
    assert "cyclic" in str(refusal(Loop, Loop(None, items)))


def test_nesting_is_refused_when_it_is_too_deep_and_kept_below() -> None:
    def nested(depth: int) -> list[Any]:
        value: list[Any] = []
        for _ in range(depth):
            value = [value]
        return value

    def chain(depth: int) -> Loop:
        value = Loop()
        for _ in range(depth):
            value = Loop(value)
        return value

    assert codec_for(Any).decode(codec_for(Any).encode(nested(200))) == nested(200)
    assert codec_for(Loop).decode(codec_for(Loop).encode(chain(100))) == chain(100)
    for annotation, value in ((Any, nested(300)), (Any, nested(100_000)), (Loop, chain(5_000))):
        assert "nested" in str(refusal(annotation, value))


def test_value_above_the_limit_is_refused_with_its_size() -> None:
    codec = codec_for(str)
    assert codec.encode("a" * 98, max_bytes=100)
    with pytest.raises(PayloadTooLarge, match=r"101 bytes .* limit of 100"):
        codec.encode("a" * 99, max_bytes=100)


class Loose(pydantic.BaseModel):
    anything: Any
    model_config = {"arbitrary_types_allowed": True}


class Secret(pydantic.BaseModel):
    key: pydantic.SecretStr


class Holder(pydantic.BaseModel):
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)


def test_model_that_would_come_back_changed_is_refused_with_path() -> None:
    assert refusal(list[Loose], [Loose(anything=[1]), Loose(anything=[(1,)])]).path == (
        "$[1].anything[0]"
    )
    assert refusal(Loose, Loose(anything=float("nan"))).path == "$.anything"
    assert refusal(Loose, Loose(anything=threading.Lock())).path == "$.anything"
    assert refusal(Secret, Secret(key=pydantic.SecretStr("a"))).path == "$.key"
    assert refusal(Holder, Holder()).path == "$._lock"
    assert refusal(v.Model, v.Model.model_construct(name=5)).path == "$.name"  # type: ignore[arg-type]
    assert refusal(v.Model, v.Model.model_construct()).path == "$"


class Checked(msgspec.Struct):
    value: int

    def __post_init__(self) -> None:
        self.value += 1


@dataclasses.dataclass
class Small:
    value: int

    def __post_init__(self) -> None:
        if self.value > 3:
            raise ValueError("too large")


@dataclasses.dataclass
class Attached:
    value: int

    def __post_init__(self) -> None:
        self.seen = 0


@dataclasses.dataclass
class Masked:
    value: int

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found + 1 if name == "value" else found


@dataclasses.dataclass
class Rounded:
    value: int

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value + 1)


@dataclasses.dataclass
class Behind:
    value: int


def _doubled(self: Any) -> int:
    return int(self.__dict__["value"]) * 2


def _set_value(self: Any, value: int) -> None:
    self.__dict__["value"] = value


Behind.value = property(_doubled, _set_value)  # type: ignore[assignment]


def test_class_whose_attributes_run_code_is_compared() -> None:
    assert refusal(Behind, Behind(1)).path == "$.value"
    assert refusal(Masked, Masked(1)).path == "$.value"
    value = Rounded(1)
    codec = codec_for(Rounded)
    assert codec.decode(codec.encode(value)) == value == Rounded(1)


class Tagged(Row2 := NamedTuple("Row2", [("a", int)])):  # type: ignore[misc]
    pass


def test_named_tuple_with_attributes_beside_its_fields_is_refused() -> None:
    value = Tagged(1)
    assert codec_for(Tagged).decode(codec_for(Tagged).encode(value)) == value
    value.extra = 1
    refusal(Tagged, value)


def test_class_whose_constructor_changes_the_value_is_refused() -> None:
    assert refusal(Checked, Checked(1)).path == "$.value"
    small = Small(1)
    small.value = 5
    assert "too large" in str(refusal(Small, small))
    attached = Attached(1)
    assert codec_for(Attached).encode(attached)
    attached.seen = 1
    assert refusal(Attached, attached).path == "$.seen"


@dataclasses.dataclass
class NeedsInit:
    value: int
    given: dataclasses.InitVar[int]


def test_dataclass_that_cannot_be_rebuilt_is_refused() -> None:
    assert "given" in str(refusal(NeedsInit, NeedsInit(1, 2)))


@dataclasses.dataclass(init=False)
class Unset:
    value: int


def test_field_that_is_not_set_is_refused() -> None:
    assert "'value'" in str(refusal(Unset, Unset()))


class Hostile:
    __class__ = property(lambda self: 1 / 0)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "annotation", [Any, int, v.Point, list[int], v.Page | v.Point, Hostile, v.Model, Literal[1]]
)
def test_value_with_broken_methods_is_refused(annotation: Any) -> None:
    refusal(annotation, Hostile())


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__module__", "__qualname__", "__name__"):
            raise RuntimeError(name)
        return super().__getattribute__(name)


class Cursed(metaclass=Meta):
    pass


def test_value_whose_class_has_no_readable_name_is_refused() -> None:
    refusal(Any, Cursed())
    refusal(int, Cursed())


class Sentinel(enum.Enum):
    A = 1


def test_enum_member_that_is_not_in_its_class_is_refused() -> None:
    rogue = object.__new__(Sentinel)
    rogue._name_, rogue._value_ = "B", 2
    refusal(Sentinel, rogue)


class Row(NamedTuple):
    a: int


def test_named_tuple_at_a_tuple_position_is_refused() -> None:
    assert "Row" in str(refusal(tuple[int], Row(1)))


def test_refusals_do_not_leave_the_codec_as_their_own_class() -> None:
    assert not issubclass(Refused, CodecError)
    assert not issubclass(CodecError, Refused)
