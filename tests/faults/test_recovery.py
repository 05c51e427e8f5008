"""Whatever dies or hangs, at whatever moment: the run goes on, and no committed step runs again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import kagzi
from kagzi import Client, LeaseLost, RunHandle
from kagzi.store.queries import load_queries
from kagzi.worker import Worker
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import started, until
from tests.fix_faults import StartWorker, WorkerProcess, orphans, rows, value
from tests.fix_proxy import Link, Message, Proxy, pass_all

LEASE = {"lease_s": 1.0, "heartbeat_s": 0.2, "poll_s": 0.05}


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Client]:
    async with kagzi.connect(dsn, migrate=False) as made:
        yield made


@pytest.fixture
def story_witness(tmp_path: Path) -> Witness:
    return Witness(tmp_path)


async def committed(dsn: str) -> set[str]:
    """Ids of the steps that have a checkpoint."""
    return {row[0] for row in await rows(dsn, "SELECT step_id FROM kagzi.step_runs")}


async def status_of(dsn: str) -> tuple[str, UUID | None]:
    return (await rows(dsn, "SELECT status, worker_id FROM kagzi.workflow_runs"))[0]  # type: ignore[return-value]


# --- a worker that is killed ----------------------------------------------------------------


class Assassin:
    """Kills a worker at its nth commit: before that reaches the server, or its answer the worker.

    Attributes:
        at: Which one.
        happened: It did.
    """

    def __init__(self, proxy: Proxy, answered: bool) -> None:
        proxy.hook = self._look
        self._answered = answered
        self.at = 0
        self.count = 0
        self.victim: WorkerProcess | None = None
        self.happened = asyncio.Event()
        self._stroke: asyncio.Future[None] | None = None
        self._text = ""  # of the latest statement
        self._within = False  # a transaction of several statements
        self._under_way = False

    def aim(self, victim: WorkerProcess, at: int) -> None:
        self.victim, self.at, self.count = victim, at, 0
        self._text, self._within, self._under_way = "", False, False
        self.happened.clear()

    async def _look(self, link: Link, message: Message) -> bool:
        if not link.is_fenced or not self._is_moment(message):
            return True
        self.count += 1
        if self.count != self.at:
            return True
        # Its death ends this connection, and so the task that this runs in.
        self._stroke = asyncio.ensure_future(self._strike())
        await asyncio.shield(self._stroke)
        return False

    async def _strike(self) -> None:
        assert self.victim is not None, "aimed at somebody"
        await asyncio.to_thread(self.victim.kill)
        self.happened.set()

    def _is_moment(self, message: Message) -> bool:
        if message.from_client:
            self._text = message.text or self._text
            if "idle_in_transaction" in self._text or "pg_walfile_name" in self._text:
                return False
            self._within = self._within or self._text.startswith("BEGIN")
            commits = {"E": not self._within, "c": "COMMIT" in self._text}
            if commits.get(message.kind, message.text == "COMMIT"):
                self._under_way, self._within = True, False
                self._text = ""  # what follows may be prepared, and come without its text
                return not self._answered
        elif message.is_ready and self._under_way:
            self._under_way = False
            return self._answered
        return False


@pytest.mark.parametrize("answered", [False, True], ids=["before it", "after it"])
async def test_worker_killed_at_each_commit_in_turn_is_followed_by_one_that_repeats_no_step(
    client: Client,
    dsn: str,
    proxy: Proxy,
    start_worker: StartWorker,
    story_witness: Witness,
    answered: bool,
) -> None:
    """Each incarnation is killed one commit further on, until one comes through untouched.

    Killed before a commit reaches the server, or after it and before its answer is seen. The lease
    is far from its end: on its own host a dead worker's runs are free at once.
    """
    handle = await client.start(programs.story, story_witness.folder)
    assassin = Assassin(proxy, answered)
    moments: list[tuple[set[str], int]] = []  # of death: what was committed, and had been noted
    result = asyncio.ensure_future(handle.result(timeout=300))
    while not result.done():
        worker = start_worker(proxy.dsn, lease_s=60.0)
        assassin.aim(worker, 1 if answered else 2)
        death = asyncio.ensure_future(assassin.happened.wait())
        await asyncio.wait([result, death], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        death.cancel()
        if not assassin.happened.is_set():
            break
        moments.append((await committed(dsn), len(story_witness.entries)))
        # How often a run may take its worker with it is another test's subject.
        await rows(dsn, "UPDATE kagzi.workflow_runs SET crash_count = 0")

    assert await result == programs.STORY
    assert len(moments) >= 8, "a story of some commits"
    for done, seen in moments:
        assert not done & set(story_witness.entries[seen:]), "committed, and run again"
    assert len(await committed(dsn)) == 79
    assert await orphans(dsn) == []
    details = await handle.describe()
    assert {group.path: group.succeeded for group in details.groups} == {
        **{"g": 70, "race": 1, "some": 1, "outer/in": 3},
    }
    assert [attempt.step_id for attempt in details.attempts if attempt.step_id == "again"] == [
        "again"
    ]


async def test_worker_that_a_test_may_stop_is_in_a_session_of_its_own(
    dsn: str, start_worker: StartWorker
) -> None:
    """Else it goes on by itself when whoever started the tests ends."""
    worker = start_worker(dsn)
    assert os.getsid(worker.pid) == worker.pid


async def test_worker_killed_within_bodies_leaves_no_process_and_its_run_goes_on_at_once(
    client: Client, dsn: str, start_worker: StartWorker, story_witness: Witness
) -> None:
    handle = await client.start(programs.behind_gate, story_witness.folder, 12)
    first = start_worker(dsn, processes=2, lease_s=60.0)
    await until(lambda: len(story_witness.entries) >= 13, 20)
    first.kill()
    await until(lambda: first.relatives() == [], 20)
    story_witness.open("go")
    start_worker(dsn, processes=1, lease_s=60.0)
    assert len(await handle.result(timeout=20)) == 12
    assert story_witness.counts["before"] == 1
    assert story_witness.counts["after"] == 1
    details = await handle.describe()
    assert details.attempts == [], "what a worker's death cuts off is not counted"
    assert {step.attempts for step in details.steps} == {1}


# --- a worker that is stopped past its lease ------------------------------------------------


async def test_worker_stopped_past_its_lease_commits_nothing_and_stops_its_runs(
    client: Client, dsn: str, start_worker: StartWorker, story_witness: Witness
) -> None:
    """Its pool process goes on meanwhile, so answers wait for it when it comes back."""
    handle = await client.start(programs.behind_gate, story_witness.folder, 8)
    frozen = start_worker(dsn, processes=1, **LEASE)
    await until(lambda: len(story_witness.entries) >= 9, 20)
    owner = (await status_of(dsn))[1]
    assert owner is not None
    theirs = {int(entry.split()[1]) for entry in story_witness.entries[1:]}
    frozen.signal(signal.SIGSTOP)
    async with client.worker(processes=1, **LEASE):
        await until(lambda: len(story_witness.entries) >= 17, 20)
        story_witness.open("go")
        result = await handle.result(timeout=20)
        assert not theirs & set(result), "the second worker's own results"
        before = await everything(dsn)
        frozen.signal(signal.SIGCONT)
        await until(lambda: "takes the place of" in frozen.said, 20)
        assert "stops its runs" in frozen.said
        assert await everything(dsn) == before
    query = "SELECT count(*) FROM kagzi.step_runs WHERE worker_id = %(id)s"
    assert await value(dsn, query, id=owner) == 1, "the step before it was stopped"
    assert story_witness.counts["after"] == 1
    assert await orphans(dsn) == []


async def everything(dsn: str) -> list[list[tuple[Any, ...]]]:
    tables = ("step_runs", "step_attempts", "parallel_groups", "memos", "workflow_runs")
    return [await rows(dsn, f"TABLE kagzi.{table} ORDER BY 1, 2") for table in tables]


async def test_worker_stopped_for_a_moment_goes_on(
    client: Client, dsn: str, start_worker: StartWorker, story_witness: Witness
) -> None:
    """Longer than its lease, but nobody took over: the lease is renewed and holds."""
    handle = await client.start(programs.behind_gate, story_witness.folder, 4)
    worker = start_worker(dsn, processes=1, **LEASE)
    await until(lambda: len(story_witness.entries) >= 5, 20)
    worker.signal(signal.SIGSTOP)
    expired = load_queries("kagzi")["find_expired"]
    await until(lambda: rows(dsn, expired), 20)
    worker.signal(signal.SIGCONT)
    story_witness.open("go")
    assert len(await handle.result(timeout=20)) == 4
    assert worker.exit_code is None
    assert story_witness.counts["after"] == 1


# --- connections that are lost --------------------------------------------------------------


@asynccontextmanager
async def worker_on(proxy: Proxy, **options: Any) -> AsyncIterator[tuple[Client, Worker]]:
    """A client and a worker's first incarnation, through the proxy."""
    async with kagzi.connect(proxy.dsn, migrate=False) as made:
        async with made.worker(**{"processes": 1, "poll_s": 0.05, **options}) as worker:
            yield made, worker.incarnation


