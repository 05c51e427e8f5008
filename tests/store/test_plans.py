"""Which indexes serve the engine's statements when there are 100,000 runs.

All statements are planned for any parameters, as the server does when it has been asked the same
often enough; those that look for runs also for parameters as they are. Nothing is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import generators, pq, sql

from kagzi.store.connections import Connector
from kagzi.store.desk import start_statements
from kagzi.store.forms import make_statements
from kagzi.store.queries import load_queries
from kagzi.store.statements import Statement, raise_failure
from tests.fix_db import Databases

QUERIES = load_queries("kagzi")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SOME_RUN, SOME_WORKER = UUID(int=1), UUID(int=2)

# Nine in ten runs have ended; of the others most wait or sleep, some are held by five workers.
MANY = """
INSERT INTO kagzi.workers (id, host, boot_id, pid, process_started, status)
SELECT md5(n::text)::uuid, 'h', 'b', n, '', CASE WHEN n = 5 THEN 'ended' ELSE 'active' END
FROM generate_series(1, 5) n;

INSERT INTO kagzi.schedules (id, workflow, version, pinned, cron, timezone, catch_up, overlap,
    next_at, input)
SELECT 's' || n, 'w', '1', false, '* * * * *', 'UTC', 'last',
    (ARRAY['allow', 'skip', 'cancel'])[1 + n % 3], now() + n * interval '1 minute', '[]'
FROM generate_series(1, 1000) n;

INSERT INTO kagzi.workflow_runs (id, external_id, workflow, version, status, input, wake_at, epoch,
    worker_id, created_at, started_at, completed_at, schedule_id, scheduled_at)
SELECT md5('run' || n)::uuid, 'run' || n, 'w' || n % 7, '1', s.status, '[]',
    CASE s.status WHEN 'sleeping' THEN now() + n * interval '1 minute'
        ELSE now() - n * interval '1 second' END, 1,
    CASE WHEN s.status = 'running' THEN md5((1 + n % 5)::text)::uuid END,
    now() - n * interval '1 minute',
    CASE WHEN s.status <> 'pending' THEN now() - n * interval '1 minute' END,
    CASE WHEN s.status IN ('completed', 'failed') THEN now() - n * interval '30 seconds' END,
    CASE WHEN n % 4 = 0 THEN 's' || n % 1000 END,
    CASE WHEN n % 4 = 0 THEN now() - n * interval '1 minute' END
FROM generate_series(1, 100000) n
CROSS JOIN LATERAL (SELECT CASE
    WHEN n % 100 < 3 THEN 'pending' WHEN n % 100 < 8 THEN 'sleeping' WHEN n % 100 = 8 THEN 'running'
    WHEN n % 100 = 9 THEN 'failed' ELSE 'completed' END AS status) s;

INSERT INTO kagzi.step_runs (run_id, step_id, function, status, input_hash, attempts, started_at,
    completed_at, call_number, completed_number, worker_id, process_id)
SELECT md5('run' || n)::uuid, 'step' || m, 'f', 'completed', '', 1, now(), now(), m, m,
    md5('1')::uuid, 0
FROM generate_series(1, 20000) n, generate_series(1, 3) m;

