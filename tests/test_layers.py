"""The layers: a module imports only from rows below its own. See docs/architecture.md."""

import ast
from pathlib import Path

import pytest

import kagzi

PACKAGE = Path(kagzi.__file__).parent

# From the top. A name stands for a module or a whole subpackage.
ROWS = [
    {"__main__"},
    {"cli"},
    {"demo", "terminal"},
    {"__init__", "bench", "serve", "show"},
    {"client"},
    {"worker"},
    {"runner"},
    {"answers", "group", "remote", "sleeping"},
    {"context", "inner", "local", "pool", "targets", "work"},
    {"host", "registry"},
    {"definition"},
    {"attempts", "codec", "heartbeat", "listener", "retrying", "tasks"},
    {"equality", "store", "typed"},
    {"plain", "records", "scope", "timeline"},
    {"_build_check", "containers", "failures", "model", "parameters", "retry", "scalars"},
    {"errors", "executor", "plans"},
    {"_core", "clock", "ids", "incarnation", "loop_watch", "names", "stream", "timers"},
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}

# These know no clock, socket, event loop or randomness, so they are tested without Postgres.
PURE = {
    *("codec", "definition", "registry", "retry", "scope", "typed"),
    *("containers", "errors", "failures", "model", "names", "parameters", "plans", "records"),
}
IMPURE = {
    "asyncio",
    "multiprocessing",
    "psycopg",
    "random",
    "secrets",
    "socket",
    "threading",
    "time",
}


def modules() -> dict[Path, str]:
    """Every source file, with the name that stands for it in `ROWS`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        found[path] = parts[0].removesuffix(".py")
    return found


MODULES = modules()


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, wherever in it, with the line."""
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


def test_every_module_has_its_row() -> None:
    assert sum(len(row) for row in ROWS) == len(ROW_OF), "a name stands in two rows"
    assert set(ROW_OF) == {*MODULES.values(), "_core"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_rows_below_its_own(path: Path) -> None:
    own = MODULES[path]
    upward = [
        f"line {line}: {imported}"
        for line, imported in imports_of(path)
        if imported.startswith("kagzi.")
        and (name := imported.split(".")[1]) in ROW_OF
        and name != own
        and ROW_OF[name] <= ROW_OF[own]
    ]
    assert upward == []


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_module_imports_nothing_that_waits_or_varies(name: str) -> None:
    imported = {module.split(".")[0] for _, module in imports_of(PACKAGE / f"{name}.py")}
    assert imported & IMPURE == set()


def test_only_the_store_and_few_others_speak_to_postgres() -> None:
    speakers = {
        MODULES[path]
        for path in MODULES
        if any(
            module.split(".")[0] in ("psycopg", "psycopg_pool") for _, module in imports_of(path)
        )
    }
    assert speakers <= {"store", "heartbeat", "listener", "bench", "terminal"}
