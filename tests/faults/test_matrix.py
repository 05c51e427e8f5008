"""A sample of the crash matrix. All of it: `python -m tests.faults --matrix`."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.migrating import migrate_together
from tests.faults.soak import AT_ONCE, Soak
from tests.faults.trial import Report, Server, Trial, plans_of_matrix
from tests.faults.victims import VICTIMS

SEED = 1
TRIALS = 3  # of each victim
POINTS_MISSED = 4  # a plan may ask for a moment that does not come; then another takes its place


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


@pytest.mark.parametrize("victim", VICTIMS)
async def test_whatever_dies_at_any_point_nothing_is_lost_and_nothing_doubled(
    server: Server, victim: str
) -> None:
    """The same sample each time; a plan that fails is shown, for `--replay`."""
    plans = [plan for plan in plans_of_matrix(SEED) if plan.victim == victim]
    struck: list[Report] = []
    for plan in random.Random(SEED).sample(plans, TRIALS + POINTS_MISSED):
        report = await Trial(server, plan).run()
        assert report.problems == [], f"--replay '{plan}'"
        if report.faults:
            struck.append(report)
        if len(struck) == TRIALS:
            return
    assert struck, "no plan met its point"


async def test_stopped_workers_come_back_and_their_writes_are_refused(server: Server) -> None:
    """Stopped with a batch in hand, until another has taken over."""
    plans = [
        plan
        for plan in plans_of_matrix(SEED)
        if plan.victim == "freeze" and plan.point == "batch.before" and plan.nth == 1
    ]
    refused = 0
    for plan in plans[:4]:
        report = await Trial(server, plan).run()
        assert report.problems == [], f"--replay '{plan}'"
        assert report.faults
        refused += report.refused
    assert refused > 0


async def test_soak_of_some_seconds_loses_and_doubles_nothing(server: Server) -> None:
    """All kinds of runs and faults at once; for longer: `python -m tests.faults --soak 8`."""
    trial = Soak(server, SEED, workers=3, seconds=10)
    report = await trial.run()
    assert report.problems == [], report
    assert report.faults
    assert report.runs >= AT_ONCE


def test_processes_that_migrate_at_once_leave_one_whole_schema(server: Server) -> None:
    assert migrate_together(server, 4) == 0
