"""Faults: looks into the database from outside, and workers in processes of their own."""

from __future__ import annotations

from typing import Any

import psycopg


async def rows(dsn: str, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    """What a statement gives, over a connection of its own."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(query.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []


async def value(dsn: str, query: str, **parameters: Any) -> Any:
    """The one value that a statement gives."""
    return (await rows(dsn, query, **parameters))[0][0]


async def orphans(dsn: str) -> list[tuple[Any, ...]]:
    """Rows that belong to no run."""
    query = " UNION ALL ".join(
        f"SELECT '{table}', t.run_id, count(*) FROM kagzi.{table} t"  # noqa: S608
        " WHERE NOT EXISTS (SELECT FROM kagzi.workflow_runs r WHERE r.id = t.run_id) GROUP BY 2"
        for table in ("step_runs", "step_attempts", "parallel_groups")
    )
    return await rows(dsn, query)
