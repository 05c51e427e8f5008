"""What comes back is equal to what went in, in value and type, at every depth."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime as dt
import functools
import os
import pathlib
import subprocess
import sys
import typing
import zoneinfo
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pytest
import typing_extensions as te
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import TzInfo

from kagzi.codec import Codec, codec_for
from kagzi.errors import CodecError
from tests.unit import codec_values as v
from tests.unit.codec_values import shape


def round_trip(annotation: Any, value: Any) -> bytes:
    codec: Codec[Any] = codec_for(annotation)
    data = codec.encode(value)
    back = codec.decode(data)
    assert shape(back) == shape(value), (annotation, data)
    assert codec.encode(back) == data
    return data


@given(st.data())
@settings(max_examples=400)
def test_value_of_any_supported_annotation_comes_back_equal_in_value_and_type(
    data: st.DataObject,
) -> None:
    annotation, values = data.draw(v.any_type)
    round_trip(annotation, data.draw(values))


@given(v.plain_json)
@settings(max_examples=100)
def test_plain_json_comes_back_from_an_untyped_position(value: Any) -> None:
    round_trip(Any, value)


everything = st.recursive(
    st.one_of(*v.LEAVES.values(), *v.OTHERS.values(), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(*v.LEAVES.values()), inner, max_size=2),
    ),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=400)
def test_value_of_another_type_comes_back_the_same_or_is_refused(data: st.DataObject) -> None:
    annotation, _ = data.draw(v.any_type)
    value = data.draw(everything)
    codec = codec_for(annotation)
    try:
        encoded = codec.encode(value)
    except CodecError:
        return
    assert shape(codec.decode(encoded)) == shape(value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (None, None, b"null"),
        (int, 2**63, b"9223372036854775808"),
        (int, 2**70, b" 1180591620717411303424"),
        (Any, {"n": [2**64, 1.0]}, b' {"n":[18446744073709551616,1.0]}'),
        (float, 1, b"1"),
        (float, -0.0, b"-0.0"),
        (str, "\0é", b'"\\u0000\xc3\xa9"'),
        (bytes, b"\xff\0", b'"/wA="'),
        (set[int], {30, 4, 100}, b"[100,30,4]"),
        (frozenset[str], frozenset({"b", "a"}), b'["a","b"]'),
        (dict[int, str], {1: "a", -2: "b"}, b'{"1":"a","-2":"b"}'),
        (dict[int | str, int], {1: 1, "1": 2}, b'{"1":1,"\\"1\\"":2}'),
        (dict[tuple[int, int], int], {(1, 2): 3}, b'{"[1,2]":3}'),
        (int | str, "x", b'"x"'),
        (list[int] | None, [1], b"[1]"),
        (list[int] | set[int], {1}, b'["set[int]",[1]]'),
        (v.Page | v.Point, v.Point(1, 2), b'["Point",{"x":1,"y":2}]'),
        (list[int] | v.Page | v.Point, [1, 2], b'["list[int]",[1,2]]'),
        (list[int] | v.Page | v.Point | None, None, b"null"),
        (v.Point | None, v.Point(1), b'{"x":1,"y":0}'),
        (str | bytes, b"a", b'["bytes","YQ=="]'),
        (dt.timedelta, dt.timedelta(days=-1, microseconds=1), b"-86399999999"),
        (dt.timedelta, dt.timedelta.max, b" 86399999999999999999"),
        (v.Color, v.Color.GREEN, b'"GREEN"'),
        (v.Rights, v.Rights.READ | v.Rights.WRITE, b"3"),
        (pathlib.PurePosixPath, pathlib.PurePosixPath("a/b"), b'"a/b"'),
        (list, [1, "a"], b'[1,"a"]'),
        (tuple, (1, "a"), b'[1,"a"]'),
        (tuple[()], (), b"[]"),
        (typing.Tuple, (1,), b"[1]"),  # noqa: UP006
        (typing.Tuple[()], (), b"[]"),  # noqa: UP006
        (typing.List, [1], b"[1]"),  # noqa: UP006
        (typing.Dict[int, bytes], {1: b""}, b'{"1":""}'),  # noqa: UP006
        (v.Box[typing.Annotated[bytes, []]], v.Box(b""), b'{"item":""}'),
        (Literal[v.Color.RED, b"x"], v.Color.RED, b'["Color","RED"]'),
        (dict, {"a": 1}, b'{"a":1}'),
        (set, {"a"}, b'["a"]'),
        (object, [None], b"[null]"),
        (Final[int], 1, b"1"),
        (te.ReadOnly[int], 1, b"1"),
        (collections.abc.Mapping[str, set[int]], {"a": {1}}, b'{"a":[1]}'),
        (collections.abc.Sequence[str], "abc", b'"abc"'),
        (collections.OrderedDict[str, int], collections.OrderedDict(b=1, a=2), b'{"b":1,"a":2}'),
        (collections.Counter[str], collections.Counter("aab"), b'{"a":2,"b":1}'),
        (collections.deque[bytes], collections.deque([b"a"]), b'["YQ=="]'),
        (TypeVar("B", bound=v.Point), v.Point(1), b'{"x":1,"y":0}'),
        (TypeVar("C", int, bytes), b"a", b'"YQ=="'),
        (collections.abc.Awaitable[bytes], b"a", b'"YQ=="'),
        (collections.abc.Callable[[int], int], 5, b"5"),
        (np.float32, np.float32(0.1), b"0.10000000149011612"),
        (np.bool_, np.bool_(True), b"true"),
        (np.str_, np.str_("a"), b'"a"'),
        (type[int], [1], b"[1]"),
    ],
)
def test_encoded_form_of_each_type(annotation: Any, value: Any, expected: bytes) -> None:
    assert round_trip(annotation, value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (dt.datetime(2024, 1, 2, 3, 4, 5, 6), b'"2024-01-02T03:04:05.000006"'),
        (dt.datetime(2024, 1, 2, tzinfo=dt.UTC), b'"2024-01-02T00:00:00Z"'),
        (
            dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
            b'"2024-01-02T00:00:00+05:30"',
        ),
        (
            dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(0), "Z[]")),
            b'"2024-01-02T00:00:00+00:00[name=Z[]]"',
        ),
        (
            dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
            b'"2024-10-27T02:30:00+01:00[Europe/Berlin][fold=1]"',
        ),
        (
            dt.datetime(2024, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
            b'"2024-01-02T00:00:00+00:00[UTC]"',
        ),
        (
            dt.datetime(2024, 1, 2, tzinfo=TzInfo(19800)),
            b'"2024-01-02T00:00:00+05:30[tz=pydantic]"',
        ),
        (dt.datetime(2024, 1, 2, tzinfo=TzInfo(0)), b'"2024-01-02T00:00:00+00:00[tz=pydantic]"'),
        (dt.datetime(2024, 1, 2, fold=1), b'"2024-01-02T00:00:00[fold=1]"'),
        (dt.datetime.min, b'"0001-01-01T00:00:00"'),
        (dt.datetime.max.replace(tzinfo=dt.UTC), b'"9999-12-31T23:59:59.999999Z"'),
    ],
)
def test_datetime_keeps_its_zone_offset_and_fold(value: dt.datetime, expected: bytes) -> None:
    assert round_trip(dt.datetime, value) == expected
    back = codec_for(dt.datetime).decode(expected)
    assert back.utcoffset() == value.utcoffset()
    assert back.tzname() == value.tzname()
    if value.tzinfo is dt.UTC:
        assert back.tzinfo is dt.UTC


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.array([1.5, np.nan, -np.inf]),
        np.array(5),
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::2],
        np.array(["ab", "c"]),
        np.array(["2024-01-01"], dtype="datetime64[D]"),
        np.array([1, 2], dtype=">i4"),
        np.array([1 + 2j]),
        np.array([True, False]),
    ],
)
def test_numpy_array_comes_back_with_dtype_shape_and_bits(array: Any) -> None:
    for annotation in (np.ndarray, npt.NDArray[Any]):
        codec = codec_for(annotation)
        back = codec.decode(codec.encode(array))
        assert shape(back) == shape(np.ascontiguousarray(array).reshape(array.shape))
        assert back.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.datetime64("2024-01-01T00:00", "m"),
        np.timedelta64(5, "h"),
        np.complex64(1 + 2j),
        np.longdouble("0.1"),
    ],
)
def test_numpy_scalar_comes_back_with_its_unit(value: Any) -> None:
    round_trip(type(value), value)


def test_recursive_alias_is_supported() -> None:
    name = te.TypeAliasType("Json", "dict[str, Json] | list[Json] | set[int] | None")  # noqa: F821
    codec = Codec(name, {"Json": name})
    value = {"a": [{1, 2}, None, {"b": []}]}
    assert shape(codec.decode(codec.encode(value))) == shape(value)


def test_generic_alias_is_supported() -> None:
    A = TypeVar("A")
    pairs = te.TypeAliasType("Pairs", list[tuple[A, A]], type_params=(A,))
    round_trip(pairs[int], [(1, 2)])
    round_trip(pairs[bytes], [(b"1", b"2")])


def test_union_gives_the_same_bytes_in_either_order() -> None:
    one = Codec(typing.Union[list[v.Point], list[int]])  # noqa: UP007
    two = Codec(typing.Union[list[int], list[v.Point]])  # noqa: UP007
    for value in ([], [1], [v.Point(1)]):
        assert one.encode(value) == two.encode(value)
        assert two.decode(one.encode(value)) == value


def test_union_of_plain_types_has_no_tag_and_stays_plain() -> None:
    codec = codec_for(int | str | None | list[int] | dict[str, list[str]])
    assert codec.plain
    for value in (1, "a", None, [1], {"a": ["b"]}):
        assert codec.decode(codec.encode(value)) == value


def same_name(module: str, field_type: type) -> type:
    made = dataclasses.make_dataclass("Same", [("value", field_type)])
    made.__module__ = module
    return made


def test_union_of_two_classes_of_one_name_keeps_them_apart() -> None:
    one, two = same_name("shop.a", int), same_name("shop.b", int)
    codec = Codec(one | two | None)
    assert codec.encode(one(1)) == b'["shop.a.Same",{"value":1}]'
    assert type(codec.decode(codec.encode(two(1)))) is two


def test_same_set_gives_the_same_bytes_whatever_its_history() -> None:
    codec = codec_for(set[str])
    grown = {f"w{i}" for i in range(1000)}
    grown -= {f"w{i}" for i in range(50, 1000)}
    assert codec.encode(grown) == codec.encode({f"w{i}" for i in range(50)})


def test_set_gives_the_same_bytes_in_every_process() -> None:
    code = (
        "from kagzi.codec import codec_for\n"
        "value = {'abc', 'd', 'xyz', 'e', 'f'}\n"
        "print(codec_for(set[str]).encode(value), list(value))\n"
    )
    seen = {}
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        encoded, _, order = done.stdout.partition(b" ")
        seen[order] = encoded
    assert len(seen) > 1
    assert set(seen.values()) == {b"""b'["abc","d","e","f","xyz"]'"""}


def test_flag_and_int_keys_and_nested_dicts_come_back() -> None:
    round_trip(dict[v.Rights, dict[dt.date, set[v.Level]]], {v.Rights.READ: {dt.date.min: set()}})


@dataclasses.dataclass
class Grown:
    url: str
    seen: bool = False
    tags: list[str] = dataclasses.field(default_factory=list)


def test_field_added_to_a_class_takes_its_default() -> None:
    assert codec_for(Grown).decode(b'{"url":"a"}') == Grown("a")


def test_field_removed_from_a_class_is_ignored() -> None:
    assert codec_for(Grown).decode(b'{"url":"a","old":1}') == Grown("a")


def test_stored_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CodecError, match="does not fit"):
        codec_for(Grown).decode(b'{"seen":true}')
    with pytest.raises(CodecError, match="does not fit"):
        codec_for(v.Color).decode(b'"BLUE"')
    with pytest.raises(CodecError, match="does not fit"):
        codec_for(int).decode(b"{")


def test_dataclass_whose_constructor_computes_comes_back_as_it_was() -> None:
    value = v.Doubled(3)
    value.total = 99
    round_trip(v.Doubled, value)


@dataclasses.dataclass
class WithCache:
    path: str

    def __post_init__(self) -> None:
        self._parts = self.path.split("/")

    @functools.cached_property
    def depth(self) -> int:
        return len(self._parts)


def test_dataclass_gets_back_what_its_constructor_sets_beside_the_fields() -> None:
    value = WithCache("a/b")
    assert value.depth == 2
    codec = codec_for(WithCache)
    assert codec.decode(codec.encode(value))._parts == ["a", "b"]


def test_model_keeps_which_fields_were_given() -> None:
    given, default = v.Model(name="a", when=None), v.Model(name="a")
    assert round_trip(v.Model, given) != round_trip(v.Model, default)


def shout(text: str) -> str:
    return text + "!"


class Odd(pydantic.BaseModel):
    """Aliases, a validator that is not idempotent, types of pydantic's own, extras, privates."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)

    full_name: typing.Annotated[str, pydantic.AfterValidator(shout)] = pydantic.Field(
        alias="fullName"
    )
    home: pydantic.AnyUrl | None = None
    hosts: list[pydantic.IPvAnyAddress] = []
    at: pydantic.AwareDatetime | None = None
    _seen: set[int] = pydantic.PrivateAttr(default_factory=set)

    @functools.cached_property
    def upper(self) -> str:
        return self.full_name.upper()


