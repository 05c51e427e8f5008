"""Counts what goes between programs and Postgres: a relay that reads the types of messages.

Statements are counted by the server's own answers, so those of any client library count alike. A
relay takes time of its own: what is counted behind it is not timed, and what is timed does not go
through it.

Source: PostgreSQL manual, "Frontend/Backend Protocol", "Message Formats".
"""

from __future__ import annotations

import asyncio
import shutil
import struct
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_COMPLETE, _READY, _IDLE = b"CZI"
_CHUNK = 1 << 16
_PORT = 5432  # of the socket's name alone


@dataclass(slots=True)
class Traffic:
    """What was seen so far.

    Attributes:
        statements: Ended by the server, BEGIN and COMMIT included.
        round_trips: Answers of the server that leave the turn to the client.
        transactions: Ended, reading ones included.
        sent_bytes, received_bytes: From the programs to the server, and back.
    """

    statements: int = 0
    round_trips: int = 0
    transactions: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def copy(self) -> Traffic:
        return Traffic(
            self.statements,
            self.round_trips,
            self.transactions,
            self.sent_bytes,
            self.received_bytes,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.statements - other.statements,
            self.round_trips - other.round_trips,
            self.transactions - other.transactions,
            self.sent_bytes - other.sent_bytes,
            self.received_bytes - other.received_bytes,
        )


class Messages:
    """Splits a stream of the server's messages, however it is cut, and counts them."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._rest = b""
        self._skip = 0

    def feed(self, data: bytes) -> None:
        traffic = self._traffic
        if self._skip >= len(data):
            self._skip -= len(data)
            return
        data = self._rest + data[self._skip :]
        self._skip = at = 0
        # The byte after the head is wanted as well: the state of the transaction.
        while len(data) - at >= 6:
            kind, length = data[at], int.from_bytes(data[at + 1 : at + 5], "big")
            if kind == _COMPLETE:
                traffic.statements += 1
            elif kind == _READY:
                traffic.round_trips += 1
                traffic.transactions += data[at + 5] == _IDLE
            at += length + 1
        if len(data) - at == 5 and data[at + 1 : at + 5] == b"\0\0\0\4":
            at += 5  # a message without a body, last of what came
        if at > len(data):
            self._skip, self._rest = at - len(data), b""
        else:
            self._rest = data[at:]


class Tap:
    """A relay before a server, in a thread with a loop of its own.

    It listens on a socket that only this user reaches: the server may trust whoever comes from us.

    Args:
        conninfo: Of the server; must be reachable without TLS.

    Attributes:
        conninfo: Of the same database through the relay.
    """

    def __init__(self, conninfo: str) -> None:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            info = connection.info
            self._host, self._port = info.hostaddr or info.host, info.port
        parts = conninfo_to_dict(conninfo)
        parts.pop("hostaddr", None)
        self._folder = tempfile.mkdtemp(prefix="kagzi-tap-")  # with mode 0700
        self._traffic = Traffic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kagzi-bench-tap")
        self._thread.start()
        self._server: asyncio.Server = self._call(self._listen())
        self.conninfo = make_conninfo("", **{**parts, "host": self._folder, "port": _PORT})

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def traffic(self) -> Traffic:
        """A copy; exact once the programs have their answers."""
        return self._traffic.copy()

    async def settled(self, quiet_s: float = 0.03, most_s: float = 0.5) -> Traffic:
        """A copy when nothing more comes: what follows a result, such as a notification, is in.

        Some programs ask all the time: they are waited for no longer than `most_s`.
        """
        before, until = self.traffic(), time.monotonic() + most_s
        while True:
            await asyncio.sleep(quiet_s)
            now = self.traffic()
            if now == before or time.monotonic() > until:
                return now
            before = now

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._relay, f"{self._folder}/.s.PGSQL.{_PORT}")

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            answers, upstream = await self._connect()
            upstream.write(await _startup(reader, writer))
            messages = Messages(self._traffic)
            passing = [
                asyncio.create_task(self._pass(reader, upstream, None)),
                asyncio.create_task(self._pass(answers, writer, messages)),
            ]
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in passing:
                    task.cancel()
                await asyncio.gather(*passing, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # either side has gone, or the tap is closed: the other side is told below
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.close()
                    with suppress(OSError, asyncio.CancelledError):
                        await end.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        return await asyncio.open_connection(self._host, self._port)

    async def _pass(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, seen: Messages | None
    ) -> None:
        while data := await source.read(_CHUNK):
            if seen is None:
                self._traffic.sent_bytes += len(data)
            else:
                self._traffic.received_bytes += len(data)
                seen.feed(data)  # before it is passed on: who has the answer can read the count
            to.write(data)
            await to.drain()


async def _startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """The client's first message; offers of encryption are declined before it."""
    while True:
        head = await reader.readexactly(8)
        length, code = struct.unpack("!ii", head)
        if code not in (_SSL_REQUEST, _GSS_REQUEST):
            return head + await reader.readexactly(length - 8)
        writer.write(b"N")
        await writer.drain()