INSERT INTO kagzi.memos (key, function, output, run_id, expires_at)
SELECT n::text::bytea, 'f', '', md5('1')::uuid, now() + n * interval '1 minute'
FROM generate_series(1, 20000) n
"""

BEGINNING = {"after_at": datetime.min.replace(tzinfo=UTC), "after_id": UUID(int=0)}
IDS = [uuid4() for _ in range(100)]
PARAMETERS: dict[str, dict[str, Any]] = {
    "claim_runs": {
        **{"worker_id": SOME_WORKER, "names": ["w1", "w2"], "versions": ["1", "1"], "most": 100},
        **{"suspects": 1, "takes_default": True, "served": None},
    },
    "free_strays": {"worker_id": SOME_WORKER, "run_ids": IDS},
    "free_runs": {},
    "list_runs": {"status": None, "queue": None, "workflow": None, "most": 50},
    "list_runs of a status": {"status": "failed", "queue": None, "workflow": None, "most": 50},
    "list_runs of a workflow": {"status": None, "queue": None, "workflow": "w1", "most": 50},
    "start_ticks": {
        **{"ids": ["s1", "s2"], "revisions": [1, 1], "next_ats": [NOW, NOW]},
        **{"later_ats": [NOW, NOW], "tick_ids": ["s1", "s2"], "run_ids": IDS[:2]},
        **{"external_ids": ["s1@a", "s2@b"], "ticks": [NOW, NOW]},
    },
    "find_overlapped": {},
    "find_expired_runs": {"retain_s": 30 * 86_400.0, "most": 500, **BEGINNING},
    "find_expired_runs of a short time": {"retain_s": 60.0, "most": 500, **BEGINNING},
    "find_expired_runs from one on": {
        **{"retain_s": 60.0, "most": 500, "after_at": NOW, "after_id": SOME_RUN},
    },
    "delete_runs": {"run_ids": IDS},
    "delete_expired_memos": {"most": 2000},
}
LARGE = {"workflow_runs", "step_runs", "memos"}

# By which index the runs are found, where another one would read more of them than it should.
EXPECTED = {
    "claim_runs": {"workflow_runs_due", "workflow_runs_suspect"},
    "free_runs": {"workflow_runs_held"},
    "free_strays": {"workflow_runs_held"},
    "list_runs": {"workflow_runs_created"},
    "find_overlapped": {"workflow_runs_of_schedule"},
    "start_ticks": {"workflow_runs_of_schedule"},
    "find_expired_runs": {"workflow_runs_finished"},
    "delete_expired_memos": {"memos_expiry"},
}


@pytest.fixture(scope="module")
def connection(databases: Databases) -> Iterator[psycopg.Connection[Any]]:
    """A database with many runs in it, whose statistics are true."""
    name = databases.clone()
    with psycopg.connect(databases.dsn_of(name), autocommit=True) as made:
        made.execute(MANY)
        made.execute("VACUUM ANALYZE")
        yield made
    databases.retire(name)


def plan_of(
    connection: psycopg.Connection[Any], statement: str, parameters: dict[str, Any], mode: str
) -> dict[str, Any]:
    query = QUERIES[statement]
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", query)))
    for number, name in enumerate(names, 1):
        query = query.replace(f"%({name})s", f"${number}")
    connection.execute(f"SET plan_cache_mode = force_{mode}_plan".encode())
    connection.execute(f"PREPARE planned AS {query.replace('%%', '%')}".encode())
    try:
        values = sql.SQL(", ").join(sql.Literal(parameters[name]) for name in names)
        execute = sql.SQL("({})").format(values) if names else sql.SQL("")
        explain = sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE planned {}").format(execute)
        (row,) = connection.execute(explain).fetchall()
    finally:
        connection.execute("DEALLOCATE planned")
    plan = row[0] if isinstance(row[0], list) else json.loads(row[0])
    return plan[0]["Plan"]  # type: ignore[no-any-return]


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes_of(inner)


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_statement_finds_its_rows_by_an_index(
    case: str, mode: str, connection: psycopg.Connection[Any]
) -> None:
    nodes = list(nodes_of(plan_of(connection, case.split()[0], PARAMETERS[case], mode)))
    whole = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
    assert not whole & LARGE
    used = {node["Index Name"] for node in nodes if "Index Name" in node}
    assert EXPECTED.get(case, set()) <= used


async def test_plans_that_are_kept_suit_large_tables_though_they_were_made_for_empty_ones(
    dsn: str,
) -> None:
    """A worker prepares its statements once, maybe before there was a row."""
    connector = Connector(dsn)
    kept = {**make_statements(QUERIES), **start_statements(QUERIES)}
    async with await connector.connect() as connection:
        await connector.plan_once(connection)
        for name, statement in kept.items():
            await connection.wait(prepared(connection.pgconn, statement))
            nothing = ", ".join(["NULL"] * len(statement.names))
            explain = f"EXPLAIN (FORMAT JSON) EXECUTE kagzi_{name} ({nothing})"
            cursor = await connection.execute(explain.encode())
            (row,) = await cursor.fetchall()
            nodes = list(nodes_of(row[0][0]["Plan"]))
            whole = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
            assert not whole & LARGE, name
            used = {node["Index Name"] for node in nodes if "Index Name" in node}
            assert used <= FEW_ROWS, name
            assert used >= FIRST_OF_ALL[name], name


def prepared(pgconn: pq.abc.PGconn, statement: Statement) -> Iterator[Any]:
    pgconn.send_prepare(f"kagzi_{statement.name}".encode(), statement.text, statement.oids)
    raise_failure((yield from generators.execute(pgconn)))


# Indexes that give as many rows as they are asked for.
FEW_ROWS = {
    "workers_pkey",
    "step_runs_pkey",
    "parallel_groups_pkey",
    "workflow_runs_pkey",
    "queues_pkey",
    "workflow_versions_default",
}
FIRST_OF_ALL = {
    "write_step": {"workers_pkey"},
    "write_run": {"workers_pkey", "workflow_runs_pkey"},
    "write_steps": {"workers_pkey"},
    "write_group": {"workers_pkey"},
    "write_rows": {"workers_pkey", "workflow_runs_pkey", "step_runs_pkey"},
    "insert_start": {"workers_pkey"},
    "insert_starts": {"workers_pkey"},
}


# Questions of a person that count all runs, or all that are not finished.
READ_ALL = {"list_versions", "list_queues", "count_to_check"}
# Not statements for the planner, or prepared with the types of their parameters declared.
NOT_PLANNED = {"begin_check", *make_statements(QUERIES)}


@pytest.mark.parametrize("statement", sorted(QUERIES.keys() - READ_ALL - NOT_PLANNED))
def test_no_statement_reads_a_whole_table_when_it_is_planned_for_any_parameters(
    statement: str, connection: psycopg.Connection[Any]
) -> None:
    assert not read_whole(connection, statement) & LARGE


@pytest.mark.parametrize("statement", sorted(READ_ALL))
def test_a_statement_that_reads_all_runs_is_seen(
    statement: str, connection: psycopg.Connection[Any]
) -> None:
    """The control."""
    assert read_whole(connection, statement) & LARGE


def read_whole(connection: psycopg.Connection[Any], statement: str) -> set[str]:
    names = re.findall(r"%\((\w+)\)s", QUERIES[statement])
    nodes = nodes_of(plan_of(connection, statement, dict.fromkeys(names), "generic"))
    return {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
