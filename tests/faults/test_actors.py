"""The processes of a trial: only they are signalled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.trial import Actor


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as made:
        yield made
        made.kill()


@pytest.fixture
def actor(process: subprocess.Popen[bytes], tmp_path: Path) -> Actor:
    trial: Any = SimpleNamespace(server=SimpleNamespace(fork=lambda _: process.pid), actors=[])
    return Actor(trial, {"log": str(tmp_path / "log")})


def test_process_that_has_an_ended_ones_number_is_neither_it_nor_signalled(
    actor: Actor, process: subprocess.Popen[bytes]
) -> None:
    assert actor.is_alive
    assert actor._started_at is not None
    actor._started_at -= 1  # as if that one had been another
    assert not actor.is_alive
    assert actor.family() == []
    actor.kill()
    actor.end()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)


def test_process_of_a_trial_is_killed(actor: Actor, process: subprocess.Popen[bytes]) -> None:
    assert actor.family() == []
    actor.kill()
    assert process.wait(10) == -9
    assert not actor.is_alive
