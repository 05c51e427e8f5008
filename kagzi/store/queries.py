"""Loads `sql/*.sql`: each statement under its name, with the schema's name put in.

What several statements of a file say alike stands there once, under `-- part: name`, and
`{name}` stands for it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

from psycopg import sql

_HEAD = re.compile(r"^-- (name|part): (\w+)\n", re.MULTILINE)


@lru_cache(maxsize=8)
def load_queries(schema: str) -> dict[str, str]:
    """Statements by name, complete but for their parameters."""
    quoted = sql.Identifier(schema).as_string(None)
    queries: dict[str, str] = {}
    for file in (files("kagzi.store") / "sql").iterdir():
        for name, text in _read(file.read_text(encoding="utf-8")).items():
            assert name not in queries, f"{name} is defined twice, once in {file.name}"
            queries[name] = text.replace("{schema}", quoted)
    return queries


def _read(text: str) -> dict[str, str]:
    """The statements of one file, with its parts put in."""
    pieces = _HEAD.split(text)
    parts: dict[str, str] = {}
    queries: dict[str, str] = {}
    for kind, name, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        for part, said in parts.items():
            body = body.replace(f"{{{part}}}", said)
        known = parts if kind == "part" else queries
        assert name not in known, f"{name} is defined twice"
        known[name] = body.strip().rstrip(";")
    return queries
