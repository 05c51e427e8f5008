"""The compiled core: scheduler, result slots, frames and COPY rows.

Everything here is a data structure or a function over bytes, numbers and tuples. Nothing here
knows a socket, an event loop, a clock or SQL. Each name has a slow twin in `tests/reference.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, final

SOURCE_HASH: Final[str]
"""blake2b-16 hex digest of the `_core.pyx` that was compiled; compared at import in a checkout."""

# Lanes: the kinds of room that a place has. A step waits only for room in its own lane, so lanes
# also say which places may run it: pool processes have room in the first three, the coordinator in
# the OWN lanes, and a process for a step that is suspected of a crash in the last.
LANE_ASYNC: Final = 0  # an async body: shares the event loop of its place
LANE_THREAD: Final = 1  # a sync body: takes a thread
LANE_CPU: Final = 2  # a body declared cpu=True: one at a time in its place
LANE_OWN_ASYNC: Final = 3
LANE_OWN_THREAD: Final = 4
LANE_OWN_CPU: Final = 5
LANE_ALONE: Final = 6
LANES: Final = 7

# Where a step stands in its scheduler.
NEW: Final = 0
WAITING: Final = 1  # added, not begun
BEGUN: Final = 2  # taken by a place; holds its permits
SUSPENDED: Final = 3  # waits for an inner group; shared permits given up, its gate's kept
RESUMING: Final = 4  # inner group done; waits for its shared permits, ahead of new work
ENDED: Final = 5  # finished or dropped

@final
class Gate:
    """At most `limit` steps at once (`limit` >= 1). Used per group, or per function, never both.

    While steps of a scheduler name it, it belongs to that scheduler: `add` elsewhere is refused.
    A function's gate is made anew for each scheduler: one that was left with steps keeps its gates.
    """

    def __init__(self, limit: int) -> None: ...
    @property
    def limit(self) -> int: ...
    @property
    def held(self) -> int: ...

@final
class Place:
    """Where bodies run, as the scheduler sees it: room per lane, in steps.

    Args:
        room: How many begun steps of each lane it may hold, up to `LANES` numbers >= 0; lanes left
            out have none.

    While it holds steps of a scheduler, it belongs to that scheduler: `take` elsewhere is refused.
    """

    def __init__(self, room: Sequence[int], name: object = None) -> None: ...
    name: Any
    open: bool  # False: `take` gives it no new step, resumed ones still
    def held(self, lane: int) -> int: ...
    def room(self, lane: int) -> int: ...
    def set_room(self, lane: int, room: int) -> None:
        """From the next `take` on; less than is held stops no step."""

@final
class Step:
    """One step of a live run, from its call to its checkpoint. Plain fields, no behaviour.

    Numbers are 64 bits wide, and 32 where the column is an integer: others are an OverflowError.
    """

    def __init__(
        self,
        run: Any,
        run_id: bytes,
        id: str,  # noqa: A002
        definition: Any,
        function: str,
        input: bytes,  # noqa: A002
        input_hash: bytes,
        lane: int = 0,
        priority: int = 0,
        gate: Gate | None = None,
        function_gate: Gate | None = None,
        group: Any = None,
        index: int = -1,
    ) -> None: ...
    # identity
    run: Any
    run_id: bytes  # 16 bytes
    id: str
    definition: Any
    function: str
    input: bytes
    input_hash: bytes
    group: Any
    index: int  # slot in the group, -1 outside groups
    group_id: bytes | None  # 16 bytes
    parent_id: str | None
    call_number: int
    # scheduling: the first four may be set while the step is NEW or ENDED, else ValueError
    @property
    def lane(self) -> int: ...
    @lane.setter
    def lane(self, lane: int) -> None: ...
    @property
    def priority(self) -> int: ...  # higher first
    @priority.setter
    def priority(self, priority: int) -> None: ...
    @property
    def gate(self) -> Gate | None: ...
    @gate.setter
    def gate(self, gate: Gate | None) -> None: ...
    @property
    def function_gate(self) -> Gate | None: ...
    @function_gate.setter
    def function_gate(self, gate: Gate | None) -> None: ...
    @property
    def place(self) -> Place | None: ...  # where it began last; None again when it is added
    @property
    def number(self) -> int: ...  # on the wire; set by `add`, unique in its scheduler for ever
    @property
    def state(self) -> int: ...
    # outcome
    attempt: int  # of the current or last execution, from 1 (0 to 65535 on the wire)
    timeout_us: int  # 0: none
    status: str  # "", "completed" or "failed"
    output: bytes | None
    error: bytes | None
    started_us: int  # microseconds since 1970-01-01 UTC, clock of the place; 0: never begun
    completed_us: int
    completed_number: int
    process_id: int  # of the pool process; 0: coordinator; -1: answered from a memo
    worker_id: bytes | None  # 16 bytes
    extra: Any  # free for the owner

@final
class Scheduler:
    """Which step begins next, where: heaps by (priority, arrival), gates, and room per lane.

    A step that is added takes its gate's permit first (its group's limit); without one it waits in
    that gate's own order. With it, it waits in its lane's heap. `take` moves the best steps of each
    lane to a place as long as that place has room and the step's function gate a permit. Order
    everywhere: higher `priority` first, then order of arrival (order of `add`). A step whose
    function gate is full does not hold up others behind it; it keeps its turn. Each RESUMING step
    has one permit of its function gate spoken for, which no new step takes: whoever takes a place
    out of use finishes the steps that resume there.

    No method waits. Nothing is kept of a step that has ended. A step of another scheduler is a
    ValueError everywhere.
    """

    def __init__(self) -> None: ...
    def add(self, step: Step) -> None:
        """Enter a NEW step (or an ENDED one again, with a new number): it is WAITING, or refused.

        Raises:
            ValueError: The step is in a scheduler already, or a gate of it serves another scheduler
                or both as a group's and as a function's.
        """
    def add_all(self, steps: Iterable[Step]) -> None:
        """`add` for each, in order. Those before a refused one stay added."""
    def take(self, place: Place, most: int) -> list[Step]:
        """Begin up to `most` steps in `place`.

        First every RESUMING step of this place whose lane has room and whose function gate has a
        permit, in order of `resume` (these do not count against `most`); then, if the place is
        open, new ones lane by lane, the last lane first, none if `most` is below 1.
        All returned are BEGUN.
        A returned step that was RESUMING has been begun before: `resumed` tells them apart.
        """
    def resumed(self, step: Step) -> bool:
        """Whether the last `take` that returned `step` resumed it."""
    def finish(self, step: Step) -> None:
        """End a BEGUN, SUSPENDED or RESUMING step and give all its permits back. Else no change."""
    def suspend(self, step: Step) -> None:
        """BEGUN -> SUSPENDED: give up room and function permit; keep the gate's. Else no change."""
    def resume(self, step: Step) -> None:
        """SUSPENDED -> RESUMING: take room and function permit again at the next `take`."""
    def drop(self, step: Step) -> bool:
        """End a WAITING step before it begins. False (and no change) in any other state."""
    def ready(self, lane: int) -> int:
        """How many steps could begin now, each taken alone, in a place with room in `lane`: they
        have their gate's permit, and their function gate has one that is not spoken for.
        """
    def find(self, number: int) -> Step | None:
        """The step that is BEGUN, SUSPENDED or RESUMING under this number."""
    @property
    def begun(self) -> int:
        """How many steps `find` can find."""
    def waiting(self) -> int:
        """How many steps are WAITING, wherever."""
    def absorb(
        self, messages: list[tuple[int, int, int, int, bytes, bytes]], done: int, process_id: int
    ) -> tuple[list[Step], list[tuple[int, int, int, int, bytes, bytes]]]:
        """Take in the answers of one place.

        For each message of kind `done` whose number `find` knows: set `status` to "completed",
        `output` to the body, `started_us` to first, `completed_us` to first + second, `process_id`;
        `finish` it; collect it. Messages of kind `done` with an unknown number are late: dropped.
        A message that is no such tuple is a TypeError; those before it have been taken in.

        Returns:
            The steps in message order, and the messages of other kinds, untouched, in order.
        """

