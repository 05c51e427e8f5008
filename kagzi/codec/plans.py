"""Plans: how a value of one type becomes a JSON tree and comes back. Here the leaves and Any.

A plan never changes a value silently. `enc` gives a tree of exact JSON types (None, bool, int,
float, str, list or tuple, dict with str keys) or raises `Refused`, which collects the path while it
passes through the containers. `dec` turns the tree back; None stands for "the tree is the value".

Plans of containers are in `containers`, of library types in `scalars`, of classes with fields in
`records`. Which annotation gets which plan is decided in `typed`, what is verified in `codec`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from math import isfinite
from types import NoneType
from typing import Any

import orjson

from kagzi.names import recorded_module

Enc = Callable[[Any], Any]
Dec = Callable[[Any], Any]

MAX_DEPTH = 250
"""Levels of nesting; orjson stops at 254, and the levels that tags add must fit too."""

MAX_INT_BITS = 14_000
"""Below the 4,300 digits at which Python stops parsing integers (sys.int_info)."""

BIG = b" "
"""In front of JSON that holds an integer beyond 64 bits: orjson would read it as a float."""

ALL_KINDS = frozenset({NoneType, bool, int, float, str, list, dict})
_PLAIN_LEAVES = frozenset({NoneType, bool, int, str})
_PLAIN = ALL_KINDS


class Refused(Exception):
    """This value cannot be stored; a `CodecError` at the edge of the codec.

    `segments` is the path to it, innermost first.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.segments: list[str] = []

    def at(self, segment: str) -> Refused:
        self.segments.append(segment)
        return self

    @property
    def path(self) -> str:
        return "$" + "".join(reversed(self.segments))


class Plan:
    """One way to encode.

    Attributes:
        name: Of the type, with modules: `list[shop.Order]`.
        accepts: Exact types of the values it takes; None: any type may be tried.
        kinds: JSON kinds (as Python types, list for every array) that `enc` can give.
        leaves: Exact types that `enc` gives back unchanged whatever the value is. Beyond 64 bits
            and lone surrogates are left to `write`.
        verify: A value must be decoded and compared before it counts as encoded.
    """

    __slots__ = ("accepts", "dec", "enc", "kinds", "leaves", "name", "verify")

    def __init__(
        self,
        name: str,
        enc: Enc,
        dec: Dec | None,
        accepts: Iterable[type] | None,
        kinds: Iterable[type],
        leaves: Iterable[type] = (),
        verify: bool = False,
    ) -> None:
        self.name = name
        self.enc = enc
        self.dec = dec
        self.accepts = None if accepts is None else frozenset(accepts)
        self.kinds = frozenset(kinds)
        self.leaves = frozenset(leaves)
        self.verify = verify

    @property
    def short(self) -> str:
        """The name without modules: `list[Order]`."""
        return _MODULES.sub("", self.name)


_MODULES = re.compile(r"(?:[\w<>]+\.)+(?=[\w<])")


# --- messages -------------------------------------------------------------------------------


def type_name(cls: type) -> str:
    """`int`, `numpy.float64`, `shop.orders.Order`; read past whatever a metaclass does."""
    name = str(_qualname_of(cls))
    module = recorded_module(str(_module_of(cls)))
    return name if module == "builtins" else f"{module}.{name}"


_qualname_of = type.__dict__["__qualname__"].__get__
_module_of = type.__dict__["__module__"].__get__


def mismatch(expected: str, value: object, accepts: Iterable[type] | None = None) -> Refused:
    got = type(value)
    text = f"a value of type {type_name(got)} where {_MODULES.sub('', expected)} is annotated"
    bases = [t for t in accepts or () if t is not got and t in got.__mro__]
    if bases:
        text += f": it would come back as {type_name(bases[0])}"
    return Refused(f"{text}; annotate {_qualname_of(got)} there, or convert the value")


def key_segment(key: object) -> str:
    if type(key) is str:
        return f".{key}" if key.isidentifier() and len(key) < 100 else f"[{key[:100]!r}]"
    return f"[{_qualname_of(type(key))} key]"


_ADVICE = {
    "tuple": "it would come back as a list; annotate it, e.g. tuple[int, ...], or use list(value)",
    "set": "annotate it, e.g. set[int], or use sorted(value)",
    "frozenset": "annotate it, e.g. frozenset[int], or use sorted(value)",
    "bytes": "annotate it as bytes, or decode it to str",
    "bytearray": "annotate it as bytearray, or decode it to str",
    "generator": "consume it first: list(value)",
    "range": "use list(value)",
    "coroutine": "await it first",
}


def refuse_untyped(value: object, expected: str = "") -> Refused:
    """Why a position without a (known) annotation cannot hold this value, and what to do."""
    name = type_name(type(value))
    where = f"annotated {expected}" if expected else "without an annotation, or annotated Any,"
    advice = _ADVICE.get(name)
    if name.startswith("numpy."):
        advice = f"annotate it as {name}, or convert it with .item() or .tolist()"
    elif advice is None:
        bases = [base for base in (dict, list, tuple, str, int, float) if isinstance(value, base)]
        plain = type_name(bases[0]) if bases else "plain JSON types"
        advice = f"annotate it as {_qualname_of(type(value))} if kagzi knows that type, or convert "
        advice += f"it to {plain}"
    return Refused(
        f"a value of type {name} at a position {where} would not come back equal: {advice}"
    )


