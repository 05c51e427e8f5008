"""The core keeps nothing that has ended, leaks nothing, and stands any argument."""

import gc
import itertools
import sys
import tracemalloc
import weakref
from contextlib import suppress

import pytest

from kagzi import _core as core


class Payload:
    """Something that a step drags along; its death can be watched."""


def make_step(extra=None, **fields):
    step = core.Step(None, b"r" * 16, "fetch", None, "app:fetch", b"[]", b"h" * 16, **fields)
    step.extra = extra
    return step


def make_watched_steps(count, **fields):
    payloads = [Payload() for _ in range(count)]
    steps = [make_step(payload, **fields) for payload in payloads]
    return steps, [weakref.ref(payload) for payload in payloads]


def alive(watched):
    return sum(reference() is not None for reference in watched)


@pytest.mark.parametrize("limited", ["nothing", "gate", "function_gate"])
def test_dropped_steps_are_freed_at_once(limited):
    scheduler, place = core.Scheduler(), core.Place([5, 5, 5])
    gates = {} if limited == "nothing" else {limited: core.Gate(2)}
    steps, watched = make_watched_steps(100, **gates)
    scheduler.add_all(steps)
    begun = scheduler.take(place, 1)
    for step in steps:
        scheduler.drop(step)
    del steps, step
    assert alive(watched) == 1
    scheduler.finish(begun.pop())
    assert alive(watched) == 0


def test_finished_steps_are_freed_at_once():
    scheduler, place = core.Scheduler(), core.Place([9, 9, 9])
    steps, watched = make_watched_steps(9, function_gate=core.Gate(9))
    scheduler.add_all(steps)
    scheduler.take(place, 9)
    for step in steps[:6]:
        scheduler.suspend(step)
    for step in steps[:3]:
        scheduler.resume(step)
    for step in steps:
        scheduler.finish(step)
    del steps, step
    assert alive(watched) == 0


def test_circles_through_a_scheduler_are_collected():
    scheduler, place = core.Scheduler(), core.Place([2, 0, 0], name=Payload())
    gates = [core.Gate(1), core.Gate(1)]
    steps, watched = make_watched_steps(20, gate=gates[0])
    more, more_watched = make_watched_steps(20, function_gate=gates[1])
    for step in steps + more:
        step.run = scheduler
        step.group = place
    scheduler.add_all(steps + more)
    for step in scheduler.take(place, 2):
        scheduler.suspend(step)
        scheduler.resume(step)
    watched += more_watched
    watched.append(weakref.ref(place.name))
    del scheduler, place, gates, steps, more, step
    gc.collect()
    assert alive(watched) == 0


def test_slots_in_a_circle_are_collected():
    slots, payload = core.Slots(2), Payload()
    payload.slots = slots
    watched = weakref.ref(payload)
    slots.fill(0, payload)
    slots.fail(1, payload)
    del slots, payload
    gc.collect()
    assert watched() is None


def one_round():
    scheduler, place = core.Scheduler(), core.Place([300, 10, 1])
    gate, function_gate = core.Gate(50), core.Gate(20)
    steps = [
        make_step(gate=gate, function_gate=function_gate if index % 2 else None, index=index)
        for index in range(300)
    ]
    writer, reader, slots = core.FrameWriter(), core.FrameReader(), core.Slots(300)
    scheduler.add_all(steps)
    while taken := scheduler.take(place, 7):
        for step in taken:
            scheduler.suspend(step)
            scheduler.resume(step)
        for step in scheduler.take(place, 0):
            writer.add(2, step.number, 1000, 5, b"", b"x" * 1000)
            writer.add_step(1, step, 3)
        data = writer.take()
        messages = reader.feed(data[:-5]) + reader.feed(data[-5:])
        ended, _ = scheduler.absorb(messages, 2, 1)
        for step in ended:
            step.worker_id = b"w" * 16
        core.copy_rows(ended)
        core.unnest_arrays(ended)
        slots.fill_steps(ended)
    slots.fail(299, "late")
    for arguments in ([None], [make_step()]):
        with pytest.raises((TypeError, ValueError)):
            core.copy_rows(arguments)
        with pytest.raises((TypeError, ValueError)):
            core.unnest_arrays(arguments)
    assert slots.succeeded == 300


