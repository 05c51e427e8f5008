"""Processes that migrate one empty database at once: `python -m tests.faults.migrating 200`."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from kagzi.store.migrate import check, migrate, migrations
from tests.faults.trial import Server

PROCESSES = 8


def _migrate(dsn: str, together: Any) -> None:
    together.wait(30)
    migrate(dsn)


def migrate_together(server: Server, times: int) -> int:
    """So often; how many processes failed. Each time the schema must be whole, and made once."""
    context = multiprocessing.get_context("fork")
    failed = 0
    for number in range(times):
        name = f"empty_{number}"
        server.execute("postgres", f"CREATE DATABASE {name} TEMPLATE template0")
        dsn = make_conninfo(server.dsn_of(name), application_name="kagzi")
        together = context.Barrier(PROCESSES)
        started = [context.Process(target=_migrate, args=(dsn, together)) for _ in range(PROCESSES)]
        for process in started:
            process.start()
        for process in started:
            process.join(60)
            failed += process.exitcode != 0
        with psycopg.connect(dsn, autocommit=True) as connection:
            check(connection)
            count = connection.execute("SELECT count(*) FROM kagzi.schema_migrations").fetchone()
            assert count == (len(migrations()),)
        server.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")
    return failed


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with Server() as server:
        print(f"{times} times {PROCESSES} processes: {migrate_together(server, times)} failed")
