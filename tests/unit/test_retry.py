"""The retry policy: waits, what is worth another attempt, and values that are refused."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagzi.codec.failures import describe_exception, read_failure
from kagzi.errors import (
    CodecError,
    InvalidInput,
    NestingTooDeep,
    NonDeterminism,
    PayloadTooLarge,
    StepConflict,
    StepCrashed,
    StepFailed,
    StepTimeout,
)
from kagzi.retry import Retry


def failed(error: BaseException) -> StepFailed:
    return read_failure(describe_exception(error), "step", 1)


def test_wait_doubles_up_to_the_longest() -> None:
    policy = Retry(max_attempts=10, initial=1.5, factor=2.0, max_delay=10.0, jitter=False)
    assert [policy.delay_s(n, 0.9) for n in range(1, 6)] == [1.5, 3.0, 6.0, 10.0, 10.0]


def test_jitter_takes_away_up_to_half() -> None:
    policy = Retry(initial=4.0)
    assert policy.delay_s(1, 0.0) == 2.0
    assert policy.delay_s(1, 0.5) == 3.0
    assert 3.99 < policy.delay_s(1, 0.9999) < 4.0


@given(
    st.floats(0, 1e6), st.floats(0.001, 1e6), st.floats(0, 1e6), st.integers(1, 10**6),
    st.floats(0, 1, exclude_max=True), st.booleans(),
)  # fmt: skip
def test_wait_is_never_negative_nor_above_the_longest(
    initial: float, factor: float, longest: float, attempt: int, value: float, jitter: bool
) -> None:
    policy = Retry(initial=initial, factor=factor, max_delay=longest, jitter=jitter)
    assert 0.0 <= policy.delay_s(attempt, value) <= longest


def test_fixed_policy_waits_the_same_each_time() -> None:
    policy = Retry.fixed(max_attempts=5, delay=2.5, on=ValueError)
    assert policy.max_attempts == 5
    assert {policy.delay_s(n, 0.3) for n in range(1, 6)} == {2.5}
    assert policy.wants(ValueError())
    assert not policy.wants(KeyError())


def test_long_fixed_delay_is_not_cut() -> None:
    assert Retry.fixed(delay=86_400).delay_s(1, 0.0) == 86_400


def test_none_is_a_single_attempt() -> None:
    assert Retry.none().max_attempts == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_attempts", 0),
        ("max_attempts", -1),
        ("max_attempts", 1.0),
        ("max_attempts", True),
        ("max_attempts", "3"),
        ("max_attempts", None),
        ("initial", -0.1),
        ("initial", math.nan),
        ("initial", math.inf),
        ("initial", True),
        ("initial", "1"),
        ("initial", 10**400),
        ("factor", 0),
        ("factor", -2.0),
        ("factor", math.nan),
        ("factor", math.inf),
        ("max_delay", -1),
        ("max_delay", math.nan),
        ("max_delay", 1e300),
        ("max_delay", None),
        ("jitter", 1),
        ("jitter", None),
        ("on", ()),
        ("on", int),
        ("on", (ValueError, int)),
        ("on", ["ValueError"]),
        ("on", "ValueError"),
    ],
)
def test_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"Retry\({name}=.*: give ") as caught:
        Retry(**{name: value})
    assert repr(value)[:20] in str(caught.value)


@pytest.mark.parametrize("value", [-1, math.nan, "1"])
def test_bad_fixed_delay_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"Retry.fixed\(delay="):
        Retry.fixed(delay=value)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


def test_bad_value_without_a_repr_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Unprintable"):
        Retry(initial=Unprintable())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("on", "error", "wanted"),
    [
        (None, ValueError(), True),
        (None, StepCrashed(), True),
        (None, StepTimeout(), True),
        (None, KeyboardInterrupt(), False),
        (None, SystemExit(), False),
        (None, asyncio.CancelledError(), False),
        (OSError, ConnectionResetError(), True),
        (OSError, ValueError(), False),
        ((KeyError, OSError), TimeoutError(), True),
        (TimeoutError, StepTimeout(), True),
        (BaseException, KeyboardInterrupt(), True),
        (lambda error: "again" in str(error), ValueError("again"), True),
        (lambda error: "again" in str(error), ValueError("no"), False),
        (lambda error: error.missing, ValueError(), False),
        (lambda error: True, CodecError("x"), False),
        (TypeError, CodecError("x"), False),
        (None, PayloadTooLarge("x"), False),
        (None, NonDeterminism(), False),
        (None, StepConflict(), False),
        (None, NestingTooDeep(), False),
        (None, StepFailed("a", "b", "c"), True),
    ],
)
def test_policy_wants_another_attempt_for_the_right_errors(
    on: Any, error: BaseException, wanted: bool
) -> None:
    assert Retry(on=on).wants(error) is wanted


@pytest.mark.parametrize(
    ("on", "error", "wanted"),
    [
        (None, ValueError(), True),
        (None, KeyboardInterrupt(), False),
        (None, asyncio.CancelledError(), False),
        (None, CodecError("x"), False),
        (None, PayloadTooLarge("x"), False),
        (Exception, StepCrashed("died"), True),
        (TimeoutError, StepTimeout("late"), True),
        (ValueError, StepCrashed("died"), False),
        (OSError, ConnectionResetError(), True),
        ((KeyError, OSError), ValueError(), False),
        (lambda error: isinstance(error, StepCrashed), StepCrashed("died"), True),
        (lambda error: "died" in str(error), StepCrashed("died"), True),
        (lambda error: error.type == "builtins.ValueError", ValueError(), True),
        (lambda error: True, NonDeterminism("x"), False),
    ],
)
def test_policy_decides_the_same_from_names(on: Any, error: BaseException, wanted: bool) -> None:
    assert Retry(on=on).wants_named(failed(error)) is wanted


def test_policy_decides_from_a_bare_name() -> None:
    crashed = StepFailed("a", "kagzi.errors.StepCrashed", "died")
    assert Retry().wants_named(crashed)
    assert Retry(on=StepCrashed).wants_named(crashed)
    assert not Retry(on=OSError).wants_named(crashed)
    assert Retry().wants_named(StepFailed("a", "shop.Broken", ""))
    assert not Retry().wants_named(StepFailed("a", "builtins.SystemExit", ""))
    assert not Retry().wants_named(StepFailed("a", "kagzi.errors.CodecError", ""))


def test_policies_are_equal_by_value_and_frozen() -> None:
    assert Retry() == Retry(3, 1.0, 2.0, 60.0, True, None)
    assert hash(Retry()) == hash(Retry())
    with pytest.raises(AttributeError):
        Retry().max_attempts = 4  # type: ignore[misc]
