"""The commands for schedules, as a script sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from kagzi.cli import main

FLOWS = "tests.engine.cli_flows"
Command = Callable[..., Result]


@pytest.fixture
def kagzi_command(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process, on the test's database."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *words: CliRunner().invoke(main, words, prog_name="kagzi")


def test_schedule_is_made_listed_paused_and_removed(kagzi_command: Command) -> None:
    words = ("schedule", f"{FLOWS}:doubled", "30 2 * * *", "--input", "[[1, 2]]", "--id", "nightly")
    options = ("--timezone", "Europe/Berlin", "--catch-up", "all", "--overlap", "skip", "--json")
    made = json.loads(kagzi_command(*words, *options).stdout)
    assert (made["id"], made["input"], made["timezone"]) == ("nightly", [[1, 2]], "Europe/Berlin")
    assert (made["catch_up"], made["overlap"], made["runs"]) == ("all", "skip", 0)
    assert json.loads(kagzi_command("schedules", "--json").stdout) == [made]
    listed = kagzi_command("schedules").stdout
    assert "nightly" in listed
    assert "30 2 * * *" in listed

    paused = json.loads(kagzi_command("schedules", "--pause", "nightly", "--json").stdout)
    assert [one["paused"] for one in paused] == [True]
    assert "paused" in kagzi_command("schedules").stdout
    resumed = json.loads(kagzi_command("schedules", "--resume", "nightly", "--json").stdout)
    assert [one["paused"] for one in resumed] == [False]

    removed = kagzi_command("unschedule", "nightly")
    assert (removed.exit_code, removed.stdout) == (0, "schedule 'nightly' is removed\n")
    assert kagzi_command("schedules").stdout == "no schedules\n"


def test_schedule_tells_its_next_tick(kagzi_command: Command) -> None:
    told = kagzi_command("schedule", f"{FLOWS}:doubled", "@yearly", "--id", "s", "--input", "[[1]]")
    assert told.exit_code == 0
    assert "ticks next at " in told.stdout
    assert "-01-01 00:00:00 UTC" in told.stdout


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("schedule", f"{FLOWS}:doubled", "61 * * * *", "--id=s", "--input=[[]]"), 2, "61"),
        (("schedule", f"{FLOWS}:doubled", "@daily", "--id", "s"), 2, "numbers"),
        (("schedule", f"{FLOWS}:none", "@daily", "--id", "s"), 4, "none"),
        (("schedule", f"{FLOWS}:doubled", "@daily"), 2, "--id"),
        (("unschedule", "s"), 4, "'s'"),
        (("schedules", "--pause", "s"), 4, "'s'"),
        (("schedules", "--resume", "s"), 4, "'s'"),
    ],
)
def test_what_is_wrong_is_told_by_text_and_exit_code(
    words: tuple[str, ...], code: int, named: str, kagzi_command: Command
) -> None:
    ended = kagzi_command(*words)
    assert ended.exit_code == code
    assert named in ended.stderr
    assert kagzi_command("schedules", "--json").stdout == "[]\n"
