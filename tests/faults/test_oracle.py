"""The oracle is tested first: engines that are broken in one way each do not pass it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.broken import ENGINES
from tests.faults.trial import PATIENCE_S, Plan, Server, Trial

TRIES = 10  # some need a little luck with timing


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


def plan_of(name: str, **fields: Any) -> Plan:
    return Plan(**{"seed": 1, "processes": 0, **ENGINES[name].plan, **fields})


@pytest.mark.parametrize("name", ENGINES)
async def test_oracle_notices_an_engine_that_is_broken(server: Server, name: str) -> None:
    reports = []
    for _ in range(TRIES):
        reports.append(await Trial(server, plan_of(name, broken=name)).run())
        if any(ENGINES[name].shows in problem for problem in reports[-1].problems):
            return
    pytest.fail(f"{TRIES} trials passed: {reports}")


@pytest.mark.parametrize("name", ENGINES)
async def test_engine_as_it_is_passes_the_same_trial(server: Server, name: str) -> None:
    report = await Trial(server, plan_of(name, patience_s=PATIENCE_S)).run()
    assert report.problems == []
    if report.plan.victim != "none":
        assert report.faults
