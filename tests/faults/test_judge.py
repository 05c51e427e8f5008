"""What the judge of all writes says of a run that changes hands."""

from __future__ import annotations

from uuid import UUID

import psycopg
import pytest

from kagzi.ids import uuid7
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.operations import send_event
from kagzi.store.rows import Batch
from kagzi.store.store import Store
from tests.faults import oracle
from tests.store.samples import batch_of, mark, release, settled

GIVEN = "was given to"
HELD = "did not hold the run"


@pytest.mark.parametrize("given", [False, True], ids=["told something", "given"])
async def test_held_run_may_be_told_something_and_not_be_given_to_an_ended_worker(
    dsn: str, given: bool
) -> None:
    """Between the end of a lease and the freeing of its runs anybody may send them an event."""
    store = Store(Connector(dsn))
    await store.open()
    with psycopg.connect(dsn, autocommit=True) as connection:
        oracle.install(connection)
        worker = uuid7()
        await store.register_worker(worker, "host", "boot", 1, "then", {}, 60.0)
        run = await _start(store)
        assert [one.run_id for one in await store.claim_runs(worker, [("w", "1")], 9)] == [run]
        connection.execute("UPDATE kagzi.workers SET status = 'ended'")
        await send_event(store, run, "topic", b"1", None)
        if given:
            connection.execute(
                "UPDATE kagzi.workflow_runs SET status = 'running', worker_id = %s, epoch = 1"
                " WHERE id = %s",
                [worker, await _start(store)],
            )
        problems = oracle._judge_writes(connection)
    await store.close()
    assert [GIVEN in problem for problem in problems if GIVEN in problem] == [True] * given


@pytest.mark.parametrize("apart", [False, True], ids=["with it", "after it"])
async def test_worker_may_mark_a_step_with_the_row_that_lets_the_run_go_and_not_after_it(
    dsn: str, apart: bool
) -> None:
    """One statement writes both, the row of the run first."""
    store = Store(Connector(dsn))
    await store.open()
    with psycopg.connect(dsn, autocommit=True) as connection:
        oracle.install(connection)
        worker = uuid7()
        await store.register_worker(worker, "host", "boot", 1, "then", {}, 60.0)
        run = await _start(store)
        await store.claim_runs(worker, [("w", "1")], 9)
        fenced = FencedConnection(Connector(dsn), worker)
        await fenced.write(batch_of([settled("s", run_id=run)]))
        first, last = Batch(), Batch()
        (first if apart else last).runs.append(release(run))
        last.marks.append(mark("s", run_id=run))
        for batch in (first, last):
            await fenced.write(batch)
        await fenced.close()
        problems = oracle._judge_writes(connection)
    await store.close()
    assert [HELD in problem for problem in problems] == [True] * apart


async def _start(store: Store) -> UUID:
    run_id = uuid7()
    await store.insert_run(run_id, str(run_id), "w", "1", 0, b"[]")
    return run_id