def test_memory_does_not_grow_from_round_to_round():
    # tracemalloc counts the buffers of C as well as objects.
    tracemalloc.start()
    try:
        for _ in range(3):
            one_round()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(10):
            one_round()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


def test_counts_of_shared_objects_are_even():
    function, data = "app:" + "f" * 50, b"x" * 50
    before = sys.getrefcount(function), sys.getrefcount(data)
    for _ in range(100):
        core.hash_input(function, data)
        step = core.Step(None, b"r" * 16, function, None, function, data, data)
        step.output = step.error = data
        with pytest.raises(ValueError, match="status"):
            core.copy_rows([step])
        step.status, step.worker_id = "failed", b"w" * 16
        core.copy_rows([step])
        core.unnest_arrays([step])
        writer = core.FrameWriter()
        writer.add_step(1, step, 0)
        writer.add(1, 2, 3, 4, data, data)
        slots = core.Slots(1)
        slots.fill(0, data)
        slots.fill(0, function)
    del step, slots, writer
    assert (sys.getrefcount(function), sys.getrefcount(data)) == before


def test_finalizer_that_calls_back_finds_the_scheduler_whole():
    scheduler, place = core.Scheduler(), core.Place([50, 0, 0])
    gate = core.Gate(3)
    added = []

    class CallsBack:
        def __del__(self):
            added.append(make_step(gate=gate))
            scheduler.add(added[-1])
            for other in scheduler.take(place, 2):
                scheduler.suspend(other)

    scheduler.add_all(make_step(CallsBack(), gate=gate) for _ in range(40))
    for number in range(1, 81):
        scheduler.take(place, 1)
        if (step := scheduler.find(number)) is not None:
            scheduler.finish(step)
            del step
    assert len(added) == 40
    assert scheduler.waiting() == scheduler.begun == 0
    assert gate.held == place.held(core.LANE_ASYNC) == 0


class Odd:
    def __len__(self):
        return -1

    def __iter__(self):
        return iter([None])

    def __getitem__(self, index):
        return self


def make_all():
    scheduler, place = core.Scheduler(), core.Place([1, 1, 1])
    step = make_step()
    scheduler.add(step)
    return [
        step,
        scheduler,
        place,
        core.Gate(1),
        core.Slots(2),
        core.FrameWriter(),
        core.FrameReader(),
    ]


ODD_ARGUMENTS = [None, -1, 3, 2**70, -(2**70), 1.5, "text", b"bytes", [], [None], (), {}, Odd()]
REFUSALS = (TypeError, ValueError, OverflowError, AttributeError)
MEMBERS = [
    (position, name)
    for position, thing in enumerate(make_all())
    for name in dir(thing)
    if not name.startswith("__")
]


@pytest.mark.parametrize(("position", "name"), MEMBERS)
def test_odd_arguments_are_refused_cleanly(position, name):
    for arguments in itertools.chain(
        [()], itertools.product(ODD_ARGUMENTS), itertools.product(ODD_ARGUMENTS, repeat=2)
    ):
        things = make_all()
        thing = things[position]
        with suppress(REFUSALS):
            member = getattr(thing, name)
            if callable(member):
                member(*arguments)
            elif len(arguments) == 1:
                setattr(thing, name, arguments[0])
        for use in (core.copy_rows, core.unnest_arrays, things[4].fill_steps):
            with suppress(REFUSALS):
                use(things[:1])
        things[1].drop(things[0])


@pytest.mark.parametrize(
    "make",
    [
        *(core.Step, core.Gate, core.Place, core.Slots, core.FrameReader),
        *(core.copy_rows, core.unnest_arrays, core.row_bytes, core.hash_input),
    ],
)
def test_odd_arguments_make_nothing(make):
    for count in range(3):
        for arguments in itertools.product(ODD_ARGUMENTS, repeat=count):
            with suppress(REFUSALS):
                make(*arguments)


@pytest.mark.parametrize("name", ["Step", "Gate", "Place", "Slots"])
def test_class_makes_no_empty_object(name):
    kind = getattr(core, name)
    with pytest.raises(TypeError):
        kind.__new__(kind)
