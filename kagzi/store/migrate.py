"""Brings a database schema up to date: applies `migrations/NNNN_*.sql` in order, once each.

All of a run's migrations are one transaction under an advisory lock, so that any number of
processes may start at once. A migration names its own tables without a schema (the transaction's
search path is the schema); what is resolved later, such as the body of a function, is written
`{schema}.name`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from kagzi.errors import (
    SchemaChanged,
    SchemaMissing,
    SchemaTooNew,
    ServerTooOld,
    StoreError,
    StoreForbidden,
)
from kagzi.model import check_name
from kagzi.store.connections import OLDEST_SERVER, Connector

DEFAULT_SCHEMA = "kagzi"

_PRINT_HINT = (
    "Let somebody with more rights run the output of `kagzi migrate --print`, and grant this role "
    "the use of the schema and of its tables."
)
_TABLE = """\
CREATE TABLE schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
"""
_INSERT = sql.SQL("INSERT INTO schema_migrations (version, name, checksum) VALUES ({}, {}, {})")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of `migrations/`.

    Attributes:
        version: Its number, from 1 without gaps.
        name: The file's name without number and ending.
        sql: Its text, with `{schema}` for the quoted schema.
        checksum: blake2b-16 of the text.
    """

    version: int
    name: str
    sql: str
    checksum: str


# --- what there is --------------------------------------------------------------------------


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """The migrations of this kagzi, in order."""
    found = []
    for file in _folder().iterdir():
        name = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if name is not None:
            text = file.read_text(encoding="utf-8")
            checksum = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            found.append(Migration(int(name[1]), name[2], text, checksum))
    return tuple(sorted(found, key=lambda migration: migration.version))


