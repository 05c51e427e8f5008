"""The retry policy: whether a failed attempt is followed by another, and after which wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kagzi import errors
from kagzi.errors import (
    CodecError,
    InvalidInput,
    KagziError,
    NestingTooDeep,
    NonDeterminism,
    StepConflict,
    StepFailed,
)

RetryOn = (
    type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool] | None
)

_NEVER: tuple[type[KagziError], ...] = (CodecError, NonDeterminism, StepConflict, NestingTooDeep)
"""Another attempt at these meets the same code and the same data."""

_LONGEST_S = 100 * 365.25 * 86_400
_NOT_EXCEPTIONS = frozenset(
    {
        "builtins.KeyboardInterrupt",
        "builtins.SystemExit",
        "builtins.GeneratorExit",
        "asyncio.exceptions.CancelledError",
    }
)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, when, and for which errors a step's body runs again.

    Attributes:
        max_attempts: Executions in all, the first one included; at least 1.
        initial: Wait after the first failed attempt, in seconds.
        factor: Each wait is this many times the one before.
        max_delay: Longest wait, in seconds.
        jitter: Shorten each wait by up to half, so that steps that failed together spread out.
        on: What is worth another attempt: an exception class, a tuple of them, or a function
            from the error to bool. None: every `Exception`. Whatever it says, an error that
            another attempt would meet again (`CodecError`, `NonDeterminism`, `StepConflict`,
            `NestingTooDeep`) is never retried.

    Raises:
        InvalidInput: A value out of range or of the wrong type.
    """

    max_attempts: int = 3
    initial: float = 1.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: bool = True
    on: RetryOn = None

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise InvalidInput(
                f"Retry(max_attempts={_shown(self.max_attempts)}): give a whole number of at least "
                "1; Retry.none() stands for a single attempt"
            )
        _check_number("initial", self.initial, "seconds, 0 or more")
        _check_number("max_delay", self.max_delay, "seconds, 0 or more")
        _check_number("factor", self.factor, "a number above 0, e.g. 2.0")
        if self.factor <= 0:
            raise InvalidInput(
                f"Retry(factor={_shown(self.factor)}): give a number above 0, e.g. 2.0; "
                "1.0 keeps the wait the same"
            )
        if type(self.jitter) is not bool:
            raise InvalidInput(f"Retry(jitter={_shown(self.jitter)}): give True or False")
        _check_on(self.on)

    @classmethod
    def fixed(cls, max_attempts: int = 3, delay: float = 1.0, on: RetryOn = None) -> Retry:
        """The same wait of `delay` seconds after each failed attempt, without jitter."""
        _check_number("delay", delay, "seconds, 0 or more", "Retry.fixed")
        return cls(max_attempts, delay, 1.0, delay, False, on)

    @classmethod
    def none(cls) -> Retry:
        """One attempt, no retry."""
        return cls(1, 0.0, 1.0, 0.0, False)

    def delay_s(self, attempt: int, jitter_value: float) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1).

        `min(max_delay, initial * factor ** (attempt - 1))`; with jitter between half of that and
        all of it, at `jitter_value` in [0, 1).

        Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: "equal
        jitter". "Full jitter" spreads a little better but may wait for nothing at all, and the
        load of a worker is bounded by its limits anyway.
        """
        try:
            wait_s = min(float(self.max_delay), self.initial * float(self.factor) ** (attempt - 1))
        except OverflowError:
            wait_s = float(self.max_delay) if self.initial else 0.0
        if self.jitter:
            wait_s *= 0.5 + 0.5 * jitter_value
        return wait_s

    def wants(self, error: BaseException) -> bool:
        """Whether this error is worth another attempt; counting attempts is the caller's.

        A predicate `on` that raises counts as False: the error that matters is the step's own.
        """
        cls = type(error)  # isinstance would ask a `__class__` of the error's own as well
        if issubclass(cls, _NEVER):
            return False
        if self.on is None:
            return issubclass(cls, Exception)
        if isinstance(self.on, (type, tuple)):
            return issubclass(cls, self.on)
        try:
            return bool(self.on(error))
        except BaseException:  # also SystemExit: it must not end the process
            return False

    def wants_named(self, failure: StepFailed) -> bool:
        """The same for an error known by its names only: a crash, a timeout, a record.

        A predicate `on` gets an error of kagzi as itself (`StepCrashed`, `StepTimeout`), anything
        else as the `StepFailed`.
        """
        own = _own_error(failure.type)
        if own is not None:
            return self.wants(own(failure.message))
        if any(failure.is_a(cls) for cls in _NEVER):
            return False
        if self.on is None:
            if len(failure.mro) > 1:
                return failure.is_a(Exception)
            return failure.type not in _NOT_EXCEPTIONS
        if isinstance(self.on, type):
            return failure.is_a(self.on)
        if isinstance(self.on, tuple):
            return any(failure.is_a(cls) for cls in self.on)
        return self.wants(failure)


def _own_error(name: str) -> type[KagziError] | None:
    """The class of an error that kagzi raises itself for a step, if it takes just a message."""
    if name == f"{errors.__name__}.StepCrashed":
        return errors.StepCrashed
    if name == f"{errors.__name__}.StepTimeout":
        return errors.StepTimeout
    if name.startswith(f"{errors.__name__}."):
        for cls in _NEVER:
            if name.endswith(f".{cls.__name__}"):
                return cls
    return None


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except Exception:
        return f"<{type(value).__name__}>"


def _check_number(name: str, value: object, wanted: str, where: str = "Retry") -> None:
    # NaN fails the comparison, infinity and integers beyond float the upper bound
    if not (
        isinstance(value, (int, float)) and type(value) is not bool and 0 <= value <= _LONGEST_S
    ):
        raise InvalidInput(f"{where}({name}={_shown(value)}): give {wanted} (at most 100 years)")


def _check_on(on: object) -> None:
    if on is None:
        return
    classes = on if isinstance(on, tuple) else (on,)
    if isinstance(on, (type, tuple)):
        if classes and all(isinstance(c, type) and issubclass(c, BaseException) for c in classes):
            return
    elif callable(on):
        return
    raise InvalidInput(
        f"Retry(on={_shown(on)}): give an exception class, a non-empty tuple of them, or a "
        "function from the error to bool; Retry.none() retries nothing"
    )
