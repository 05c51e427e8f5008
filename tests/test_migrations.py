"""The migration runner, and the schema that the migrations make."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from kagzi.errors import (
    InvalidDsn,
    InvalidName,
    SchemaChanged,
    SchemaMissing,
    SchemaTooNew,
    ServerTooOld,
    StoreError,
    StoreForbidden,
    StoreUnavailable,
)
from kagzi.store import migrate as migrating
from kagzi.store.migrate import Migration, check, migrate, migrations, pending, script

ROOT = Path(__file__).parents[1]

# What two databases must have alike, as one sorted list of texts.
CATALOG = """
SELECT concat_ws(' ', relkind, relname, relpersistence, reloptions)
  FROM pg_class WHERE relnamespace = %(schema)s::regnamespace
UNION ALL
SELECT concat_ws(' ', c.relname, attnum, attname, format_type(atttypid, atttypmod),
              attnotnull, attcollation::regcollation, pg_get_expr(adbin, adrelid))
  FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
  LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  WHERE relnamespace = %(schema)s::regnamespace AND attnum > 0
UNION ALL
SELECT concat_ws(' ', conname, pg_get_constraintdef(oid))
  FROM pg_constraint WHERE connamespace = %(schema)s::regnamespace
UNION ALL
SELECT indexdef FROM pg_indexes WHERE schemaname = %(name)s
UNION ALL
SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = %(schema)s::regnamespace
ORDER BY 1
"""


def catalog(dsn: str, schema: str = "kagzi") -> list[str]:
    quoted = sql.Identifier(schema).as_string(None)
    with psycopg.connect(dsn) as connection:
        objects = connection.execute(CATALOG, {"schema": quoted, "name": schema}).fetchall()
        columns = sql.SQL("SELECT version, name, checksum FROM {} ORDER BY 1")
        table = sql.Identifier(schema, "schema_migrations")
        applied = connection.execute(columns.format(table)).fetchall()
    return [row[0] for row in objects] + [str(row) for row in applied]


def run(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def role_dsn(empty_dsn: str) -> Iterator[str]:
    """`empty_dsn` as a role that may connect and nothing else."""
    role = f"kagzi_test_{uuid.uuid4().hex[:8]}"
    run(empty_dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'secret-password'")
    yield make_conninfo(empty_dsn, user=role, password="secret-password")
    run(empty_dsn, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def role_of(dsn: str) -> str:
    return str(conninfo_to_dict(dsn)["user"])


def with_further(monkeypatch: pytest.MonkeyPatch, text: str) -> Migration:
    """As if the code had one more migration."""
    known = migrations()
    further = Migration(len(known) + 1, "further", text, "0" * 32)
    monkeypatch.setattr(migrating, "migrations", lambda: (*known, further))
    return further


# --- applying -------------------------------------------------------------------------------


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    assert [migration.version for migration in migrations()] == [
        *range(1, len(migrations()) + 1),
    ]


def test_migrate_applies_each_migration_once(empty_dsn: str) -> None:
    assert migrate(empty_dsn) == list(migrations())
    assert migrate(empty_dsn) == []
    rows = run(empty_dsn, "SELECT version FROM kagzi.schema_migrations ORDER BY version")
    assert [version for (version,) in rows] == [m.version for m in migrations()]


def test_eight_processes_migrating_at_once_leave_one_clean_schema(empty_dsn: str, dsn: str) -> None:
    program = (
        "import sys; from kagzi.store.migrate import migrate; sys.stdin.readline(); "
        "print(len(migrate(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_dsn],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    told = sorted(int(process.communicate("go\n")[0]) for process in processes)
    assert told == [0] * 7 + [len(migrations())]
    assert [process.returncode for process in processes] == [0] * 8
    assert catalog(empty_dsn) == catalog(dsn)


def test_only_the_missing_migration_is_applied(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    further = with_further(monkeypatch, "CREATE TABLE further (id integer);")
    assert migrate(dsn) == [further]
    assert run(dsn, "SELECT * FROM kagzi.further") == []


def test_failing_migration_leaves_nothing_behind(
    empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_further(monkeypatch, "CREATE TABLE half (id integer); SELECT 1 / 0;")
    with pytest.raises(StoreError, match="division by zero"):
        migrate(empty_dsn)
    assert run(empty_dsn, "SELECT to_regnamespace('kagzi')") == [(None,)]


@pytest.mark.parametrize("schema", ["other", 'Odd "name" with {schema} and %s; --', "ünïcödé"])
def test_schema_may_have_another_name(empty_dsn: str, schema: str) -> None:
    migrate(empty_dsn, schema)
    migrate(empty_dsn, "kagzi")
    assert len(catalog(empty_dsn, schema)) == len(catalog(empty_dsn))
    hold_fence = sql.SQL("SELECT {}(gen_random_uuid())").format(
        sql.Identifier(schema, "hold_fence")
    )
    # Without any search path the function finds its own schema's table.
    with psycopg.connect(empty_dsn, options="-c search_path=") as connection:
        with pytest.raises(psycopg.Error) as raised:
            connection.execute(hold_fence)
    assert raised.value.sqlstate == "KZ001"


@pytest.mark.parametrize("schema", ["", "x" * 64, "a\nb"])
def test_schema_name_that_postgres_would_not_keep_is_refused(schema: str) -> None:
    with pytest.raises(InvalidName):
        migrate("host=/nonexistent", schema)
    with pytest.raises(InvalidName):
        script(schema)


def test_nothing_to_do_takes_one_statement_and_no_lock(dsn: str) -> None:
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(hashtextextended('kagzi.migrate:kagzi', 0))")
        assert migrate(dsn) == []


# --- refusing -------------------------------------------------------------------------------


def test_database_of_a_newer_kagzi_is_refused(dsn: str) -> None:
    run(dsn, "INSERT INTO kagzi.schema_migrations VALUES (9999, 'from_the_future', '')")
    with pytest.raises(SchemaTooNew, match="9999"):
        migrate(dsn)
    with psycopg.connect(dsn) as connection, pytest.raises(SchemaTooNew):
        check(connection)


def test_edited_migration_is_refused(dsn: str) -> None:
    run(dsn, "UPDATE kagzi.schema_migrations SET checksum = 'another' WHERE version = 1")
    with pytest.raises(SchemaChanged, match="Migration 1"):
        migrate(dsn)


def test_check_tells_what_is_missing(empty_dsn: str, dsn: str) -> None:
    with psycopg.connect(empty_dsn) as connection:
        assert pending(connection) == list(migrations())
        with pytest.raises(SchemaMissing, match="kagzi migrate"):
            check(connection)
        assert connection.execute("SELECT 1").fetchone() == (1,)  # its transaction is sound
    with psycopg.connect(dsn) as connection:
        check(connection)


def test_role_without_rights_is_told_about_the_printed_sql(role_dsn: str) -> None:
    with pytest.raises(StoreForbidden, match="kagzi migrate --print") as raised:
        migrate(role_dsn)
    assert role_of(role_dsn) in str(raised.value)
    assert "secret-password" not in str(raised.value)


def test_role_may_migrate_a_schema_that_was_made_for_it(empty_dsn: str, role_dsn: str) -> None:
    run(empty_dsn, f"CREATE SCHEMA kagzi AUTHORIZATION {role_of(role_dsn)}")
    assert migrate(role_dsn) == list(migrations())


def test_read_only_server_is_refused_as_forbidden(empty_dsn: str) -> None:
    read_only = make_conninfo(empty_dsn, options="-c default_transaction_read_only=on")
    with pytest.raises(StoreForbidden):
        migrate(read_only)


def test_server_that_is_too_old_is_refused(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrating, "OLDEST_SERVER", 990000)
    with pytest.raises(ServerTooOld, match="99"):
        migrate(empty_dsn)


def test_unreachable_server_is_told_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable) as raised:
        migrate(f"host={tmp_path} dbname=orders password=secret-password")
    assert "secret-password" not in str(raised.value)
    assert raised.value.host == str(tmp_path)
    assert raised.value.database == "orders"


def test_unreadable_dsn_is_told_without_the_password() -> None:
    with pytest.raises(InvalidDsn) as raised:
        migrate("postgresql://user:secret-password@host:port:port/x?y")
    assert "secret-password" not in str(raised.value)


# --- printing -------------------------------------------------------------------------------


def test_printed_sql_makes_the_identical_schema(empty_dsn: str, dsn: str) -> None:
    run(empty_dsn, script())
    assert catalog(empty_dsn) == catalog(dsn)
    assert migrate(empty_dsn) == []


def test_printed_sql_run_twice_changes_nothing(empty_dsn: str) -> None:
    run(empty_dsn, script())
    before = catalog(empty_dsn)
    with pytest.raises(psycopg.errors.DuplicateTable):
        run(empty_dsn, script())
    assert catalog(empty_dsn) == before


def test_printed_sql_for_an_older_schema_holds_only_what_it_lacks(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = len(migrations())
    with_further(monkeypatch, "CREATE TABLE further (id integer);")
    run(dsn, script(after=present))
    assert migrate(dsn) == []


def test_role_with_the_printed_grants_can_use_the_schema(empty_dsn: str, role_dsn: str) -> None:
    text = script()
    grants = re.findall(r"GRANT .*;", text)
    assert len(grants) == 3
    run(empty_dsn, text + "\n".join(grants).replace("the_role", role_of(role_dsn)))
    assert migrate(role_dsn) == []
    assert run(role_dsn, "SELECT count(*) FROM kagzi.workflow_runs") == [(0,)]
    assert run(role_dsn, "SELECT kagzi.now_at() IS NOT NULL") == [(True,)]
