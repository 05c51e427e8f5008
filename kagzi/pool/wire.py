"""Kinds of messages between a coordinator and its pool processes, and the cells of shared memory.

A message is (kind, number, first, second, head, body); see `_core.FrameWriter`.
"""

from __future__ import annotations

# Coordinator to process.
DEFINE = 1  # first: function number; head: module:qualname; body: registered name
RUN = 2  # number: step; first: function number; second: attempt, timeout; head: run and step id
CANCEL = 3  # number: step
OUTCOME = 4  # number: outer step; first: request; second: 0 ok, 1 failed; body: what became of it
STOP = 5

# Process to coordinator.
READY = 16  # number: process id
DONE = 17  # number: step; first: began at, second: duration, microseconds; body: output
FAILED = 18  # the same; head: b"1" if the retry policy wants it again; body: error
CANCELLED = 19  # number: step; it was cancelled or had not begun
TIMED_OUT = 20  # number: step; first, second as DONE; head: b"1" if its thread goes on
ABANDONED = 21  # number: step; cancelled, its thread goes on
FREED = 22  # first: lane; a thread that was given up has come to its end
INNER = 23  # number: outer step; first: request; head: options; body: calls
INNER_CANCEL = 24  # number: outer step; first: request

# Cells of 8 bytes that a process marks: what would be the culprit if it died now.
CELL_LOOP = 0  # the step whose code runs on the loop at this moment
CELL_FIRST_THREAD = 1  # then one per body in a thread
CELL_FIRST_BODY = 64  # then one per body begun on the loop and not ended
CELLS = 4096

THREADS = 8
ASYNC_ROOM = 1000

# A process writes an answer of so many bytes at once, as it is; smaller ones gather to frames. With
# more than MOST_UNSENT_BYTES that the coordinator has not taken it begins no more bodies.
LARGE_BYTES = 16 << 10
MOST_UNSENT_BYTES = 4 << 20
