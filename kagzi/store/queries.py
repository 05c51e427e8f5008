"""Loads `queries.sql`: each statement under its name, with the schema's name put in."""

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
    text = (files("kagzi.store") / "queries.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)
    names, bodies = parts[1::2], parts[2::2]
    return {
        name: body.strip().rstrip(";").replace("{schema}", quoted)
        for name, body in zip(names, bodies, strict=True)
    }