async def test_connections_cut_again_and_again_lose_and_double_nothing(
    proxy: Proxy, dsn: str, story_witness: Witness
) -> None:
    """The 31st thing that a worker asks on a connection is its last, or the answer to it is."""
    asked: Counter[Link] = Counter()
    cuts: set[Link] = set()

    async def cut(link: Link, message: Message) -> bool:
        asked[link] += message.from_client
        most = 31 + len(proxy.links) % 5
        if asked[link] < most or (message.from_client and asked[link] % 2 == 1):
            return True
        cuts.add(link)
        return False

    async with worker_on(proxy) as (client, _):
        proxy.hook = cut
        for _ in range(3):
            handles = [await client.start(programs.story, story_witness.folder) for _ in range(8)]
            results = await asyncio.gather(*(handle.result(timeout=30) for handle in handles))
            assert results == [programs.STORY] * 8
        proxy.hook = pass_all
    assert len({link.application_name for link in cuts}) >= 2, "of the pool, and fenced ones"
    assert len(cuts) > 12
    query = "SELECT count(*), count(DISTINCT step_id) FROM kagzi.step_runs GROUP BY run_id"
    assert set(await rows(dsn, query)) == {(79, 79)}
    assert await orphans(dsn) == []


async def test_run_whose_claim_was_never_answered_is_driven_all_the_same(
    proxy: Proxy, dsn: str, story_witness: Witness
) -> None:
    """The claim is committed, and its worker does not know of it."""
    lost = asyncio.Event()
    claims: set[Link] = set()

    async def cut(link: Link, message: Message) -> bool:
        if not lost.is_set() and message.is_ready and await is_claimed(dsn):
            claims.add(link)
            lost.set()
            return False
        return True

    async with worker_on(proxy, processes=0) as (client, worker):
        proxy.hook = cut
        handle = await client.start(programs.story, story_witness.folder)
        assert await handle.result(timeout=20) == programs.STORY
        assert lost.is_set()
        assert worker.lost is None
    assert claims


