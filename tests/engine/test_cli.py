"""The commands, as a script sees them: what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from click.testing import CliRunner, Result

from kagzi import errors
from kagzi.cli import main
from kagzi.codec.failures import describe_exception, kagzi_error_from
from kagzi.command.terminal import exit_code
from tests.engine.processes import Process

FLOWS = "tests.engine.cli_flows"
NOWHERE = "postgresql://somebody:geheim@127.0.0.1:1/none"


@pytest.fixture
def kagzi_command(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process, on the test's database."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=stdin, prog_name="kagzi")

    return invoke


def run(kagzi_command: Any, workflow: str, value: Any, *more: str) -> Result:
    target = f"{FLOWS}:{workflow}"
    result: Result = kagzi_command(
        "run", target, "--input", json.dumps(value), "--processes", "0", *more
    )
    return result


# --- help -----------------------------------------------------------------------------------


def test_help_names_every_command_and_exit_code() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    for word in ("demo", "worker", "run", "runs", "show", "retry", "migrate", "where", "--dsn"):
        assert word in shown
    for code in (0, 1, 2, 3, 4, 70):
        assert re.search(rf"^ +{code} +\w", shown, re.MULTILINE)


def test_version_and_where_name_the_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("KAGZI_DATA", str(tmp_path / "data"))
    told = json.loads(CliRunner().invoke(main, ["where", "--json"]).stdout)
    assert told["embedded_data"] == str(tmp_path / "data")
    assert not told["embedded_data_exists"]
    assert str(tmp_path / "data") in CliRunner().invoke(main, ["where"]).stdout
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StoreUnavailable("gone"), 3),
        (errors.SchemaTooNew("newer"), 3),
        (errors.InvalidDsn("odd"), 2),
        (errors.CodecError("odd"), 2),
        (errors.RunConflict("other input"), 2),
        (errors.UnknownRun("none"), 4),
        (errors.PoolStartFailed("no process"), 70),
        (errors.RunWasCancelled("cancelled"), 1),
        (kagzi_error_from(describe_exception(errors.StoreUnavailable("gone")), "r"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


# --- run ------------------------------------------------------------------------------------


def test_run_prints_the_result_as_json_and_nothing_else(kagzi_command: Any) -> None:
    ended = run(kagzi_command, "doubled", [[1, 2, 3]])
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "[2,4,6]\n", "")


def test_object_as_input_gives_keyword_arguments(kagzi_command: Any) -> None:
    ended = run(kagzi_command, "doubled", {"plus": 1, "numbers": [1]})
    assert json.loads(ended.stdout) == [3]


def test_input_comes_from_a_file_or_standard_input(kagzi_command: Any, tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text("[[4]]")
    target = (f"{FLOWS}:doubled", "--processes", "0", "--input")
    assert kagzi_command("run", *target, f"@{tmp_path}/input.json").stdout == "[8]\n"
    assert kagzi_command("run", *target, "-", stdin="[[5]]").stdout == "[10]\n"
    missing = kagzi_command("run", *target, f"@{tmp_path}/none.json")
    assert missing.exit_code == 2
    assert "none.json" in missing.stderr


def test_input_of_other_types_is_given_as_it_is_stored(kagzi_command: Any) -> None:
    value = {"at": "2026-02-03T00:00:00+00:00", "tags": ["b", "a"]}
    assert json.loads(run(kagzi_command, "dated", value).stdout) == "2026-02-03 a,b"


def test_same_id_prints_the_first_run_s_result(kagzi_command: Any) -> None:
    first = run(kagzi_command, "doubled", [[7]], "--id", "seven")
    again = run(kagzi_command, "doubled", [[7]], "--id", "seven")
    assert (first.stdout, again.stdout) == ("[14]\n", "[14]\n")
    listed = json.loads(kagzi_command("runs", "--json").stdout)
    assert [one["id"] for one in listed] == ["seven"]
    other = run(kagzi_command, "doubled", [[8]], "--id", "seven")
    assert other.exit_code == 2
    assert "another input" in other.stderr


def test_failed_run_ends_with_1_and_one_line_that_says_what_to_do(kagzi_command: Any) -> None:
    ended = run(kagzi_command, "only_even", [3], "--id", "odd")
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    for part in ("'odd'", "refuse_odd", "3 is odd, and", "kagzi show odd", "kagzi retry odd"):
        assert part in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "no_such_module:x"), 2, "no module 'no_such_module'"),
        (("run", "shop.py:x"), 2, "is not a module's name"),
        (("run", FLOWS), 2, "names no workflow"),
        (("run", f"{FLOWS}:nothing"), 4, "has no workflow 'nothing'; it has: doubled"),
        (("run", f"{FLOWS}:double"), 4, "has no workflow 'double'"),
        (("run", f"{FLOWS}:doubled", "--input", "["), 2, "is not JSON"),
        (("run", f"{FLOWS}:doubled", "--input", "5"), 2, "array of positional arguments"),
        (("run", f"{FLOWS}:doubled", "--input", "[[1], 2, 3]"), 2, "at most 2 positional"),
        (("run", f"{FLOWS}:doubled", "--input", '["a"]'), 2, "list"),
        (("run", f"{FLOWS}:doubled", "--input", "[[1]]", "--id", "a\nb"), 2, "run id 'a"),
        (("worker", "no_such_module"), 2, "no module"),
        (("worker", f"{FLOWS}:nothing"), 2, "has no 'nothing'"),
        (("worker", f"{FLOWS}:FLOWS"), 2, "has no 'FLOWS'"),
        (("worker", FLOWS, "--lease-s", "nan"), 2, "lease_s"),
        (("worker", FLOWS, "--heartbeat-s", "20"), 2, "at most half of the lease"),
        (("worker", FLOWS, "--drain-s", "-1"), 2, "--drain-s"),
        (("worker", FLOWS, "--processes", "-1"), 2, "--processes"),
        (("worker", FLOWS, "--concurrency", "0"), 2, "concurrency"),
        (("show", "nothing"), 4, "no run has the id 'nothing'"),
        (("retry", "nothing"), 4, "no run has the id 'nothing'"),
        (("runs", "--status", "odd"), 2, "odd"),
        (("--schema", "a/b", "runs"), 2, "schema 'a/b'"),
        (("demo", "--folder", "/no/such/folder"), 2, "does not exist"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_run(
    kagzi_command: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended = kagzi_command(*arguments)
    assert ended.exit_code == code, ended.output
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads(kagzi_command("runs", "--json").stdout) == []


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_thing", "No module named 'no_such_thing' ("),
        ("1 / 0", "ZeroDivisionError: division by zero ("),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_module_that_cannot_be_imported_is_named_with_the_cause(
    kagzi_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, cause: str
) -> None:
    (tmp_path / "cli_broken_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    ended = kagzi_command("worker", "cli_broken_module")
    assert ended.exit_code == 2
    assert "module 'cli_broken_module' cannot be imported" in ended.stderr
    assert cause in ended.stderr
    assert "cli_broken_module.py:1)" in ended.stderr


# --- runs, show, retry ----------------------------------------------------------------------


def test_runs_are_listed_newest_first_and_filtered(kagzi_command: Any) -> None:
    run(kagzi_command, "doubled", [[1]], "--id", "one")
    run(kagzi_command, "only_even", [1], "--id", "two")
    run(kagzi_command, "only_even", [2], "--id", "three")

    def listed(*options: str) -> list[str]:
        return [one["id"] for one in json.loads(kagzi_command("runs", "--json", *options).stdout)]

    assert listed() == ["three", "two", "one"]
    assert listed("--limit", "1") == ["three"]
    assert listed("--status", "failed") == ["two"]
    assert listed("--workflow", "doubled") == ["one"]
    table = kagzi_command("runs").stdout
    assert table.index("three") < table.index("two") < table.index("one")
    assert "StepFailed" in table


def test_show_draws_steps_groups_and_failed_attempts(kagzi_command: Any) -> None:
    run(kagzi_command, "doubled", [list(range(30))], "--id", "many")
    shown = kagzi_command("show", "many").stdout
    for part in ("completed", "doubles (30 steps", "… 24 more; --all", "Failed attempts", "x "):
        assert part in shown
    assert "[bold]not yet[/bold]" in shown  # as it is, not as markup
    assert "\x1b" not in shown
    everything = kagzi_command("show", "many", "--all").stdout
    assert "more; --all" not in everything
    assert re.search(r"^ +29 +completed", everything, re.MULTILINE)


def test_show_as_json_has_all_that_is_recorded(kagzi_command: Any) -> None:
    run(kagzi_command, "doubled", [[1, 2]], "--id", "few")
    told = json.loads(kagzi_command("show", "few", "--json").stdout)
    assert told["status"] == "completed"
    assert told["input"] == [[1, 2]]
    assert {step["id"] for step in told["steps"]} == {
        "steady_at_second",
        "doubles/0",
        "doubles/1",
    }
    assert all(step["duration_s"] >= 0 for step in told["steps"])
    (group,) = told["groups"]
    assert (group["path"], group["succeeded"], group["failed"]) == ("doubles", 2, 0)
    assert group["speedup"] >= 0
    (attempt,) = told["attempts"]
    assert attempt["error"]["type"] == "builtins.ConnectionError"
    assert kagzi_command("show", told["run_id"], "--json").exit_code == 0


def test_retry_makes_a_failed_run_pending(kagzi_command: Any) -> None:
    run(kagzi_command, "only_even", [5], "--id", "odd")
    told = json.loads(kagzi_command("retry", "odd", "--json").stdout)
    assert (told["id"], told["status"]) == ("odd", "pending")
    assert json.loads(kagzi_command("runs", "--json").stdout)[0]["status"] == "pending"


def test_retry_says_no_to_what_cannot_be_retried(kagzi_command: Any) -> None:
    run(kagzi_command, "sorted_out", [[1, 2]], "--id", "fine")
    refused = kagzi_command("retry", "fine")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    run(kagzi_command, "only_even", [5], "--id", "odd")
    assert kagzi_command("retry", "odd", "--step", "nothing").exit_code == 4


# --- the store ------------------------------------------------------------------------------


def test_unavailable_store_ends_with_3_and_shows_no_password(kagzi_command: Any) -> None:
    for arguments in (("runs",), ("migrate",), ("--debug", "show", "x"), ("migrate", "--print")):
        ended = kagzi_command("--dsn", NOWHERE, *arguments)
        assert ended.exit_code == 3, ended.output
        assert "127.0.0.1" in ended.stderr
        assert "geheim" not in ended.output
        assert ("Traceback" in ended.stderr) == ("--debug" in arguments)


def test_unreadable_dsn_ends_with_2_and_shows_no_password(kagzi_command: Any) -> None:
    for dsn in ("postgresql://u:ge heim@h/d", "postgresql://u:x@geheim@h/d", "password=geheim x"):
        ended = kagzi_command("runs", "--dsn", dsn)
        assert ended.exit_code == 2, ended.output
        assert "heim" not in ended.output


def test_options_of_kagzi_are_taken_behind_the_command_too(kagzi_command: Any, dsn: str) -> None:
    assert kagzi_command("--dsn", NOWHERE, "runs", "--dsn", dsn, "--json").stdout == "[]\n"


def test_listing_an_empty_database_asks_for_a_migration_and_makes_none(
    kagzi_command: Any, empty_dsn: str
) -> None:
    ended = kagzi_command("runs", "--dsn", empty_dsn)
    assert ended.exit_code == 3
    assert "kagzi migrate" in ended.stderr
    with psycopg.connect(empty_dsn) as conn:
        found = conn.execute("SELECT FROM pg_namespace WHERE nspname = 'kagzi'").fetchall()
    assert found == []


def test_migrate_applies_what_is_missing_once(kagzi_command: Any, empty_dsn: str) -> None:
    first = json.loads(kagzi_command("migrate", "--dsn", empty_dsn, "--json").stdout)
    assert first["applied"][0].startswith("0001_")
    again = kagzi_command("migrate", "--dsn", empty_dsn)
    assert "up to date" in again.stdout
    assert "applied" not in again.stdout


def test_printed_migration_makes_the_schema_that_kagzi_accepts(
    kagzi_command: Any, empty_dsn: str
) -> None:
    script = kagzi_command("migrate", "--print", "--dsn", empty_dsn, "--schema", "other").stdout
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        conn.execute(script.encode())
    options = ("--dsn", empty_dsn, "--schema", "other")
    assert kagzi_command("runs", "--json", *options).stdout == "[]\n"
    assert "CREATE TABLE" not in kagzi_command("migrate", "--print", *options).stdout
    offline = kagzi_command("migrate", "--print", "--after", "0", "--dsn", NOWHERE)
    assert "CREATE TABLE" in offline.stdout


# --- processes of their own -----------------------------------------------------------------

HERE = """\
import kagzi

