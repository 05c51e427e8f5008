"""Many starts in one write, and starts within a caller's own transaction."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any
from uuid import UUID

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from kagzi.errors import InvalidInput, RunConflict, StoreUnavailable
from kagzi.payloads import Sealer
from kagzi.store.listener import due_channel
from kagzi.store.store import MOST_CONNECTIONS, StartedRun, Store

FEW = 20  # up to so many go without a COPY: one round trip less
COPY_CHUNK = 500  # rows

Connection = psycopg.AsyncConnection[Any]

_COLUMNS = (
    "id, external_id, workflow, version, priority, input, wake_at, created_at, queue, queue_key,"
    " apart"
)
_COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_I2, _I4, _TIME = Struct("!h"), Struct("!i"), Struct("!iqiq")
_POSTGRES_EPOCH_US = 946_684_800_000_000


@dataclass(slots=True)
class NewRun:
    """A run to be started. Its ids are unique within a batch."""

    run_id: UUID
    external_id: str
    payload: bytes
    queue_key: str


@dataclass(slots=True)
class Starts:
    """Runs of one workflow to be started together."""

    workflow: str
    version: str
    priority: int
    queue: str
    runs: list[NewRun]


async def insert_runs(store: Store, starts: Starts) -> list[StartedRun]:
    """Add runs, or find those that have their ids: all or nothing. Committed on return.

    New ids go in by one COPY. Where an id is known, or nobody knows whether the COPY was committed,
    they are sent again in a form that adds only what is not there.

    Raises:
        RunConflict: An id belongs to a run with another input; the first such is named.

    Source: sql/starts.sql, insert_runs.
    """
    if len(starts.runs) > FEW:
        try:
            async with store.connection() as connection:
                return await _copy(connection, store, starts)
        except psycopg.errors.UniqueViolation:
            pass
        except StoreUnavailable as error:
            if error.__cause__ is None:  # no connection to be had: nothing was sent
                raise
    for last in (*[False] * MOST_CONNECTIONS, True):
        try:
            async with store.connection() as connection, connection.transaction():
                return await _merge(connection, store, starts)
        except StoreUnavailable as error:
            if last or error.__cause__ is None:
                raise
    raise AssertionError("the last try returns or raises")


async def insert_runs_within(
    connection: Connection, store: Store, starts: Starts
) -> list[StartedRun]:
    """The same as part of the transaction that is open on `connection`; says so to the workers.

    An error of `insert_runs` leaves that transaction as it was.
    """
    alone = len(starts.runs) == 1
    is_pipeline = connection.pgconn.pipeline_status != PipelineStatus.OFF
    found = None
    if len(starts.runs) > FEW and not is_pipeline:
        try:
            async with connection.transaction():
                found = await _copy(connection, store, starts)
        except psycopg.errors.UniqueViolation:
            pass
    if found is None and alone:
        found = await _merge(connection, store, starts)
    elif found is None:
        async with connection.transaction():
            found = await _merge(connection, store, starts)
    if any(run.is_new for run in found):
        # Sent when the transaction commits, and once however often it is said.
        await _rows(connection, store, "notify", channel=due_channel(store.connector.schema))
    return found


async def _rows(
    connection: Connection, store: Store, name: str, **parameters: Any
) -> list[tuple[Any, ...]]:
    async with store.connector.cursor(connection) as cursor:
        await cursor.execute(store.queries[name].encode(), parameters)
        return await cursor.fetchall()


# --- the two forms --------------------------------------------------------------------------


async def _copy(connection: Connection, store: Store, starts: Starts) -> list[StartedRun]:
    """Raises `UniqueViolation` where an id is taken."""
    now_us, apart = (await _rows(connection, store, "start_facts", queue=starts.queue))[0]
    table = f"{store.connector.quoted_schema}.workflow_runs ({_COLUMNS})"
    async with psycopg.AsyncCursor(connection) as cursor:
        async with cursor.copy(f"COPY {table} FROM STDIN (FORMAT binary)".encode()) as copy:
            encoding = connection.info.encoding
            sealer = store.connector.sealer
            for data in _copy_data(starts, now_us, apart, encoding, sealer):
                await copy.write(data)
    return [_new(starts, run) for run in starts.runs]


def _copy_data(
    starts: Starts, now_us: int, apart: bool, encoding: str, sealer: Sealer | None
) -> Iterator[bytes]:
    """A binary COPY stream of the runs.

    By their ids, as `insert_runs` has them; due in the order of the batch.

    Source: PostgreSQL manual, COPY, "Binary Format".
    """

    def field(value: bytes) -> bytes:
        return _I4.pack(len(value)) + value

    def text(value: str) -> bytes:
        return field(value.encode(encoding))

    head = _I2.pack(_COLUMNS.count(",") + 1) + _I4.pack(16)
    kind = text(starts.workflow) + text(starts.version) + field(_I4.pack(starts.priority))
    queue = text(starts.queue)
    line = field(b"\1" if apart else b"\0")
    first = now_us - _POSTGRES_EPOCH_US - len(starts.runs)
    places = {run.external_id: first + place for place, run in enumerate(starts.runs, 1)}
    ordered = sorted(starts.runs, key=lambda run: run.external_id)  # code points sort as UTF-8 does
    parts = [_COPY_HEAD]
    for number, run in enumerate(ordered, 1):
        at = places[run.external_id]
        key = text(run.queue_key)
        payload = run.payload if sealer is None else sealer.seal(run.payload)
        parts += (head, run.run_id.bytes, text(run.external_id), kind, _I4.pack(len(payload)))
        parts += (payload, _TIME.pack(8, at, 8, at), queue, key, line)
        if number % COPY_CHUNK == 0:
            yield b"".join(parts)
            parts = []
    yield b"".join((*parts, _COPY_END))


async def _merge(connection: Connection, store: Store, starts: Starts) -> list[StartedRun]:
    """Within a transaction, which is to be rolled back when this raises."""
    runs = starts.runs
    while True:
        inserted = await _rows(
            connection,
            store,
            "insert_runs",
            workflow=starts.workflow,
            version=starts.version,
            priority=starts.priority,
            queue=starts.queue,
            ids=[run.run_id for run in runs],
            external_ids=[run.external_id for run in runs],
            inputs=[run.payload for run in runs],
            queue_keys=[run.queue_key for run in runs],
        )
        if len(inserted) == len(runs):
            return [_new(starts, run) for run in starts.runs]
        known = {
            external_id: (UUID(run_id), version, payload)
            for external_id, run_id, version, payload in await _rows(
                connection,
                store,
                "read_runs_by_keys",
                workflow=starts.workflow,
                external_ids=[run.external_id for run in starts.runs],
            )
        }
        runs = [run for run in starts.runs if run.external_id not in known]
        if not runs:
            return [_known(starts, run, *known[run.external_id]) for run in starts.runs]
        # Deleted between the two statements: add them now.


def _new(starts: Starts, run: NewRun) -> StartedRun:
    return StartedRun(run.run_id, run.external_id, starts.workflow, starts.version, True)


def _known(starts: Starts, run: NewRun, run_id: UUID, version: str, payload: bytes) -> StartedRun:
    if run_id == run.run_id:  # inserted just now, or before the answer to that was lost
        return _new(starts, run)
    if payload != run.payload:
        raise RunConflict(
            f"run {run.external_id!r} of {starts.workflow!r} was started with another input; "
            "use another id, or the same input to get that run"
        )
    return StartedRun(run_id, run.external_id, starts.workflow, version, False)


# --- callers' connections -------------------------------------------------------------------


class Guests:
    """Connections of callers, once they are known to reach the store's own database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: weakref.WeakSet[Connection] = weakref.WeakSet()

    async def admit(self, connection: object) -> Connection:
        """The connection, with a transaction open on it.

        Raises:
            InvalidInput: It cannot take part: sync, closed, in a failed transaction, in autocommit
                without one, or connected to another database.
        """
        if not isinstance(connection, psycopg.AsyncConnection):
            raise InvalidInput(
                "connection must be a psycopg.AsyncConnection, got "
                f"{type(connection).__module__}.{type(connection).__qualname__}"
            )
        if connection.closed:
            raise InvalidInput("the connection given to start is closed")
        status = connection.info.transaction_status
        if status == TransactionStatus.INERROR:
            raise InvalidInput(
                "the transaction of the connection given to start has failed: roll it back first"
            )
        idle = status == TransactionStatus.IDLE
        if idle and connection.autocommit:
            raise InvalidInput(
                "the connection given to start is in autocommit and no transaction is open on it: "
                "start within `async with connection.transaction():`"
            )
        if idle or connection not in self._known:  # the first statement opens the transaction
            try:
                await self._check(connection)
            except InvalidInput:
                if idle:
                    await connection.rollback()
                raise
        self._known.add(connection)
        return connection

    async def _check(self, connection: Connection) -> None:
        table = f"{self._store.connector.quoted_schema}.workflow_runs"
        theirs = await _rows(connection, self._store, "identify_database", table=table)
        where = f"{connection.info.host}, database {connection.info.dbname!r}"
        if theirs[0][2] is None:
            raise InvalidInput(
                f"the connection given to start leads to {where}, which has no kagzi tables in "
                f"schema {self._store.connector.schema!r}"
            )
        if connection in self._known:
            return
        theirs += await _rows(connection, self._store, "identify_schema")
        ours = await self._store.ask("identify_database", table=table)
        ours += await self._store.ask("identify_schema")
        if theirs != ours:
            raise InvalidInput(
                f"the connection given to start leads to {where}, but the runs are kept at "
                f"{self._store.connector.host}, database {self._store.connector.database!r}"
            )
