"""From an annotation to the plan that encodes its values.

Resolution never fails: what cannot be resolved, or says nothing about encoding, is held to the
rules of Any (plain JSON values pass, the rest is refused when it is encoded).
"""

from __future__ import annotations

import collections
import collections.abc as abc
import dataclasses
import datetime as dt
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from kagzi.codec import records
from kagzi.codec.containers import array_plan, dict_plan, list_plan, tuple_plan, union_plan
from kagzi.codec.plans import ALL_KINDS, ANY, STR, Plan, Refused, foreign_plan, mismatch, type_name
from kagzi.codec.scalars import scalar_for

Names = Mapping[str, Any]
Bindings = dict[Any, Any]  # of type variables

# By name: typing_extensions has its own for older Pythons.
_WRAPPERS = frozenset({"Annotated", "Final", "ClassVar", "Required", "NotRequired", "ReadOnly"})

# An abstract annotation stands for these concrete ones; which it was is kept by the union's tag.
_ARRAYS = ("list", "tuple")
_GROUPS = ("list", "tuple", "set", "frozenset")
_ABSTRACT: dict[Any, tuple[str, ...]] = {
    abc.Sequence: _ARRAYS,
    abc.MutableSequence: ("list",),
    abc.Reversible: _ARRAYS,
    abc.Iterable: _GROUPS,
    abc.Collection: _GROUPS,
    abc.Container: _GROUPS,
    abc.Set: ("set", "frozenset"),
    abc.MutableSet: ("set",),
}
_PYDANTIC_TIMES: dict[str, type] = {
    **{f"pydantic.types.{name}Date": dt.date for name in ("Past", "Future")},
    **{f"pydantic.types.{n}Datetime": dt.datetime for n in ("Past", "Future", "Aware", "Naive")},
}
_DICTS: dict[Any, type] = {
    dict: dict,
    abc.Mapping: dict,
    abc.MutableMapping: dict,
    collections.OrderedDict: collections.OrderedDict,
}


def plan_for(annotation: Any, names: Names | None = None) -> Plan:
    """The plan of an annotation.

    Args:
        names: Where forward references are looked up besides their own modules.
    """
    try:
        return _Compiler(names or {}).plan(annotation, {})
    except Exception as error:  # an odd metaclass, a generic class that grows without end
        return foreign_plan(f"{_hint_name(annotation)} (not understood: {type(error).__name__})")


