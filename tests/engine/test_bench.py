"""`python -m kagzi.bench`: selection, figures as JSON, exit codes, nothing left behind.

No test looks at a time: how fast the machine is at the moment must not matter here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import orjson
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from kagzi.bench import check, command
from kagzi.bench.against import CONTESTS
from kagzi.bench.measure import Figure, Samples, at_least, below
from kagzi.bench.session import own_schema
from kagzi.bench.sides import absurd_side, dbos_side
from kagzi.bench.sides.databases import url_of
from kagzi.bench.suites import SUITES
from kagzi.bench.tap import Messages, Tap, Traffic
from kagzi.errors import StoreError

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "counts.json"
ANY_TIME = "1e9"
NO_TIME = "1e-9"


def run_bench(*arguments: str, dsn: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DATABASE_URL": dsn}
    return subprocess.run(
        [sys.executable, "-m", "kagzi.bench", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def schemas(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'kagzi_bench%'"
        return [name for (name,) in connection.execute(query)]


def test_quick_race_writes_figures_as_json_and_leaves_nothing_behind(
    empty_dsn: str, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    done = run_bench(
        "race",
        "--quick",
        "--processes",
        "1",
        "--slack",
        ANY_TIME,
        "--json",
        str(file),
        dsn=empty_dsn,
    )
    assert done.returncode == 0, done.stderr
    assert "All 3 thresholds" in done.stdout
    written: dict[str, Any] = orjson.loads(file.read_bytes())
    assert written["ok"] is True
    assert written["quick"] is True
    assert list(written["benchmarks"]) == ["race"]
    figures = written["benchmarks"]["race"]["figures"]
    asked = [figure for figure in figures if figure["threshold"] is not None]
    assert [figure["size"] for figure in asked] == [3, 5, 10]
    assert all(figure["samples"] and figure["unit"] == "ms" for figure in asked)
    around = written["surroundings"]
    assert around["cores"] >= 1
    assert around["postgres"]["fsync"] in ("on", "off")
    assert schemas(empty_dsn) == []


def test_missed_threshold_is_exit_code_1(empty_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ("race", "--quick", "--processes", "1", "--slack", NO_TIME, "--json", str(file))
    done = run_bench(*arguments, dsn=empty_dsn)
    assert done.returncode == 1, done.stderr
    assert "3 of 3 thresholds missed" in done.stdout
    assert orjson.loads(file.read_bytes())["ok"] is False
    assert schemas(empty_dsn) == []


def test_counts_are_not_above_those_committed(empty_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_bench(
        *("counts", "--quick", "--processes", "1", "--json", str(file), "--check", str(COMMITTED)),
        dsn=empty_dsn,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = orjson.loads(file.read_bytes())["benchmarks"]["counts"]["figures"]
    found = {figure["name"]: figure["median"] for figure in figures}
    assert found["group of 1,000: rows"] == 1000 + 1 + 1, "steps, group, run"
    assert found["run of one step: rows"] == 2
    assert found["sequence of 20: write transactions"] >= 20
    # More rows than one batch holds, each batch one transaction; start, claim and completion.
    assert 3 <= found["group of 1,000: write transactions"] <= 12
    for name in ("group of 10", "group of 1,000", "run of one step"):
        assert found[f"{name}: write transactions"] <= found[f"{name}: transactions"]
        assert found[f"{name}: transactions"] <= found[f"{name}: statements"]
        assert found[f"{name}: WAL"] > 1000


@pytest.mark.parametrize("counter", ["statements", "WAL"])
def test_count_beyond_what_was_committed_is_a_regression(counter: str) -> None:
    committed: check.Counts = {"run": {"statements": 100, "WAL": 100_000}}
    same = check.regressions(committed, 1.3, committed)
    assert same == []
    less = {"run": {name: value / 2 for name, value in committed["run"].items()}}
    assert check.regressions(less, 1.3, committed) == []
    more = {"run": {**committed["run"], counter: committed["run"][counter] * 1.5}}
    (line,) = check.regressions(more, 1.3, committed)
    assert counter in line


def test_counts_that_only_one_side_knows_are_regressions() -> None:
    both: check.Counts = {"run": {"statements": 1.0}}
    assert check.regressions(both, 1.3, {}) == ["run: was not committed"]
    assert check.regressions({}, 1.3, both) == ["run: statements is not counted any more"]


def test_counts_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_bytes(check.written({"run": {"statements": 3.0, "WAL": 12.0}}))
    assert check.read(file) == (check.FACTOR, {"run": {"statements": 3.0, "WAL": 12.0}})
    file.write_text('{"factor": 2}')
    with pytest.raises(check.UnreadableCounts, match=r"counts\.json"):
        check.read(file)


def test_grown_count_is_exit_code_1(empty_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_bytes(check.written({"run of one step": {"rows": 1.0}}))
    done = run_bench("counts", "--quick", "--processes", "1", "--check", str(file), dsn=empty_dsn)
    assert done.returncode == 1, done.stderr
    assert "run of one step: 2 rows, committed 1" in done.stdout


def test_check_without_the_benchmark_counts_is_refused() -> None:
    done = run_bench("race", "--check", str(COMMITTED), dsn="postgresql://localhost:1/nowhere")
    assert done.returncode == 2
    assert "counts" in done.stderr


def test_tap_counts_messages_however_they_are_cut() -> None:
    answers = (
        b"1\0\0\0\4" + b"2\0\0\0\4" + b"C\0\0\0\x0dINSERT 0\0" + b"Z\0\0\0\5I"
    ) * 3 + b"C\0\0\0\x0aBEGIN\0Z\0\0\0\5T"
    for width in (1, 2, 3, 5, 7, 1000):
        traffic = Traffic()
        messages = Messages(traffic)
        for start in range(0, len(answers), width):
            messages.feed(answers[start : start + width])
        assert (traffic.statements, traffic.round_trips, traffic.transactions) == (4, 4, 3), width


def test_tap_counts_what_a_connection_does(empty_dsn: str) -> None:
    with closing(Tap(empty_dsn)) as tap:
        with psycopg.connect(tap.conninfo, autocommit=True) as connection:
            connection.execute("SELECT 1")
            before = tap.traffic()
            connection.execute("SELECT repeat('x', 100000)")
            with connection.transaction():
                connection.execute("CREATE TABLE t ()")
            spent = tap.traffic() - before
    assert (spent.statements, spent.round_trips, spent.transactions) == (4, 4, 2)
    assert spent.received_bytes > 100_000


def test_list_names_every_benchmark_without_a_database() -> None:
    done = run_bench("--list", dsn="postgresql://localhost:1/nowhere")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SUITES)
    named = {"coordination", "parallel_vs_sequential", "memoisation", "race", "latency", "memory"}
    assert named <= set(SUITES)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    done = run_bench("coordination", "rase", dsn="postgresql://localhost:1/nowhere")
    assert done.returncode == 2
    assert "'rase'" in done.stderr
    assert "memoisation" in done.stderr


def test_file_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "such" / "figures.json")
    done = run_bench("--json", missing, dsn="postgresql://localhost:1/nowhere")
    assert done.returncode == 2
    assert "--json" in done.stderr


def test_missing_server_is_exit_code_2_without_a_traceback() -> None:
    done = run_bench("race", dsn="postgresql://me:hidden@localhost:1/nowhere")
    assert done.returncode == 2
    assert "localhost" in done.stderr
    assert "hidden" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_second_benchmark_in_one_database_is_refused(empty_dsn: str) -> None:
    with own_schema(empty_dsn):
        with pytest.raises(StoreError, match="another benchmark"), own_schema(empty_dsn):
            pytest.fail("entered")


def test_schema_of_a_killed_benchmark_is_replaced(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("CREATE SCHEMA kagzi_bench")
        connection.execute("CREATE TABLE kagzi_bench.rest ()")
    with own_schema(empty_dsn):
        assert schemas(empty_dsn) == []


def test_figure_is_judged_by_its_median() -> None:
    assert Figure("x", 1, "ms", [1.0, 2.0, 90.0], below(3)).ok
    assert not Figure("x", 1, "ms", [1.0, 3.0, 3.5], below(3)).ok
    assert Figure("x", 1, "x", [1.0, 2.0, 90.0], at_least(2)).ok
    assert not Figure("x", 1, "x", [1.0, 1.9, 90.0], at_least(2)).ok
    assert Figure("x", 1, "x", [1.0], goal=at_least(2)).ok, "a goal fails nothing"


def test_slack_makes_both_kinds_of_threshold_easier() -> None:
    assert Figure("x", 1, "ms", [5.0], below(3)).slackened(2).ok
    assert Figure("x", 1, "x", [5.0], at_least(8)).slackened(2).ok
    assert not Figure("x", 1, "ms", [2.0], below(3)).slackened(0.5).ok


def test_quotients_are_taken_round_by_round() -> None:
    ours, theirs = Samples(), Samples()
    for mine, other in ((2.0, 1.0), (20.0, 10.0), (3.0, 1.0)):
        ours.add(10, mine)
        theirs.add(10, other)
    assert ours.over(theirs, 10) == [2.0, 2.0, 3.0]


def test_comparison_names_what_is_to_be_installed_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(click.UsageError, match=r"-m pip install dbos==[\d.]+\n"):
        command.peers_of("dbos,absurd")
    with pytest.raises(click.BadParameter, match="dbos, absurd"):
        command.peers_of("celery")


def test_comparison_without_peers_has_plain_asyncio_and_the_floor(
    empty_dsn: str, tmp_path: Path
) -> None:
    files = tmp_path / "figures.json", tmp_path / "page.html"
    arguments = ("--against", "", "--quick", "--processes", "1", "race", "pauses")
    done = run_bench(*arguments, "--json", str(files[0]), "--html", str(files[1]), dsn=empty_dsn)
    assert done.returncode == 0, done.stderr
    compared = orjson.loads(files[0].read_bytes())["compared"]
    assert list(compared) == ["pauses", "race"]
    for contest in compared.values():
        assert list(contest["sides"]) == ["kagzi", "floor", "asyncio"]
        assert contest["sides"]["kagzi"]["over_ours"] == 1
        assert len({len(side["samples"]) for side in contest["sides"].values()}) == 1
    assert compared["pauses"]["sides"]["kagzi"]["cost"]["statements"] >= 2, "start and results"
    assert "20 steps of 50 ms" in files[1].read_text()
    assert schemas(empty_dsn) == []


@pytest.mark.parametrize("module", [dbos_side, absurd_side])
def test_sides_of_peers_know_what_ours_knows(module: ModuleType) -> None:
    """They run only where the peers are installed; that they fit is seen from their source."""
    source = Path(str(module.__file__)).read_text()
    assert all(f'"{contest.task}":' in source for contest in CONTESTS)


@pytest.mark.parametrize(
    ("conninfo", "url"),
    [
        ("host=h port=5 user=u password=p@/ dbname=d", "postgresql://u:p%40%2F@h:5/d"),
        ("host=/run/pg dbname=d", "postgresql:///d?host=%2Frun%2Fpg"),
        ("postgresql://u@h/d?sslmode=disable", "postgresql://u@h/d?sslmode=disable"),
    ],
)
def test_peers_get_the_connection_string_as_a_url(conninfo: str, url: str) -> None:
    assert url_of(conninfo) == url
    assert conninfo_to_dict(url) == conninfo_to_dict(conninfo)
