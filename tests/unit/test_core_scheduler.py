"""The scheduler of `_core` against its twin, by random sequences, and its promises one by one."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kagzi import _core as core
from tests import reference

LANES = tuple(range(core.LANES))
DONE = 2


def make_step(module=core, **fields):
    return module.Step(
        None, b"r" * 16, fields.pop("id", "fetch"), None, "app:fetch", b"[]", b"h" * 16, **fields
    )


def make_steps(count, **fields):
    return [make_step(id=f"pages/{index}", index=index, **fields) for index in range(count)]


@dataclass(eq=False)
class Pair:
    """A thing of the core and its twin."""

    core: object
    twin: object


class SchedulerAgainstItsTwin(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.scheduler = Pair(core.Scheduler(), reference.Scheduler())
        self.group_gates = []
        self.function_gates = []
        self.places = []
        self.steps = []

    def pair(self, name, *arguments, **fields):
        twin_fields = {}
        for key, value in fields.items():
            is_pair = isinstance(value, Pair)
            fields[key] = value.core if is_pair else value
            twin_fields[key] = value.twin if is_pair else value
        if name == "Step":
            return Pair(make_step(core, **fields), make_step(reference, **twin_fields))
        return Pair(getattr(core, name)(*arguments), getattr(reference, name)(*arguments))

    def both(self, method, *arguments):
        """Call it on both schedulers; the answers, steps told by their place in `self.steps`."""
        answers = []
        for side in ("core", "twin"):
            own = [getattr(item, side) if isinstance(item, Pair) else item for item in arguments]
            answer = getattr(getattr(self.scheduler, side), method)(*own)
            if isinstance(answer, list):
                known = {id(getattr(pair, side)): n for n, pair in enumerate(self.steps)}
                answer = [known[id(step)] for step in answer]
            answers.append(answer)
        assert answers[0] == answers[1]
        return answers[0]

    @initialize(rooms=st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=2))
    def make_places(self, rooms):
        for room in rooms:
            self.places.append(self.pair("Place", room))

    @rule(limit=st.integers(1, 3), is_function=st.booleans())
    def make_gate(self, limit, is_function):
        gates = self.function_gates if is_function else self.group_gates
        if len(gates) < 3:
            gates.append(self.pair("Gate", limit))

    def draw_step(self, data):
        return self.pair(
            "Step",
            lane=data.draw(st.integers(0, 2)),
            priority=data.draw(st.integers(-1, 1)),
            gate=data.draw(st.sampled_from([None, *self.group_gates])),
            function_gate=data.draw(st.sampled_from([None, *self.function_gates])),
        )

    @rule(data=st.data())
    def add_step(self, data):
        self.steps.append(self.draw_step(data))
        self.both("add", self.steps[-1])

    @rule(data=st.data(), count=st.integers(0, 6))
    def add_steps(self, data, count):
        pairs = [self.draw_step(data) for _ in range(count)]
        self.steps += pairs
        self.scheduler.core.add_all(pair.core for pair in pairs)
        self.scheduler.twin.add_all(pair.twin for pair in pairs)

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), priority=st.integers(-1, 1))
    def add_step_again(self, data, priority):
        step = data.draw(st.sampled_from(self.steps))
        if step.twin.state == core.ENDED:
            step.core.priority = step.twin.priority = priority
            self.both("add", step)
        else:
            with pytest.raises(ValueError, match="in a scheduler already"):
                self.scheduler.core.add(step.core)
            with pytest.raises(ValueError, match="its place in line is fixed"):
                step.core.priority = priority

    @rule(data=st.data(), most=st.integers(-1, 5))
    def take(self, data, most):
        place = data.draw(st.sampled_from(self.places))
        for index in self.both("take", place, most):
            self.both("resumed", self.steps[index])

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), move=st.sampled_from(["finish", "suspend", "resume", "drop"]))
    def move_any_step(self, data, move):
        self.both(move, data.draw(st.sampled_from(self.steps)))

    def in_state(self, *states):
        return [pair for pair in self.steps if pair.twin.state in states]

    @precondition(lambda self: self.in_state(core.BEGUN))
    @rule(data=st.data(), move=st.sampled_from(["finish", "suspend"]))
    def move_begun_step(self, data, move):
        self.both(move, data.draw(st.sampled_from(self.in_state(core.BEGUN))))

    @precondition(lambda self: self.in_state(core.SUSPENDED))
    @rule(data=st.data())
    def resume_suspended_step(self, data):
        self.both("resume", data.draw(st.sampled_from(self.in_state(core.SUSPENDED))))

    @precondition(lambda self: self.in_state(core.WAITING))
    @rule(data=st.data())
    def drop_waiting_step(self, data):
        self.both("drop", data.draw(st.sampled_from(self.in_state(core.WAITING))))

    @rule(data=st.data(), process_id=st.integers(0, 3))
    def absorb_answers(self, data, process_id):
        numbers = st.integers(0, self.scheduler.twin.last_number + 1)
        begun = [pair.twin.number for pair in self.in_state(core.BEGUN, core.SUSPENDED)]
        if begun:
            numbers |= st.sampled_from(begun)
        time = st.integers(0, 2**40)
        message = st.tuples(
            st.integers(DONE - 1, DONE), numbers, time, time, st.just(b""), st.binary(max_size=3)
        )
        messages = data.draw(st.lists(message, max_size=4))
        steps, others = self.scheduler.core.absorb(messages, DONE, process_id)
        twins, twin_others = self.scheduler.twin.absorb(messages, DONE, process_id)
        assert others == twin_others
        pairs = {id(pair.core): pair for pair in self.steps}
        assert [pairs[id(step)].twin for step in steps] == twins
        for step, twin in zip(steps, twins, strict=True):
            for name in ("status", "output", "started_us", "completed_us", "process_id"):
                assert getattr(step, name) == getattr(twin, name)

    @rule(data=st.data(), lane=st.integers(0, 2), room=st.integers(0, 3))
    def set_room(self, data, lane, room):
        place = data.draw(st.sampled_from(self.places))
        place.core.set_room(lane, room)
        place.twin.set_room(lane, room)

    @rule(data=st.data(), is_open=st.booleans())
    def open_or_close_place(self, data, is_open):
        place = data.draw(st.sampled_from(self.places))
        place.core.open = place.twin.open = is_open

    @invariant()
    def counts_are_equal(self):
        scheduler, twin = self.scheduler.core, self.scheduler.twin
        assert scheduler.waiting() == twin.waiting()
        assert scheduler.begun == twin.begun
        for lane in LANES:
            assert scheduler.ready(lane) == twin.ready(lane)
        for pair in self.group_gates + self.function_gates:
            assert pair.core.held == pair.twin.held <= pair.core.limit
        for pair in self.places:
            for lane in LANES:
                assert pair.core.held(lane) == pair.twin.held(lane)

    @invariant()
    def steps_are_equal(self):
        twins = {id(pair.twin): pair for pair in self.places}
        for pair in self.steps:
            step, twin = pair.core, pair.twin
            assert (step.state, step.number) == (twin.state, twin.number)
            assert step.place is (twin.place and twins[id(twin.place)].core)
            is_begun = twin.state in (core.BEGUN, core.SUSPENDED, core.RESUMING)
            assert self.scheduler.core.find(step.number) is (step if is_begun else None)

    def teardown(self):
        """Everything ends, and nothing is held afterwards."""
        for pair in self.steps:
            self.both("drop", pair)
            self.both("finish", pair)
        self.counts_are_equal()
        assert not any(pair.core.held for pair in self.group_gates + self.function_gates)
        assert self.scheduler.core.waiting() == self.scheduler.core.begun == 0


TestSchedulerAgainstItsTwin = SchedulerAgainstItsTwin.TestCase
TestSchedulerAgainstItsTwin.settings = settings(max_examples=60, stateful_step_count=60)


GATES = st.none() | st.integers(1, 3)


@settings(max_examples=150)
@given(
    limits=st.tuples(GATES, GATES, GATES),
    count=st.integers(5, 25),
    seed=st.integers(0),
)
def test_crowd_of_steps_begins_and_resumes_in_the_order_of_the_twin(limits, count, seed):
    """Fewer gates than with the machine above, and more steps that wait for the same thing."""
    moves, sides = random.Random(seed), []
    choices = [
        (moves.randrange(2), moves.randrange(-1, 2), moves.randrange(3)) for _ in range(count)
    ]
    rooms = [moves.randrange(1, 6) for _ in range(3)]
    for module in (core, reference):
        group, *functions = [limit and module.Gate(limit) for limit in limits]
        functions.append(None)
        scheduler, place = module.Scheduler(), module.Place(rooms)
        steps = [
            make_step(
                module, lane=lane, priority=priority, gate=group, function_gate=functions[function]
            )
            for lane, priority, function in choices
        ]
        scheduler.add_all(steps)
        sides.append((scheduler, place, {step.number: step for step in steps}))
    states = {core.BEGUN: "finish suspend suspend", core.WAITING: "drop"}
    states |= {core.SUSPENDED: "resume resume finish", core.RESUMING: "finish"}
    while sides[1][0].steps:
        most = moves.randrange(4)
        taken = [
            [(step.number, scheduler.resumed(step)) for step in scheduler.take(place, most)]
            for scheduler, place, _ in sides
        ]
        assert taken[0] == taken[1]
        for _ in range(moves.randrange(8)):
            twin = moves.choice(sides[1][0].steps or [None])
            if twin is None or (twin.state == core.WAITING and moves.random() < 0.9):
                continue
            move = moves.choice(states[twin.state].split())
            for scheduler, _, steps in sides:
                getattr(scheduler, move)(steps[twin.number])
        ready = [[scheduler.ready(lane) for lane in LANES] for scheduler, _, _ in sides]
        assert ready[0] == ready[1]


# --- Progress, whatever the nesting and however tight the limits ---------------------------------


@dataclass(eq=False)
class Body:
    """What a step does once it runs: inner groups one after the other, then it ends."""

    lane: int
    function: int | None
    groups: list["Group"]
    step: core.Step = None
    inner: int = 0  # steps of the current group that have not ended


@dataclass(eq=False)
class Group:
    limit: int | None
    bodies: list[Body]


def make_groups(bodies):
    return st.builds(Group, st.none() | st.integers(1, 2), st.lists(bodies, min_size=1, max_size=3))


LEAVES = st.builds(
    Body, st.integers(0, 2), st.none() | st.integers(0, 1), st.just(()).map(lambda _: [])
)
BODIES = st.recursive(
    LEAVES,
    lambda bodies: st.builds(
        Body,
        st.integers(0, 2),
        st.none() | st.integers(0, 1),
        st.lists(make_groups(bodies), max_size=2),
    ),
    max_leaves=25,
)


@dataclass
class Simulation:
    """Places that run bodies in a random order, one move at a time."""

    places: list[core.Place]
    functions: list[core.Gate]
    random: random.Random
    scheduler: core.Scheduler = field(default_factory=core.Scheduler)
    running: list[Body] = field(default_factory=list)
    ended: int = 0

    def open_group(self, group, outer):
        gate = group.limit and core.Gate(group.limit)
        if outer is not None:
            outer.inner = len(group.bodies)
        for body in group.bodies:
            gates = {"gate": gate, "function_gate": None}
            if body.function is not None:
                gates["function_gate"] = self.functions[body.function]
            body.step = make_step(lane=body.lane, **gates)
            body.step.extra = body, outer
            self.scheduler.add(body.step)

    def move(self, body):
        if body.groups:
            self.scheduler.suspend(body.step)
            self.open_group(body.groups.pop(0), body)
            return
        self.scheduler.finish(body.step)
        self.ended += 1
        _, outer = body.step.extra
        if outer is not None:
            outer.inner -= 1
            if not outer.inner:
                self.scheduler.resume(outer.step)

    def run(self, group):
        self.open_group(group, None)
        while True:
            self.random.shuffle(self.places)
            for place in self.places:
                self.running += [step.extra[0] for step in self.scheduler.take(place, 3)]
            if not self.running:
                return
            self.move(self.running.pop(self.random.randrange(len(self.running))))


def count_bodies(group):
    return sum(1 + sum(map(count_bodies, body.groups)) for body in group.bodies)


def simulate(group, randomness, places=1):
    total = count_bodies(group)
    simulation = Simulation(
        [core.Place([1] * core.LANES) for _ in range(places)],
        [core.Gate(1), core.Gate(2)],
        randomness,
    )
    simulation.run(group)
    scheduler = simulation.scheduler
    assert simulation.ended == total
    assert scheduler.waiting() == scheduler.begun == 0
    assert not any(gate.held for gate in simulation.functions)


@settings(max_examples=150)
@given(
    group=make_groups(BODIES),
    randomness=st.randoms(use_true_random=False),
    places=st.integers(1, 2),
)
def test_nested_groups_always_come_to_an_end(group, randomness, places):
    simulate(group, randomness, places)


def nest(depth, lane, function, limit):
    group = Group(limit, [Body(lane, function, []) for _ in range(2)])
    for _ in range(depth):
        group = Group(limit, [Body(lane, function, [group]), Body(lane, function, [])])
    return group


@pytest.mark.parametrize("lane", LANES)
def test_nest_deeper_than_the_room_comes_to_an_end(lane):
    simulate(nest(30, lane, None, None), random.Random(1))


def test_limit_of_one_inside_a_limit_of_one_comes_to_an_end():
    simulate(nest(10, core.LANE_ASYNC, None, 1), random.Random(2))


@pytest.mark.parametrize("places", [1, 3])
def test_recursive_function_with_a_limit_of_one_comes_to_an_end(places):
    simulate(nest(20, core.LANE_THREAD, 0, 1), random.Random(3), places)


# --- Promises, one by one ------------------------------------------------------------------------


def test_steps_begin_by_priority_then_by_arrival():
    scheduler, place = core.Scheduler(), core.Place([10, 0, 0])
    low, first, second, high = (make_step(priority=priority) for priority in (-1, 0, 0, 5))
    scheduler.add_all([low, first, second, high])
    assert scheduler.take(place, 10) == [high, first, second, low]


@pytest.mark.parametrize("limit", [None, 1])
@given(priorities=st.lists(st.integers(-50, 50), min_size=30, max_size=150), data=st.data())
@settings(max_examples=60)
def test_order_holds_when_steps_are_dropped_from_the_middle(limit, priorities, data):
    scheduler, place, gate = core.Scheduler(), core.Place([1, 0, 0]), limit and core.Gate(limit)
    running = make_step(gate=gate, priority=100)
    steps = [make_step(gate=gate, priority=priority) for priority in priorities]
    scheduler.add_all([running, *steps])
    assert scheduler.take(place, 1) == [running]
    for index in data.draw(st.lists(st.integers(0, len(steps) - 1), unique=True)):
        assert scheduler.drop(steps[index])
    waiting = [step for step in steps if step.state == core.WAITING]
    assert scheduler.waiting() == len(waiting)
    scheduler.finish(running)
    for step in sorted(waiting, key=lambda step: (-step.priority, step.number)):
        assert scheduler.take(place, 1) == [step]
        scheduler.finish(step)
    assert scheduler.take(place, 1) == []


def test_take_serves_the_cpu_lane_then_threads_then_the_loop():
    scheduler, place = core.Scheduler(), core.Place([1, 1, 1])
    steps = [make_step(lane=lane) for lane in (core.LANE_ASYNC, core.LANE_THREAD, core.LANE_CPU)]
    scheduler.add_all(steps)
    assert scheduler.take(place, 2) == [steps[2], steps[1]]
    assert scheduler.take(place, 2) == [steps[0]]


def test_group_limit_is_kept_while_a_step_is_suspended():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    outer, second = make_steps(2, gate=gate)
    scheduler.add_all([outer, second])
    assert scheduler.take(place, 9) == [outer]
    scheduler.suspend(outer)
    assert (gate.held, place.held(core.LANE_ASYNC)) == (1, 0)
    assert scheduler.take(place, 9) == []
    scheduler.finish(outer)
    assert scheduler.take(place, 9) == [second]


def test_function_limit_is_given_up_while_a_step_is_suspended():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    outer, second = make_steps(2, function_gate=gate)
    scheduler.add_all([outer, second])
    assert scheduler.take(place, 9) == [outer]
    assert scheduler.ready(core.LANE_ASYNC) == 0
    scheduler.suspend(outer)
    assert scheduler.ready(core.LANE_ASYNC) == 1
    assert scheduler.take(place, 9) == [second]


def test_resumed_step_takes_the_function_permit_before_new_steps_of_any_place():
    scheduler, gate = core.Scheduler(), core.Gate(1)
    home, other = core.Place([1, 0, 0], "home"), core.Place([1, 0, 0], "other")
    outer, second, third = make_steps(3, function_gate=gate, priority=7)
    outer.priority = 0
    scheduler.add(outer)
    assert scheduler.take(home, 1) == [outer]
    scheduler.suspend(outer)
    scheduler.add_all([second, third])
    assert scheduler.take(other, 1) == [second]
    scheduler.resume(outer)
    scheduler.finish(second)
    assert scheduler.take(other, 1) == []
    assert scheduler.take(home, 0) == [outer]
    assert scheduler.resumed(outer)
    assert not scheduler.resumed(second)


def test_step_with_a_full_function_gate_does_not_hold_up_others_and_keeps_its_turn():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    running, waiting = make_steps(2, function_gate=gate)
    free, late = make_steps(2)
    scheduler.add_all([running, waiting, free])
    assert scheduler.take(place, 9) == [running, free]
    scheduler.add(late)
    scheduler.finish(running)
    assert scheduler.take(place, 9) == [waiting, late]


def test_resuming_step_that_is_finished_frees_the_permit_kept_for_it():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    outer, second = make_steps(2, function_gate=gate)
    scheduler.add_all([outer, second])
    assert scheduler.take(place, 9) == [outer]
    scheduler.suspend(outer)
    scheduler.resume(outer)
    assert scheduler.ready(core.LANE_ASYNC) == 0
    scheduler.finish(outer)
    assert scheduler.ready(core.LANE_ASYNC) == 1
    assert scheduler.take(place, 9) == [second]


def test_dropped_step_makes_room_for_the_next_of_its_function():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    first, second, third = make_steps(3, function_gate=gate)
    scheduler.add_all([first, second, third])
    assert scheduler.take(place, 9) == [first]
    scheduler.finish(first)
    assert scheduler.drop(second)
    assert scheduler.take(place, 9) == [third]


def test_steps_resume_in_the_order_of_resume_whatever_their_lane_and_function():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 9, 9]), core.Gate(9)
    steps = [
        make_step(lane=lane, function_gate=function_gate, priority=lane)
        for lane in LANES
        for function_gate in (None, gate)
    ]
    scheduler.add_all(steps)
    assert len(scheduler.take(place, 9)) == 6
    for step in steps:
        scheduler.suspend(step)
    order = [steps[index] for index in (3, 0, 5, 2, 4, 1)]
    for step in order:
        scheduler.resume(step)
    assert scheduler.take(place, 0) == order


def test_steps_of_a_full_function_wait_in_the_order_of_arrival():
    scheduler, place, gate = core.Scheduler(), core.Place([9, 0, 0]), core.Gate(1)
    steps = make_steps(6, function_gate=gate)
    scheduler.add_all(steps)
    for step in steps:
        assert scheduler.take(place, 9) == [step]
        scheduler.finish(step)


def test_closed_place_takes_resumed_steps_and_no_new_ones():
    scheduler, place = core.Scheduler(), core.Place([9, 0, 0])
    outer, second = make_steps(2)
    scheduler.add(outer)
    scheduler.take(place, 1)
    scheduler.suspend(outer)
    scheduler.resume(outer)
    scheduler.add(second)
    place.open = False
    assert scheduler.take(place, 9) == [outer]
    place.open = True
    assert scheduler.take(place, 9) == [second]


def test_step_that_ended_is_added_again_under_a_new_number():
    scheduler, place = core.Scheduler(), core.Place([9, 0, 0])
    step = make_step()
    scheduler.add(step)
    scheduler.take(place, 1)
    number = step.number
    scheduler.finish(step)
    scheduler.add(step)
    assert (step.state, step.place) == (core.WAITING, None)
    assert step.number > number
    assert scheduler.find(number) is scheduler.find(step.number) is None


def test_late_answer_is_dropped_and_other_kinds_are_handed_back():
    scheduler, place = core.Scheduler(), core.Place([9, 0, 0])
    first, second = make_steps(2)
    scheduler.add_all([first, second])
    scheduler.take(place, 9)
    late = (DONE, first.number, 1000, 5, b"", b"1")
    call = (9, second.number, 0, 0, b"head", b"")
    assert scheduler.absorb([late, call, late], DONE, 3) == ([first], [call])
    assert (first.status, first.output, first.process_id) == ("completed", b"1", 3)
    assert (first.started_us, first.completed_us) == (1000, 1005)
    assert scheduler.absorb([late], DONE, 3) == ([], [])


@pytest.mark.parametrize(
    "message", [(), (1, 2, 3), [DONE, 1, 0, 0, b"", b""], None, (DONE, 1, 0, 0, b"", "text")]
)
def test_absorb_refuses_what_is_no_message(message):
    scheduler, place = core.Scheduler(), core.Place([9, 0, 0])
    step = make_step()
    scheduler.add(step)
    scheduler.take(place, 9)
    with pytest.raises(TypeError):
        scheduler.absorb([message], DONE, 0)
    assert step.state == core.BEGUN


def test_things_in_use_by_one_scheduler_are_refused_by_another():
    scheduler, other = core.Scheduler(), core.Scheduler()
    place, gate = core.Place([9, 0, 0]), core.Gate(1)
    step = make_step(gate=gate)
    scheduler.add(step)
    with pytest.raises(ValueError, match="in use by another scheduler"):
        other.add(make_step(gate=gate))
    scheduler.take(place, 9)
    with pytest.raises(ValueError, match="in use by another scheduler"):
        other.take(place, 9)
    for method in (other.finish, other.suspend, other.resume, other.drop):
        with pytest.raises(ValueError, match="in another scheduler"):
            method(step)
    scheduler.finish(step)
    other.add(step)
    assert other.take(place, 9) == [step]


def test_one_gate_cannot_limit_a_group_and_a_function():
    scheduler, gate = core.Scheduler(), core.Gate(1)
    with pytest.raises(ValueError, match="a group and a function"):
        scheduler.add(make_step(gate=gate, function_gate=gate))
    scheduler.add(make_step(gate=gate))
    refused = make_step(function_gate=gate)
    with pytest.raises(ValueError, match="a group and a function"):
        scheduler.add(refused)
    assert (refused.state, scheduler.waiting()) == (core.NEW, 1)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (core.Gate, [0]),
        (core.Gate, [-1]),
        (core.Place, [[1] * (core.LANES + 1)]),
        (core.Place, [[1, -1, 1]]),
        (core.Place([1, 1, 1]).set_room, [0, -1]),
        (core.Place([1, 1, 1]).set_room, [core.LANES, 1]),
        (core.Place([1, 1, 1]).room, [-1]),
        (core.Place([1, 1, 1]).held, [core.LANES]),
        (core.Scheduler().ready, [core.LANES]),
    ],
)
def test_number_out_of_range_is_refused(make, arguments):
    with pytest.raises(ValueError, match=r"\d"):
        make(*arguments)


def test_step_refuses_a_lane_that_does_not_exist():
    with pytest.raises(ValueError, match=f"lane {core.LANES}"):
        make_step(lane=core.LANES)
    step = make_step()
    with pytest.raises(ValueError, match="lane -1"):
        step.lane = -1


@pytest.mark.parametrize("name", ["place", "number", "state"])
def test_step_lets_only_the_scheduler_write_its_state(name):
    with pytest.raises(AttributeError):
        setattr(make_step(), name, None)
