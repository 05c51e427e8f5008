"""Plans for classes with named fields: dataclasses, NamedTuple, TypedDict, msgspec, pydantic.

Records are JSON objects with a key per field. A class without code of its own in its constructor
is rebuilt by calling it with its fields; a dataclass with such code is rebuilt, set to the stored
fields, and verified; a pydantic model is rebuilt past its validators. A field that the stored
object lacks takes its default: classes may grow.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import attrgetter, itemgetter
from typing import Annotated, Any

from kagzi.codec.containers import Fields
from kagzi.codec.plans import ALL_KINDS, ANY, Plan, Refused, key_segment, mismatch, type_name, write

FieldPlans = Mapping[str, Plan]

_CONTAINERS = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex, BaseException)


def record_kind(cls: type) -> str | None:
    """Which of the functions below serves this class, None for other classes."""
    if hasattr(cls, "__struct_fields__") and hasattr(cls, "__struct_config__"):
        return "struct"
    if hasattr(cls, "__pydantic_validator__") and hasattr(cls, "model_fields"):
        return "pydantic"
    if dataclasses.is_dataclass(cls) and not issubclass(cls, _CONTAINERS):
        return "dataclass"
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "namedtuple"
    if issubclass(cls, dict) and hasattr(cls, "__total__"):
        return "typeddict"
    return None


def has_hooks(cls: type) -> bool:
    """Whether constructing the class runs code of its own, so that its records are verified."""
    kind = record_kind(cls)
    if kind == "struct":
        return hasattr(cls, "__post_init__")
    if kind == "dataclass":
        return _dataclass_has_hooks(cls)
    return False


def _record(
    name: str, cls: type, fields: Fields, build: Callable[[Sequence[Any]], Any], verify: bool
) -> Plan:
    """Common to classes whose fields are attributes. `build` gets one value per field, in order,
    or `MISSING` where the stored object lacks it."""
    names = [segment[1:] for segment in fields.names]
    get_attributes, get_keys = _getters(attrgetter, names), _getters(itemgetter, names)
    known = fields.known

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(name, value, (cls,))
        try:
            values = get_attributes(value)
        except AttributeError as error:
            raise Refused(f"the field {error.name!r} of this {name} is not set") from None
        if known.get(tuple(map(type, values))) != ():
            values = fields.enc(values)
        return dict(zip(names, values))  # noqa: B905 - as many, and strict costs 100 ns

    def dec(tree: Any) -> Any:
        try:
            values = get_keys(tree)
        except KeyError:
            return build(
                [
                    MISSING if one not in tree else tree[one] if dec is None else dec(tree[one])
                    for one, dec in zip(names, fields.decs, strict=True)
                ]
            )
        return build(fields.dec(values) if fields.any_dec else values)

    return Plan(name, enc, dec, (cls,), (dict,), verify=verify)


def _getters(getter: Any, names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """`attrgetter` or `itemgetter` that gives a tuple for any number of names."""
    if len(names) > 1:
        return getter(*names)  # type: ignore[no-any-return]
    if not names:
        return lambda value: ()
    one = getter(names[0])
    return lambda value: (one(value),)


MISSING: Any = object()


def _fields(plans: FieldPlans) -> Fields:
    return Fields([f".{name}" for name in plans], list(plans.values()))


# --- dataclasses ----------------------------------------------------------------------------


def dataclass_plan(name: str, cls: type, plans: FieldPlans) -> Plan:
    """`plans` has every field in order, also those with init=False."""
    specs = dataclasses.fields(cls)
    fields = _fields(plans)
    hooks = _dataclass_has_hooks(cls)
    verify = hooks or any(plan.verify for plan in plans.values())
    positional = not hooks and all(spec.init and not spec.kw_only for spec in specs)
    by_position: Any = cls

    def build_plain(values: Sequence[Any]) -> Any:
        return by_position(*values) if MISSING not in values else build(values)

    def build(values: Sequence[Any]) -> Any:
        given = {
            spec.name: value
            for spec, value in zip(specs, values, strict=True)
            if value is not MISSING
        }
        value = cls(**{spec.name: given[spec.name] for spec in specs if _passed(spec, given)})
        if hooks:
            # what __post_init__ computed anew is not what was stored
            for field_name, stored in given.items():
                object.__setattr__(value, field_name, stored)
        return value

    return _record(name, cls, fields, build_plain if positional else build, verify)


def _passed(spec: dataclasses.Field[Any], given: dict[str, Any]) -> bool:
    return spec.init and spec.name in given


def _dataclass_has_hooks(cls: Any) -> bool:
    return (
        not _is_generated(cls.__init__)
        or hasattr(cls, "__post_init__")
        or cls.__new__ is not object.__new__
        or cls.__getattribute__ is not object.__getattribute__
        or not (cls.__setattr__ is object.__setattr__ or _is_generated(cls.__setattr__))
        or any(not spec.init or _is_computed(cls, spec.name) for spec in dataclasses.fields(cls))
        or any(_has_init_var(base) for base in cls.__mro__)
    )


def _is_generated(method: Any) -> bool:
    """Written by `dataclasses`, not by hand."""
    return getattr(getattr(method, "__code__", None), "co_filename", "") == "<string>"


def _is_computed(cls: type, name: str) -> bool:
    """Whether a property or another descriptor stands between the field and its value."""
    found = inspect.getattr_static(cls, name, None)
    return hasattr(type(found), "__set__") and not inspect.ismemberdescriptor(found)


def _has_init_var(base: Any) -> bool:
    marked = getattr(base, "__dataclass_fields__", {}).values()
    return any(getattr(spec._field_type, "name", "") == "_FIELD_INITVAR" for spec in marked)


def extra_state(value: Any) -> dict[str, Any]:
    """Attributes of a dataclass instance beside its fields, cached properties left out."""
    names = {spec.name for spec in dataclasses.fields(value)}
    return {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if name not in names
        and name != "__orig_class__"
        and not isinstance(getattr(type(value), name, None), cached_property)
    }


# --- NamedTuple, TypedDict ------------------------------------------------------------------


def namedtuple_plan(name: str, cls: Any, plans: FieldPlans) -> Plan:
    fields = _fields(plans)
    names = tuple(plans)
    make: Callable[[Sequence[Any]], Any] = cls._make
    defaults: dict[str, Any] = cls._field_defaults

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(name, value, (cls,))
        if getattr(value, "__dict__", None):
            raise Refused(f"a {name} with attributes beside its fields")
        return dict(zip(names, fields.enc(tuple(value)), strict=True))

    def dec(tree: Any) -> Any:
        missing = [one for one in names if one not in tree]
        if missing:
            values = [
                defaults[one] if one in missing else tree[one] if dec is None else dec(tree[one])
                for one, dec in zip(names, fields.decs, strict=True)
            ]
            return make(values)
        return make(fields.dec([tree[one] for one in names]))

    verify = any(plan.verify for plan in plans.values())
    return Plan(name, enc, dec, (cls,), (dict,), verify=verify)


def typeddict_plan(name: str, plans: FieldPlans) -> Plan:
    """A plain dict; keys that the class does not declare are held to the rules of Any."""
    identity = all(plan.dec is None for plan in plans.values())

    def enc(value: Any) -> Any:
        if type(value) is not dict:
            raise mismatch(name, value, (dict,))
        tree = {}
        for key, item in value.items():
            try:
                if type(key) is not str:
                    raise Refused(f"a {name} with a key that is not a str")
                tree[key] = plans.get(key, ANY).enc(item)
            except Refused as refused:
                raise refused.at(key_segment(key)) from None
        return value if identity else tree

    def dec(tree: Any) -> Any:
        for key, plan in plans.items():
            if plan.dec is not None and key in tree:
                tree[key] = plan.dec(tree[key])
        return tree

    verify = any(plan.verify for plan in plans.values())
    return Plan(name, enc, None if identity else dec, (dict,), (dict,), verify=verify)


# --- msgspec, pydantic ----------------------------------------------------------------------


def struct_plan(name: str, cls: type, plans: FieldPlans) -> Plan:
    names = tuple(plans)
    verify = hasattr(cls, "__post_init__") or any(plan.verify for plan in plans.values())

    def build(values: Sequence[Any]) -> Any:
        given = zip(names, values, strict=True)
        return cls(**{one: value for one, value in given if value is not MISSING})

    return _record(name, cls, _fields(plans), build, verify)


def pydantic_plan(name: str, cls: Any, plans: FieldPlans, private: FieldPlans) -> Plan:
    """By its fields, past its validators and serializers, as `copy` and `pickle` do.

    Which fields were given, extra fields and private attributes, where they are not what the class
    gives by itself, are under the key `$`.
    """
    fields = _fields(plans)
    names = tuple(plans)
    get_keys = _getters(itemgetter, names)

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(name, value, (cls,))
        try:
            values = get_keys(value.__dict__)
        except KeyError as error:
            raise Refused(f"the field {error} of this {name} is not set") from None
        tree = dict(zip(names, fields.enc(values), strict=True))
        unset = [one for one in names if one not in value.model_fields_set]
        parts = {
            "unset": unset,
            "extra": _enc_attributes(value.__pydantic_extra__, {}),
            "private": _enc_attributes(value.__pydantic_private__, private),
        }
        parts = {part: content for part, content in parts.items() if content}
        return {**tree, "$": parts} if parts else tree

    def dec(tree: Any) -> Any:
        parts = tree.get("$", {})
        missing = [one for one in names if one not in tree]
        values = dict(zip(names, fields.dec(get_keys(tree)), strict=True)) if not missing else {}
        for one, dec_one in zip(names, fields.decs, strict=True) if missing else ():
            if one in tree:
                values[one] = tree[one] if dec_one is None else dec_one(tree[one])
            else:
                values[one] = _model_default(cls, one)
        extra = parts.get("extra", {} if cls.model_config.get("extra") == "allow" else None)
        given = {*names, *(extra or ())}.difference(parts.get("unset", ()), missing)
        private_values = _dec_attributes(parts.get("private", {}), private)
        model = cls.__new__(cls)
        for slot, content in (
            ("__dict__", values),
            ("__pydantic_fields_set__", given),
            ("__pydantic_extra__", extra),
            ("__pydantic_private__", private_values if cls.__private_attributes__ else None),
        ):
            if content is not None or not cls.__pydantic_root_model__:
                object.__setattr__(model, slot, content)
        return model

    verify = any(plan.verify for plan in (*plans.values(), *private.values()))
    return Plan(name, enc, dec, (cls,), (dict,), verify=verify)


def _model_default(cls: Any, name: str) -> Any:
    field = cls.model_fields[name]
    if field.is_required():
        raise KeyError(name)
    return field.get_default(call_default_factory=True)


def _enc_attributes(values: Mapping[str, Any] | None, plans: FieldPlans) -> dict[str, Any]:
    trees = {}
    for name, value in (values or {}).items():
        try:
            trees[name] = plans.get(name, ANY).enc(value)
        except Refused as refused:
            raise refused.at(key_segment(name)) from None
    return trees


def _dec_attributes(trees: Mapping[str, Any], plans: FieldPlans) -> dict[str, Any]:
    decs = {name: plans.get(name, ANY).dec for name in trees}
    return {
        name: tree if (dec := decs[name]) is None else dec(tree) for name, tree in trees.items()
    }


def adapted_plan(field: Any) -> Plan | None:
    """A field of a type of pydantic's (a URL, a network, a custom type), by its JSON, verified."""
    import pydantic

    annotation = field.annotation
    name = type_name(annotation) if isinstance(annotation, type) else str(annotation)
    try:
        typed: Any = Annotated[(annotation, *field.metadata, "")]
        adapter: Any = pydantic.TypeAdapter(typed)
    except Exception:
        return None

    def enc(value: Any) -> Any:
        try:
            return adapter.dump_python(value, mode="json", round_trip=True, warnings="error")
        except Exception as error:
            kind = type_name(type(value))
            raise Refused(f"pydantic cannot write this {kind} as JSON: {error}") from None

    def dec(tree: Any) -> Any:
        return adapter.validate_json(write(tree))

    return Plan(name, enc, dec, None, ALL_KINDS, verify=True)