@kagzi.step
def add(a: int, b: int) -> int:
    return a + b

@kagzi.workflow
async def added(ctx: kagzi.Context, a: int, b: int) -> int:
    return await ctx.step(add, a, b)

def more() -> None:
    print("more was called", flush=True)
"""


async def test_module_of_the_current_folder_is_imported_by_the_pool(
    dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "cli_here.py").write_text(HERE)
    arguments = ("run", "cli_here:added", "--input", "[1, 2]", "--processes", "1")
    async with Process(dsn, *arguments, folder=tmp_path) as process:
        assert await process.ended() == 0
        assert process.output == "3\n"
        assert process.errors == ""


async def test_worker_calls_the_app_function_of_its_module(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "cli_here.py").write_text(HERE)
    arguments = ("worker", "cli_here:more", "--processes", "0")
    async with Process(dsn, *arguments, folder=tmp_path) as process:
        await process.says("serving cli_here.added")
        process.terminate()
        assert await process.ended() == 0
        assert process.output == "more was called\n"


async def test_module_without_workflow_is_refused_by_a_worker(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "cli_empty.py").write_text("x = 1")
    async with Process(dsn, "worker", "cli_empty", folder=tmp_path) as process:
        assert await process.ended() == 2
        assert "registers no workflow" in process.errors


def test_json_is_printed_without_color_whatever_the_terminal(kagzi_command: Any) -> None:
    environment = {"FORCE_COLOR": "1", "DATABASE_URL": os.environ["DATABASE_URL"]}
    ended = CliRunner(env=environment).invoke(main, ["runs", "--json"])
    assert orjson.loads(ended.stdout) == []
