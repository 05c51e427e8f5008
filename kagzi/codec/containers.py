"""Plans made of other plans: arrays, tuples, dicts, unions, and named values side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any

from kagzi.codec.plans import (
    ALL_KINDS,
    FLOAT,
    Dec,
    Enc,
    Plan,
    Refused,
    key_segment,
    mismatch,
    read,
    refuse_key,
    write,
)

# --- containers -----------------------------------------------------------------------------


def enc_items(items: Iterable[Any], item: Plan) -> list[Any]:
    """The trees of the items, in order; the path of a refusal has the index."""
    enc, leaves = item.enc, item.leaves
    trees: list[Any] = []
    try:
        for value in items:
            trees.append(value if type(value) in leaves else enc(value))
    except Refused as refused:
        raise refused.at(f"[{len(trees)}]") from None
    return trees


def list_plan(item: Plan) -> Plan:
    full = f"list[{item.name}]"
    leaves, dec_item = item.leaves, item.dec
    floats = item is FLOAT

    def enc(value: Any) -> Any:
        if type(value) is not list:
            raise mismatch(full, value, (list,))
        types = {*map(type, value)}
        if types <= leaves or (floats and types == _ONLY_FLOAT and _all_finite(value)):
            return value
        trees = enc_items(value, item)
        return trees if dec_item else value

    def dec(tree: Any) -> Any:
        return list(map(dec_item, tree)) if dec_item else tree

    return Plan(full, enc, dec if dec_item else None, (list,), (list,), verify=item.verify)


_ONLY_FLOAT = frozenset({float})


def _all_finite(floats: Iterable[float]) -> bool:
    # NaN and infinities survive a sum, so a finite sum needs no look at each number
    return isfinite(sum(floats))


def array_plan(
    name: str, cls: Any, item: Plan, make: Callable[[Iterable[Any]], Any], ordered: bool = True
) -> Plan:
    """tuple[X, ...], set, frozenset, deque: other arrays than list. Sets are sorted by bytes."""
    full = f"{name}[{item.name}]" if cls is not tuple else f"{name}[{item.name}, ...]"
    leaves, dec_item = item.leaves, item.dec

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(full, value, (cls,))
        if leaves.issuperset(map(type, value)):
            trees: Sequence[Any] = value if cls is tuple else list(value)
        else:
            trees = enc_items(value, item)
        return trees if ordered else sorted(trees, key=write)

    def dec(tree: Any) -> Any:
        return make(map(dec_item, tree)) if dec_item else make(tree)

    return Plan(full, enc, dec, (cls,), (list,), verify=item.verify)


class Fields:
    """Named values side by side: arguments, tuple positions, fields of records.

    Which combinations of exact types need no look at the values is learned while encoding.
    """

    __slots__ = ("any_dec", "decs", "known", "names", "plans")

    def __init__(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        self.names = tuple(names)
        self.plans = tuple(plans)
        self.decs = tuple(plan.dec for plan in plans)
        self.any_dec = any(dec is not None for dec in self.decs)
        # types of the values -> positions of floats, which must be finite
        self.known: dict[tuple[type, ...], tuple[int, ...]] = {}

    def enc(self, values: Sequence[Any]) -> Sequence[Any]:
        """The trees of as many values as there are fields."""
        types = tuple(map(type, values))
        floats = self.known.get(types)
        if floats is not None:
            for index in floats:
                if not isfinite(values[index]):
                    break
            else:
                return values
        trees: list[Any] = []
        try:
            for plan, value in zip(self.plans, values, strict=True):
                trees.append(value if type(value) in plan.leaves else plan.enc(value))
        except Refused as refused:
            raise refused.at(self.names[len(trees)]) from None
        if len(self.known) < _MOST_COMBINATIONS:
            self._learn(types)
        return trees

    def _learn(self, types: tuple[type, ...]) -> None:
        pairs = list(zip(self.plans, types, strict=True))
        if all(cls in plan.leaves or (cls is float and plan.dec is None) for plan, cls in pairs):
            self.known[types] = tuple(i for i, cls in enumerate(types) if cls is float)

    def dec(self, trees: Sequence[Any]) -> Sequence[Any]:
        if not self.any_dec:
            return trees
        return [
            tree if dec is None else dec(tree) for dec, tree in zip(self.decs, trees, strict=True)
        ]


_MOST_COMBINATIONS = 64


def tuple_plan(items: Sequence[Plan]) -> Plan:
    """tuple[A, B]: as many items as annotated."""
    name = f"tuple[{', '.join(item.name for item in items) or '()'}]"
    fields = Fields([f"[{i}]" for i in range(len(items))], items)

    def enc(value: Any) -> Any:
        if type(value) is not tuple:
            raise mismatch(name, value, (tuple,))
        if len(value) != len(items):
            raise Refused(f"a tuple of {len(value)} items where {name} is annotated")
        return fields.enc(value)

    def dec(tree: Any) -> Any:
        return tuple(fields.dec(tree))

    return Plan(name, enc, dec, (tuple,), (list,), verify=any(item.verify for item in items))


def key_codec(key: Plan) -> tuple[Enc, Dec | None]:
    """Keys as JSON object keys: text stays text, everything else becomes its JSON text."""
    if key.dec is None and (key.kinds == {str} or key.kinds == ALL_KINDS):

        def enc_text(value: Any) -> Any:
            if type(value) is str:
                return value
            if key.kinds == {str}:
                raise mismatch("str", value, (str,))
            raise refuse_key(value)

        return enc_text, None
    if key.kinds == {str}:
        return key.enc, key.dec
    dec = key.dec

    def enc_json(value: Any) -> Any:
        return write(key.enc(value)).decode()

    def dec_json(text: Any) -> Any:
        tree = read(text.encode())
        return tree if dec is None else dec(tree)

    return enc_json, dec_json


def dict_plan(key: Plan, item: Plan, cls: Any = dict, name: str = "dict") -> Plan:
    full = f"{name}[{key.name}, {item.name}]"
    enc_key, dec_key = key_codec(key)
    leaves, dec_item = item.leaves, item.dec
    identity = dec_key is None and dec_item is None and cls is dict
    floats = item is FLOAT

    def enc(value: Any) -> Any:
        if type(value) is not cls:
            raise mismatch(full, value, (cls,))
        if dec_key is None and (not value or {str}.issuperset(map(type, value))):
            keys: Any = value
        else:
            keys = []
            for one in value:
                try:
                    keys.append(enc_key(one))
                except Refused as refused:
                    raise refused.at(key_segment(one)) from None
        items = value.values()
        types = {*map(type, items)}
        if types <= leaves or (floats and types == _ONLY_FLOAT and _all_finite(items)):
            return value if keys is value else dict(zip(keys, items, strict=True))
        trees: list[Any] = []
        try:
            for one in items:
                trees.append(one if type(one) in leaves else item.enc(one))
        except Refused as refused:
            raise refused.at(key_segment(list(value)[len(trees)])) from None
        return value if identity else dict(zip(keys, trees, strict=True))

    def dec(tree: Any) -> Any:
        keys = tree if dec_key is None else map(dec_key, tree)
        items = tree.values() if dec_item is None else map(dec_item, tree.values())
        pairs = dict(zip(keys, items, strict=True))
        return pairs if cls is dict else cls(pairs)

    verify = key.verify or item.verify
    return Plan(full, enc, None if identity else dec, (cls,), (dict,), verify=verify)


# --- unions ---------------------------------------------------------------------------------


def union_plan(members: Sequence[Plan]) -> Plan:
    """One of several. Sorted by name first: `A | B` and `B | A` must give the same bytes.

    Where the JSON kind alone tells the member, or the tree is the value anyway, nothing is added;
    else the value is written as `[tag, tree]`.
    """
    by_name = {member.name: member for member in members}
    ordered = sorted(by_name.values(), key=lambda member: (member.short, member.name))
    if len(ordered) == 1:
        return ordered[0]
    name = " | ".join(member.name for member in ordered)
    verify = any(member.verify for member in ordered)
    table = _candidates(ordered)
    anything = tuple(member for member in ordered if member.accepts is None)
    owners = _owners(ordered)
    known: frozenset[type] | None = frozenset(table)
    if anything:
        known = None
    kinds = frozenset().union(*(member.kinds for member in ordered))
    leaves = frozenset().union(*(member.leaves for member in ordered if member.dec is None))

    def choose(value: Any) -> tuple[Plan, Any]:
        refusals: list[Refused] = []
        for member in table.get(type(value), anything):
            try:
                return member, member.enc(value)
            except Refused as refused:
                refusals.append(refused)
        if not refusals:
            raise mismatch(name, value, known)
        raise max(refusals, key=lambda refused: len(refused.segments))

    if all(member.dec is None for member in ordered):
        return Plan(name, lambda v: choose(v)[1], None, known, kinds, leaves, verify)

    if None not in owners.values():

        def dec(tree: Any) -> Any:
            member = owners[type(tree)]
            return tree if member is None or member.dec is None else member.dec(tree)

        return Plan(name, lambda v: choose(v)[1], dec, known, kinds, (), verify)

    shorts = [member.short for member in ordered]
    by_tag = {m.short if shorts.count(m.short) == 1 else m.name: m for m in ordered}
    tags = {id(member): tag for tag, member in by_tag.items()}
    bare = {kind: member for kind, member in owners.items() if member and kind is not list}

    def enc_tagged(value: Any) -> Any:
        member, tree = choose(value)
        owner = bare.get(type(tree))
        if owner is not None and (owner is member or (owner.dec is None and member.dec is None)):
            return tree
        return [tags[id(member)], tree]

    def dec_tagged(tree: Any) -> Any:
        if type(tree) is list:
            member, tree = by_tag[tree[0]], tree[1]
        else:
            member = bare[type(tree)]
        return tree if member.dec is None else member.dec(tree)

    return Plan(name, enc_tagged, dec_tagged, known, kinds | {list}, (), verify)


def _candidates(members: Sequence[Plan]) -> dict[type, tuple[Plan, ...]]:
    """Members to try for each exact type, those of that very type first, "anything" last."""
    anything = tuple(member for member in members if member.accepts is None)
    table: dict[type, tuple[Plan, ...]] = {}
    for cls in {cls for member in members for cls in member.accepts or ()}:
        own = [member for member in members if member.accepts and cls in member.accepts]
        own.sort(key=lambda member: member.short != cls.__name__)
        table[cls] = (*own, *anything)
    return table


def _owners(members: Sequence[Plan]) -> dict[type, Plan | None]:
    """Which member a JSON kind belongs to; None where it takes a tag to know.

    Members whose tree is the value share a kind: whichever of them decodes, nothing changes.
    """
    owners: dict[type, Plan | None] = {}
    for kind in {kind for member in members for kind in member.kinds}:
        having = [member for member in members if kind in member.kinds]
        same = len(having) == 1 or all(member.dec is None for member in having)
        owners[kind] = having[0] if same else None
    return owners
