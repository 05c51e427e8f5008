"""What the judge says of a run that changes hands."""

from __future__ import annotations

from pathlib import Path
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

AGAIN = "times, not at most"
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


@pytest.mark.parametrize(
    ("lapses", "owed", "most"),
    [
        pytest.param([7], None, 1, id="nothing was to strike"),
        pytest.param([], {}, 1, id="of another run's worker"),
        pytest.param([7], {}, 2, id="of its worker"),
        pytest.param([7], {7: 1}, 2, id="of its worker, which was struck"),
        pytest.param([7], {8: 1}, 3, id="of its worker, while another was struck"),
        pytest.param([7, 7], {7: 1}, 3, id="of its worker, which was struck, and again"),
    ],
)
async def test_lease_that_ran_out_allows_one_execution_more_of_what_its_worker_held(
    dsn: str,
    tmp_path: Path,
    lapses: list[int],
    owed: dict[int, int] | None,
    most: int,
) -> None:
    """`lapses`: processes whose lease ran out while they held the run, one after the other."""
    store = Store(Connector(dsn))
    await store.open()
    with psycopg.connect(dsn, autocommit=True) as connection:
        oracle.install(connection)
        run = await _start(store, "w", b'["/folder", "key"]')
        other = await _start(store, "other", b'["/folder", "another"]')
        for process, workflow in [(9, "other"), *((process, "w") for process in lapses)]:
            worker = uuid7()
            await store.register_worker(worker, "host", "boot", process, "then", {}, 0.0)
            claimed = await store.claim_runs(worker, [(workflow, "1")], 9)
            assert [one.run_id for one in claimed] == [other if workflow == "other" else run]
            assert await store.rescue(worker, "lease ran out") == 1
        for times in (most, most + 1):
            witness = tmp_path / f"{times}"
            witness.write_text("ran key s0 s0 nonce 1\n" * times)
            programs = {"key": "sequential", "another": "sequential"}
            faults = sum((owed or {}).values())
            problems = oracle.judge(connection, witness, programs, faults, owed).problems
            assert any(AGAIN in one for one in problems) == (times > most)
    await store.close()


async def _start(store: Store, workflow: str = "w", payload: bytes = b"[]") -> UUID:
    run_id = uuid7()
    await store.insert_run(run_id, str(run_id), workflow, "1", 0, payload)
    return run_id