def refuse_key(key: object) -> Refused:
    name = _qualname_of(type(key))
    return Refused(
        f"a dict key of type {type_name(type(key))} would come back as str; annotate the dict, "
        f"e.g. dict[{name}, Any], or use str keys"
    )


_NOT_FINITE = "a float that is NaN or infinite has no JSON form; use None, or store its repr()"


# --- bytes ----------------------------------------------------------------------------------


def write(tree: Any) -> bytes:
    """The JSON bytes of a tree of exact JSON types.

    Raises:
        Refused: Lone surrogates, an integer of more than `MAX_INT_BITS`, nesting too deep.
    """
    try:
        return orjson.dumps(tree)
    except TypeError:
        _survey(tree, 0)
        text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return BIG + text.encode()


def read(data: bytes) -> Any:
    """The tree that `write` was given (tuples as lists)."""
    if data[:1] == BIG:
        return json.loads(data)
    return orjson.loads(data)


def _survey(tree: Any, depth: int) -> None:
    """Find what orjson refused and raise it with its path; only big integers pass."""
    if depth > MAX_DEPTH:
        raise Refused(f"nested deeper than {MAX_DEPTH} levels, or cyclic; store it flatter")
    kind = type(tree)
    if kind is str:
        _check_text(tree)
    elif kind is int:
        if tree.bit_length() > MAX_INT_BITS:
            raise Refused(f"an integer of more than {MAX_INT_BITS} bits; store it as bytes")
    elif kind is dict:
        for key, value in tree.items():
            try:
                _check_text(key)
                _survey(value, depth + 1)
            except Refused as refused:
                raise refused.at(key_segment(key)) from None
    elif kind is list or kind is tuple:
        for index, value in enumerate(tree):
            try:
                _survey(value, depth + 1)
            except Refused as refused:
                raise refused.at(f"[{index}]") from None


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(
            "a str with a lone surrogate has no UTF-8 form; store bytes, e.g. "
            "value.encode('utf-8', 'surrogateescape')"
        ) from None


# --- leaves ---------------------------------------------------------------------------------


def leaf_plan(name: str, *types: type, kinds: Iterable[type] = ()) -> Plan:
    accepts = frozenset(types)

    def enc(value: Any) -> Any:
        if type(value) in accepts:
            return value
        raise mismatch(name, value, types)

    return Plan(name, enc, None, accepts, kinds or types, accepts)


def scalar_plan(name: str, cls: Any, enc: Enc, dec: Dec, kinds: Iterable[type] = (str,)) -> Plan:
    """A type whose values are one JSON value; `enc` may assume the exact type."""

    def checked(value: Any) -> Any:
        if type(value) is cls:
            return enc(value)
        raise mismatch(name, value, (cls,))

    return Plan(name, checked, dec, (cls,), kinds)


def _enc_float(value: Any) -> Any:
    kind = type(value)
    if kind is float:
        if isfinite(value):
            return value
        raise Refused(_NOT_FINITE)
    if kind is int or kind is bool:
        return value
    raise mismatch("float", value, (float, int))


def enc_untyped(value: Any) -> Any:
    """`value` itself, once it is known to come back equal in value and type."""
    kind = type(value)
    if kind in _PLAIN_LEAVES:
        return value
    if kind is list:
        items: Iterable[Any] = value
    elif kind is dict:
        if value and not {str}.issuperset(map(type, value)):
            for key in value:
                if type(key) is not str:
                    raise refuse_key(key).at(key_segment(key))
        items = value.values()
    elif kind is float:
        if isfinite(value):
            return value
        raise Refused(_NOT_FINITE)
    else:
        raise refuse_untyped(value)
    if {*map(type, items)} <= _PLAIN_LEAVES:
        return value
    index = 0
    try:
        for item in items:
            kind_of = type(item)
            if kind_of is float:
                if not isfinite(item):
                    raise Refused(_NOT_FINITE)
            elif kind_of not in _PLAIN_LEAVES:
                enc_untyped(item)
            index += 1
    except Refused as refused:
        if kind is list:
            raise refused.at(f"[{index}]") from None
        raise refused.at(key_segment(list(value)[index])) from None
    return value


NONE = leaf_plan("None", NoneType)
BOOL = leaf_plan("bool", bool)
# An int annotation takes a bool, and float takes both, as type checkers do: JSON tells them apart.
INT = leaf_plan("int", int, bool)
STR = leaf_plan("str", str)
FLOAT = Plan("float", _enc_float, None, (float, int, bool), (float, int, bool), (int, bool))
ANY = Plan("Any", enc_untyped, None, None, ALL_KINDS, _PLAIN_LEAVES)


def foreign_plan(name: str) -> Plan:
    """For annotations that say nothing about encoding: plain JSON values pass, others do not."""

    def enc(value: Any) -> Any:
        if type(value) not in _PLAIN:
            raise refuse_untyped(value, name)
        return enc_untyped(value)

    return Plan(name, enc, None, None, ALL_KINDS, _PLAIN_LEAVES)