class _Compiler:
    """Builds one plan. Classes and aliases in progress are answered with a plan that waits."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.begun: dict[Any, Plan] = {}
        self.foreign = 0  # how many annotations said nothing about encoding

    def plan(self, hint: Any, bound: Bindings) -> Plan:
        hint = types.NoneType if hint is None else _bare(hint)
        if isinstance(hint, (str, typing.ForwardRef)):
            return self._unresolved(hint, bound)
        if isinstance(hint, TypeVar):
            return self._type_var(hint, bound)
        if hint is Any or hint is object:
            return ANY
        if _is_alias(hint):
            return self._alias(hint, ())
        origin, args = get_origin(hint), get_args(hint)
        if origin is None:
            return (
                self._class(hint, (), bound) if isinstance(hint, type) else self._foreign(str(hint))
            )
        if origin is Union or origin is types.UnionType:
            return union_plan([self.plan(arg, bound) for arg in args])
        if origin is typing.Literal:
            return _literal_plan(args)
        if _is_alias(origin):
            return self._alias(origin, _given(args, bound))
        if isinstance(origin, type):
            return self._class(origin, args, bound, hint)
        return self._foreign(str(hint))

    def _unresolved(self, hint: Any, bound: Bindings) -> Plan:
        found = resolve(hint, {}, self.names)
        if isinstance(found, (str, typing.ForwardRef)):
            text = hint if isinstance(hint, str) else hint.__forward_arg__
            return self._foreign(f"{text!r} (a name that could not be resolved)")
        return self.plan(found, bound)

    def _type_var(self, hint: TypeVar, bound: Bindings) -> Plan:
        if hint in bound:
            return self.plan(bound[hint], {})
        if hint.__constraints__:
            return union_plan([self.plan(one, {}) for one in hint.__constraints__])
        return ANY if hint.__bound__ is None else self.plan(hint.__bound__, {})

    def _alias(self, alias: Any, args: tuple[Any, ...]) -> Plan:
        inner = dict(zip(alias.__type_params__, args, strict=False))
        name = _with_args(alias.__name__, args)
        return self._once((alias, args), name, lambda: self.plan(alias.__value__, inner))

    def _once(self, key: Any, name: str, make: Callable[[], Plan], **known: Any) -> Plan:
        """Build a plan that may contain itself."""
        if key in self.begun:
            return self.begun[key]
        waiting = Plan(
            name,
            lambda value: self.begun[key].enc(value),
            lambda tree: _decode(self.begun[key], tree),
            known.get("accepts"),
            known.get("kinds", ALL_KINDS),
            verify=known.get("verify", False),
        )
        self.begun[key] = waiting
        self.begun[key] = plan = make()
        return plan

    def _class(self, cls: Any, args: tuple[Any, ...], bound: Bindings, hint: Any = None) -> Plan:
        def item(index: int) -> Plan:
            return self.plan(args[index], bound) if len(args) > index else ANY

        if cls is list:
            return list_plan(item(0))
        if cls in _DICTS:
            name = "dict" if _DICTS[cls] is dict else _DICTS[cls].__name__
            return dict_plan(item(0), item(1), _DICTS[cls], name)
        if cls is tuple:
            return self._tuple(args, bound, hint)
        if cls in (set, frozenset):
            return array_plan(cls.__name__, cls, item(0), cls, ordered=False)
        if cls is collections.deque:
            return _deque_plan(item(0))
        if cls is collections.Counter:
            return dict_plan(item(0), self.plan(int, {}), collections.Counter, "Counter")
        if cls in _ABSTRACT:
            return _abstract_plan(cls, item(0))
        if cls in (abc.Awaitable, abc.Coroutine) and args:
            return item(len(args) - 1)
        plan = scalar_for(_PYDANTIC_TIMES.get(type_name(cls), cls))
        if plan is not None:
            return plan
        kind = records.record_kind(cls)
        if kind is None:
            return self._foreign(_hint_name(hint or cls))
        given = _given(args, bound)
        name = _with_args(type_name(cls), given)
        return self._once(
            (cls, given),
            name,
            lambda: self._record(kind, name, cls, given),
            accepts=(dict,) if kind == "typeddict" else (cls,),
            kinds=(dict,),
            verify=records.has_hooks(cls),
        )

    def _tuple(self, args: tuple[Any, ...], bound: Bindings, hint: Any) -> Plan:
        if not args and hint is not None and hint is not typing.Tuple:  # noqa: UP006
            return tuple_plan([])  # tuple[()]
        if not args:
            return array_plan("tuple", tuple, ANY, tuple)
        if len(args) == 2 and args[1] is Ellipsis:
            return array_plan("tuple", tuple, self.plan(args[0], bound), tuple)
        if any(_is_unpacked(arg) for arg in args):
            return array_plan("tuple", tuple, ANY, tuple)
        return tuple_plan([self.plan(arg, bound) for arg in args])

    def _record(self, kind: str, name: str, cls: Any, args: tuple[Any, ...]) -> Plan:
        if kind == "pydantic":
            return self._model(name, cls)
        bindings = _bindings(cls, args)
        hints = class_hints(cls, self.names)
        if kind == "dataclass":
            wanted = [spec.name for spec in dataclasses.fields(cls)]
        elif kind == "namedtuple":
            wanted = list(cls._fields)
        elif kind == "struct":
            wanted = list(cls.__struct_fields__)
        else:
            wanted = list(hints)
        plans = {one: self.plan(hints.get(one, Any), bindings) for one in wanted}
        if kind == "dataclass":
            return records.dataclass_plan(name, cls, plans)
        if kind == "namedtuple":
            return records.namedtuple_plan(name, cls, plans)
        if kind == "struct":
            return records.struct_plan(name, cls, plans)
        return records.typeddict_plan(name, plans)

    def _model(self, name: str, cls: Any) -> Plan:
        if not getattr(cls, "__pydantic_complete__", True):
            cls.model_rebuild(raise_errors=False, _types_namespace=dict(self.names))
        plans = {}
        for one, field in cls.model_fields.items():
            before = self.foreign
            plans[one] = self.plan(field.annotation, {})
            if self.foreign > before:
                # not known here; pydantic may know it
                plans[one] = records.adapted_plan(field) or plans[one]
        hints = class_hints(cls, self.names) if cls.__private_attributes__ else {}
        private = {one: self.plan(hints.get(one, Any), {}) for one in cls.__private_attributes__}
        return records.pydantic_plan(name, cls, plans, private)

    def _foreign(self, name: str) -> Plan:
        self.foreign += 1
        return foreign_plan(name[:200])


def _decode(plan: Plan, tree: Any) -> Any:
    return tree if plan.dec is None else plan.dec(tree)


def _bare(hint: Any) -> Any:
    """Without what does not change the encoding: Annotated, NewType, Final, Required."""
    while True:
        if isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif isinstance(hint, dataclasses.InitVar):
            hint = hint.type
        elif _special_name(get_origin(hint)) in _WRAPPERS:
            hint = get_args(hint)[0]
        elif _special_name(hint) in _WRAPPERS:
            return Any
        else:
            return hint


def _special_name(form: Any) -> str | None:
    """`Final`, `Required`; Annotated is a class on some Pythons."""
    return "Annotated" if form is typing.Annotated else getattr(form, "_name", None)


def _is_alias(hint: Any) -> bool:
    return type(hint).__name__ == "TypeAliasType" and hasattr(hint, "__value__")


def _with_args(name: str, args: tuple[Any, ...]) -> str:
    if not args:
        return name
    return f"{name}[{', '.join(type_name(a) if isinstance(a, type) else str(a) for a in args)}]"


def _is_unpacked(arg: Any) -> bool:
    unpacked = _special_name(get_origin(arg)) == "Unpack"
    return unpacked or bool(getattr(arg, "__unpacked__", False))


def _hint_name(hint: Any) -> str:
    return type_name(hint) if isinstance(hint, type) else str(hint)


def _literal_plan(values: tuple[Any, ...]) -> Plan:
    allowed = {(type(value), value) for value in values}
    plans = [scalar_for(type(value)) for value in values]
    inner = union_plan([plan for plan in plans if plan is not None])
    name = f"Literal[{', '.join(repr(value) for value in values)}]"[:200]

    def enc(value: Any) -> Any:
        if type(value) not in {cls for cls, _ in allowed}:
            raise mismatch(name, value)
        if (type(value), value) not in allowed:
            raise Refused(f"a {type(value).__name__} that is not one of {name}")
        return inner.enc(value)

    accepts = {cls for cls, _ in allowed}
    return Plan(name, enc, inner.dec, accepts, inner.kinds)


def _deque_plan(item: Plan) -> Plan:
    plan = array_plan("deque", collections.deque, item, collections.deque)
    inner = plan.enc

    def enc(value: Any) -> Any:
        if type(value) is collections.deque and value.maxlen is not None:
            raise Refused("a deque with maxlen, which JSON does not hold; use deque(value)")
        return inner(value)

    plan.enc = enc
    return plan


def _abstract_plan(cls: Any, item: Plan) -> Plan:
    make: dict[str, Callable[[], Plan]] = {
        "list": lambda: list_plan(item),
        "tuple": lambda: array_plan("tuple", tuple, item, tuple),
        "set": lambda: array_plan("set", set, item, set, ordered=False),
        "frozenset": lambda: array_plan("frozenset", frozenset, item, frozenset, ordered=False),
    }
    members = [make[name]() for name in _ABSTRACT[cls]]
    if cls is not abc.MutableSequence and item.name in ("str", "Any"):
        members.append(STR)  # a str is a Sequence[str]
    return union_plan(members)


# --- names and type variables ---------------------------------------------------------------


def resolve(hint: Any, module_names: Mapping[str, Any], names: Names) -> Any:
    """The annotation with its forward references filled in, or itself where that fails."""
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        found = typing.get_type_hints(holder, dict(module_names), dict(names), include_extras=True)
    except Exception:
        return hint
    return found["hint"]


def class_hints(cls: Any, names: Names) -> dict[str, Any]:
    """The annotations of a class and its bases, each resolved as far as possible."""
    local = {**names, cls.__name__: cls}
    try:
        return typing.get_type_hints(cls, localns=local, include_extras=True)
    except Exception:
        hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        module_names = vars(sys.modules.get(base.__module__, types))
        for name, hint in inspect.get_annotations(base).items():
            hints[name] = resolve(hint, module_names, {**local, **vars(base)})
    return hints


def _bindings(cls: Any, args: tuple[Any, ...]) -> Bindings:
    """What the type variables of a generic class and of its bases stand for."""
    bound: Bindings = dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = get_origin(base)
        if isinstance(origin, type) and origin is not typing.Generic:
            inner = _given(get_args(base), bound)
            bound = {**_bindings(origin, inner), **bound}
    return bound


def _given(args: tuple[Any, ...], bound: Bindings) -> tuple[Any, ...]:
    return tuple(_bare(_substitute(arg, bound)) for arg in args)


def _substitute(arg: Any, bound: Bindings) -> Any:
    if isinstance(arg, TypeVar):
        return bound.get(arg, arg)
    parameters = getattr(arg, "__parameters__", ())
    if parameters and not isinstance(arg, type):
        return arg[tuple(bound.get(one, one) for one in parameters)]
    return arg
