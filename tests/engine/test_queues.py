"""Queues as a program uses them: limits over several workers, who serves what, the commands."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kagzi
from kagzi import Context, InvalidInput
from kagzi.cli import main
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import HOUR_S, PATIENCE_S, Engine, started, until
from tests.fix_faults import rows
from tests.fix_proxy import Proxy


@kagzi.step(where="coordinator")
async def shows(folder: str, name: str, gate: str | None) -> str:
    witness = Witness(folder)
    witness.note(f"+{name}")
    try:
        if gate is None:
            await asyncio.sleep(0.003)
        else:
            await witness.pass_gate(gate)
    finally:
        witness.note(f"-{name}")
    return name


@kagzi.workflow
async def shown(ctx: Context, folder: str, name: str, gate: str | None = None) -> str:
    return await ctx.step(shows, folder, name, gate)


@kagzi.workflow
async def naps(ctx: Context, folder: str, seconds: float) -> str:
    await ctx.step(steps.note, folder, "before")
    await ctx.sleep(seconds)
    return await ctx.step(steps.note, folder, "after")


@pytest.fixture
async def engine(dsn: str) -> AsyncIterator[Engine]:
    async with started(dsn, processes=0, poll_s=0.05, heartbeat_s=0.02) as made:
        yield made


@pytest.fixture
async def three(engine: Engine) -> AsyncIterator[Engine]:
    """Three workers with room for three runs each, two of them of another client."""
    engine.worker.concurrency = 3  # or the quickest would leave nothing to the others
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(kagzi.connect(engine.dsn, migrate=False))
        for _ in range(2):
            worker = client.worker(processes=0, poll_s=0.05, concurrency=3)
            await stack.enter_async_context(worker)
        yield engine


# --- limits ---------------------------------------------------------------------------------


async def test_three_workers_keep_a_limit_and_use_it(three: Engine, witness: Witness) -> None:
    await three.client.set_queue("q", concurrency=4)
    handles = await three.client.start_many(
        shown, [(witness.folder, f"{number}", "go") for number in range(60)], queue="q"
    )
    await until(lambda: witness.most_open() >= 4)
    witness.open("go")
    for handle in handles:
        await handle.result(PATIENCE_S)
    assert witness.most_open() == 4
    workers = await three.rows("SELECT count(DISTINCT worker_id) FROM kagzi.step_runs")
    assert workers[0][0] >= 2, "four were open at once, and no worker has room for four"


async def test_keys_have_their_own_limit_and_pass_a_long_line_of_one(
    three: Engine, witness: Witness
) -> None:
    await three.client.set_queue("q", concurrency_per_key=2)
    many = [(witness.folder, "busy", "end") for _ in range(700)]
    await three.client.start_many(shown, many, queue="q", keys="busy")
    await until(lambda: witness.counts["+busy"] == 2)
    others = await three.client.start_many(
        shown,
        [(witness.folder, f"k{n % 3}", "others") for n in range(12)],
        queue="q",
        keys=[f"k{n % 3}" for n in range(12)],
    )
    await until(lambda: all(witness.counts[f"+k{n}"] == 2 for n in range(3)))
    witness.open("others")
    for handle in others:
        await handle.result(PATIENCE_S)
    assert witness.counts["+busy"] == 2
    for key in ("k0", "k1", "k2"):
        assert witness.most_open(f"+{key}", f"-{key}") == 2
    await three.client.set_queue("q", concurrency_per_key=None)
    await three.rows("DELETE FROM kagzi.workflow_runs WHERE status = 'pending'")
    witness.open("end")


async def test_rate_holds_over_three_workers_and_is_used_up(
    three: Engine, witness: Witness
) -> None:
    await three.client.set_queue("q", rate=(5, timedelta(seconds=2)))
    handles = await three.client.start_many(
        shown, [(witness.folder, f"{number}") for number in range(12)], queue="q"
    )
    for handle in handles:
        await handle.result(PATIENCE_S)
    starts = sorted(at for (at,) in await three.rows("SELECT started_at FROM kagzi.workflow_runs"))
    window = timedelta(seconds=2)
    assert max(sum(at <= other < at + window for other in starts) for at in starts) == 5


async def test_run_that_sleeps_leaves_its_place_and_competes_for_it_again(
    engine: Engine, witness: Witness
) -> None:
    await engine.client.set_queue("q", concurrency=1)
    sleeper = await engine.start(naps, witness.folder, HOUR_S, queue="q", priority=1)
    holder = await engine.start(shown, witness.folder, "holder", "end", queue="q")
    await until(lambda: "+holder" in witness.entries)
    assert await sleeper.status() == "sleeping"
    await engine.move_clock(2 * HOUR_S)
    (queue,) = await engine.client.queues()
    assert (queue.waiting, queue.sleeping, queue.running) == (1, 0, 1)
    witness.open("end")
    await holder.result(PATIENCE_S)
    assert await sleeper.result(PATIENCE_S) == "after"


async def test_priority_goes_first_in_a_queue(engine: Engine, witness: Witness) -> None:
    await engine.client.set_queue("q", concurrency=1, paused=True)
    handles = [
        await engine.start(shown, witness.folder, f"p{priority}", queue="q", priority=priority)
        for priority in (0, 7, -3, 7, 2)
    ]
    await engine.client.set_queue("q", paused=False)
    for handle in handles:
        await handle.result(PATIENCE_S)
    begun = [entry for entry in witness.entries if entry[0] == "+"]
    assert begun == ["+p7", "+p7", "+p2", "+p0", "+p-3"]


async def test_paused_queue_stands_still_and_goes_on(engine: Engine, witness: Witness) -> None:
    running = await engine.start(shown, witness.folder, "running", "end")
    await until(lambda: "+running" in witness.entries)
    await engine.client.set_queue("default", paused=True)
    waiting = await engine.start(shown, witness.folder, "waiting")
    elsewhere = await engine.start(shown, witness.folder, "elsewhere", queue="other")
    assert await elsewhere.result(PATIENCE_S) == "elsewhere"
    witness.open("end")
    assert await running.result(PATIENCE_S) == "running", "what is held ends"
    assert await waiting.status() == "pending"
    await engine.client.set_queue("default", paused=False)
    assert await waiting.result(PATIENCE_S) == "waiting"


async def test_limit_that_is_lifted_lets_go_at_once(dsn: str, witness: Witness) -> None:
    """Workers hear of it; the poll is a minute away."""
    async with started(dsn, processes=0, poll_s=60, heartbeat_s=10) as engine:
        await engine.client.set_queue("q", paused=True)
        handle = await engine.start(shown, witness.folder, "a", queue="q")
        await engine.client.set_queue("q", paused=False)
        assert await handle.result(PATIENCE_S) == "a"


async def test_everything_works_by_polling_alone(dsn: str, witness: Witness) -> None:
    async with started(dsn, processes=0, poll_s=0.05) as engine:
        await engine.client._listener.close()
        async with kagzi.connect(dsn, migrate=False) as client:
            await client.set_queue("q", concurrency=1, rate=(100, 1))
            handles = await client.start_many(
                shown, [(witness.folder, f"{n}") for n in range(4)], queue="q"
            )
            for handle in handles:
                await handle.result(PATIENCE_S)
    assert witness.most_open() == 1


async def test_without_limits_nothing_more_is_asked(proxy: Proxy, witness: Witness) -> None:
    """No claim from lines that are not there; the list of queues is read now and then."""

    def asked(statement: str) -> int:
        return sum(statement in m.text for link in proxy.links for m in link.seen)

    async with started(proxy.dsn, processes=0, poll_s=60, heartbeat_s=10) as engine:
        for number in range(10):
            await engine.run(shown, witness.folder, f"{number}", queue="free")
        assert asked(".claim_apart(") == 0
        assert 1 <= asked("Whether there are queues with lines") <= 3
        assert not await engine.rows("SELECT 1 FROM kagzi.workflow_runs WHERE apart")
        await engine.client.set_queue("free", concurrency=1)
        await engine.run(shown, witness.folder, "limited", queue="free")
        assert asked(".claim_apart(") > 0


# --- who serves what ------------------------------------------------------------------------


async def test_worker_serves_only_its_queues(dsn: str, witness: Witness) -> None:
    async with started(dsn, processes=0, poll_s=0.05, queues=("mail",)) as engine:
        other = await engine.start(shown, witness.folder, "other", queue="other")
        plain = await engine.start(shown, witness.folder, "plain")
        mail = await engine.start(shown, witness.folder, "mail", queue="mail")
        assert await mail.result(PATIENCE_S) == "mail"
        assert await other.status() == await plain.status() == "pending"
        async with engine.client.worker(processes=0, poll_s=0.05, queues=["default", "other"]):
            assert await other.result(PATIENCE_S) == "other"
            assert await plain.result(PATIENCE_S) == "plain"


async def test_worker_of_one_queue_finds_what_was_started_before_it(
    dsn: str, witness: Witness
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(shown, witness.folder, "early", queue="mail")
        assert (await handle.describe()).summary.queue == "mail"
        async with client.worker(processes=0, poll_s=0.05, queues=("mail",)):
            assert await handle.result(PATIENCE_S) == "early"


async def test_run_knows_its_queue_and_key(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(shown, witness.folder, "a", queue="mail", key="customer-7")
    await handle.result(PATIENCE_S)
    (run,) = await engine.client.runs(queue="mail")
    assert (run.queue, run.key) == ("mail", "customer-7")
    assert await engine.client.runs(queue="other") == []
    fork = await engine.client.fork(handle.id, from_step="shows")
    summary = (await fork.describe()).summary
    assert (summary.queue, summary.key) == ("mail", "customer-7")
    await fork.result(PATIENCE_S)


async def test_retried_run_waits_in_its_queue_again(engine: Engine, witness: Witness) -> None:
    @kagzi.workflow(name="fails once")
    async def fails_once(ctx: Context) -> str:
        return await ctx.step(steps.unless, witness.folder, "try", "good")

    await engine.client.set_queue("q", concurrency=1)
    handle = await engine.start(fails_once, queue="q")
    with pytest.raises(kagzi.RunFailed):
        await handle.result(PATIENCE_S)
    witness.open("good")
    await engine.client.set_queue("q", paused=True)
    await engine.client.retry(handle)
    assert (await engine.client.queues())[0].waiting == 1
    await engine.client.set_queue("q", paused=False)
    await handle.result(PATIENCE_S)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"concurrency_per_key": 1.5}, "concurrency_per_key"),
        ({"rate": 5}, "rate must be"),
        ({"rate": (0, 1)}, "starts"),
        ({"rate": (1, 0)}, "time"),
        ({"rate": (1, float("inf"))}, "time"),
        ({"rate": (1, timedelta(days=400))}, "366 days"),
        ({"paused": 1}, "paused"),
    ],
)
async def test_bad_limit_is_named_and_nothing_changes(
    engine: Engine, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidInput, match=named):
        await engine.client.set_queue("q", **options)
    assert await engine.client.queues() == []


async def test_bad_names_are_refused(engine: Engine) -> None:
    for start in (
        engine.client.set_queue(""),
        engine.client.set_queue(" q"),
        engine.start(shown, "", "", queue="q" * 251),
        engine.start(shown, "", "", queue=3),
        engine.start(shown, "", "", key=""),
        engine.start(shown, "", "", key="a\nb"),
    ):
        with pytest.raises(InvalidInput, match=r"queue|key"):
            await start
    for queues in ("mail", (), ("",), 3, [1]):
        with pytest.raises(InvalidInput, match="queue"):
            async with engine.client.worker(processes=0, queues=queues):  # type: ignore[arg-type]
                pass
    assert await engine.count("workflow_runs") == 0


# --- commands -------------------------------------------------------------------------------


@pytest.fixture
def kagzi_command(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *words: CliRunner().invoke(main, words, prog_name="kagzi")


def test_queue_is_set_paused_and_listed(kagzi_command: Callable[..., Result]) -> None:
    assert kagzi_command("queues").stdout == "no queues\n"
    words = ("queue", "emails", "--concurrency", "5", "--per-key", "2", "--rate", "10/1.5")
    made = json.loads(kagzi_command(*words, "--json").stdout)
    assert (made["name"], made["concurrency"], made["concurrency_per_key"]) == ("emails", 5, 2)
    assert (made["rate"], made["paused"], made["waiting"]) == ([10, 1.5], False, 0)
    paused = kagzi_command("queue", "emails", "--pause", "--rate", "none")
    assert "paused" in paused.stdout
    (listed,) = json.loads(kagzi_command("queues", "--json").stdout)
    assert (listed["paused"], listed["rate"], listed["concurrency"]) == (True, None, 5)
    resumed = json.loads(kagzi_command("queue", "emails", "--resume", "--json").stdout)
    assert not resumed["paused"]
    assert "emails" in kagzi_command("queues").stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("queue", "q"), "nothing to set"),
        (("queue", "q", "--pause", "--resume"), "--resume"),
        (("queue", "q", "--concurrency", "many"), "many"),
        (("queue", "q", "--concurrency", "0"), "0"),
        (("queue", "q", "--rate", "10"), "10"),
        (("queue", "q", "--rate", "0/1"), "starts"),
        (("queue", "", "--pause"), "queue"),
        (("worker", "tests.engine.cli_flows", "--queue", ""), "queue"),
    ],
)
def test_bad_options_are_told(
    kagzi_command: Callable[..., Result], words: tuple[str, ...], named: str
) -> None:
    ended = kagzi_command(*words)
    assert ended.exit_code == 2
    assert named in ended.stderr


async def test_runs_are_listed_by_queue(
    dsn: str, witness: Witness, kagzi_command: Callable[..., Result]
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        await client.start(shown, witness.folder, "a", queue="mail", id="a")
        await client.start(shown, witness.folder, "b", id="b")
    found = await asyncio.to_thread(kagzi_command, "runs", "--queue", "mail", "--json")
    (run,) = json.loads(found.stdout)
    assert (run["id"], run["queue"], run["key"]) == ("a", "mail", None)
    assert len(await rows(dsn, "SELECT id FROM kagzi.workflow_runs")) == 2


# --- child runs -----------------------------------------------------------------------------


@kagzi.workflow
async def queues_children(ctx: Context, folder: str) -> list[str]:
    calls = [shown.bind(folder, f"{n}").options(queue="narrow", key=f"k{n}") for n in range(6)]
    group = await ctx.parallel_vec("group", calls)
    alone = await ctx.run_child(shown, folder, "alone", queue="narrow")
    handle = await ctx.start_child(shown, folder, "started", queue="narrow", key="k")
    return [*group, alone, await handle.result()]


async def test_child_runs_wait_in_the_queue_that_they_are_given(
    three: Engine, witness: Witness
) -> None:
    """While the parent, which holds no place there, waits for them."""
    await three.client.set_queue("narrow", concurrency=1)
    handle = await three.start(queues_children, witness.folder)
    assert await handle.result(PATIENCE_S) == [*"012345", "alone", "started"]
    entries = [entry[0] for entry in witness.entries]
    assert entries == ["+", "-"] * 8, "one at a time"
    query = "SELECT queue, queue_key, apart FROM kagzi.workflow_runs WHERE parent_run_id = %(id)s"
    lines = [(f"k{n}", True) for n in range(6)] + [("", True), ("k", True)]
    assert sorted(await three.rows(query, id=handle.run_id)) == sorted(
        ("narrow", *line) for line in lines
    )
