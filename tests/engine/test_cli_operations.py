"""The commands that change runs from outside, as a script sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import uvloop
from click.testing import CliRunner, Result

import kagzi
from kagzi.cli import main
from tests.engine import cli_flows

Command = Callable[..., Result]


@pytest.fixture
def kagzi_command(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process, on the test's database."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *words: CliRunner().invoke(main, words, prog_name="kagzi")


@pytest.fixture
def waiting(dsn: str) -> list[str]:
    """Ids of three runs that nobody drives."""

    async def start() -> list[str]:
        async with kagzi.connect(dsn, migrate=False) as client:
            handles = [
                await client.start(cli_flows.doubled, [1], id=f"run {number}")
                for number in range(3)
            ]
            return [handle.id for handle in handles]

    return uvloop.run(start())


def statuses(kagzi_command: Command) -> dict[str, str]:
    runs = json.loads(kagzi_command("runs", "--json").stdout)
    return {run["id"]: run["status"] for run in runs}


def test_named_runs_are_paused_resumed_and_cancelled(
    kagzi_command: Command, waiting: list[str]
) -> None:
    first, second, third = waiting
    told = kagzi_command("pause", first, second)
    assert told.exit_code == 0
    assert told.stdout == f"run {first!r} is paused\nrun {second!r} is paused\n"
    resumed = json.loads(kagzi_command("resume", first, "--json").stdout)
    assert resumed == {"count": 1, "runs": {first: "pending"}}
    assert kagzi_command("cancel", second).stdout == f"run {second!r} is cancelled\n"
    assert statuses(kagzi_command) == {first: "pending", second: "cancelled", third: "pending"}


def test_all_that_match_are_changed(kagzi_command: Command, waiting: list[str]) -> None:
    assert kagzi_command("pause", "--all", "--workflow", "nothing").stdout == "Paused 0 run(s)\n"
    assert kagzi_command("pause", "--all", "--workflow", "doubled").stdout == "Paused 3 run(s)\n"
    told = kagzi_command("resume", "--all", "--status", "paused", "--json")
    assert json.loads(told.stdout)["count"] == 3
    assert kagzi_command("cancel", "--all", "--before", "2020-01-01").stdout.endswith(" 0 run(s)\n")
    assert kagzi_command("cancel", "--all").stdout == "Cancelled 3 run(s)\n"
    assert set(statuses(kagzi_command).values()) == {"cancelled"}


@pytest.mark.parametrize(
    "words",
    [
        ["cancel"],
        ["cancel", "run 0", "--all"],
        ["pause", "run 0", "--workflow", "doubled"],
        ["cancel", "--all", "--before", "yesterday"],
        ["cancel", "--all", "--status", "completed"],
        ["send", "run 0", "topic", "{"],
        ["send", "run 0", "a/b", "1"],
        ["fork", "run 0", "--id", "run 1"],
    ],
)
def test_wrong_use_ends_with_2_and_changes_nothing(
    kagzi_command: Command, waiting: list[str], words: list[str]
) -> None:
    ended = kagzi_command(*words)
    assert ended.exit_code == 2
    assert ended.stderr.strip()
    assert set(statuses(kagzi_command).values()) == {"pending"}


@pytest.mark.parametrize("words", [["cancel", "no"], ["fork", "run 0", "--from", "no"]])
def test_unknown_run_or_step_ends_with_4(
    kagzi_command: Command, waiting: list[str], words: list[str]
) -> None:
    assert kagzi_command(*words).exit_code == 4


def test_fork_says_what_is_kept(kagzi_command: Command) -> None:
    words = ("run", "tests.engine.cli_flows:doubled", "--input", "[[1, 2]]", "--id", "old")
    assert kagzi_command(*words, "--processes", "0").exit_code == 0
    steps = json.loads(kagzi_command("show", "old", "--json").stdout)["steps"]
    assert {step["id"] for step in steps} == {"steady_at_second", "doubles/0", "doubles/1"}
    words = ("fork", "old", "--from", "doubles/1", "--id", "new", "--json")
    made = json.loads(kagzi_command(*words).stdout)
    assert (made["id"], made["kept"]) == ("new", 2)
    assert statuses(kagzi_command) == {"old": "completed", "new": "pending"}


def test_event_is_sent_once_under_its_id(kagzi_command: Command, waiting: list[str]) -> None:
    assert kagzi_command("send", "run 0", "go", '{"n": 1}', "--id", "e").stdout == "sent\n"
    assert "sent before" in kagzi_command("send", "run 0", "go", "2", "--id", "e").stdout
    assert json.loads(kagzi_command("send", "run 0", "go", "--json").stdout) == {"sent": True}
    kagzi_command("cancel", "run 0")
    refused = kagzi_command("send", "run 0", "go")
    assert refused.exit_code == 2
    assert "cancelled" in refused.stderr
