"""Where a trial strikes, seen from the process that comes there.

An armed process that reaches its point tells the trial over a socket and waits for its word; what
the trial does meanwhile (kills it, cuts its connections, stops the server) happens at that instant.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from kagzi import faultpoints

ENGINE: tuple[str, ...] = get_args(faultpoints.Point)
BODY = ("body.before", "body.after")
WIRE = ("commit.sent", "copy.messages", "commit.answer")
POINTS = (*ENGINE, *BODY, *WIRE)

VARIABLE = "KAGZI_FAULTS"


class Armed:
    """One point of one process, and of its pool.

    Args:
        nth: At which time of reaching it; counted over the processes by a file.
    """

    def __init__(self, control: str, point: str, nth: int, owner: int) -> None:
        self._control = control
        self._point = point
        self._nth = nth
        self._owner = owner
        self._lock = threading.Lock()

    def reach(self, point: str) -> None:
        if point != self._point or self._count() != self._nth:
            return
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(self._control)
            said = {"point": point, "owner": self._owner, "pid": os.getpid()}
            channel.sendall(json.dumps(said).encode() + b"\n")
            channel.recv(1)

    def _count(self) -> int:
        """How often it was reached: the size of a file to which each time is one byte."""
        with self._lock:
            path = f"{self._control}.{self._owner}.count"
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(descriptor, b".")
                return os.lseek(descriptor, 0, os.SEEK_CUR)
            finally:
                os.close(descriptor)


def arm(control: str, point: str, nth: int) -> None:
    """Arm this process, and the pool processes that it will start."""
    os.environ[VARIABLE] = json.dumps([control, point, nth, os.getpid()])
    if point in ENGINE:
        faultpoints.reach = Armed(control, point, nth, os.getpid()).reach


@contextmanager
def around_body() -> Iterator[None]:
    """The points around the body of a step, in whichever process it runs."""
    said = os.environ.get(VARIABLE)
    armed = Armed(*json.loads(said)) if said else None
    if armed is not None:
        armed.reach("body.before")
    yield
    if armed is not None:
        armed.reach("body.after")