def test_model_comes_back_past_its_validators() -> None:
    value = Odd.model_validate(
        {
            "fullName": "Ada",
            "home": "https://example.org/",
            "hosts": ["127.0.0.1", "::1"],
            "at": dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
            "more": [1],
        }
    )
    value._seen.add(5)
    assert value.upper == "ADA!"
    codec = codec_for(Odd)
    back = codec.decode(codec.encode(value))
    assert back.full_name == "Ada!"
    assert back.upper == "ADA!"
    assert back == value
    assert back.at.tzinfo is value.at.tzinfo  # type: ignore[union-attr]
    assert back.model_fields_set == value.model_fields_set
    assert back.model_extra == {"more": [1]}
    assert back._seen == {5}
    assert codec.encode(back) == codec.encode(value)


class Root(pydantic.RootModel[list[v.Point]]):
    pass


class Generic(pydantic.BaseModel, typing.Generic[v.T]):
    item: v.T


def test_root_and_generic_models_come_back() -> None:
    round_trip(Root, Root([v.Point(1)]))
    round_trip(Generic[v.Point] | None, Generic[v.Point](item=v.Point(1)))


def test_field_added_to_a_model_takes_its_default() -> None:
    assert codec_for(v.Model).decode(b'{"name":"a"}') == v.Model(name="a")
    assert codec_for(v.Model).decode(b'{"name":"a"}').model_fields_set == {"name"}
    with pytest.raises(CodecError, match="name"):
        codec_for(v.Model).decode(b"{}")


