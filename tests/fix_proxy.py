"""A proxy before Postgres that sees every message, and cuts or holds a connection at any of them.

It runs in the test's own event loop. Each message goes through `Proxy.hook`, which may wait (the
message is held meanwhile) and says whether it, or what instead of it, is passed on; if not, both
sides are cut there: what went before has arrived.

Source: PostgreSQL manual, "Frontend/Backend Protocol", "Message Formats".
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_SSL_REQUEST, _GSS_REQUEST, _CANCEL_REQUEST = 80877103, 80877104, 80877102

READY_IDLE = b"I"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the protocol.

    Attributes:
        from_client: Else from the server.
        kind: Its type byte; "" for the startup message.
        body: What follows the length.
    """

    from_client: bool
    kind: str
    body: bytes

    @property
    def is_ready(self) -> bool:
        """The server has ended a transaction (or a statement outside of one)."""
        return not self.from_client and self.kind == "Z" and self.body == READY_IDLE

    @property
    def text(self) -> str:
        """The statement of a simple query or of a parse, else ""."""
        if not self.from_client or self.kind not in ("Q", "P"):
            return ""
        return self.body.rstrip(b"\0").split(b"\0")[-1 if self.kind == "Q" else 1].decode()

    @property
    def statements(self) -> int:
        """How many statements it makes the server run."""
        if not self.from_client:
            return 0
        if self.kind == "Q":
            return sum(1 for part in self.text.split(";") if part.strip())
        return int(self.kind == "E")

    def packed(self) -> bytes:
        return self.kind.encode() + struct.pack("!I", len(self.body) + 4) + self.body


@dataclass(eq=False)
class Link:
    """One proxied connection."""

    application_name: str = ""
    seen: list[Message] = field(default_factory=list)

    @property
    def is_fenced(self) -> bool:
        """Whether a worker writes over it."""
        return re.fullmatch(r"kagzi:[0-9a-f-]{36}", self.application_name) is not None


Hook = Callable[[Link, Message], Awaitable[bool | Message]]


async def pass_all(link: Link, message: Message) -> bool:
    return True


class Proxy:
    """Listens on a port of this machine; `dsn` leads through it to the server.

    Attributes:
        hook: Asked about every message of every connection but those at its start.
        links: Every connection so far, in order.
        refusing: New connections are closed at once, as if the server were down.
        refusal: New connections get this error, an SQLSTATE and a text.
    """

    def __init__(self, server_dsn: str) -> None:
        self._server_dsn = server_dsn
        self.hook: Hook = pass_all
        self.links: list[Link] = []
        self.refusing = False
        self.refusal: tuple[str, str] | None = None
        self.dsn = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def lead_to(self, server_dsn: str) -> None:
        """New connections go to another server."""
        self._server_dsn = server_dsn

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        parts: dict[str, Any] = {"host": "127.0.0.1", "port": port, "sslmode": "disable"}
        self.dsn = make_conninfo(self._server_dsn, **parts)

    async def stop(self) -> None:
        assert self._server is not None, "started"
        self._server.close()
        for _ in range(3):  # what was being accepted becomes a task in the next turns
            await self.cut_all()
            await asyncio.sleep(0)
        await self.cut_all()

    async def cut_all(self) -> None:
        """Cut every connection there is."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def statements(self) -> int:
        """How many statements the server was made to run, on all connections."""
        return sum(message.statements for link in self.links for message in link.seen)

    # --- one connection ---------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first turn closes nothing itself.
        task.add_done_callback(lambda _: writer.close())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        pumps: list[asyncio.Task[None]] = []
        try:
            startup = await self._startup(reader, writer)
            if self.refusing:
                return
            if self.refusal is not None:
                writer.write(_error(*self.refusal).packed())
                await writer.drain()
                return
            server_reader, server_writer = await self._connect()
            writers.append(server_writer)
            server_writer.write(struct.pack("!I", len(startup) + 4) + startup)
            if struct.unpack_from("!I", startup)[0] == _CANCEL_REQUEST:
                await server_writer.drain()
                await server_reader.read()  # the server ends it when the signal is sent
                return
            link = Link(_application_name(startup))
            self.links.append(link)
            pumps = [
                asyncio.ensure_future(self._pump(link, True, reader, server_writer)),
                asyncio.ensure_future(self._pump(link, False, server_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, EOFError):
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            # Before anything is awaited: this task may be cancelled a second time.
            for one in reversed(writers):  # the server first: it must not outlive the cut
                one.close()
            await asyncio.gather(*pumps, return_exceptions=True)
            for one in writers:
                with suppress(OSError):
                    await one.wait_closed()

    async def _startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            startup = await reader.readexactly(length - 4)
            if struct.unpack_from("!I", startup)[0] not in (_SSL_REQUEST, _GSS_REQUEST):
                return startup
            writer.write(b"N")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = conninfo_to_dict(self._server_dsn)
        host, port = str(parts.get("host") or "localhost"), int(str(parts.get("port") or 5432))
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _pump(
        self,
        link: Link,
        from_client: bool,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError, EOFError):
            while True:
                kind = (await reader.readexactly(1)).decode("latin-1")
                (length,) = struct.unpack("!I", await reader.readexactly(4))
                message = Message(from_client, kind, await reader.readexactly(length - 4))
                link.seen.append(message)
                answer = await self.hook(link, message)
                if not answer:
                    await writer.drain()
                    return
                writer.write((answer if isinstance(answer, Message) else message).packed())
                await writer.drain()


def _error(state: str, text: str) -> Message:
    fields = {"S": "FATAL", "V": "FATAL", "C": state, "M": text}
    packed = b"".join(f"{kind}{content}".encode() + b"\0" for kind, content in fields.items())
    return Message(False, "E", packed + b"\0")


def _application_name(startup: bytes) -> str:
    parts = startup[4:].split(b"\0")
    options = dict(zip(parts[::2], parts[1::2], strict=False))
    return options.get(b"application_name", b"").decode()


@pytest.fixture
async def proxy(dsn: str) -> AsyncIterator[Proxy]:
    """A proxy before the test's database."""
    made = Proxy(dsn)
    await made.start()
    yield made
    await made.stop()
