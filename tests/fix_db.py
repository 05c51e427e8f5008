"""Databases for tests: `dsn` is one with kagzi's schema in it, `empty_dsn` one without.

Each test gets its own, cloned from a template that the session migrated once (16 ms), and dropped
afterwards. The server is that of `DATABASE_URL`, else an embedded one with a data folder of its own
that stays between sessions. Any number of sessions may share a server.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from kagzi.store import embedded
from kagzi.store.migrate import migrate

_PREFIX = "kagzi_test_"


def data_folder_of_tests() -> Path:
    """Where the embedded server of the tests keeps its data; reachable for root's server too."""
    chosen = os.environ.get("KAGZI_TEST_DATA")
    base = "/var/tmp" if os.geteuid() == 0 else tempfile.gettempdir()
    return Path(chosen or base) / f"kagzi-tests-{os.geteuid()}"


class Databases:
    """Makes and drops the databases of one test session.

    A session's databases share a random prefix, on which it holds an advisory lock. What a killed
    session left behind is recognised by the lock being free.
    """

    def __init__(self, server_dsn: str, admin: psycopg.Connection[Any]) -> None:
        self._server_dsn = server_dsn
        self._admin = admin
        self._prefix = f"{_PREFIX}{uuid.uuid4().hex[:8]}_"
        self._numbers = itertools.count(1)
        self._retired: list[str] = []
        self._template = ""

    def prepare(self) -> None:
        self._lock(self._prefix)
        self._drop_leftovers()
        self._template = self.create("template0")
        migrate(self.dsn_of(self._template))

    def drop_all(self) -> None:
        self._drop_all(self._prefix)

    def clone(self) -> str:
        return self.create(self._template)

    def create(self, template: str) -> str:
        while self._retired:
            self._drop(self._retired.pop())
        name = f"{self._prefix}{next(self._numbers)}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self._admin.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def retire(self, name: str) -> None:
        """Dropped before the next is made: DROP waits 0.1 s where a connection is just closing."""
        self._retired.append(name)

    def _drop(self, name: str) -> None:
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        self._admin.execute(statement.format(sql.Identifier(name)))

    def dsn_of(self, name: str) -> str:
        return make_conninfo(self._server_dsn, dbname=name)

    def _lock(self, prefix: str) -> bool:
        query = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
        return self._admin.execute(query, [prefix]).fetchone() == (True,)

    def _drop_leftovers(self) -> None:
        for prefix in {name[: len(self._prefix)] for name in self._names(_PREFIX)}:
            if prefix != self._prefix and self._lock(prefix):
                self._drop_all(prefix)

    def _drop_all(self, prefix: str) -> None:
        for name in self._names(prefix):
            self._drop(name)

    def _names(self, prefix: str) -> list[str]:
        query = "SELECT datname FROM pg_database WHERE starts_with(datname, %s)"
        return [name for (name,) in self._admin.execute(query, [prefix])]


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """The server that the tests use; its own database is left alone."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield given
        return
    with embedded.attach(data_folder_of_tests()) as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            # A database per test is many small files: a busy disk would set the pace. What is
            # committed still outlives every process; only the machine must not go down.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server.dsn


@pytest.fixture(scope="session")
def databases(server_dsn: str) -> Iterator[Databases]:
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        made = Databases(server_dsn, admin)
        try:
            made.prepare()
            yield made
        finally:
            made.drop_all()


@pytest.fixture
def dsn(databases: Databases) -> Iterator[str]:
    """A database with the present schema and no rows."""
    name = databases.clone()
    yield databases.dsn_of(name)
    databases.retire(name)


@pytest.fixture
def empty_dsn(databases: Databases) -> Iterator[str]:
    """A database without kagzi's schema."""
    name = databases.create("template0")
    yield databases.dsn_of(name)
    databases.retire(name)
