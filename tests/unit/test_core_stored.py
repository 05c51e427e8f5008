"""Checkpoints as they are loaded, beside their slow twin."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagzi import _core as core
from tests import reference

NUMBERS = st.integers(0, 2**31 - 1)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.text(max_size=4),
        st.sampled_from(["completed", "failed"]),
        st.sampled_from(["a.f", "b.g"]),
        st.binary(max_size=3),
        st.none() | st.binary(max_size=3),
        st.none() | st.binary(max_size=3),
        NUMBERS,
        NUMBERS,
        NUMBERS,
        st.none() | NUMBERS,
        st.booleans(),
        st.none() | st.integers(0, 2**40),
    ),
    max_size=12,
)


def fields(stored):
    return [getattr(stored, name) for name in (*reference.STORED, "is_elsewhere")]


def taken(module, rows):
    runs, numbers = [{}, {}, {}], [0, 7, 0]
    elsewhere = module.take_stored(rows, runs, numbers)
    found = [{step_id: fields(stored) for step_id, stored in run.items()} for run in runs]
    return found, numbers, elsewhere


@given(ROWS)
def test_rows_go_where_those_of_its_twin_go(rows):
    assert taken(core, rows) == taken(reference, rows)


@given(ROWS, NUMBERS)
def test_a_failure_that_was_seen_is_otherwise_the_same(rows, number):
    for _, _, *values in rows:
        ours = core.StoredStep(*values).seen(number)
        assert fields(ours) == fields(reference.StoredStep(*values).seen(number))


@pytest.mark.parametrize("place", [-1, 3])
def test_a_row_of_no_run_is_refused(place):
    row = (place, "id", "completed", "f", b"", None, None, 1, 1, 1, None, False, None)
    with pytest.raises(ValueError, match="run"):
        core.take_stored([row], [{}, {}, {}], [0, 0, 0])
    with pytest.raises(TypeError, match="thirteen"):
        core.take_stored([row[1:]], [{}], [0])


def test_the_collector_does_not_look_at_them():
    stored = core.StoredStep("completed", "f", b"", b"1", None, 1, 1, 1)
    assert not gc.is_tracked(stored)
