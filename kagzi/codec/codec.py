"""Values and arguments as JSON bytes, typed by annotations.

The rule: what `decode` gives is equal, in value and type, at every depth, to what `encode` took; or
`encode` raises `CodecError` with the path to what could not be kept. Two names for one mutable
object inside a value become two objects. Which plan an annotation gets is decided in `typed`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, NoReturn, TypeVar

import orjson

from kagzi.codec.containers import Fields
from kagzi.codec.equality import check_same
from kagzi.codec.parameters import Parameters, names_around
from kagzi.codec.plans import ANY, Plan, Refused, read, type_name, write
from kagzi.codec.typed import plan_for, resolve
from kagzi.errors import CodecError, PayloadTooLarge

T = TypeVar("T")

MAX_PAYLOAD_BYTES = 256 * 1024 * 1024

_dumps = orjson.dumps

# orjson builds its answer in a buffer of 1 KiB, which stays behind a short one for as long as it
# lives. Arguments and results live for the length of their group: they are copied.
SHORT_BYTES = 1024


class Codec(Generic[T]):
    """Encodes the values of one annotation. Compiled once, shared, without state.

    Attributes:
        plain: The JSON tree is the value; encoding is a type check and one call of orjson.
    """

    __slots__ = ("_dec", "_leaves", "annotation", "plain", "plan")

    def __init__(self, annotation: object, names: Mapping[str, Any] | None = None) -> None:
        self.annotation = annotation
        missing = annotation is inspect.Parameter.empty
        self.plan = ANY if missing else plan_for(annotation, names)
        self.plain = self.plan.dec is None
        self._dec = self.plan.dec
        self._leaves = self.plan.leaves

    def encode(self, value: T, max_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        """The JSON bytes of `value`; the same bytes in every process.

        Raises:
            CodecError: The value would not come back equal in value and type.
            PayloadTooLarge: More than `max_bytes`.
        """
        plan = self.plan
        try:
            data = write(value if type(value) in self._leaves else plan.enc(value))
            if plan.verify:
                check_same(value, _from_tree(plan, read(data)))
        except MemoryError:
            raise
        except Exception as error:
            _raise_codec_error(error, value)
        if len(data) > max_bytes:
            _raise_too_large(len(data), max_bytes)
        return data

    def decode(self, data: bytes) -> T:
        """The value that `encode` was given.

        Raises:
            CodecError: The bytes do not fit the annotation, e.g. after a change of the code.
        """
        try:
            tree = read(data)
            return tree if self._dec is None else self._dec(tree)  # type: ignore[no-any-return]
        except Exception as error:
            raise _does_not_fit(self.plan.name, error) from error


@functools.lru_cache(maxsize=4096)
def _cached(annotation: object) -> Codec[Any]:
    return Codec(annotation)


def codec_for(annotation: object, names: Mapping[str, Any] | None = None) -> Codec[Any]:
    """The codec of an annotation; `inspect.Parameter.empty` and `Any` give the untyped one.

    Args:
        names: Where forward references are looked up besides their own modules.
    """
    if names:
        return Codec(annotation, names)
    try:
        return _cached(annotation)
    except TypeError:  # unhashable, e.g. Annotated[int, []]
        return Codec(annotation)


def _from_tree(plan: Plan, tree: Any) -> Any:
    return tree if plan.dec is None else plan.dec(tree)


def _raise_codec_error(error: Exception, value: object, prefix: str = "") -> NoReturn:
    if isinstance(error, Refused):
        raise CodecError(f"{prefix}{error.path}: {error.message}", error.path) from None
    if isinstance(error, RecursionError):
        text = "nested too deeply, or cyclic (a value that contains itself); store it flatter"
        raise CodecError(f"{prefix}$: {text}") from None
    text = f"a value of type {type_name(type(value))} cannot be encoded: {_shown(error)}"
    raise CodecError(f"{prefix}$: {text}") from error


def _shown(error: Exception) -> str:
    try:
        return f"{type_name(type(error))}: {error}"[:500]
    except Exception:
        return type_name(type(error))


def _raise_too_large(size_bytes: int, max_bytes: int) -> NoReturn:
    raise PayloadTooLarge(
        f"$: {size_bytes:,} bytes of JSON, above the limit of {max_bytes:,}; store the data "
        "elsewhere (a file, an object store, a table) and pass its name"
    )


def _does_not_fit(expected: str, error: Exception) -> CodecError:
    return CodecError(f"$: the stored value does not fit {expected}: {_shown(error)}")


class ArgumentsCodec:
    """Encodes the arguments of one function, and knows the codec of its result.

    Attributes:
        returns: Codec of the return annotation.
    """

    __slots__ = (
        "_around",
        "_by_count",
        "_parameters",
        "_plain",
        "_plans",
        "_returns",
        "_verify",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        skip_first: bool = False,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        """Annotations are looked up at the first use, when the function's module is complete.

        One that cannot be resolved even then is held to the rules of Any.

        Args:
            skip_first: The first parameter is kagzi's own (a Context).
            names: Where annotations are looked up besides the function's globals and closure.
        """
        self._parameters = Parameters(function, skip_first)
        self._around = (function, names)
        self._returns: Codec[Any] | None = None
        self._plans: dict[str, Plan] = {}
        self._plain = self._verify = False
        # The common calls, without keywords: arguments by their number.
        self._by_count: dict[int, Fields] = {}

    @property
    def returns(self) -> Codec[Any]:
        return self._returns or self._compile()

    def _compile(self) -> Codec[Any]:
        parameters = self._parameters
        function, names = self._around
        module_names, local = names_around(function)
        local.update(names or {})

        def codec(annotation: Any) -> Codec[Any]:
            return codec_for(resolve(annotation, module_names, local), local)

        self._plans = {n: codec(hint).plan for n, hint in parameters.annotations.items()}
        self._verify = any(plan.verify for plan in self._plans.values())
        self._plain = all(plan.dec is None for plan in self._plans.values())
        returns = codec(parameters.returned)
        if not (self._verify or parameters.required_keywords):
            counts = range(parameters.least, len(parameters.positional) + 1)
            self._by_count = {count: self._fields(count) for count in counts}
        self._returns = returns  # last: another thread may look
        return returns

    def encode(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        max_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> bytes:
        """The arguments as JSON: an array, or `{"a": [...], "k": {...}}` when some are by keyword.

        Canonical: `f(1, b=2)` and `f(1, 2)` give the same bytes. Defaults are not filled in.

        Raises:
            InvalidArguments: The function cannot be called with them.
            CodecError: An argument would not come back equal in value and type.
            PayloadTooLarge: More than `max_bytes`.
        """
        if not kwargs:
            fields = self._by_count.get(len(args))
            if fields is not None:
                try:
                    data = _dumps(fields.enc(args))
                    if len(data) <= SHORT_BYTES:
                        data = b"%b" % data
                    if len(data) <= max_bytes:
                        return data
                except Exception:
                    pass  # the way below says what is wrong, if anything is
        args, kwargs = self._parameters.bind(args, kwargs)
        if self._returns is None:
            self._compile()
        try:
            data = self._write(args, kwargs)
            if self._verify:
                self._check(args, kwargs, data)
        except MemoryError:
            raise
        except Exception as error:
            where = f"arguments of {self._parameters.function_name}(), "
            _raise_codec_error(error, args, where)
        if len(data) > max_bytes:
            _raise_too_large(len(data), max_bytes)
        return data

    def decode(self, data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that `encode` was given, in canonical form.

        Raises:
            CodecError: The bytes do not fit the annotations, e.g. after a change of the code.
        """
        if self._returns is None:
            self._compile()
        try:
            tree = read(data)
            trees, keywords = (tree, {}) if type(tree) is list else (tree["a"], tree["k"])
            if self._plain:
                return tuple(trees), keywords
            values = self._fields(len(trees)).dec(trees)
            for name, one in keywords.items():
                keywords[name] = _from_tree(self._keyword_plan(name), one)
            return tuple(values), keywords
        except Exception as error:
            expected = f"the arguments of {self._parameters.function_name}()"
            raise _does_not_fit(expected, error) from error

    def _fields(self, count: int) -> Fields:
        """The plans of `count` arguments by position."""
        if count in self._by_count:
            return self._by_count[count]
        names = self._parameters.positional[:count]
        rest = self._plans.get(self._parameters.rest or "", ANY)
        plans = [self._plans[name] for name in names] + [rest] * (count - len(names))
        paths = [f".{self._parameters.position_name(index)}" for index in range(count)]
        return Fields(paths, plans)

    def _keyword_plan(self, name: str) -> Plan:
        return self._plans.get(self._parameters.keyword_parameter(name) or "", ANY)

    def _write(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        fields = self._fields(len(args))
        trees = fields.enc(args)
        named: dict[str, Any] = {}
        for name, value in kwargs.items():
            try:
                named[name] = self._keyword_plan(name).enc(value)
            except Refused as refused:
                raise refused.at(f".{name}") from None
        try:
            return write({"a": trees, "k": named} if named else trees)
        except Refused:
            # the path there begins with the array; name the argument instead
            paths = (*fields.names, *(f".{name}" for name in named))
            for path, tree in zip(paths, (*trees, *named.values()), strict=True):
                try:
                    write(tree)
                except Refused as refused:
                    raise refused.at(path) from None
            raise

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], data: bytes) -> None:
        back_args, back_kwargs = self.decode(data)
        paths = (*self._fields(len(args)).names, *(f".{name}" for name in kwargs))
        back = (*back_args, *back_kwargs.values())
        for path, one, two in zip(paths, (*args, *kwargs.values()), back, strict=True):
            try:
                check_same(one, two)
            except Refused as refused:
                raise refused.at(path) from None
