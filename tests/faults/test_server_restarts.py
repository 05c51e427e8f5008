"""The server is stopped, killed and replaced under load: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from kagzi import ServerReplaced
from kagzi.model import RunStatus
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_cluster import Cluster, MakeCluster
from tests.fix_engine import started, until
from tests.fix_faults import orphans, rows, value
from tests.fix_proxy import Proxy

RUNS = 30
NOTES = 81  # of one story; the step that fails once notes twice


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
async def test_server_restarted_under_load_costs_no_body_a_second_run(
    cluster: Cluster, witness: Witness, how: signal.Signals
) -> None:
    """The worker keeps what it has until it is committed, however often the server goes down."""
    async with started(cluster.dsn, processes=1, lease_s=60.0, heartbeat_s=0.5) as engine:
        handles = [await engine.start(programs.story, witness.folder) for _ in range(RUNS)]
        waiting = asyncio.gather(*(handle.result(timeout=60) for handle in handles))
        for share in (0.1, 0.4, 0.7):
            await until(lambda s=share: len(witness.entries) >= s * RUNS * NOTES, 30)
            assert not waiting.done()
            await asyncio.to_thread(cluster.stop, how)
            await asyncio.to_thread(cluster.start)
        assert await waiting == [programs.STORY] * RUNS
        assert engine.worker.lost is None
        assert set(witness.counts.values()) == {RUNS, 2 * RUNS}
        assert Counter(witness.counts)["again"] == 2 * RUNS
    query = "SELECT count(*), count(DISTINCT step_id) FROM kagzi.step_runs GROUP BY run_id"
    assert await rows(cluster.dsn, query) == [(79, 79)] * RUNS
    assert await orphans(cluster.dsn) == []
    assert await value(cluster.dsn, "SELECT count(*) FROM kagzi.worker_leases") == 0


async def test_standby_that_is_promoted_makes_workers_load_their_runs_again(
    cluster: Cluster, make_cluster: MakeCluster, witness: Witness
) -> None:
    """It lacks the last commit of the server before it, and no lease was ended."""
    standby = make_cluster()
    await asyncio.to_thread(standby.copy_from, cluster)
    await asyncio.to_thread(standby.start)
    proxy = Proxy(cluster.dsn)
    await proxy.start()
    try:
        async with started(proxy.dsn, processes=0, lease_s=60.0, heartbeat_s=0.1) as engine:
            engine.worker.concurrency = 0
            handle = await engine.start(programs.behind_gate, witness.folder, 2)
            found = "SELECT count(*) FROM kagzi.workflow_runs"
            await until(lambda: standby.execute(found) == [(1,)])
            await asyncio.to_thread(standby.stop)
            engine.worker.concurrency = 10
            await until(lambda: len(witness.entries) == 3, 20)

            await asyncio.to_thread(cluster.stop, signal.SIGQUIT)
            await asyncio.to_thread(standby.start)
            proxy.lead_to(standby.dsn)
            assert standby.execute("SELECT pg_promote()") == [(True,)]
            await asyncio.wait_for(asyncio.shield(engine.worker.ended), 20)
            assert isinstance(engine.worker.lost, ServerReplaced)
            witness.open("go")
            assert len(await handle.result(timeout=30)) == 2
            assert witness.counts["before"] == 2, "its first commit did not come over"
            assert await handle.status() is RunStatus.COMPLETED
    finally:
        await proxy.stop()