async def is_claimed(dsn: str) -> bool:
    return bool(await rows(dsn, "SELECT 1 FROM kagzi.workflow_runs WHERE status = 'running'"))


async def test_claim_that_somebody_cancels_is_made_again(
    client: Client, dsn: str, story_witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    await rows(
        dsn,
        """
        CREATE SEQUENCE kagzi.tries;
        CREATE FUNCTION kagzi.cancel() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.status = 'running' AND nextval('kagzi.tries') = 1 THEN
                RAISE EXCEPTION 'cancelled on purpose' USING ERRCODE = '57014';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER cancel BEFORE UPDATE ON kagzi.workflow_runs
            FOR EACH ROW EXECUTE FUNCTION kagzi.cancel();
        """,
    )
    handle = await client.start(programs.story, story_witness.folder)
    async with client.worker(processes=0, poll_s=0.05):
        assert await handle.result(timeout=20) == programs.STORY
    assert "cancelled on purpose" in caplog.text


async def test_client_goes_on_after_the_server_cut_every_connection(
    proxy: Proxy, story_witness: Witness
) -> None:
    async with worker_on(proxy, processes=0) as (client, _):
        for _ in range(3):
            handle = await client.start(programs.story, story_witness.folder)
            waiting = asyncio.ensure_future(handle.result(timeout=20))
            await asyncio.sleep(0)
            await proxy.cut_all()
            assert await waiting == programs.STORY
            assert await handle.status() == "completed"


# --- a server that goes away ----------------------------------------------------------------


async def test_server_that_is_away_for_a_while_delays_a_run_and_no_more(
    proxy: Proxy, story_witness: Witness
) -> None:
    async with worker_on(proxy, lease_s=20.0, heartbeat_s=0.2) as (client, worker):
        handle = await client.start(programs.behind_gate, story_witness.folder, 8)
        await until(lambda: len(story_witness.entries) >= 9, 20)
        proxy.refusing = True
        await proxy.cut_all()
        await until(lambda: worker.heartbeat.is_failing)  # no answer is on its way any more
        beats, tries = worker.heartbeat.beats, worker.heartbeat.tries
        story_witness.open("go")
        await until(lambda: worker.heartbeat.tries >= tries + 3)
        assert worker.heartbeat.beats == beats
        proxy.refusing = False
        assert len(await handle.result(timeout=30)) == 8
        assert worker.lost is None
    assert story_witness.counts["after"] == 1


async def test_worker_closes_although_the_server_is_gone(
    proxy: Proxy, dsn: str, story_witness: Witness, client: Client
) -> None:
    """What it held goes on elsewhere when its lease has run out."""
    handle: RunHandle[Any]
    async with asyncio.timeout(60):
        async with kagzi.connect(proxy.dsn, migrate=False) as ours:
            async with ours.worker(processes=0, **LEASE):
                handle = await client.start(programs.behind_gate, story_witness.folder, 4)
                await until(lambda: len(story_witness.entries) >= 5, 20)
                proxy.refusing = True
                await proxy.cut_all()
    story_witness.open("go")
    async with client.worker(processes=0, **LEASE):
        assert len(await handle.result(timeout=20)) == 4
    assert story_witness.counts["before"] == 1


async def test_server_that_accepts_and_never_answers_ends_the_workers_trust_in_its_lease(
    proxy: Proxy, story_witness: Witness
) -> None:
    going = asyncio.Event()

    async def hold(link: Link, message: Message) -> bool:
        await going.wait()
        return True

    async with worker_on(proxy, **LEASE) as (client, worker):
        await client.start(programs.behind_gate, story_witness.folder, 4)
        await until(lambda: len(story_witness.entries) >= 5, 20)
        proxy.hook = hold
        await asyncio.wait_for(asyncio.shield(worker.ended), 30)
        assert isinstance(worker.lost, LeaseLost)
        assert worker.runs == {}
        going.set()
        story_witness.open("go")


async def test_lease_that_cannot_be_renewed_in_time_ends_the_worker(
    proxy: Proxy, story_witness: Witness
) -> None:
    async with worker_on(proxy, processes=0, **LEASE) as (client, worker):
        await client.start(programs.behind_gate, story_witness.folder, 2)
        await until(lambda: len(story_witness.entries) >= 3, 20)
        proxy.refusing = True
        await proxy.cut_all()
        await asyncio.wait_for(asyncio.shield(worker.ended), 30)
        assert isinstance(worker.lost, LeaseLost)
        proxy.refusing = False
        story_witness.open("go")


async def test_worker_rescues_nobody_right_after_it_lost_sight_of_the_store_itself(
    client: Client, dsn: str
) -> None:
    """Others had no chance to renew their leases meanwhile."""
    async with client.worker(processes=0, lease_s=30, heartbeat_s=0.4) as keeper:
        worker = keeper.incarnation
        rescued: list[UUID] = []

        async def note_rescue(worker_id: UUID, *_: Any, **__: Any) -> int:
            rescued.append(worker_id)
            return 0

        worker.store.rescue = note_rescue  # type: ignore[method-assign]
        other = await register(worker, lease_s=0.0)
        heartbeat = worker.heartbeat
        await until(lambda: other in rescued)
        rescued.clear()
        heartbeat.good_since = float("inf")
        beats = heartbeat.beats
        await until(lambda: heartbeat.beats >= beats + 3)
        assert rescued == []
        del worker.store.rescue  # type: ignore[method-assign]


async def register(worker: Worker, lease_s: float) -> UUID:
    other = kagzi.worker.worker.uuid7()
    await worker.store.register_worker(other, "elsewhere", "boot", 1, "then", {}, lease_s)
    return other


# --- a worker that cannot write -------------------------------------------------------------


async def test_worker_whose_rows_are_refused_lets_others_have_its_runs(
    client: Client, dsn: str, story_witness: Witness
) -> None:
    """Its process lives, and so would its lease."""
    await rows(dsn, "ALTER TABLE kagzi.parallel_groups ADD CONSTRAINT poison CHECK (false)")
    async with client.worker(processes=0, poll_s=0.05) as broken:
        first = broken.incarnation
        handle = await client.start(programs.story, story_witness.folder)
        await asyncio.wait_for(asyncio.shield(first.ended), 20)
        assert first.lost is not None
        await until(lambda: is_free(dsn))
        await rows(dsn, "ALTER TABLE kagzi.parallel_groups DROP CONSTRAINT poison")
        async with client.worker(processes=0, poll_s=0.05):
            assert await handle.result(timeout=20) == programs.STORY


async def is_free(dsn: str) -> bool:
    return await status_of(dsn) == ("pending", None)


async def test_second_worker_on_the_host_leaves_a_living_one_alone(
    client: Client, dsn: str, story_witness: Witness, start_worker: StartWorker
) -> None:
    async with client.worker(processes=0, poll_s=0.05) as worker:
        handle = await client.start(programs.behind_gate, story_witness.folder, 2)
        await until(lambda: len(story_witness.entries) >= 3, 20)
        other = start_worker(dsn, lease_s=60.0, heartbeat_s=0.1)
        await until(lambda: "claims" in other.said, 20)
        query = "SELECT count(*) FROM kagzi.workers WHERE status <> 'ended'"
        assert await value(dsn, query) == 2
        story_witness.open("go")
        assert len(await handle.result(timeout=20)) == 2
        assert worker.lost is None


async def test_fresh_database_is_left_without_orphans_by_a_worker_that_comes_and_goes(
    dsn: str, story_witness: Witness
) -> None:
    for _ in range(3):
        async with started(dsn, processes=1) as engine:
            handle = await engine.start(programs.story, story_witness.folder, id="one")
    async with started(dsn, processes=1) as engine:
        assert await handle_of(engine.client, handle).result(timeout=20) == programs.STORY
    assert await orphans(dsn) == []
    assert await value(dsn, "SELECT count(*) FROM kagzi.worker_leases") == 0


def handle_of(client: Client, handle: RunHandle[Any]) -> RunHandle[Any]:
    return RunHandle(
        client, handle.run_id, handle.id, handle.workflow, handle.version, handle.is_new
    )


async def test_no_backend_is_left_by_a_worker_that_is_killed(
    dsn: str, start_worker: StartWorker, story_witness: Witness
) -> None:
    async with kagzi.connect(dsn) as client:
        await client.start(programs.behind_gate, story_witness.folder, 4)
    worker = start_worker(dsn, processes=0)
    await until(lambda: len(story_witness.entries) >= 5, 20)
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'kagzi%' AND pid <> pg_backend_pid()"
    )

    async def all_there() -> bool:
        """Of the pool, fenced, listening, renewing, kept."""
        return bool(await value(dsn, query) >= 5)

    async def none_left() -> bool:
        return bool(await value(dsn, query) == 0)

    await until(all_there)
    worker.kill()
    await until(none_left)
