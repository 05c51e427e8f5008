"""Prepared statements over binary arrays, below psycopg's query layer.

The writer sends a few long statements very often. psycopg reads the text of a long one again at
each call, which takes longer than the server needs for it; here that is done once.

Source: PostgreSQL manual, "Extended Query"; PostgreSQL source, array_recv, timestamptz_recv.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from struct import Struct
from typing import Any
from uuid import UUID

import psycopg
from psycopg import generators, pq

_PLACE = re.compile(r"%\((\w+)\)s")
_HEAD = Struct("!iIIii")
_EMPTY = Struct("!iII")
_I4 = Struct("!i")
_I8 = Struct("!q")
_F8 = Struct("!d")
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NULL = _I4.pack(-1)

UUID_OID, TEXT_OID, INT_OID, BYTES_OID, TIME_OID, BOOL_OID = 2950, 25, 23, 17, 1184, 16
FLOAT_OID = 701
UUIDS, TEXTS, INTS, FLOATS, BYTES, TIMES, BOOLS = 2951, 1009, 1007, 1022, 1001, 1185, 1000

Row = list[bytes | None]

# By the array's OID: the element's.
ELEMENT_OIDS = {
    UUIDS: UUID_OID,
    TEXTS: TEXT_OID,
    INTS: INT_OID,
    FLOATS: FLOAT_OID,
    BYTES: BYTES_OID,
    TIMES: TIME_OID,
    BOOLS: BOOL_OID,
}
_WRITERS: dict[int, Callable[[Any], bytes]] = {
    UUID_OID: lambda value: value.bytes,
    TEXT_OID: lambda value: value.encode(),
    INT_OID: _I4.pack,
    FLOAT_OID: _F8.pack,
    BYTES_OID: bytes,
    TIME_OID: lambda value: _I8.pack((value - _POSTGRES_EPOCH) // _MICROSECOND),
    BOOL_OID: lambda value: b"\1" if value else b"\0",
}


def binary_value(oid: int, value: Any) -> bytes | None:
    """A value of a type, or a list of them for the type's array; None becomes NULL."""
    if value is None:
        return None
    if oid in ELEMENT_OIDS:
        return binary_array(oid, value)
    return _WRITERS[oid](value)


def binary_array(oid: int, values: Sequence[Any]) -> bytes:
    """A one-dimensional array; None becomes NULL."""
    element_oid = ELEMENT_OIDS[oid]
    write = _WRITERS[element_oid]
    if not values:
        return _EMPTY.pack(0, 0, element_oid)
    parts = [_HEAD.pack(1, None in values, element_oid, len(values), 1)]
    for value in values:
        if value is None:
            parts.append(_NULL)
        else:
            data = write(value)
            parts += (_I4.pack(len(data)), data)
    return b"".join(parts)


def raw_rows(result: pq.abc.PGresult) -> list[Row]:
    """Rows as they came."""
    columns = range(result.nfields)
    return [[result.get_value(row, column) for column in columns] for row in range(result.ntuples)]


def typed_rows(
    result: pq.abc.PGresult, unseal: Callable[[bytes], bytes] | None = None
) -> list[tuple[Any, ...]]:
    """Rows of Python values; `unseal` is applied to each bytea."""
    readers = [_READERS[result.ftype(column)] for column in range(result.nfields)]
    if unseal is not None:
        readers = [unseal if reader is bytes else reader for reader in readers]
    return [
        tuple(
            [
                None if value is None else read(value)
                for read, value in zip(readers, row, strict=True)
            ]
        )
        for row in raw_rows(result)
    ]


def read_moment(data: bytes) -> datetime:
    """A timestamptz."""
    moment: datetime = _POSTGRES_EPOCH + _I8.unpack(data)[0] * _MICROSECOND
    return moment


def read_counts(result: pq.abc.PGresult) -> list[int]:
    """A row of bigints that are not NULL."""
    return [_I8.unpack(value)[0] for value in raw_rows(result)[0] if value is not None]


# By the type's OID; `void` is what a function gives that gives nothing.
_READERS: dict[int, Callable[[bytes], Any]] = {
    UUID_OID: lambda data: UUID(bytes=data),
    TEXT_OID: lambda data: data.decode(),
    INT_OID: lambda data: _I4.unpack(data)[0],
    20: lambda data: _I8.unpack(data)[0],
    BYTES_OID: bytes,
    TIME_OID: read_moment,
    BOOL_OID: lambda data: data == b"\1",
    2278: lambda _: None,
}


class Statement:
    """A statement of `sql/`, prepared once per connection.

    Args:
        name: Its name there, and on the server.
        query: Its text, with `%(name)s` parameters.
        oids: Type of each parameter.

    Attributes:
        names: Of its parameters, in order.
        text, oids: As the server is given them.
    """

    def __init__(self, name: str, query: str, oids: dict[str, int]) -> None:
        self.names = list(dict.fromkeys(_PLACE.findall(query)))
        numbers = {parameter: f"${place + 1}" for place, parameter in enumerate(self.names)}
        text = _PLACE.sub(lambda found: numbers[found.group(1)], query).replace("%%", "%")
        self.name = name
        self._name = f"kagzi_{name}".encode()
        self.text = text.encode()
        self.oids = [oids[parameter] for parameter in self.names]
        self._formats = [pq.Format.BINARY] * len(self.names)

    def messages(
        self,
        connection: psycopg.AsyncConnection[Any],
        values: Mapping[str, bytes | None],
        known: set[str] | None,
    ) -> Generator[Any, Any, pq.abc.PGresult]:
        """Prepare it, unless it is `known` to the server, and execute it; its rows are in binary.

        With `known` None it is sent whole each time: the next backend may be another one. For
        `AsyncConnection.wait`, under the connection's lock.
        """
        pgconn = connection.pgconn
        parameters = [values[name] for name in self.names]
        if known is None:
            pgconn.send_query_params(
                self.text, parameters, self.oids, self._formats, pq.Format.BINARY
            )
        else:
            if self.name not in known:
                pgconn.send_prepare(self._name, self.text, self.oids)
                raise_failure((yield from generators.execute(pgconn)))
                known.add(self.name)  # whatever becomes of this execution
            pgconn.send_query_prepared(self._name, parameters, self._formats, pq.Format.BINARY)
        results = yield from generators.execute(pgconn)
        raise_failure(results)
        return results[-1]  # type: ignore[no-any-return]

    def encode(self, values: Mapping[str, Any]) -> dict[str, bytes | None]:
        """Values by parameter, as `messages` takes them."""
        return {
            name: binary_value(oid, values[name])
            for name, oid in zip(self.names, self.oids, strict=True)
        }


def raise_failure(results: Sequence[Any]) -> None:
    """Raise the error that the server answered with, if it did."""
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")
