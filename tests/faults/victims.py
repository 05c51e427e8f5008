"""What strikes at a point: who dies, freezes or is cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from tests.fix_proxy import Link, Message, Proxy

if TYPE_CHECKING:
    from tests.faults.trial import Trial, WorkerActor

LEASE_S = 1.2
HOLE_S = 1.8 * LEASE_S
FENCE_SHUT = b"\0CKZ001\0"
NO_FENCE = struct.pack(
    "!hiq", 3, 8, 0
)  # the row of a write: how often it found the fence open, ...
NOTHING = Message(False, "N", b"SNOTICE\0VNOTICE\0C00000\0Mlost on the way\0\0")


class Wire:
    """The proxy before one worker: its points on the wire, and the hole that messages fall into.

    Attributes:
        strike: Called once, at the nth time that the point is reached.
        refused: Writes that the server answered with a shut fence.
    """

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        proxy.hook = self._look
        self.point = ""
        self.nth = 0
        self.strike: Callable[[], Awaitable[None]] | None = None
        self.refused = 0
        self.deaf = False  # no notification comes through
        self._hole: asyncio.Event | None = None
        self._count = 0
        self._copies: dict[Link, str] = {}
        self._awaits: set[Link] = set()  # a commit was sent, and is not answered
        self._within: set[Link] = set()

    async def _look(self, link: Link, message: Message) -> bool | Message:
        if link.is_fenced and is_refusal(message):
            self.refused += 1
        if self.strike is not None and link.is_fenced and self._is_moment(link, message):
            self._count += 1
            if self._count == self.nth:
                # It may end this connection, and so the task that this runs in.
                await asyncio.shield(asyncio.ensure_future(self.strike()))
        if self._hole is not None:
            await self._hole.wait()
            return False
        if self.deaf and not message.from_client and message.kind == "A":
            return NOTHING
        return True

    def _is_moment(self, link: Link, message: Message) -> bool:
        if message.from_client:
            if message.kind == "Q":
                text = message.text
                if text.startswith("BEGIN"):
                    self._within.add(link)
                self._copies[link] = text
                if text == "COMMIT":
                    return self._sent(link)
            elif message.kind == "B":
                self._copies[link] = message.body.split(b"\0")[1].decode(errors="replace")
            elif message.kind == "c":
                if self.point == "copy.messages":
                    return True
                if "COMMIT" in self._copies.get(link, ""):
                    return self._sent(link)
            elif message.kind == "E":
                written = self._copies.get(link, "").startswith("kagzi_write")
                if written and link not in self._within:
                    return self._sent(link)
        elif message.is_ready and link in self._awaits:
            self._awaits.discard(link)
            return self.point == "commit.answer"
        return False

    def _sent(self, link: Link) -> bool:
        self._within.discard(link)
        self._awaits.add(link)
        return self.point == "commit.sent"

    def open_hole(self) -> None:
        """From here on nothing arrives, in either direction; nobody is told."""
        self._hole = asyncio.Event()

    async def close_hole(self) -> None:
        """What fell in is lost, and its connections are cut."""
        if self._hole is not None:
            hole, self._hole = self._hole, None
            hole.set()
            await self.proxy.cut_all()


def is_refusal(message: Message) -> bool:
    """Whether it tells, over a fenced connection, that a write met a shut fence."""
    if message.from_client:
        return False
    if message.kind == "E":  # of a COPY
        return FENCE_SHUT in message.body
    return message.kind == "D" and message.body.startswith(NO_FENCE)


Strike = Callable[["Trial", "WorkerActor"], Awaitable[bool]]


async def worker(trial: Trial, actor: WorkerActor) -> bool:
    actor.kill()
    return True


async def pool(trial: Trial, actor: WorkerActor) -> bool:
    members = [one for one in actor.family() if "forkserver" in _command(one)]
    bodies = [one for one in members if _parent(one) != actor.pid]
    if not bodies:
        return False
    for one in bodies:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return True


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


async def client(trial: Trial, actor: WorkerActor) -> bool:
    alive = trial.client is not None and trial.client.is_alive
    if trial.client is not None:
        trial.client.kill()
    trial.start_client()
    return alive


async def backend(trial: Trial, actor: WorkerActor) -> bool:
    query = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'kagzi%'"
    )
    return bool((await trial.ask(query))[0][0])


async def postmaster(trial: Trial, actor: WorkerActor) -> bool:
    await trial.restart_server()
    return True


async def reset(trial: Trial, actor: WorkerActor) -> bool:
    await actor.wire.proxy.cut_all()
    return True


async def hole(trial: Trial, actor: WorkerActor) -> bool:
    actor.wire.open_hole()

    async def end() -> None:
        await asyncio.sleep(HOLE_S)
        await actor.wire.close_hole()

    trial.later(end())
    return True


async def freeze(trial: Trial, actor: WorkerActor) -> bool:
    """Stopped until another has ended its lease, then let go on."""
    stopped = stop(trial, actor)

    async def end() -> None:
        await until_lease_ended(trial, actor)
        let_go_on(stopped)

    trial.later(end())
    return True


def stop(trial: Trial, actor: WorkerActor) -> list[int]:
    """Stop a worker, and its pool processes or not; who was stopped."""
    family = [actor.pid, *(one.pid for one in actor.family())]
    chosen = family if trial.chance.random() < 0.5 else family[:1]
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    return chosen


async def until_lease_ended(trial: Trial, actor: WorkerActor) -> bool:
    """Wait for it, and not longer, before the next owner has done it all; whether it was ended."""
    query = (
        "SELECT count(*) FROM kagzi.worker_leases JOIN kagzi.workers ON id = worker_id"
        " WHERE pid = %s"
    )
    for _ in range(2000):
        await asyncio.sleep(0.005)
        if (await trial.ask(query, actor.pid))[0][0] == 0:
            return True
    return False


def let_go_on(stopped: list[int]) -> None:
    for pid in reversed(stopped):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


VICTIMS: dict[str, Strike] = {
    "worker": worker,
    "pool": pool,
    "client": client,
    "backend": backend,
    "postmaster": postmaster,
    "reset": reset,
    "hole": hole,
    "freeze": freeze,
}
ZOMBIE = "zombie"  # a worker of `zombies.Round`
COST_LEASE = ("worker", "hole", "freeze", ZOMBIE)  # that of the worker which is struck