def _folder() -> Path:
    """The package's folder; a checkout, also one installed as editable, keeps it at its root."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def pending(conn: psycopg.Connection[Any], schema: str = DEFAULT_SCHEMA) -> list[Migration]:
    """What this database still lacks.

    Raises:
        SchemaTooNew: The database has a migration that this kagzi does not know.
        SchemaChanged: It has one whose file has another content now.
        StoreForbidden: The role may not look at the schema.
    """
    applied = _applied(conn, schema)
    _check_known(applied, schema)
    return [migration for migration in migrations() if migration.version not in applied]


def check(conn: psycopg.Connection[Any], schema: str = DEFAULT_SCHEMA) -> None:
    """Raises unless this database has exactly the migrations of this kagzi.

    Raises:
        SchemaMissing: It lacks some, or all; further as `pending`.
    """
    missing = pending(conn, schema)
    if missing:
        numbers = ", ".join(str(migration.version) for migration in missing)
        raise SchemaMissing(
            f"Schema {schema!r} of this database lacks migration(s) {numbers}. "
            "Run `kagzi migrate`; where the role may not, `kagzi migrate --print` shows the SQL."
        )


def missing(conninfo: str, schema: str = DEFAULT_SCHEMA) -> list[Migration]:
    """As `pending`, over a connection of its own. Raises as `migrate`."""
    with _connect(Connector(conninfo, schema)) as conn:
        return pending(conn, schema)


def verify(conninfo: str, schema: str = DEFAULT_SCHEMA) -> None:
    """As `check`, over a connection of its own. Raises as `migrate`."""
    with _connect(Connector(conninfo, schema)) as conn:
        check(conn, schema)


def _applied(conn: psycopg.Connection[Any], schema: str) -> dict[int, str]:
    """Checksums by version; empty where the schema is not there. One cheap SELECT."""
    table = sql.Identifier(schema, "schema_migrations")
    query = sql.SQL("SELECT version, checksum FROM {}").format(table)
    try:
        with conn.transaction():
            return dict(conn.execute(query).fetchall())
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return {}
    except psycopg.errors.InsufficientPrivilege as error:
        raise _forbidden(conn, f"may not read schema {schema!r}") from error


def _check_known(applied: Mapping[int, str], schema: str) -> None:
    known = {migration.version: migration for migration in migrations()}
    newer = sorted(applied.keys() - known.keys())
    if newer:
        raise SchemaTooNew(
            f"Schema {schema!r} of this database has migration {newer[-1]}, made by a newer kagzi; "
            f"this one knows up to {max(known)}. Install the newer kagzi here."
        )
    for version, checksum in applied.items():
        if known[version].checksum != checksum:
            raise SchemaChanged(
                f"Migration {version} ({known[version].name}) was applied to schema {schema!r} "
                "with another content than its file has now. A released migration is never "
                "edited: put the change into a new one. For a throw-away database: DROP SCHEMA."
            )


# --- applying -------------------------------------------------------------------------------


def migrate(conninfo: str, schema: str = DEFAULT_SCHEMA) -> list[Migration]:
    """Apply what is missing. Committed on return, all or nothing.

    Returns:
        What this call applied; nothing when another process was first, or nothing was missing.

    Raises:
        StoreUnavailable, InvalidDsn, ServerTooOld: No usable server.
        StoreForbidden: The role may not change the schema; the message says what to do.
        SchemaTooNew, SchemaChanged: As `pending`.
    """
    connector = Connector(conninfo, schema)
    with _connect(connector) as conn:
        if not pending(conn, schema):
            return []
        try:
            with conn.transaction():
                return _apply(conn, schema)
        except (
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.ReadOnlySqlTransaction,
        ) as error:
            raise _forbidden(conn, f"may not create schema {schema!r}") from error
        except psycopg.OperationalError as error:
            raise connector.unavailable(error) from error
        except psycopg.Error as error:
            raise StoreError(f"A migration of schema {schema!r} failed: {error}") from error


def _apply(conn: psycopg.Connection[Any], schema: str) -> list[Migration]:
    """Within a transaction. Looks again under the lock: another process may have been first."""
    conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [_lock_name(schema)])
    missing = pending(conn, schema)
    if not missing:
        return []
    # CREATE SCHEMA IF NOT EXISTS asks for the right to create one even where it exists.
    if not conn.execute("SELECT FROM pg_namespace WHERE nspname = %s", [schema]).fetchall():
        conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    conn.execute(sql.SQL("SET LOCAL search_path TO {}").format(sql.Identifier(schema)))
    if conn.execute("SELECT to_regclass('schema_migrations')").fetchone() == (None,):
        conn.execute(_TABLE)
    for migration in missing:
        conn.execute(_render(migration, schema).encode())
        conn.execute(_row(migration))
    return missing


def script(schema: str = DEFAULT_SCHEMA, after: int = 0) -> str:
    """What `migrate` would do, as SQL for psql.

    Args:
        schema: Where to.
        after: The newest version that the database has; 0 for none.
    """
    quoted = _quoted(check_name("schema", schema, 63))
    parts = [
        f"-- kagzi: schema {quoted}, migrations after {after}. Run it as one, for example with\n"
        "--   psql --set ON_ERROR_STOP=1 --file this.sql\n"
        "BEGIN;",
        f"SELECT pg_advisory_xact_lock(hashtextextended({_literal(_lock_name(schema))}, 0));",
    ]
    if after == 0:
        parts.append(f"CREATE SCHEMA IF NOT EXISTS {quoted};")
    parts.append(f"SET LOCAL search_path TO {quoted};")
    if after == 0:
        parts.append(_TABLE.rstrip())
    for migration in migrations():
        if migration.version > after:
            parts.append(_render(migration, schema).rstrip())
            parts.append(f"{_row(migration).as_string(None)};")
    parts.append(
        "COMMIT;\n"
        "-- The role that kagzi connects as then needs, unless it is the one that ran this:\n"
        f"--   GRANT USAGE ON SCHEMA {quoted} TO the_role;\n"
        f"--   GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {quoted} TO the_role;\n"
        f"--   GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {quoted} TO the_role;"
    )
    return "\n\n".join(parts) + "\n"


def _render(migration: Migration, schema: str) -> str:
    return migration.sql.replace("{schema}", _quoted(schema))


def _row(migration: Migration) -> sql.Composed:
    return _INSERT.format(migration.version, migration.name, migration.checksum)


def _quoted(schema: str) -> str:
    return sql.Identifier(schema).as_string(None)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None)


def _lock_name(schema: str) -> str:
    return f"kagzi.migrate:{schema}"


# --- connecting -----------------------------------------------------------------------------


@contextlib.contextmanager
def _connect(connector: Connector) -> Iterator[psycopg.Connection[Any]]:
    try:
        # No prepared statements: a pooler may give every transaction another connection.
        conn = psycopg.connect(
            connector.conninfo(application_name="kagzi:migrate"),
            autocommit=True,
            prepare_threshold=None,
        )
    except psycopg.OperationalError as error:
        raise connector.unavailable(error) from None
    try:
        with conn:
            version = conn.info.server_version
            if version < OLDEST_SERVER:
                raise ServerTooOld(
                    f"PostgreSQL at {connector.host} is version {version // 10000}; "
                    f"kagzi needs {OLDEST_SERVER // 10000} or newer"
                )
            yield conn
    except psycopg.OperationalError as error:  # lost since
        raise connector.unavailable(error) from error


def _forbidden(conn: psycopg.Connection[Any], what: str) -> StoreForbidden:
    info = conn.info
    return StoreForbidden(f"Role {info.user!r} {what} in database {info.dbname!r}. {_PRINT_HINT}")
