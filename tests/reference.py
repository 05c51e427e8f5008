"""Slow, obvious twins of all that `kagzi._core` exports; `_core.pyi` says what they promise.

Nothing is kept up to date here: what can be counted or sorted is counted and sorted when asked.
"""

import struct
from hashlib import blake2b
from pathlib import Path

from xxhash import xxh3_128

SOURCE = Path(__file__).parents[1] / "kagzi" / "_core.pyx"
SOURCE_HASH = blake2b(SOURCE.read_bytes(), digest_size=16).hexdigest()

LANE_ASYNC, LANE_THREAD, LANE_CPU = range(3)
LANE_OWN_ASYNC, LANE_OWN_THREAD, LANE_OWN_CPU, LANE_ALONE = range(3, 7)
LANES = 7
NEW, WAITING, BEGUN, SUSPENDED, RESUMING, ENDED = range(6)

INPUT_STORED_BYTES = 8192
MOST_BYTES = 2**31 - 1
FIXED = struct.Struct("<BQqqI")


def check(condition, message):
    if not condition:
        raise ValueError(message)


class Gate:
    def __init__(self, limit):
        check(limit >= 1, "limit")
        self.limit = limit
        self.users = []  # steps that have not ended and name this gate
        self.holders = []

    @property
    def held(self):
        return len(self.holders)

    @property
    def spare(self):
        """Permits that a new step may take: each resuming step has one spoken for."""
        return self.limit - self.held - sum(step.state == RESUMING for step in self.users)

    def role_for(self, step):
        return "group" if step.gate is self else "function"


class Place:
    def __init__(self, room, name=None):
        check(0 < len(room) <= LANES and min(room) >= 0, "room")
        self._room = [*room, *[0] * (LANES - len(room))]
        self.name = name
        self.open = True
        self.steps = []  # begun here, not ended

    def held(self, lane):
        check(lane in range(LANES), "lane")
        return sum(step.lane == lane and step.state == BEGUN for step in self.steps)

    def room(self, lane):
        check(lane in range(LANES), "lane")
        return self._room[lane]

    def set_room(self, lane, room):
        check(lane in range(LANES) and room >= 0, "room")
        self._room[lane] = room

    def has_room(self, lane):
        return self.held(lane) < self.room(lane)


class Step:
    def __init__(
        self,
        run,
        run_id,
        id,  # noqa: A002
        definition,
        function,
        input,  # noqa: A002
        input_hash,
        lane=0,
        priority=0,
        gate=None,
        function_gate=None,
        group=None,
        index=-1,
    ):
        check(lane in range(LANES), "lane")
        self.run = run
        self.run_id = run_id
        self.id = id
        self.definition = definition
        self.function = function
        self.input = input
        self.input_hash = input_hash
        self.group = group
        self.index = index
        self.group_id = None
        self.parent_id = None
        self.call_number = 0
        self.lane = lane
        self.priority = priority
        self.gate = gate
        self.function_gate = function_gate
        self.place = None
        self.number = 0
        self.state = NEW
        self.attempt = 1
        self.timeout_us = 0
        self.status = ""
        self.output = None
        self.error = None
        self.started_us = 0
        self.completed_us = 0
        self.completed_number = 0
        self.process_id = 0
        self.worker_id = None
        self.extra = None
        # for the twins only
        self.scheduler = None
        self.was_resumed = False
        self.resume_number = 0

    @property
    def gates(self):
        return [gate for gate in (self.gate, self.function_gate) if gate is not None]

    @property
    def has_gate(self):
        return self.gate is None or self in self.gate.holders

    @property
    def may_begin(self):
        return self.function_gate is None or self.function_gate.spare > 0

    @property
    def turn(self):
        return -self.priority, self.number


