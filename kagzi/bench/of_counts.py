"""What work costs the server, in counts: they do not drift with the machine's day."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql

from kagzi.bench import work
from kagzi.bench.catalogue import Suites
from kagzi.bench.counters import ServerCounters
from kagzi.bench.many import all_at_once
from kagzi.bench.measure import Figure
from kagzi.bench.session import Bench, Session
from kagzi.bench.tap import Tap

Scenario = Callable[[Session], Awaitable[Any]]

COUNTERS = {
    "statements": "",
    "round trips": "",
    "transactions": "",
    "write transactions": "",
    "rows": "",
    "WAL": "bytes",
}

SUITES = Suites()


def _memos(size: int) -> Scenario:
    async def run(session: Session) -> None:
        key = str(uuid4())
        await session.run(work.remembered_together, key, size)
        await session.run(work.remembered_together, key, size)

    return run


def _run(*args: Any) -> Scenario:
    return lambda session: session.run(*args)


SCENARIOS: dict[str, Scenario] = {
    "group of 10": _run(work.nothings, 10),
    "group of 100": _run(work.nothings, 100),
    "group of 1,000": _run(work.nothings, 1000),
    "sequence of 20": _run(work.nothings_in_sequence, 20),
    "race of 10": _run(work.raced, 10, 0.01, 1.0),
    "run of one step": _run(work.of_steps, 1),
    "100 runs of one step": lambda session: all_at_once(session.client, 100, 1),
    "replay of 100": lambda session: session.drive_again(1, 100, 0.0, True),
    "100 memos, twice": _memos(100),
}


@SUITES.add(
    "counts",
    "What runs cost the server, from start to result",
    "Least of the rounds. Statements, round trips and transactions are counted between worker and "
    "server, by the server's answers; those that write and WAL by the server itself, rows in the "
    "tables.",
)
async def counts(bench: Bench) -> list[Figure]:
    seen: dict[tuple[str, str], list[float]] = {}
    with (
        closing(ServerCounters(bench.conninfo)) as counters,
        psycopg.connect(bench.conninfo, autocommit=True) as connection,
    ):
        async with bench.counted_session(processes=1) as (session, tap):
            for scenario in SCENARIOS.values():
                await scenario(session)
            for _ in bench.rounds(full=5, quick=4):
                for name, scenario in SCENARIOS.items():
                    before = await _read(bench, counters, connection, tap)
                    await scenario(session)
                    after = await _read(bench, counters, connection, tap)
                    for counter, value in after.items():
                        seen.setdefault((name, counter), []).append(value - before[counter])
    return [
        Figure(f"{name}: {counter}", None, COUNTERS[counter], [min(values)])
        for (name, counter), values in seen.items()
    ]


async def _read(
    bench: Bench, counters: ServerCounters, connection: psycopg.Connection[Any], tap: Tap
) -> dict[str, float]:
    traffic = await tap.settled()
    rows = _rows(connection, bench.schema)
    count = counters.count()
    return {
        "statements": traffic.statements,
        "round trips": traffic.round_trips,
        "transactions": traffic.transactions,
        "write transactions": count.transactions,
        "rows": rows,
        "WAL": count.wal_bytes,
    }


def _rows(connection: psycopg.Connection[Any], schema: str) -> int:
    query = "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r'"
    tables = [name for (name,) in connection.execute(query, [schema]).fetchall()]
    total = 0
    for table in tables:
        statement = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, table))
        row = connection.execute(statement).fetchone()
        total += row[0] if row is not None else 0
    return total