@dataclasses.dataclass
class Growing(typing.Generic[v.T]):
    item: v.T
    next: Growing[list[v.T]] | None = None


def test_generic_class_that_grows_without_end_is_not_understood_but_harmless() -> None:
    codec = codec_for(Growing[int])
    assert codec.encode(5) == b"5"
    with pytest.raises(CodecError, match="not understood"):
        codec.encode(Growing(1))


class Renamed(msgspec.Struct, rename="camel", tag="r", frozen=True, kw_only=True):
    first_name: str
    born: dt.date | None = None


def test_struct_with_renamed_fields_comes_back() -> None:
    round_trip(list[Renamed], [Renamed(first_name="Ada", born=dt.date(1815, 12, 10))])


def test_type_local_to_a_function_that_refers_to_itself_is_supported() -> None:
    @dataclasses.dataclass
    class Local:
        next: Local | None

    round_trip(Local, Local(Local(None)))


def test_codec_is_made_once_per_annotation() -> None:
    assert codec_for(list[int]) is codec_for(list[int])
    assert codec_for(typing.Annotated[int, []]).encode(1) == b"1"


def test_large_plain_value_comes_back() -> None:
    value = {str(i): [i, float(i), str(i)] for i in range(20_000)}
    assert codec_for(Any).decode(codec_for(Any).encode(value)) == value