class Scheduler:
    def __init__(self):
        self.steps = []  # not ended
        self.last_number = 0
        self.last_resume = 0

    def add(self, step):
        check(step.state in (NEW, ENDED), "in a scheduler")
        check(step.gate is None or step.gate is not step.function_gate, "both")
        for gate in step.gates:
            for user in gate.users:
                check(user.scheduler is self, "another scheduler's gate")
                check(gate.role_for(user) == gate.role_for(step), "both")
        self.last_number += 1
        step.number = self.last_number
        step.state = WAITING
        step.scheduler = self
        step.place = None
        step.was_resumed = False
        self.steps.append(step)
        for gate in step.gates:
            gate.users.append(step)
        self._pass_gates()

    def add_all(self, steps):
        for step in steps:
            self.add(step)

    def _pass_gates(self):
        for step in sorted(self._in(WAITING), key=lambda step: step.turn):
            if not step.has_gate and step.gate.held < step.gate.limit:
                step.gate.holders.append(step)

    def _in(self, *states):
        return [step for step in self.steps if step.state in states]

    def _ready(self, lane):
        ready = [step for step in self._in(WAITING) if step.lane == lane and step.has_gate]
        return sorted((step for step in ready if step.may_begin), key=lambda step: step.turn)

    def take(self, place, most):
        check(all(step.scheduler is self for step in place.steps), "another scheduler's place")
        taken = []
        resuming = [step for step in place.steps if step.state == RESUMING]
        for step in sorted(resuming, key=lambda step: step.resume_number):
            gate = step.function_gate
            if place.has_room(step.lane) and (gate is None or gate.held < gate.limit):
                self._begin(step, place)
                step.was_resumed = True
                taken.append(step)
        for lane in reversed(range(LANES)):
            while place.open and most > 0 and place.has_room(lane) and self._ready(lane):
                step = self._ready(lane)[0]
                self._begin(step, place)
                place.steps.append(step)
                step.was_resumed = False
                taken.append(step)
                most -= 1
        return taken

    def _begin(self, step, place):
        step.state = BEGUN
        step.place = place
        if step.function_gate is not None:
            step.function_gate.holders.append(step)

    def _end(self, step):
        for gate in step.gates:
            gate.users.remove(step)
            if step in gate.holders:
                gate.holders.remove(step)
        if step.place is not None:
            step.place.steps.remove(step)
        self.steps.remove(step)
        step.state = ENDED
        step.scheduler = None
        self._pass_gates()

    def _owns(self, step):
        check(step.scheduler in (None, self), "another scheduler's step")
        return step.scheduler is self

    def resumed(self, step):
        return step.was_resumed

    def finish(self, step):
        if self._owns(step) and step.state != WAITING:
            self._end(step)

    def suspend(self, step):
        if self._owns(step) and step.state == BEGUN:
            step.state = SUSPENDED
            if step.function_gate is not None:
                step.function_gate.holders.remove(step)

    def resume(self, step):
        if self._owns(step) and step.state == SUSPENDED:
            self.last_resume += 1
            step.resume_number = self.last_resume
            step.state = RESUMING

    def drop(self, step):
        if not self._owns(step) or step.state != WAITING:
            return False
        self._end(step)
        return True

    def ready(self, lane):
        check(lane in range(LANES), "lane")
        return len(self._ready(lane))

    def find(self, number):
        for step in self._in(BEGUN, SUSPENDED, RESUMING):
            if step.number == number:
                return step
        return None

    @property
    def begun(self):
        return len(self._in(BEGUN, SUSPENDED, RESUMING))

    def waiting(self):
        return len(self._in(WAITING))

    def absorb(self, messages, done, process_id):
        steps, others = [], []
        for message in messages:
            kind, number, first, second, _, body = message
            step = self.find(number)
            if kind != done:
                others.append(message)
            elif step is not None:
                step.status = "completed"
                step.output = body
                step.started_us = first
                step.completed_us = first + second
                step.process_id = process_id
                self.finish(step)
                steps.append(step)
        return steps, others


