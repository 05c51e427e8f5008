"""`kagzi demo` on a small folder: what it shows holds, and it says so when it does not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from kagzi.cli import main
from kagzi.demo.crash import judge
from kagzi.demo.sources import find_sources, measure_source, standard_library
from tests.engine.processes import Process

CODE = """\
class A:
    def f(self, x):
        return [y for y in x if y and x] if x else None

async def g():
    try:
        assert True
    except ValueError:
        pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven files that can be parsed, one that cannot, and some that do not count."""
    made = tmp_path / "code"
    for name in ("a.b.py", "a/b.py", "a/__init__.py", *(f"m{i}.py" for i in range(8))):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CODE)
    (made / "old.py").write_text("print 'hello'\n")
    for name in ("site-packages/x.py", "test/y.py", "notes.txt"):
        path = made / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE)
    return made


@pytest.fixture(autouse=True)
def _same_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before


def demo(dsn: str, folder: Path, *options: str) -> Result:
    arguments = ["demo", "--folder", str(folder), "--processes", "1", *options]
    return CliRunner(env={"DATABASE_URL": dsn}).invoke(main, arguments)


def test_sources_are_found_once_each_under_names_that_differ(folder: Path) -> None:
    names = [source.name for source in find_sources(str(folder), full=False)]
    assert names == ["a.__init__", "a.b", "a.b~2", *(f"m{i}" for i in range(8)), "old"]
    with_tests = [source.name for source in find_sources(str(folder), full=True)]
    assert set(with_tests) - set(names) == {"test.y"}


def test_standard_library_has_many_files_without_its_tests() -> None:
    sources = find_sources(standard_library(), full=False)
    assert len(sources) > 400
    assert not any(f"{os.sep}site-packages{os.sep}" in source.path for source in sources)


def test_file_is_measured_by_its_syntax_tree(folder: Path) -> None:
    source = find_sources(str(folder), full=False)[0]
    measures = measure_source(source)
    assert (measures.lines, measures.functions, measures.classes) == (9, 2, 1)
    # a comprehension, its `and`, the conditional expression, the assertion, the handler
    assert measures.branches == 5


def test_demo_shows_retry_race_collected_errors_and_cached_steps(dsn: str, folder: Path) -> None:
    ended = demo(dsn, folder, "--json")
    assert ended.exit_code == 0, ended.output
    told = json.loads(ended.stdout)
    assert told["holds"]
    assert told["files"] == 12
    assert list(told["unparsable"]) == ["old"]
    assert told["unparsable"]["old"].startswith("SyntaxError")
    assert told["failed_attempts"] == 1
    assert told["race_won_by"] in ("bytes", "tokens")
    assert told["speedup"] > 0
    assert not told["same_id"]["is_new"]
    assert told["again"]["cached_steps"] == 11
    assert len(told["slowest"]) == 10


def test_demo_tells_people_the_same(dsn: str, folder: Path) -> None:
    ended = demo(dsn, folder)
    assert ended.exit_code == 0, ended.output
    for part in (
        "12 Python files",
        "speed-up",
        "retry",
        "race",
        "1 of 12",
        "11 of 12 files cached",
    ):
        assert part in ended.stdout
    assert "kagzi show demo-" in ended.stdout
    assert "\x1b" not in ended.stdout


def test_demo_of_a_folder_without_python_is_refused(dsn: str, tmp_path: Path) -> None:
    ended = demo(dsn, tmp_path)
    assert ended.exit_code == 2
    assert "no Python file" in ended.stderr


async def test_crash_demo_finishes_without_repeating_a_committed_step(
    dsn: str, folder: Path
) -> None:
    options = ("--folder", str(folder), "--processes", "1", "--pause-ms", "300", "--json")
    async with Process(dsn, "demo", "--crash", *options) as process:
        code = await process.ended()
        assert code == 0, process.errors + process.output
    told = json.loads(process.output)
    assert told["holds"]
    assert told["drained"]
    assert told["repeated"] == []
    assert 0 < told["committed_at_kill"] < told["files"] == 12
    assert told["begun_by_second"] <= 12 - told["committed_at_kill"]
    with psycopg.connect(dsn) as conn:
        query = "SELECT count(*), count(DISTINCT worker_id) FROM kagzi.step_runs"
        assert conn.execute(query).fetchone() == (14, 2)
        assert conn.execute("SELECT status FROM kagzi.workflow_runs").fetchall() == [("completed",)]


def test_committed_step_that_begins_again_breaks_the_promise() -> None:
    told = judge({"a", "b"}, {"a", "b", "c"}, ["a", "b"], ["b", "c"])
    assert (told["repeated"], told["holds"]) == (["b"], False)


def test_step_that_was_cut_off_may_begin_again() -> None:
    told = judge({"a"}, {"a", "b", "c"}, ["a", "b"], ["c", "b"])
    assert (told["cut_off"], told["repeated"], told["holds"]) == (1, [], True)


def test_kill_that_came_too_late_proves_nothing() -> None:
    assert not judge({"a", "b"}, {"a", "b"}, ["a", "b"], [])["holds"]
