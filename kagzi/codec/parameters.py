"""The parameters of a function: which arguments they take, in one canonical form."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kagzi.errors import InvalidArguments, InvalidDefinition

_EMPTY = inspect.Parameter.empty
_Kind = inspect._ParameterKind


class Parameters:
    """What a function can be called with, beside its first parameter if that is kagzi's own.

    Attributes:
        function_name: Qualified name, for messages.
        positional: Names that can be given by position, in order.
        least: How many of them must be given.
        rest, rest_keywords: Names of `*args` and `**kwargs`, or None.
        annotations: Of every parameter by name, as written.
        returned: The return annotation, as written.
    """

    def __init__(self, function: Callable[..., Any], skip_first: bool) -> None:
        self.function_name = str(getattr(function, "__qualname__", type(function).__qualname__))
        signature = _signature(function)
        parameters = list(signature.parameters.values())
        if skip_first and not parameters:
            raise InvalidDefinition(f"{self.function_name}() has no first parameter")
        parameters = parameters[skip_first:]

        def names(*kinds: _Kind) -> tuple[str, ...]:
            return tuple(p.name for p in parameters if p.kind in kinds)

        self.positional = names(_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD)
        self.positional_only = frozenset(names(_Kind.POSITIONAL_ONLY))
        self.keyword_only = names(_Kind.KEYWORD_ONLY)
        self.rest = next(iter(names(_Kind.VAR_POSITIONAL)), None)
        self.rest_keywords = next(iter(names(_Kind.VAR_KEYWORD)), None)
        required = {p.name for p in parameters if p.default is _EMPTY}
        self.least = sum(name in required for name in self.positional)
        self.required_keywords = tuple(name for name in self.keyword_only if name in required)
        self.annotations = {p.name: p.annotation for p in parameters}
        self.returned = signature.return_annotation

    def keyword_parameter(self, name: str) -> str | None:
        """The parameter that takes the keyword argument `name`."""
        named = name in self.keyword_only or name in self.positional
        return name if named and name not in self.positional_only else self.rest_keywords

    def position_name(self, index: int) -> str:
        """`url`, or `args[2]` for what `*args` takes."""
        if index < len(self.positional):
            return self.positional[index]
        return f"{self.rest}[{index - len(self.positional)}]"

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with as many by position as possible, the others in parameter order.

        Raises:
            InvalidArguments: The function cannot be called with them.
        """
        self._check_names(args, kwargs)
        given = list(args)
        left = dict(kwargs)
        for name in self.positional[len(args) :]:
            if name not in left or name in self.positional_only:
                break
            given.append(left.pop(name))
        for name in self.positional[len(given) : self.least]:
            if name not in left or name in self.positional_only:
                self._refuse(f"lacks its argument {name!r}")
        for name in self.required_keywords:
            if name not in left:
                self._refuse(f"lacks its argument {name!r}, which is given by keyword")
        own = [name for name in (*self.positional, *self.keyword_only) if name in left]
        own = [name for name in own if name not in self.positional_only]
        extra = sorted(left.keys() - set(own))
        return tuple(given), {name: left[name] for name in (*own, *extra)}

    def _check_names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(args) > len(self.positional) and self.rest is None:
            most = len(self.positional)
            self._refuse(f"takes at most {most} positional argument(s), {len(args)} were given")
        twice = set(self.positional[: len(args)]) - self.positional_only
        for name in kwargs:
            if name in twice:
                self._refuse(f"got two values for its argument {name!r}")
            if self.keyword_parameter(name) is None:
                known = ", ".join((*self.positional, *self.keyword_only)) or "none"
                self._refuse(f"has no argument {name!r} by keyword (its arguments: {known})")

    def _refuse(self, what: str) -> None:
        hint = ""
        first = next(iter(self.positional), "")
        if first in ("ctx", "context") and self.annotations[first] is _EMPTY:
            hint = f"; to receive a Context there, annotate it as `{first}: Context`"
        raise InvalidArguments(f"{self.function_name}() {what}{hint}")


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        P = inspect.Parameter
        return inspect.Signature([P("args", P.VAR_POSITIONAL), P("kwargs", P.VAR_KEYWORD)])


def names_around(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Globals and closure variables of a function: where its annotations are looked up."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    inner = getattr(inner, "__func__", inner)
    if not hasattr(inner, "__globals__"):
        inner = getattr(type(inner).__call__, "__func__", type(inner).__call__)
    code = getattr(inner, "__code__", None)
    cells = getattr(inner, "__closure__", None) or ()
    local: dict[str, Any] = {}
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        try:
            local[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return getattr(inner, "__globals__", {}), local