class Slots:
    def __init__(self, size):
        check(size >= 0, "size")
        self.values = [None] * size
        self._filled = set()
        self._failures = {}
        self._times_us = []

    def __len__(self):
        return len(self.values)

    def settled(self, index):
        check(index in range(len(self)), "index")
        return index in self._filled or index in self._failures

    def fill(self, index, value):
        if self.settled(index):
            return False
        self._filled.add(index)
        self.values[index] = value
        return True

    def fail(self, index, failure):
        if self.settled(index):
            return False
        self._failures[index] = failure
        return True

    def fill_steps(self, steps):
        new = [step for step in steps if self.fill(step.index, step.output)]
        for step in new:
            self.add_time(step.started_us, step.completed_us)
        return len(new)

    def add_time(self, started_us, completed_us):
        self._times_us.append(completed_us - started_us if 0 < started_us < completed_us else 0)

    @property
    def remaining(self):
        return len(self) - self.succeeded - self.failed

    @property
    def succeeded(self):
        return len(self._filled)

    @property
    def failed(self):
        return len(self._failures)

    @property
    def busy_us(self):
        return sum(self._times_us)

    @property
    def longest_us(self):
        return max(self._times_us, default=0)

    @property
    def failures(self):
        return dict(sorted(self._failures.items()))


STORED = (
    *("status", "function", "input_hash", "output", "error", "attempts", "call_number"),
    *("completed_number", "visible_number", "in_group", "output_bytes"),
)


class StoredStep:
    def __init__(self, *values):
        fields = dict(zip(STORED, values, strict=False))
        self.__dict__ = {"visible_number": None, "in_group": False, **fields}
        if fields.get("output_bytes") is None:
            self.output_bytes = len(self.output or b"")
        self.is_elsewhere = self.output is None and self.output_bytes > 0

    def seen(self, number):
        return StoredStep(*[number if n == "visible_number" else getattr(self, n) for n in STORED])


def take_stored(rows, runs, numbers):
    for place, step_id, *values in rows:
        stored = runs[place][step_id] = StoredStep(*values)
        seen = stored.visible_number or 0
        numbers[place] = max(numbers[place], stored.call_number, stored.completed_number, seen)
    return sum(StoredStep(*values).is_elsewhere for _, _, *values in rows)


class FrameWriter:
    def __init__(self):
        self._packed = b""

    def __len__(self):
        return len(self._packed)

    def add(self, kind, number, first=0, second=0, head=b"", body=b""):
        check(0 <= kind <= 255, "kind")
        message = FIXED.pack(kind, number, first, second, len(head)) + head + body
        check(len(message) <= MOST_BYTES, "length")
        self._packed += struct.pack("<I", len(message)) + message

    def add_head(self, kind, number, first, second, head, body_size):
        check(body_size >= 0, "body")
        before = len(self._packed)
        self.add(kind, number, first, second, head, bytes(body_size))
        end = len(self._packed) - body_size
        assert end > before
        self._packed = self._packed[:end]

    def add_step(self, kind, step, function_number):
        check(len(step.run_id) == 16, "run id")
        check(0 <= step.attempt < 2**16, "attempt")
        check(0 <= step.timeout_us < 2**47, "timeout")
        second = step.attempt | step.timeout_us << 16
        head = step.run_id + step.id.encode()
        self.add(kind, step.number, function_number, second, head, step.input)

    def take(self):
        packed, self._packed = self._packed, b""
        return packed


class FrameReader:
    def __init__(self, most_bytes=MOST_BYTES):
        check(FIXED.size <= most_bytes < 2**32, "most_bytes")
        self._most_bytes = most_bytes
        self._pending = b""

    @property
    def pending_bytes(self):
        return len(self._pending)

    def feed(self, data):
        self._pending += data
        messages = []
        while len(self._pending) >= 4:
            (length,) = struct.unpack_from("<I", self._pending)
            check(FIXED.size <= length <= self._most_bytes, "length")
            message = self._pending[4 : 4 + length]
            if len(message) < length:
                break
            *numbers, head_size = FIXED.unpack_from(message)
            rest = message[FIXED.size :]
            check(head_size <= len(rest), "head")
            messages.append((*numbers, rest[:head_size], rest[head_size:]))
            self._pending = self._pending[4 + length :]
        return messages


