"""Loads `sql/*.sql`: each statement under its name, with the schema's name put in."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

from psycopg import sql

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@lru_cache(maxsize=8)
def load_queries(schema: str) -> dict[str, str]:
    """Statements by name, complete but for their parameters."""
    quoted = sql.Identifier(schema).as_string(None)
    queries: dict[str, str] = {}
    for file in (files("kagzi.store") / "sql").iterdir():
        parts = _NAME.split(file.read_text(encoding="utf-8"))
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            assert name not in queries, f"{name} is defined twice, once in {file.name}"
            queries[name] = body.strip().rstrip(";").replace("{schema}", quoted)
    return queries
