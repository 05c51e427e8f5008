"""Result slots of `_core` against their twin."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagzi import _core as core
from tests import reference


def make_step(module, index, output, started_us, completed_us):
    step = module.Step(None, b"r" * 16, "fetch", None, "app:fetch", b"", b"h" * 16, index=index)
    step.output = output
    step.started_us = started_us
    step.completed_us = completed_us
    return step


INDICES = st.integers(0, 3) | st.integers(-1, 8)
TIMES = st.integers(-5, 50)
FILLS = st.tuples(st.just("fill"), INDICES, st.integers())
FAILS = st.tuples(st.just("fail"), INDICES, st.text(max_size=3))
ADDED_TIMES = st.tuples(st.just("add_time"), TIMES, TIMES)
FILLED_STEPS = st.tuples(
    st.just("fill_steps"),
    st.lists(st.tuples(INDICES, st.binary(max_size=2), TIMES, TIMES), max_size=5),
)


def call(slots, module, method, *arguments):
    if method == "fill_steps":
        arguments = [[make_step(module, *fields) for fields in arguments[0]]]
    try:
        return getattr(slots, method)(*arguments)
    except ValueError:
        return ValueError


def state(slots):
    return (
        len(slots),
        slots.values,
        list(slots.failures.items()),
        [slots.settled(index) for index in range(len(slots))],
        (slots.remaining, slots.succeeded, slots.failed),
        (slots.busy_us, slots.longest_us),
    )


@given(
    st.integers(0, 8), st.lists(FILLS | FAILS | ADDED_TIMES | FILLED_STEPS, min_size=1, max_size=20)
)
def test_slots_do_what_their_twin_does(size, calls):
    slots, twin = core.Slots(size), reference.Slots(size)
    for method, *arguments in calls:
        answer = call(slots, core, method, *arguments)
        twin_answer = call(twin, reference, method, *arguments)
        # After a refused index the twin has counted no time at all; the two need not agree.
        if method == "fill_steps" and twin_answer is ValueError:
            assert answer is ValueError
            return
        assert answer == twin_answer
        assert state(slots) == state(twin)


def test_values_are_the_list_itself():
    slots = core.Slots(2)
    values = slots.values
    slots.fill(1, b"1")
    assert values == [None, b"1"]
    values[1] = 1
    assert slots.values is values


def test_values_that_changed_their_length_are_refused():
    slots = core.Slots(2)
    slots.values.clear()
    with pytest.raises(ValueError, match="changed its length"):
        slots.fill(1, b"1")
    assert slots.remaining == 2


def test_step_that_fills_nothing_counts_no_time():
    slots = core.Slots(2)
    steps = [make_step(core, index, b"1", 1000, 1000 + 5 * (index + 1)) for index in (0, 1, 0)]
    assert slots.fill_steps(steps) == 2
    assert slots.fill_steps(steps) == 0
    assert (slots.busy_us, slots.longest_us) == (15, 10)


def test_settled_slot_never_changes():
    slots = core.Slots(1)
    assert slots.fail(0, "first")
    assert not slots.fill(0, "second")
    assert not slots.fail(0, "third")
    assert (slots.values, slots.failures) == ([None], {0: "first"})


@pytest.mark.parametrize("index", [-1, 3, 2**62, -(2**62)])
@pytest.mark.parametrize("method", ["fill", "fail"])
def test_index_out_of_range_is_refused(method, index):
    slots = core.Slots(3)
    with pytest.raises(ValueError, match="slot"):
        getattr(slots, method)(index, None)
    with pytest.raises(ValueError, match="slot"):
        slots.settled(index)


def test_slots_of_negative_size_are_refused():
    with pytest.raises(ValueError, match="-1 slots"):
        core.Slots(-1)


@pytest.mark.parametrize("steps", [[None], [1], [object()]])
def test_fill_steps_refuses_what_is_no_step(steps):
    with pytest.raises(TypeError, match="expected a Step"):
        core.Slots(3).fill_steps(steps)
