"""Operations that meet: two at a time on the same runs, in opposite orders, on a slow server.

Each change of a run takes a moment here, so that locks are held long enough to meet; a server that
looks for deadlocks soon tells of them.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest

import kagzi
from kagzi import Client, Context, RunHandle, RunStatus
from kagzi.store.operations import tell_ends
from kagzi.store.queries import load_queries
from kagzi.store.store import Store
from tests.faults.trial import Server
from tests.fix_engine import until
from tests.fix_faults import rows, value

SLOW = """
CREATE FUNCTION audit.linger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(0.004);
    RETURN NEW;
END $$;
CREATE TRIGGER linger BEFORE UPDATE ON kagzi.workflow_runs
    FOR EACH ROW EXECUTE FUNCTION audit.linger();
"""
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


@pytest.fixture
def slow_dsn(server: Server) -> Iterator[str]:
    with server.database() as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(SLOW.encode())
        yield dsn


@kagzi.workflow
async def leaf(ctx: Context) -> str:
    return str(await ctx.wait_event("end"))


@kagzi.workflow
async def tree(ctx: Context) -> str:
    await ctx.start_child(leaf)
    return str(await ctx.wait_event("end"))


Act = Callable[[Client, RunHandle[Any]], Awaitable[Any]]
numbers = itertools.count()


async def send(client: Client, handle: RunHandle[Any]) -> None:
    """Sent, and there, once; or refused because the run has ended."""
    name = f"event {next(numbers)}"
    assert await client.send(handle, "other", name, id=name)
    # Of this run: a fork has the event, too.
    query = "SELECT count(*) FROM kagzi.run_events WHERE key = %(key)s AND run_id = %(id)s"
    dsn = client._store.connector.conninfo()
    assert await value(dsn, query, key=name, id=handle.run_id) == 1


async def fork(client: Client, handle: RunHandle[Any]) -> None:
    made = await client.fork(handle)
    assert await client.cancel(made) in (RunStatus.CANCELLED, RunStatus.RUNNING)


OPERATIONS: dict[str, Act] = {
    "cancel": lambda client, handle: client.cancel(handle),
    "pause": lambda client, handle: client.pause(handle),
    "resume": lambda client, handle: client.resume(handle),
    "retry": lambda client, handle: client.retry(handle),
    "send": send,
    "fork": fork,
    "tell": lambda client, _: tell_ends(client._store),
}


async def act(client: Client, operation: str, handles: list[RunHandle[Any]]) -> None:
    for handle in handles:
        with suppress(kagzi.RunEnded, kagzi.InvalidInput):  # it came second
            await OPERATIONS[operation](client, handle)


@pytest.mark.parametrize("held", [False, True], ids=["held by nobody", "held by a worker"])
async def test_two_operations_at_once_end_without_deadlock_or_lost_update(
    slow_dsn: str, held: bool
) -> None:
    async with (
        kagzi.connect(slow_dsn, migrate=False) as one,
        kagzi.connect(slow_dsn, migrate=False) as other,
    ):
        if held:
            async with one.worker(processes=0, poll_s=0.05):
                await meet(one, other, slow_dsn)
        else:
            await meet(one, other, slow_dsn)
    assert await value(slow_dsn, DEADLOCKS) == 0


async def meet(one: Client, other: Client, dsn: str) -> None:
    """Each pair: the first from the first run on, the second from the last back."""
    for first, second in itertools.product(OPERATIONS, OPERATIONS):
        handles = [await one.start(tree) for _ in range(2)]
        await asyncio.gather(act(one, first, handles), act(other, second, handles[::-1]))
        if "retry" in (first, second):
            await act(one, "cancel", handles)
        if "cancel" in (first, second, "cancel" if "retry" in (first, second) else ""):
            for handle in handles:
                await until(lambda h=handle: is_cancelled(h))
        else:  # none of them is lost, in whichever state it was left
            await act(other, "resume", handles)
            for handle in handles:
                await other.send(handle, "end", first)
                await other.cancel(handle)
                await until(lambda h=handle: has_ended(h))


async def is_cancelled(handle: RunHandle[Any]) -> bool:
    return await handle.status() is RunStatus.CANCELLED


async def has_ended(handle: RunHandle[Any]) -> bool:
    return (await handle.status()).is_terminal


# --- rescuers -------------------------------------------------------------------------------


async def rescue_at_once(dsn: str, rounds: int) -> int:
    """Several rescuers of the same many runs, again and again; how many deadlocks that makes."""
    async with kagzi.connect(dsn, migrate=False) as client:
        for _ in range(rounds):
            await rows(
                dsn,
                "INSERT INTO kagzi.workers (id, host, boot_id, pid, process_started, status)"
                " VALUES (gen_random_uuid(), 'gone', 'boot', 1, 'then', 'ended');"
                "INSERT INTO kagzi.workflow_runs"
                " (id, external_id, workflow, version, status, worker_id, input)"
                " SELECT gen_random_uuid(), gen_random_uuid()::text, 'gone', '1', 'running', id,"
                " '[]' FROM kagzi.workers, generate_series(1, 400) WHERE host = 'gone'",
            )
            await asyncio.gather(*(_rescue(client._store) for _ in range(4)))
            query = "SELECT count(*) FROM kagzi.workflow_runs WHERE worker_id IS NOT NULL"
            assert await value(dsn, query) == 0
            await rows(dsn, "DELETE FROM kagzi.workflow_runs; DELETE FROM kagzi.workers")

        async def is_counted() -> Any:
            return await value(dsn, DEADLOCKS)

        try:
            return int(await until(is_counted, 2))  # counts come late
        except TimeoutError:
            return 0


async def _rescue(store: Store) -> None:
    for _ in range(20):
        try:
            await store.rescue(UUID(int=1), "a test")
            return
        except kagzi.StoreUnavailable as error:
            if not isinstance(error.__cause__, psycopg.errors.DeadlockDetected):
                raise


async def test_rescuers_of_the_same_runs_do_not_wait_for_each_other_in_a_circle(
    server: Server,
) -> None:
    with server.database() as dsn:
        assert await rescue_at_once(dsn, 3) == 0


async def test_rescuers_that_lock_unsorted_would_be_noticed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the oracle, this is tested on a broken engine."""
    queries = load_queries("kagzi")
    broken = re.sub(
        r"ORDER BY r\.id FOR UPDATE OF r SKIP LOCKED",
        "ORDER BY random() FOR UPDATE OF r",
        queries["free_runs"],
    )
    assert broken != queries["free_runs"]
    monkeypatch.setitem(queries, "free_runs", broken)
    with server.database() as dsn:
        for _ in range(5):  # they must meet
            if await rescue_at_once(dsn, 3):
                return
    pytest.fail("no deadlock was seen")
