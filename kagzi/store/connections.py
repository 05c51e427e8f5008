"""How kagzi connects: the DSN, what every connection is told, and what an error of one means."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row
from psycopg.types.datetime import TimestamptzLoader

from kagzi.errors import InvalidDsn, ServerTooOld, StoreForbidden, StoreUnavailable
from kagzi.model import check_name
from kagzi.payloads import PayloadCodec, Sealer
from kagzi.store import sealing

OLDEST_SERVER = 140000
CONNECT_TIMEOUT_S = 10
IDLE_IN_TRANSACTION_S = 60

# Classes of SQLSTATE that speak of the server or the connection, not of what was sent: connection
# exceptions, insufficient resources, operator intervention, system errors, and a read-only server.
_OUTAGE_CLASSES = ("08", "53", "57", "58", "XX")
_OUTAGE_STATES = ("25006", "40001", "40P01", "55P03", "25P02", "25P03", "26000", "42P05")
_NOT_OUTAGE = ("57014",)
FORBIDDEN = "42501"

# One statement, so one round trip: what the server cannot do is left as it is.
_TUNE = (
    b"SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off;"
    b" SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off;"
    b" SELECT pg_catalog.set_config(name, 'lz4', false) FROM pg_catalog.pg_settings"
    b" WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)"
)

# What an outage is, where the server's own words are about something else.
_OUTAGE_WORDS = {
    "25006": "the server takes no writes now (a standby, or set read-only)",
    "53100": "the server's disk is full",
    "53300": "the server has no connection left for this role (max_connections)",
}

_NO_CONNECTION_LEFT = re.compile(
    r"too many (clients|connections)|remaining connection slots|no more connections allowed"
)
_LIBPQ_HINT = re.compile(r"\s*Is the server running [^?]*\?")  # ours says more


class Connector:
    """Makes connections to one database and explains their failures without the password.

    Args:
        dsn: As libpq reads it, a URL or `key=value` words.
        schema: Where kagzi's tables are.
        codec: What payloads are sealed with, if they are.

    Attributes:
        is_pooled: Whether a pooler stands between us and the server, as PgBouncer does, which may
            give each transaction another backend. Then there are no named prepared statements, no
            settings of the session and no LISTEN. `check_server` finds out.

    Raises:
        InvalidDsn: libpq cannot read the DSN.
    """

    def __init__(self, dsn: str, schema: str = "kagzi", codec: PayloadCodec | None = None) -> None:
        self.sealer = None if codec is None else Sealer(codec)
        self.schema = check_name("schema", schema, 63)
        self.quoted_schema = sql.Identifier(schema).as_string(None)
        try:
            self._parts: dict[str, Any] = conninfo_to_dict(dsn)
        except psycopg.ProgrammingError:
            raise InvalidDsn(
                f"the connection string {_redact_dsn(dsn)!r} cannot be read; "
                "write postgresql://user@host:5432/database or key=value words"
            ) from None
        if re.match(r"[a-z]+://[^?]*[@/][^?]*@", dsn):
            # libpq ends the password there, and would show the rest of it as host or database.
            raise InvalidDsn(
                f"the connection string {_redact_dsn(dsn)!r} has an at sign or a slash in its user "
                "name or password: write %40 or %2F for it"
            )
        self.is_pooled = False
        self._parts.setdefault("connect_timeout", CONNECT_TIMEOUT_S)
        self._parts.setdefault("application_name", "kagzi")

    @property
    def host(self) -> str:
        return str(self._parts.get("host") or self._parts.get("hostaddr") or "local socket")

    @property
    def database(self) -> str:
        return str(self._parts.get("dbname") or self._parts.get("user") or "")

    def conninfo(self, **extra: Any) -> str:
        """The connection string, password included: never shown."""
        return make_conninfo("", **{**self._parts, **extra})

    @property
    def options(self) -> dict[str, Any]:
        """What psycopg's own `connect` is given beside the connection string."""
        if self.is_pooled:
            return {"autocommit": True, "prepare_threshold": None}
        return {"autocommit": True}

    async def connect(self, **extra: Any) -> psycopg.AsyncConnection[Any]:
        """A new connection in autocommit.

        Raises:
            psycopg.OperationalError: As it is; callers retry, or `explain` it.
        """
        connection = await psycopg.AsyncConnection.connect(self.conninfo(**extra), **self.options)
        try:
            await self.configure(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def configure(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """What each connection of kagzi's own is told once."""
        await self.configure_shared(connection)
        if self.sealer is not None:
            sealing.register(connection, self.sealer)

    def cursor(self, connection: psycopg.AsyncConnection[Any]) -> psycopg.AsyncCursor[Any]:
        """For a statement of ours on a connection that users' code uses as well.

        Such a connection may have cursors, row factories and adapters of its own.
        """
        cursor = psycopg.AsyncCursor(connection, row_factory=tuple_row)
        if self.sealer is not None:
            sealing.register(cursor, self.sealer)
        return cursor

    async def configure_shared(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """The same for one that users' code uses as well: its bytes are its own."""
        if self.is_pooled:
            connection.adapters.register_loader("timestamptz", _UtcLoader)
            return
        await connection.execute(
            b"SELECT set_config('idle_in_transaction_session_timeout', %s, false),"
            b" set_config('TimeZone', 'UTC', false)",
            [f"{IDLE_IN_TRANSACTION_S}s"],
        )

    async def plan_once(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Let prepared statements keep their plan, planned for tables that will be large.

        Their arrays have another length each time, which the server takes for a reason to plan
        anew: that takes longer than to execute them. A plan that is kept must not be one for the
        small table that it may have been made for: by an index and row by row it suits any.

        Large values are compressed the quick way: a server that has lz4 takes a sixth of the time
        over one that it takes by its default method.
        """
        if not self.is_pooled:
            await connection.execute(_TUNE)

    async def check_server(self) -> None:
        """Connect once and see that this is a server that kagzi can use.

        Raises:
            StoreUnavailable, ServerTooOld, StoreForbidden: Says what to check.
        """
        try:
            connection = await psycopg.AsyncConnection.connect(
                self.conninfo(), autocommit=True, prepare_threshold=None
            )
        except psycopg.Error as error:
            raise self.unavailable(error) from None
        try:
            version = connection.info.server_version
            if version < OLDEST_SERVER:
                raise ServerTooOld(
                    f"PostgreSQL at {self.host} is version {version // 10000}; "
                    f"kagzi needs {OLDEST_SERVER // 10000} or newer"
                )
            cursor = await connection.execute(b"SELECT pg_catalog.pg_backend_pid()")
            self.is_pooled = await cursor.fetchone() != (connection.info.backend_pid,)
        except psycopg.Error as error:
            raise self.unavailable(error) from None
        finally:
            await connection.close()

    def unavailable(self, error: BaseException) -> Exception:
        """The error of kagzi's that stands for one of psycopg's while connecting."""
        text = self.explain(error)
        state = getattr(error, "sqlstate", None) or ""
        if state == FORBIDDEN:
            return StoreForbidden(
                f"{text}. The role needs CREATE on the database, or let its owner run the output "
                "of `kagzi migrate --print`"
            )
        if state[:2] == "53" or state == "25006":
            return StoreUnavailable(
                f"PostgreSQL at {self.host}, database {self.database!r}, refuses for now: {text}",
                host=self.host,
                database=self.database,
            )
        hint = (
            "Is PostgreSQL running and reachable, and are user, password and database right? "
            "Check the DSN argument or DATABASE_URL"
        )
        return StoreUnavailable(
            f"no connection to PostgreSQL at {self.host}, database {self.database!r}: "
            f"{text}. {hint}",
            host=self.host,
            database=self.database,
        )

    def explain(self, error: BaseException) -> str:
        """An error's text on one line, without the password."""
        text = " ".join(str(error).split()) or type(error).__name__
        text = _LIBPQ_HINT.sub("", text)
        state = getattr(error, "sqlstate", None) or ""
        if not state and _NO_CONNECTION_LEFT.search(text):
            state = "53300"  # libpq does not pass on the state of a refused connection
        words = _OUTAGE_WORDS.get(state)
        if words is not None:
            text = f"{words}: {text}"
        password = str(self._parts.get("password") or "")
        if password:
            password = " ".join(password.split())
            for spelling in (password, quote(password, safe="")):
                text = text.replace(spelling, "***")
        return redact(text)

    def __repr__(self) -> str:
        return f"<connector to {self.host}, database {self.database!r}, schema {self.schema!r}>"


def redact(text: str) -> str:
    """A connection string, or a text that holds one, without its password."""
    text = re.sub(r"(://[^:/@\s]*):.*@", r"\1:***@", text)
    return re.sub(r"(?is)(password\s*=\s*)('(?:[^'\\]|\\.)*(?:'|$)|(?:\\.|\S)+)", r"\1***", text)


def _redact_dsn(dsn: str) -> str:
    """The same for one that nothing can read: whatever may be a password goes."""
    return redact(re.sub(r"(?s)^(\w*:?/{0,2}[^:/@]*):.*@", r"\1:***@", dsn))


async def no_reset(_: psycopg.AsyncConnection[Any]) -> None:
    """With a reset, a pool takes connections back in a task of its own.

    Without one it does so in the caller's, and a caller cancelled in that moment lost it for good.
    """


class _UtcLoader(TimestamptzLoader):
    """Moments in UTC, whatever the zone of a session that is not ours to set."""

    def load(self, data: Buffer) -> datetime:
        return super().load(data).astimezone(UTC)


def cancellations() -> int:
    """How often this task was cancelled so far; for `heed_cancellation` later on."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def heed_cancellation(before: int) -> None:
    """End as cancelled, if this task was since there were `before` cancellations.

    A cancellation gets lost where it meets something else: psycopg's pool returns the connection
    that came at the same moment, and a connection that breaks while the end of a statement is
    awaited raises its own error. Who tries again after that would never end.
    """
    if cancellations() > before:
        raise asyncio.CancelledError


def is_outage(error: psycopg.Error) -> bool:
    """Whether an error speaks of the server or connection, so that trying again may help."""
    state = error.sqlstate
    if state is None:
        # libpq's own: no answer came. psycopg raises these for wrong usage too, but not here.
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    if state in _NOT_OUTAGE:
        return False
    return state[:2] in _OUTAGE_CLASSES or state in _OUTAGE_STATES


def is_forbidden(error: psycopg.Error) -> bool:
    """Whether the role lacks a right."""
    return error.sqlstate == FORBIDDEN
