"""A few workers that are stopped and come back. More: `python -m tests.faults --zombies N`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults.trial import Plan, Server
from tests.faults.zombies import LATE, Count, Round, plans_of_rounds

SEED = 1
FEW = 5  # workers at a time


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


@pytest.fixture
def plan() -> Plan:
    """Stopped with a batch in hand."""
    plans = plans_of_rounds(SEED, FEW)
    return next(one for one in plans if one.point == "batch.before" and one.processes == 0)


@pytest.mark.parametrize("point", ["batch.before", "commit.sent"])
async def test_workers_stopped_until_their_leases_are_ended_write_nothing_more(
    server: Server, plan: Plan, point: str
) -> None:
    count = Count()
    trial = Round(server, replace(plan, point=point, program="sequential", nth=1))
    report = await trial.run()
    count.add(trial)
    assert report.problems == [], f"--replay '{report.plan}'"
    assert count.stopped > 1, report
    assert count.refused > 0, report
    assert count.let_through == 0


async def test_writes_of_stopped_workers_are_noticed_in_an_engine_without_a_fence(
    server: Server, plan: Plan
) -> None:
    count = Count()
    trial = Round(server, replace(plan, program="group", broken="no_fence", patience_s=5.0))
    report = await trial.run()
    count.add(trial)
    assert count.stopped > 1, report
    assert count.let_through > 0, report
    assert any(LATE in problem for problem in report.problems)
