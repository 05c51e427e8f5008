"""The layers: a module imports only from rows below its own. See docs/architecture.md."""

import ast
from pathlib import Path

import pytest

import kagzi

PACKAGE = Path(kagzi.__file__).parent

# From the top. A name stands for a module or a whole subpackage.
ROWS = [
    {"__main__", "__init__"},
    {"cli"},
    {"demo", "show", "bench"},
    {"client"},
    {"worker", "retrying"},
    {"runner", "answers"},
    {"local", "group", "sleeping", "remote", "attempts", "executor", "heartbeat", "listener"},
    {"context", "work", "inner", "pool"},
    {"host", "store", "tasks", "stream", "timers"},
    {"registry", "scope", "clock", "incarnation", "ids"},
    {"definition"},
    {"codec"},
    {"parameters", "equality", "typed"},
]
PURE = {"scope", "registry", "definition", "codec", "retry", "model", "failures", "errors"}
IMPURE_MODULES = {"asyncio", "socket", "random", "secrets", "psycopg", "threading", "time"}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module of kagzi that a file imports, wherever in it, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "kagzi":
                found += [(node.lineno, f"kagzi.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found
