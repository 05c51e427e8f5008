"""Arguments of functions: one canonical form, refusals that name the argument."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagzi.codec import ArgumentsCodec
from kagzi.errors import CodecError, InvalidArguments, InvalidDefinition, PayloadTooLarge
from tests.unit.codec_values import Page, Point, shape


def two(a: int, b: str = "x") -> None: ...
def keyword(a: int, *, k: Point, n: int = 0) -> bytes: ...
def variadic(a: int, *rest: Point, k: int = 1, **more: bytes) -> None: ...
def only(a: int, b: int = 2, /, c: int = 3, **more: Any) -> None: ...
def untyped(a, b=None): ...  # type: ignore[no-untyped-def]
def nothing() -> Point: ...  # type: ignore[empty-body]
def quoted(page: Page, near: list[Point] | None = None) -> dict[int, Page]: ...  # type: ignore[empty-body]


def encoded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    codec = ArgumentsCodec(function)
    data = codec.encode(args, kwargs)
    assert codec.encode(args, kwargs) == data  # the second time takes the fast way
    back_args, back_kwargs = codec.decode(data)
    assert codec.encode(back_args, back_kwargs) == data
    return data


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (two, (1, "y"), {}, b'[1,"y"]'),
        (two, (1,), {"b": "y"}, b'[1,"y"]'),
        (two, (), {"b": "y", "a": 1}, b'[1,"y"]'),
        (two, (1,), {}, b"[1]"),
        (two, (2**64, "y"), {}, b' [18446744073709551616,"y"]'),
        (nothing, (), {}, b"[]"),
        (keyword, (1,), {"n": 2, "k": Point(3)}, b'{"a":[1],"k":{"k":{"x":3,"y":0},"n":2}}'),
        (keyword, (), {"k": Point(3), "a": 1}, b'{"a":[1],"k":{"k":{"x":3,"y":0}}}'),
        (variadic, (1, Point(2), Point(3)), {}, b'[1,{"x":2,"y":0},{"x":3,"y":0}]'),
        (variadic, (1,), {"z": b"1", "b": b"2"}, b'{"a":[1],"k":{"b":"Mg==","z":"MQ=="}}'),
        (only, (1,), {"a": 5, "c": 4}, b'{"a":[1],"k":{"c":4,"a":5}}'),
        (only, (1, 2), {"c": 4}, b"[1,2,4]"),
        (untyped, (), {"b": 1, "a": {"x": [None]}}, b'[{"x":[null]},1]'),
        (quoted, (), {"near": [], "page": Page("u", 1, 1.0, [])}, None),
        (functools.partial(two, 1), (), {"b": "z"}, b'["z"]'),
        (math.hypot, (1.0, 2.0), {}, b"[1.0,2.0]"),
    ],
)
def test_arguments_have_one_canonical_form(
    function: Callable[..., Any], args: Any, kwargs: Any, expected: bytes | None
) -> None:
    data = encoded(function, *args, **kwargs)
    assert expected is None or data == expected


def calls(
    a: Any = 0, b: Any = 0, /, c: Any = 0, *rest: Any, d: Any = 0, **more: Any
) -> tuple[Any, ...]:
    return a, b, c, rest, d, dict(sorted(more.items()))


values = st.integers(0, 3)


@given(st.lists(values, max_size=5), st.dictionaries(st.sampled_from("abcdxy"), values, max_size=4))
@settings(max_examples=200)
def test_decoded_arguments_call_the_function_like_the_original_ones(
    args: list[int], kwargs: dict[str, int]
) -> None:
    codec = ArgumentsCodec(calls)
    try:
        expected = calls(*args, **kwargs)
    except TypeError:
        with pytest.raises(InvalidArguments):
            codec.encode(tuple(args), kwargs)
        return
    back_args, back_kwargs = codec.decode(codec.encode(tuple(args), kwargs))
    assert calls(*back_args, **back_kwargs) == expected


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "names"),
    [
        (two, (), {}, ["two()", "'a'"]),
        (two, (1, "x", 3), {}, ["two()", "at most 2", "3 were given"]),
        (two, (1,), {"a": 1}, ["two()", "two values", "'a'"]),
        (two, (1,), {"bb": 1}, ["two()", "'bb'", "a, b"]),
        (keyword, (1,), {}, ["keyword()", "'k'"]),
        (keyword, (1, Point(1)), {}, ["keyword()", "at most 1"]),
        (two, (), {"b": "x"}, ["two()", "lacks", "'a'"]),
    ],
)
def test_call_that_does_not_fit_is_refused_by_name(
    function: Callable[..., Any], args: Any, kwargs: Any, names: list[str]
) -> None:
    with pytest.raises(InvalidArguments) as caught:
        ArgumentsCodec(function).encode(args, kwargs)
    assert isinstance(caught.value, TypeError)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "path"),
    [
        (two, ("1",), {}, "$.a"),
        (two, (1, "\ud800"), {}, "$.b"),
        (untyped, (1, {"k": [(2,)]}), {}, "$.b.k[0]"),
        (untyped, (["\ud800"],), {}, "$.a[0]"),
        (keyword, (1,), {"k": Point("x")}, "$.k.x"),  # type: ignore[arg-type]
        (variadic, (1, Point(1), 2), {}, "$.rest[1]"),
        (variadic, (1,), {"z": "no bytes"}, "$.z"),
        (variadic, (1,), {"\ud800": b""}, "$.k['\\ud800']"),
        (quoted, (Page("u", 1, 1.0, [None]),), {}, "$.page.tags[0]"),  # type: ignore[list-item]
    ],
)
def test_argument_that_cannot_be_stored_is_refused_with_its_path(
    function: Callable[..., Any], args: Any, kwargs: Any, path: str
) -> None:
    with pytest.raises(CodecError) as caught:
        ArgumentsCodec(function).encode(args, kwargs)
    assert caught.value.path == path
    assert function.__name__ in str(caught.value)


@dataclasses.dataclass
class Picky:
    """Rebuilding it fails for some values: they must be refused when they are stored."""

    value: int

    def __post_init__(self) -> None:
        self.seen = 0


def takes_picky(first: int, one: Picky, *rest: Picky, **more: Picky) -> None: ...


def test_argument_of_a_verified_type_is_compared() -> None:
    encoded(takes_picky, 1, Picky(1), Picky(2), k=Picky(3))
    bad = Picky(1)
    bad.seen = 1
    for args, kwargs, path in (
        ((1, bad), {}, "$.one.seen"),
        ((1, Picky(1), bad), {}, "$.rest[0].seen"),
        ((1, Picky(1)), {"k": bad}, "$.k.seen"),
    ):
        with pytest.raises(CodecError) as caught:
            ArgumentsCodec(takes_picky).encode(args, kwargs)
        assert caught.value.path == path


def test_first_parameter_is_left_out_on_request() -> None:
    codec = ArgumentsCodec(two, skip_first=True)
    assert codec.encode(("y",), {}) == b'["y"]'
    with pytest.raises(InvalidDefinition, match="nothing"):
        ArgumentsCodec(nothing, skip_first=True)


def test_result_follows_the_return_annotation() -> None:
    codec = ArgumentsCodec(quoted).returns
    value = {1: Page("u", 1, 1.0, [])}
    assert shape(codec.decode(codec.encode(value))) == shape(value)
    assert ArgumentsCodec(untyped).returns.plain
    assert ArgumentsCodec(nothing).returns.decode(b'{"x":1}') == Point(1)


async def fetch(url: str) -> Point: ...  # type: ignore[empty-body]


def test_result_of_a_coroutine_function_is_what_it_returns() -> None:
    assert ArgumentsCodec(fetch).returns.encode(Point(1)) == b'{"x":1,"y":0}'


def test_types_local_to_a_function_are_found_in_its_closure() -> None:
    @dataclasses.dataclass
    class Local:
        other: Point

    def used(one: Local, many: list[Local]) -> Local:
        return Local(one.other)

    def unused(one: Local) -> Local: ...  # type: ignore[empty-body]

    codec = ArgumentsCodec(used)
    value = Local(Point(1))
    assert codec.decode(codec.encode((value, [value]), {})) == ((value, [value]), {})
    assert codec.returns.decode(codec.returns.encode(value)) == value
    # not in the closure: held to the rules of Any, unless the names are given
    with pytest.raises(CodecError, match="could not be resolved"):
        ArgumentsCodec(unused).encode((value,), {})
    codec = ArgumentsCodec(unused, names=locals())
    assert codec.decode(codec.encode((value,), {})) == ((value,), {})


def broken(a: "not python", b: "Missing[int]", c: 5, d: "list[Missing]") -> "…": ...  # type: ignore  # noqa: F821, F722, UP037


def defined_above(page: "Below") -> "list[Below]": ...  # type: ignore[empty-body] # noqa: UP037


early = ArgumentsCodec(defined_above)


@dataclasses.dataclass
class Below:
    value: set[int]


def test_class_defined_below_the_function_is_found() -> None:
    assert early.returns.encode([Below({1})]) == b'[{"value":[1]}]'
    other = ArgumentsCodec(defined_above)
    assert other.decode(b'[{"value":[1]}]') == ((Below({1}),), {})


def test_annotations_that_mean_nothing_are_untyped() -> None:
    assert encoded(broken, 1, "a", [None], [1]) == b'[1,"a",[null],[1]]'


class Tool:
    def method(self, a: Point) -> None: ...
    @classmethod
    def of_class(cls, a: Point) -> None: ...
    @staticmethod
    def static(a: Point) -> None: ...
    def __call__(self, a: Point) -> None: ...


def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize(
    "function",
    [Tool().method, Tool.of_class, Tool.static, Tool(), wrapper(Tool.static)],
    ids=["method", "classmethod", "staticmethod", "callable", "wrapped"],
)
def test_every_kind_of_callable_has_its_annotations_resolved(function: Any) -> None:
    assert encoded(function, Point(1)) == b'[{"x":1,"y":0}]'


def test_arguments_above_the_limit_are_refused() -> None:
    with pytest.raises(PayloadTooLarge):
        ArgumentsCodec(two).encode((1, "a" * 100), {}, max_bytes=50)


def test_stored_arguments_that_do_not_fit_are_refused() -> None:
    codec = ArgumentsCodec(quoted)
    for data in (b"[5]", b"5", b'{"a":[]}', b"["):
        with pytest.raises(CodecError, match=r"quoted\(\)"):
            codec.decode(data)
