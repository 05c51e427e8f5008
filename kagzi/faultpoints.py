"""Named moments in the engine at which a test can strike: kill, stop, cut off.

Off, which is always but in a test, a point costs one look at a module's variable, and those that
steps pass on their way from the pool are passed by whole frames and batches. Bodies of steps and
messages on the wire are moments too; a test has those without help from here. `tests/faults/` says
what strikes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Point = Literal[
    "claim.before",  # due runs are about to be claimed
    "claim.after",  # they are, and nothing of them has begun
    "group.start",  # a group's recorded steps are recalled, the others not submitted
    "answers.in",  # bodies have returned, nothing is put of them
    "race.decided",  # the winner is known, and not written
    "retry.decided",  # an attempt has failed, and is not written
    "batch.before",  # a batch is about to be written
    "copy.before",  # the same of one that goes by COPY
    "copy.open",  # the server waits for the COPY's rows
    "copy.after",  # they are in, and other rows of the batch are to follow
    "batch.after",  # it is committed, and nobody has been told
    "timer.fires",
    "event.taken",  # an event is a wait's, and that is not written
    "child.before",  # a child run is about to be inserted
    "child.after",
    "request.heard",  # somebody wants a held run cancelled or paused
    "run.leaves",  # a run has ended or is let go of, and that is not written
    "heartbeat.before",  # in the heartbeat's thread
    "heartbeat.after",
    "rescue.between",  # a lease is ended, its runs are not free, and neither is committed
]

POINTS: tuple[Point, ...] = get_args(Point)

reach: Callable[[Point], None] | None = None