EPOCH_US = 946_684_800_000_000  # 2000-01-01, where the times of Postgres begin
EARLIEST_US = -210_866_803_200_000_000  # Julian day 0


def uuid_field(value):
    check(value is not None and len(value) == 16, "16 bytes")
    return value


def text_field(value):
    check(value is not None and "\0" not in value, "text")
    return value.encode()


def bytea_field(value):
    check(value is not None, "bytes")
    return value


def int4_field(value):
    return struct.pack(">i", value)


def time_field(unix_us):
    check(unix_us >= EARLIEST_US, "time")
    return struct.pack(">q", unix_us - EPOCH_US)


def or_null(field):
    return lambda value: None if value is None else field(value)


def status_field(value):
    check(value in ("completed", "failed"), "status")
    return text_field(value)


def input_field(value):
    return None if value is None or len(value) > INPUT_STORED_BYTES else value


# column, OID of its array, OID of its type, how its value is written, its value
COLUMNS = (
    ("run_id", 2951, 2950, uuid_field, lambda step: step.run_id),
    ("step_id", 1009, 25, text_field, lambda step: step.id),
    ("function", 1009, 25, text_field, lambda step: step.function),
    ("status", 1009, 25, status_field, lambda step: step.status),
    ("output", 1001, 17, or_null(bytea_field), lambda step: step.output),
    ("error", 1001, 17, or_null(bytea_field), lambda step: step.error),
    ("input", 1001, 17, input_field, lambda step: step.input),
    ("input_hash", 1001, 17, bytea_field, lambda step: step.input_hash),
    ("attempts", 1007, 23, int4_field, lambda step: step.attempt),
    ("parallel_group_id", 2951, 2950, or_null(uuid_field), lambda step: step.group_id),
    ("parent_step_id", 1009, 25, or_null(text_field), lambda step: step.parent_id),
    ("started_at", 1185, 1184, time_field, lambda step: step.started_us or step.completed_us),
    ("completed_at", 1185, 1184, time_field, lambda step: step.completed_us),
    ("call_number", 1007, 23, int4_field, lambda step: step.call_number),
    ("completed_number", 1007, 23, int4_field, lambda step: step.completed_number),
    ("worker_id", 2951, 2950, uuid_field, lambda step: step.worker_id),
    ("process_id", 1007, 23, int4_field, lambda step: step.process_id),
)
STEP_COLUMNS = tuple(column[0] for column in COLUMNS)
STEP_COLUMN_OIDS = tuple(column[1] for column in COLUMNS)
STEP_FIELD_OIDS = tuple(column[2] for column in COLUMNS)


def with_length(field):
    return struct.pack(">i", -1) if field is None else struct.pack(">i", len(field)) + field


def row(step):
    fields = [with_length(write(value(step))) for _, _, _, write, value in COLUMNS]
    return struct.pack(">h", len(fields)) + b"".join(fields)


def row_bytes(step):
    return len(row(step))


def copy_rows(steps):
    header = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
    return header + b"".join(row(step) for step in steps) + struct.pack(">h", -1)


def unnest_arrays(steps):
    arrays = []
    for _, _, oid, write, value in COLUMNS:
        fields = [write(value(step)) for step in steps]
        array = struct.pack(">iii", 1 if fields else 0, None in fields, oid)
        if fields:
            array += struct.pack(">ii", len(fields), 1)
        arrays.append(array + b"".join(with_length(field) for field in fields))
    return arrays


def step_fields(step):
    return [write(value(step)) for _, _, _, write, value in COLUMNS]


def hash_input(function, input):  # noqa: A002
    name = function.encode()
    digest = xxh3_128()
    digest.update(struct.pack("<I", len(name)))
    digest.update(name)
    digest.update(input)
    return digest.digest()
