"""COPY rows, unnest arrays and input hashes of `_core` against their twins."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kagzi import _core as core
from tests import reference

INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
DATA = st.binary(max_size=40)
UUIDS = st.binary(min_size=16, max_size=16)
TIMES = st.integers(reference.EARLIEST_US, 2**63 - 1) | st.just(0)
INPUTS = DATA | st.sampled_from([bytes(8191), bytes(8192), bytes(8193)]) | st.none()
FIELDS = st.fixed_dictionaries(
    {
        "run_id": UUIDS,
        "id": TEXT,
        "function": TEXT,
        "status": st.sampled_from(["completed", "failed"]),
        "output": st.none() | DATA,
        "error": st.none() | DATA,
        "input": INPUTS,
        "input_hash": DATA,
        "attempt": INT32,
        "group_id": st.none() | UUIDS,
        "parent_id": st.none() | TEXT,
        "started_us": TIMES,
        "completed_us": TIMES,
        "call_number": INT32,
        "completed_number": INT32,
        "worker_id": UUIDS,
        "process_id": INT32,
    }
)


def make_step(module, **fields):
    step = module.Step(None, b"r" * 16, "fetch", None, "app:fetch", b"[]", b"h" * 16)
    step.status = "completed"
    step.worker_id = b"w" * 16
    for name, value in fields.items():
        setattr(step, name, value)
    return step


@given(st.lists(FIELDS, max_size=5))
def test_rows_and_arrays_are_those_of_the_twins(many_fields):
    steps = [make_step(core, **fields) for fields in many_fields]
    twins = [make_step(reference, **fields) for fields in many_fields]
    assert core.copy_rows(steps) == reference.copy_rows(twins)
    assert core.copy_rows(tuple(steps)) == reference.copy_rows(twins)
    assert core.unnest_arrays(steps) == reference.unnest_arrays(twins)
    for step, twin in zip(steps, twins, strict=True):
        assert core.step_fields(step) == reference.step_fields(twin)
        assert core.row_bytes(step) == reference.row_bytes(twin)
        assert core.row_bytes(step) == len(core.copy_rows([step])) - 21


def test_every_column_has_an_array_type():
    assert core.STEP_COLUMNS == reference.STEP_COLUMNS
    assert core.STEP_COLUMN_OIDS == reference.STEP_COLUMN_OIDS
    assert core.STEP_FIELD_OIDS == reference.STEP_FIELD_OIDS
    assert len(core.unnest_arrays([])) == len(core.STEP_COLUMNS)


def test_input_is_stored_up_to_its_limit():
    limit = core.INPUT_STORED_BYTES
    short = core.row_bytes(make_step(core, input=b""))
    assert core.row_bytes(make_step(core, input=bytes(limit))) == short + limit
    assert core.row_bytes(make_step(core, input=bytes(limit + 1))) == short


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", ""),
        ("status", None),
        ("status", "begun"),
        ("worker_id", None),
        ("worker_id", b"short"),
        ("run_id", None),
        ("run_id", b"r" * 17),
        ("group_id", b""),
        ("id", None),
        ("id", "a\0b"),
        ("id", "\ud800"),
        ("function", None),
        ("function", "a\0"),
        ("parent_id", "\0"),
        ("input_hash", None),
        ("started_us", -(2**63)),
        ("completed_us", reference.EARLIEST_US - 1),
    ],
)
def test_step_that_makes_no_row_is_refused(field, value):
    good, bad = make_step(core), make_step(core, **{field: value})
    with pytest.raises(ValueError, match=r"."):
        core.row_bytes(bad)
    with pytest.raises(ValueError, match=r"."):
        core.copy_rows([good, bad])
    with pytest.raises(ValueError, match=r"."):
        core.unnest_arrays([good, bad])
    with pytest.raises(ValueError, match=r"."):
        core.step_fields(bad)


@pytest.mark.parametrize("steps", [None, 5, [None], [make_step(core), "step"]])
def test_rows_of_what_are_no_steps_are_refused(steps):
    with pytest.raises(TypeError):
        core.copy_rows(steps)
    with pytest.raises(TypeError):
        core.unnest_arrays(steps)
    with pytest.raises(TypeError):
        core.step_fields(steps)


@pytest.mark.parametrize("field", ["call_number", "completed_number", "process_id", "attempt"])
def test_number_wider_than_its_column_is_refused(field):
    with pytest.raises(OverflowError):
        make_step(core, **{field: 2**31})


@given(TEXT, DATA)
def test_hash_is_xxh3_over_function_and_input(function, data):
    name = function.encode()
    prefixed = len(name).to_bytes(4, "little") + name + data
    assert core.hash_input(function, data) == xxhash.xxh3_128_digest(prefixed)
    assert core.hash_input(function, data) == reference.hash_input(function, data)


def test_hash_tells_the_function_from_the_input():
    assert core.hash_input("fetch", b"1") != core.hash_input("fetch1", b"")


def test_hash_of_a_known_input_never_changes():
    known = "acdb2daadc11c9ef8b3bd78f451719aa"
    assert core.hash_input("app:fetch", b'["https://example.org"]').hex() == known


@pytest.mark.parametrize("arguments", [(None, b""), ("fetch", None), (b"fetch", b""), ("a", "b")])
def test_hash_refuses_other_types(arguments):
    with pytest.raises(TypeError):
        core.hash_input(*arguments)
