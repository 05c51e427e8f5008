"""What had happened before its claim is no news to a run: it is not parked before it looked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import kagzi
from kagzi import Client, Context, RunHandle
from kagzi.engine import children, runner
from tests.fix_engine import PATIENCE_S, until


@kagzi.workflow
async def waits(ctx: Context) -> str:
    return str(await ctx.wait_event("go"))


@kagzi.workflow
async def quick(ctx: Context) -> str:
    return "done"


@kagzi.workflow
async def has_child(ctx: Context) -> str:
    return await ctx.run_child(quick)


class SlowStore:
    """Answers one question only when the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.open = asyncio.Event()
        self.asked = asyncio.Event()
        ask = getattr(module, name)

        async def slow(*arguments: Any) -> Any:
            self.asked.set()
            await self.open.wait()
            return await ask(*arguments)

        monkeypatch.setattr(module, name, slow)


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[Client]:
    async with kagzi.connect(dsn, migrate=False) as made:
        yield made


async def try_to_park(client: Client, run: RunHandle[Any], store: SlowStore) -> None:
    """Look, for long enough, whether a run that still waits for the store can be parked."""
    async with client.worker(processes=0, poll_s=0.05) as worker:
        await store.asked.wait()
        live = worker.runs[run.run_id]
        live._parking._look(live.number, patient=True)
        assert not live.leaving
        store.open.set()
        await run.result(PATIENCE_S)


async def test_event_sent_before_the_claim_is_heard_however_slow_the_store_is(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await client.start(waits)
    await run.send("go", "early")
    store = SlowStore(monkeypatch, runner, "load_events")
    await try_to_park(client, run, store)


@kagzi.workflow
async def waits_shortly(ctx: Context) -> str:
    return str(await ctx.wait_event("go", timeout=0.01))


async def test_event_that_was_sent_in_time_comes_before_the_end_of_the_wait(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the time is up when the run looks for it."""
    run = await client.start(waits_shortly)
    await run.send("go", "early")
    store = SlowStore(monkeypatch, runner, "load_events")
    async with client.worker(processes=0, poll_s=0.05) as worker:
        await store.asked.wait()
        live = worker.runs[run.run_id]
        await until(lambda: live.timers.next_s() is not None and live.timers.next_s() > 0.01)
        store.open.set()
        assert await run.result(PATIENCE_S) == "early"


async def test_child_that_ended_before_the_claim_is_seen_however_slow_the_store_is(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await client.start(has_child)
    async with client.worker(processes=0, poll_s=0.05):
        assert await run.result(PATIENCE_S) == "done"
    async with client._store.connection() as connection:  # as after a crash before that
        await connection.execute("DELETE FROM kagzi.step_runs WHERE run_id = %s", [run.run_id])
        await connection.execute(
            "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL, output = NULL"
            " WHERE id = %s",
            [run.run_id],
        )
    store = SlowStore(monkeypatch, children, "read_ends")
    await try_to_park(client, run, store)
