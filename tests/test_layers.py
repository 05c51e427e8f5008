"""The layers: a module imports only from rows below its own. See docs/architecture.md."""

import ast
from pathlib import Path

import pytest

import kagzi

PACKAGE = Path(kagzi.__file__).parent

# From the top. A name stands for a module, or for all of a subpackage.
ROWS = [
    {"__main__"},
    {"cli"},
    {
        "command.versions",
        "command.check",
        "command.queues",
        "command.schedules",
        "command.retention",
        "command.operations",
        "command.workers",
    },
    {"demo", "bench", "command.terminal"},
    {"command.show", "command.serve", "command.targets"},
    {"command.timeline", "command.plain"},
    {"__init__"},
    {"client"},
    {"operations", "administration", "waiting"},
    {"handle"},
    {"worker", "checking"},
    {"engine.replay"},
    {"engine.runner", "engine.memos"},
    {"engine.answers"},
    {"engine.parking", "engine.bodies", "engine.recall"},
    {"engine.inbox", "engine.children"},
    {
        "engine.local",
        "engine.group",
        "engine.sleeping",
        "engine.patches",
        "engine.attempts",
        "pool.remote",
        "retrying",
        "starting",
        "versions",
        "scheduling",
    },
    {"context", "engine.work", "engine.executor"},
    {"groups"},
    {"relations", "mapping"},
    {"pool.pool"},
    {"pool.child", "pool.link"},
    {"pool.inner", "pool.body", "pool.marks"},
    {
        "host",
        "store",
        "pool.wire",
        "engine.tasks",
        "engine.stream",
        "engine.timers",
        "engine.turns",
    },
    {"registry", "engine.clock", "ids", "payloads", "elsewhere"},
    {"definition", "findings"},
    {"codec", "scope", "retry", "cron"},
    {"model"},
    {"_build_check"},
    {"errors"},
    {"names", "background", "faultpoints", "_core"},
]
PURE = {"names", "cron", "scope", "registry", "definition", "codec", "retry", "model", "errors"}
IMPURE = {"asyncio", "socket", "random", "secrets", "psycopg", "threading", "time", "uvloop"}

MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def imports_of(module: str) -> list[tuple[int, str]]:
    """Every module that a file imports, wherever in it, with the line. Ours without `kagzi.`."""
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = PACKAGE / module.replace(".", "/") / "__init__.py"
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            inside = node.module == "kagzi" or node.module.startswith("kagzi.")
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                is_module = inside and deeper.removeprefix("kagzi.") in [*MODULES, "_core"]
                found.append((node.lineno, deeper if is_module else node.module))
    return [
        (line, name.removeprefix("kagzi.") if name != "kagzi" else "__init__")
        for line, name in found
    ]


def row_of(module: str) -> int | None:
    for row, names in enumerate(ROWS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return row
    return None


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_below_its_own(module):
    own = row_of(module)
    package = module.split(".")[0]
    if (PACKAGE / package / "__init__.py").exists() and module == package and own is None:
        own = -1  # the door of a room that has modules in several rows
    assert own is not None, f"{module} is in no row of the table"
    for line, name in imports_of(module):
        row = row_of(name)
        if row is None or (package == name.split(".")[0] and own == row):
            continue  # another package's module, or the same room
        assert row > own, f"{module}, line {line}: imports {name}, which is not below it"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in PURE])
def test_pure_modules_know_no_clock_socket_loop_or_chance(module):
    imported = {name.split(".")[0] for _, name in imports_of(module)}
    assert not imported & IMPURE


def test_imports_make_no_circle():
    waiting = {m: {n for _, n in imports_of(m) if n in MODULES and n != m} for m in MODULES}
    while waiting:
        free = [m for m, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"these import each other: {sorted(waiting)}"
        for module in free:
            del waiting[module]