@final
class Slots:
    """Results of one group, in the order of its calls.

    `fill` and `fail` settle a slot once; settling it again changes nothing and returns False. An
    index outside 0 to size - 1 is a ValueError.
    """

    def __init__(self, size: int) -> None: ...
    def __len__(self) -> int: ...
    def fill(self, index: int, value: object) -> bool: ...
    def fail(self, index: int, failure: object) -> bool: ...
    def fill_steps(self, steps: list[Step]) -> int:
        """`fill(step.index, step.output)` for each, and `add_time` if that was new.

        Returns:
            How many were new.
        """
    def add_time(self, started_us: int, completed_us: int) -> None:
        """Count the time of a step; none if it never began (0) or its clock ran backwards."""
    def settled(self, index: int) -> bool: ...
    @property
    def remaining(self) -> int: ...
    @property
    def succeeded(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def busy_us(self) -> int:
        """Sum over what `add_time` was given of completed - started."""
    @property
    def longest_us(self) -> int: ...
    @property
    def values(self) -> list[Any]:
        """One per slot; None where failed or open. The list itself, not a copy: values may be put
        in place of others there, its length must stay.
        """
    @property
    def failures(self) -> dict[int, Any]:
        """Index -> failure, ascending."""

@final
class StoredStep:
    """What the store holds of a step: its checkpoint.

    Attributes:
        visible_number: If it failed: the call number at which the workflow saw that.
        output_bytes: Length of its output, which may be left in the store.
    """

    def __init__(
        self,
        status: str,
        function: str,
        input_hash: bytes,
        output: bytes | None,
        error: bytes | None,
        attempts: int,
        call_number: int,
        completed_number: int,
        visible_number: int | None = None,
        in_group: bool = False,
        output_bytes: int | None = None,
    ) -> None: ...
    @property
    def status(self) -> str: ...
    @property
    def function(self) -> str: ...
    @property
    def input_hash(self) -> bytes: ...
    @property
    def output(self) -> bytes | None: ...
    @property
    def error(self) -> bytes | None: ...
    @property
    def attempts(self) -> int: ...
    @property
    def call_number(self) -> int: ...
    @property
    def completed_number(self) -> int: ...
    @property
    def visible_number(self) -> int | None: ...
    @property
    def in_group(self) -> bool: ...
    @property
    def output_bytes(self) -> int: ...
    @property
    def is_elsewhere(self) -> bool:
        """It has an output, which was left in the store."""
    def seen(self, number: int) -> StoredStep:
        """The same with this `visible_number`."""

def take_stored(
    rows: list[tuple[Any, ...]], runs: list[dict[str, StoredStep]], numbers: list[int]
) -> int:
    """Put rows of `load_steps` where they belong; how many left their output in the store.

    Args:
        rows: (place of the run, step id, and what `StoredStep` is made of).
        runs: Filled, by step id.
        numbers: Raised to the highest number that occurs in a run's rows.
    """

@final
class FrameWriter:
    """Packs messages, one after the other, for one socket.

    Message, little-endian, no padding: u32 length of what follows; u8 kind; u64 number; i64 first;
    i64 second; u32 length of head; head; body (the rest).
    """

    def __init__(self) -> None: ...
    def __len__(self) -> int:
        """Bytes packed and not taken."""
    def add(
        self,
        kind: int,
        number: int,
        first: int = 0,
        second: int = 0,
        head: bytes = b"",
        body: bytes = b"",
    ) -> None:
        """Pack one message.

        Raises:
            ValueError: A kind outside 0 to 255, or more than 2**31 - 1 bytes.
            OverflowError: Another number that its field cannot hold.
        """
    def add_head(
        self, kind: int, number: int, first: int, second: int, head: bytes, body_size: int
    ) -> None:
        """Pack one message up to its body, which is not copied: it has to go to the socket behind
        what `take` gives. Raises what `add` raises.
        """
    def add_step(self, kind: int, step: Step, function_number: int) -> None:
        """`add(kind, step.number, function_number, step.attempt | step.timeout_us << 16,
        step.run_id + step.id as UTF-8, step.input)`.

        Raises:
            ValueError: A run id that has not 16 bytes, no id or input, an attempt outside 0 to
                65535, a timeout outside 0 to 2**47 - 1 us.
        """
    def take(self) -> bytes:
        """All that is packed; the writer is empty afterwards."""

@final
class FrameReader:
    """Splits a byte stream into messages, whatever the pieces it arrives in.

    Args:
        most_bytes: Longest message accepted.
    """

    def __init__(self, most_bytes: int = 0x7FFF_FFFF) -> None: ...
    def feed(self, data: bytes) -> list[tuple[int, int, int, int, bytes, bytes]]:
        """The messages that `data` completes: (kind, number, first, second, head, body).

        Raises:
            ValueError: A length that no writer makes (below 29, above `most_bytes`, head longer
                than the message). The reader is of no use afterwards.
        """
    @property
    def pending_bytes(self) -> int: ...

INPUT_STORED_BYTES: Final = 8192
"""An input longer than this is not stored in its row: the column is NULL, the hash is there."""

STEP_COLUMNS: Final[tuple[str, ...]]
"""Columns of `step_runs`, in the order in which both row builders write them."""
STEP_FIELD_OIDS: Final[tuple[int, ...]]
"""Type OID of each, for the parameters of the form for one step."""
STEP_COLUMN_OIDS: Final[tuple[int, ...]]
"""Array type OID of each, for the parameters of the unnest form."""

def copy_rows(steps: Sequence[Step]) -> bytes:
    """The steps as one binary COPY stream, header and trailer included.

    A `started_us` of 0 is written as `completed_us`.

    Raises:
        ValueError: A step whose status is neither "completed" nor "failed", a run, worker or group
            id that has not 16 bytes, no input hash, text with NUL, a time before 4713 BC.

    Source: PostgreSQL manual, COPY, "Binary Format".
    """

def unnest_arrays(steps: Sequence[Step]) -> list[bytes]:
    """The same rows as one binary one-dimensional array per column (lower bound 1).

    Without steps, the empty array, of no dimension. Raises what `copy_rows` raises.

    Source: PostgreSQL source, array_recv: ndim, has-null flag, element OID, size, lower bound.
    """

def step_fields(step: Step) -> list[bytes | None]:
    """The row of one step as binary values, one per column; None is NULL.

    Raises what `copy_rows` raises.
    """

def row_bytes(step: Step) -> int:
    """What `copy_rows` writes for this step alone, in bytes, without header and trailer."""

def hash_input(function: str, input: bytes) -> bytes:  # noqa: A002
    """16 bytes that tell whether a recorded step had the same input: XXH3-128 of the input,
    seeded with nothing; `function` is hashed before it, length-prefixed (u32 LE)."""
