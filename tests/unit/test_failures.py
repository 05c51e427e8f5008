"""Errors as JSON: whatever an exception does it is described, and comes back as kagzi's own."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from kagzi import errors
from kagzi.codec.failures import (
    MAX_MESSAGE_CHARS,
    MAX_TRACEBACK_CHARS,
    describe_exception,
    failed_steps,
    kagzi_error_from,
    read_failure,
    timed_out_groups,
)
from kagzi.errors import (
    AllStepsFailed,
    CodecError,
    GroupTimeout,
    KagziError,
    NonDeterminism,
    RunFailed,
    StepFailed,
    StoreUnavailable,
)


def described(error: BaseException, **options: Any) -> dict[str, Any]:
    record = orjson.loads(describe_exception(error, **options))
    assert isinstance(record, dict)
    assert {"type", "message", "mro"} <= record.keys()
    return record


def caught(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def step(step_id: str, error: str = "builtins.ValueError") -> StepFailed:
    return StepFailed(step_id, error, "boom", "tb", 2, (error, "builtins.Exception"))


class Custom(LookupError):
    class Inner(KeyError):
        pass


def test_exception_is_described_by_qualified_names() -> None:
    record = described(Custom.Inner("a"))
    assert record["type"] == f"{__name__}.Custom.Inner"
    assert record["message"] == "'a'"
    assert record["mro"] == [
        f"{__name__}.Custom.Inner",
        "builtins.KeyError",
        "builtins.LookupError",
        "builtins.Exception",
        "builtins.BaseException",
    ]
    assert "causes" not in record
    assert "steps" not in record


def test_traceback_reads_like_pythons_with_causes_and_notes() -> None:
    def inner() -> None:
        raise KeyError("k")

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            failure = ValueError("bad")
            failure.add_note("while paying")
            raise failure from error

    record = described(caught(outer))
    text = record["traceback"]
    assert text.index("in inner") < text.index("direct cause") < text.rindex("in outer")
    assert 'raise KeyError("k")' in text
    assert text.endswith("ValueError: bad\nwhile paying\n")
    assert record["notes"] == ["while paying"]
    assert [cause["type"] for cause in record["causes"]] == ["builtins.KeyError"]


def test_traceback_is_left_out_on_request() -> None:
    assert described(caught(lambda: 1 / 0), traceback=False)["traceback"] == ""


def test_leading_frames_of_the_given_files_are_left_out() -> None:
    def body() -> None:
        int("x")

    error = caught(body)
    assert "caught" in described(error)["traceback"]
    # all frames are of this file: then none is left out
    assert "in body" in described(error, skip_frames=(__file__,))["traceback"]
    namespace: dict[str, Any] = {}
    exec(compile("def user():\n    raise ValueError(1)\n", "user.py", "exec"), namespace)
    text = described(caught(namespace["user"]), skip_frames=(__file__,))["traceback"]
    assert "user.py" in text
    assert "test_failures" not in text


def test_long_texts_are_cut_and_stay_valid() -> None:
    def recurse(depth: int) -> None:
        if depth:
            recurse(depth - 1)
        raise ValueError("x" * 100_000 + "\udc80")

    record = described(caught(lambda: recurse(500)))
    assert len(record["message"]) < MAX_MESSAGE_CHARS + 50
    assert len(record["traceback"]) < MAX_TRACEBACK_CHARS + 100
    assert "frames left out" in described(caught(lambda: deep(500)))["traceback"]


def deep(depth: int) -> None:
    if depth:
        deep(depth - 1)
    raise ValueError("bottom")


def test_lone_surrogates_and_nul_are_kept_readable() -> None:
    assert described(ValueError("a\udc80\0b"))["message"] == "a\\udc80\0b"


class BadStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("str")


class BadEverything(Exception):
    def __init__(self, needed: int) -> None:
        raise RuntimeError("init")

    def __str__(self) -> str:
        raise SystemExit

    __repr__ = __str__  # type: ignore[assignment]

    def __reduce__(self) -> str:
        raise RuntimeError("reduce")

    def __getattribute__(self, name: str) -> Any:
        raise KeyboardInterrupt(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    __hash__ = None  # type: ignore[assignment]


class SneakyText(str):
    def __str__(self) -> str:
        raise RuntimeError("str")

    def encode(self, *args: Any) -> bytes:
        raise RuntimeError("encode")

    def __len__(self) -> int:
        raise RuntimeError("len")


class SneakyStr(Exception):
    def __str__(self) -> str:
        return SneakyText("sneaky")


class NotText(Exception):
    def __str__(self) -> Any:
        return 5


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__module__", "__qualname__", "__name__", "__mro__"):
            raise RuntimeError(name)
        return super().__getattribute__(name)

    def mro(cls) -> Any:
        return super().mro()

    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("instancecheck")

    def __subclasscheck__(cls, subclass: type) -> bool:
        raise RuntimeError("subclasscheck")


class Cursed(Exception, metaclass=Meta):
    pass


class FakeClass(Exception):
    __class__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class FakeCause(Exception):
    __cause__ = property(lambda self: 1 / 0)  # type: ignore[assignment]
    __context__ = property(lambda self: 1 / 0)  # type: ignore[assignment]
    __traceback__ = property(lambda self: 1 / 0)  # type: ignore[assignment]
    __notes__ = property(lambda self: 1 / 0)


class OddNotes(Exception):
    def __init__(self) -> None:
        self.__notes__ = [1, BadStr(), "fine"]


class NoModule(Exception):
    __module__ = 5  # type: ignore[assignment]


class FakeStep(StepFailed):
    step_id = property(lambda self: 1 / 0)  # type: ignore[assignment]

    def __init__(self) -> None:
        self.__dict__["attempts"] = SneakyText("1")


@pytest.mark.parametrize(
    "make",
    [
        BadStr,
        lambda: BadEverything.__new__(BadEverything),
        SneakyStr,
        NotText,
        lambda: Cursed(),
        FakeClass,
        FakeCause,
        OddNotes,
        NoModule,
        FakeStep,
        lambda: SystemExit(3),
        KeyboardInterrupt,
        GeneratorExit,
        lambda: ExceptionGroup("g", [BadStr(), Cursed()]),
        lambda: BaseExceptionGroup("g", [KeyboardInterrupt()]),
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        lambda: OSError(2, "missing", "file"),
        lambda: SyntaxError("bad", ("f.py", 1, 2, "x =", 1, 3)),
        lambda: type("Long" * 10_000, (Exception,), {})(),
        lambda: Exception(SneakyText("a")),
        lambda: Exception(*range(10_000)),
        lambda: StepFailed.__new__(StepFailed),
        lambda: AllStepsFailed("all", [StepFailed.__new__(StepFailed)]),
    ],
)
def test_exception_is_described_whatever_it_does(make: Callable[[], BaseException]) -> None:
    error = make()
    raised = caught(lambda: (_ for _ in ()).throw(error))
    record = described(raised)
    assert isinstance(record["type"], str)
    assert "Traceback" in record["traceback"]
    chained = ValueError("outer")
    chained.__context__ = raised
    assert described(chained)["type"] == "builtins.ValueError"
    assert isinstance(read_failure(describe_exception(raised), "a", 1), StepFailed)
    rebuilt = kagzi_error_from(describe_exception(raised))
    assert isinstance(rebuilt, RunFailed)
    assert isinstance(str(rebuilt), str)
    assert isinstance(pickle.loads(pickle.dumps(rebuilt)), RunFailed)


def test_endless_and_circular_chains_are_described() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert len(described(first)["causes"]) == 1
    error: Exception = step("deepest")
    for number in range(50_000):
        above = ValueError(str(number))
        above.__cause__ = error
        error = above
    record = described(error)
    assert record["steps"] == ["deepest"]
    assert len(orjson.dumps(record)) < 50_000
    while error is not None:  # freed link by link: the interpreter would recurse
        error.__cause__, error = None, error.__cause__  # type: ignore[assignment]


def test_exception_raised_near_the_recursion_limit_is_described() -> None:
    def forever() -> None:
        forever()

    record = described(caught(forever))
    assert record["type"] == "builtins.RecursionError"
    assert "frames left out" in record["traceback"]


def test_failed_steps_of_the_whole_cause_are_listed() -> None:
    group = ExceptionGroup("g", [step("b"), ExceptionGroup("h", [step("c"), step("b")])])
    hidden = step("hidden")
    error = ValueError("top")
    error.__cause__ = group
    error.__context__ = hidden  # a traceback shows the cause only
    group.__context__ = step("d")
    assert described(error)["steps"] == ["b", "c", "d"]
    assert failed_steps(describe_exception(error)) == described(error)["steps"]
    assert failed_steps(describe_exception(step("a"))) == ["a"]
    handled = ValueError("after")
    handled.__context__ = hidden
    handled.__suppress_context__ = True
    assert failed_steps(describe_exception(handled)) == []
    assert failed_steps(describe_exception(ValueError())) == []


def test_timed_out_groups_of_the_cause_are_listed() -> None:
    error = RuntimeError("late")
    error.__cause__ = GroupTimeout("pages#2", 5)
    assert timed_out_groups(describe_exception(error)) == ["pages#2"]


def test_steps_of_another_run_are_not_listed() -> None:
    other = kagzi_error_from(describe_exception(step("theirs")), "r1")
    error = ValueError("ours")
    error.__cause__ = other
    assert failed_steps(describe_exception(error)) == []


def test_step_failure_is_read_back() -> None:
    failure = read_failure(describe_exception(caught(lambda: {}["k"])), "pages/1", 3)
    assert failure.step_id == "pages/1"
    assert failure.type == "builtins.KeyError"
    assert failure.message == "'k'"
    assert failure.attempts == 3
    assert failure.is_a(LookupError)
    assert not failure.is_a(ValueError)
    assert "KeyError: 'k'" in failure.traceback


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"type": 5}', b"{}", b"\xff"])
def test_record_that_cannot_be_read_is_a_failure_all_the_same(data: bytes) -> None:
    assert read_failure(data, "a", 1).step_id == "a"
    assert isinstance(kagzi_error_from(data, "r"), RunFailed)


def test_error_of_a_run_is_a_run_failure_with_names_and_texts() -> None:
    error = kagzi_error_from(describe_exception(caught(lambda: 1 / 0)), "run-1")
    assert type(error).__name__ == "RunFailed"
    assert error.run_id == "run-1"
    assert error.type == "builtins.ZeroDivisionError"
    assert error.message == "division by zero"
    assert "ZeroDivisionError" in error.traceback
    assert str(error) == "builtins.ZeroDivisionError: division by zero"
    assert not isinstance(error, (ZeroDivisionError, StepFailed))


def test_error_of_a_run_that_let_a_step_failure_through_is_that_step_failure() -> None:
    error: Any = kagzi_error_from(describe_exception(step("pages/3")), "run-1")
    assert isinstance(error, RunFailed)
    assert isinstance(error, StepFailed)
    assert error.step_id == "pages/3"
    assert error.type == "builtins.ValueError"
    assert error.message == "boom"
    assert error.traceback == "tb"
    assert error.attempts == 2
    assert error.is_a(ValueError)
    assert error.steps == ("pages/3",)
    assert str(error) == str(step("pages/3"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__


def test_error_of_a_run_whose_race_failed_has_its_members() -> None:
    group = AllStepsFailed("race 'm' failed", [step("m/0"), step("m/1", "x.Y")])
    error: Any = kagzi_error_from(describe_exception(group), "r")
    assert isinstance(error, AllStepsFailed)
    assert isinstance(error, RunFailed)
    assert error.message == "race 'm' failed"
    assert [(one.step_id, one.type, one.attempts) for one in error.exceptions] == [
        ("m/0", "builtins.ValueError", 2),
        ("m/1", "x.Y", 2),
    ]
    assert error.exceptions[0].is_a(ValueError)
    assert str(error) == str(group)
    matched, rest = error.split(lambda one: isinstance(one, StepFailed) and one.is_a(ValueError))
    assert [one.step_id for one in matched.exceptions] == ["m/0"]
    assert [one.step_id for one in rest.exceptions] == ["m/1"]


def test_race_of_many_losers_keeps_a_bounded_record() -> None:
    big = [StepFailed(f"m/{i}", "x.Y", "m" * 8_000, "t" * 16_000) for i in range(1_000)]
    data = describe_exception(AllStepsFailed("all", big))
    assert len(data) < 3_000_000
    error: Any = kagzi_error_from(data)
    assert len(error.exceptions) == 1_000
    assert len(error.steps) == 1_000


OWN = [
    cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, KagziError)
]


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_every_error_of_kagzi_comes_back_as_itself_too(cls: type[KagziError]) -> None:
    special: dict[type, KagziError] = {
        StepFailed: step("a"),
        AllStepsFailed: AllStepsFailed("all", [step("a")]),
        GroupTimeout: GroupTimeout("g", 1.5),
    }
    original = special.get(cls) or cls("text of it")
    error = kagzi_error_from(describe_exception(original), "r")
    assert isinstance(error, cls)
    assert isinstance(error, RunFailed)
    assert error.run_id == "r"
    assert str(error) == str(original)
    assert type(kagzi_error_from(describe_exception(original))) is type(error)
    assert isinstance(pickle.loads(pickle.dumps(error)), cls)
    with pytest.raises(cls):
        raise error


def test_attributes_of_kagzis_errors_come_back() -> None:
    codec: Any = kagzi_error_from(describe_exception(CodecError("bad", "$.a[1]")))
    assert codec.path == "$.a[1]"
    timeout: Any = kagzi_error_from(describe_exception(GroupTimeout("pages", 2.5)))
    assert (timeout.path, timeout.timeout_s) == ("pages", 2.5)
    store: Any = kagzi_error_from(describe_exception(StoreUnavailable("down", "db1", "shop")))
    assert (store.host, store.database) == ("db1", "shop")


class Own(NonDeterminism):
    pass


def test_users_subclass_of_an_error_of_kagzi_comes_back_as_kagzis_class() -> None:
    error = kagzi_error_from(describe_exception(Own("mine")))
    assert isinstance(error, NonDeterminism)
    assert error.type == f"{__name__}.Own"
    assert str(error) == f"{__name__}.Own: mine"


def test_recorded_name_never_imports_anything() -> None:
    name = "this.module.is.not.there.Error"
    data = orjson.dumps({"type": name, "message": "m", "mro": [name, "os.system"]})
    before = set(sys.modules)
    assert kagzi_error_from(data).type == name
    assert set(sys.modules) == before


def test_notes_come_back_with_the_error_of_a_run() -> None:
    original = ValueError("a")
    original.add_note("see the log")
    assert kagzi_error_from(describe_exception(original)).__notes__ == ["see the log"]
