"""Many starts in one write, and starts that are part of the caller's own transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

import kagzi
from kagzi import CodecError, Context, InvalidArguments, InvalidInput, RunConflict, UnknownWorkflow
from tests.fix_db import Databases
from tests.fix_engine import PATIENCE_S, started, until
from tests.fix_faults import rows, value
from tests.fix_proxy import Link, Message, Proxy

RUNS = "SELECT count(*) FROM kagzi.workflow_runs"


@kagzi.workflow
async def same(ctx: Context, number: int, more: str = "") -> int:
    return number


@kagzi.workflow
async def other(ctx: Context, number: int) -> int:
    return -number


@pytest.fixture
async def client(dsn: str) -> AsyncIterator[kagzi.Client]:
    async with kagzi.connect(dsn, migrate=False) as made:
        yield made


@pytest.fixture
async def own(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of the caller's, on which nothing is open."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection


def ids_of(count: int) -> list[str]:
    return [f"run {number}" for number in range(count)]


# --- many -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 20, 21, 1_200])
async def test_each_input_gets_its_run_in_order(client: kagzi.Client, dsn: str, count: int) -> None:
    handles = await client.start_many(
        same, [(number, f"n{number}") for number in range(count)], priority=3
    )
    assert len({handle.run_id for handle in handles}) == count
    assert all(handle.is_new and handle.workflow == same.name for handle in handles)
    query = "SELECT id, input, external_id, priority, version FROM kagzi.workflow_runs"
    stored = {row[0]: row for row in await rows(dsn, f"{query} ORDER BY wake_at")}
    assert list(stored) == [handle.run_id for handle in handles], "due in the order of the inputs"
    for number, handle in enumerate(handles):
        assert stored[handle.run_id][1:] == (
            *(same.arguments.encode((number, f"n{number}"), {}), handle.id, 3, "1"),
        )


async def test_ten_thousand_starts_are_one_copy_and_a_handful_of_statements(
    proxy: Proxy, dsn: str
) -> None:
    async with kagzi.connect(proxy.dsn, migrate=False) as client:
        await client.start(same, 0)
        await client._announcer.close()  # the first start is told of, too
        before = proxy.statements()
        await client.start_many(same, [(number,) for number in range(10_000)], queue="q", keys="k")
        assert proxy.statements() - before <= 4
    assert await value(dsn, f"{RUNS} WHERE queue = 'q' AND queue_key = 'k'") == 10_000


async def test_results_come_from_a_worker(dsn: str) -> None:
    async with started(dsn, processes=0) as engine:
        handles = await engine.client.start_many(same, [(number,) for number in range(50)])
        assert [await handle.result(PATIENCE_S) for handle in handles] == list(range(50))


async def test_nothing_is_started_of_nothing(client: kagzi.Client, dsn: str) -> None:
    assert await client.start_many(same, []) == []
    assert await value(dsn, RUNS) == 0


@pytest.mark.parametrize("count", [5, 100])
async def test_known_id_gives_its_run_and_new_ones_are_added(
    client: kagzi.Client, dsn: str, count: int
) -> None:
    known = await client.start(same, 3, id="run 3")
    handles = await client.start_many(same, [(n,) for n in range(count)], ids=ids_of(count))
    assert [handle.id for handle in handles] == ids_of(count)
    assert [handle.is_new for handle in handles] == [n != 3 for n in range(count)]
    assert handles[3].run_id == known.run_id
    again = await client.start_many(same, [(n,) for n in range(count)], ids=ids_of(count))
    assert [handle.run_id for handle in again] == [handle.run_id for handle in handles]
    assert not any(handle.is_new for handle in again)
    assert await value(dsn, RUNS) == count
    assert all(h.is_new for h in await client.start_many(other, [(1,)] * 2, ids=["run 1", "run 2"]))


@pytest.mark.parametrize("count", [5, 100])
async def test_known_id_with_another_input_is_named_and_nothing_is_written(
    client: kagzi.Client, dsn: str, count: int
) -> None:
    for number in (4, 2):
        await client.start(same, -1, id=f"run {number}")
    with pytest.raises(RunConflict, match=r"'run 2'.*another input"):
        await client.start_many(same, [(n,) for n in range(count)], ids=ids_of(count))
    assert await value(dsn, RUNS) == 2


async def test_id_given_twice_is_one_run_unless_its_inputs_differ(
    client: kagzi.Client, dsn: str
) -> None:
    first, second, third = await client.start_many(same, [(1,), (2,), (1,)], ids=["a", "b", "a"])
    assert (first.is_new, second.is_new, third.is_new) == (True, True, False)
    assert first.run_id == third.run_id != second.run_id
    with pytest.raises(RunConflict, match=r"'c'.*inputs\[2\]"):
        await client.start_many(same, [(1,), (2,), (3,)], ids=["c", "d", "c"])
    assert await value(dsn, RUNS) == 2


async def test_overlapping_ids_in_any_order_do_not_deadlock(dsn: str) -> None:
    """Two that add the same ids wait for each other, whatever the order they were given in."""
    count, forward = 300, ids_of(300)
    async with kagzi.connect(dsn, migrate=False) as one, kagzi.connect(dsn, migrate=False) as two:
        for turn in range(5):
            ids = [f"{turn} {name}" for name in forward]
            inputs = [(number,) for number in range(count)]
            shares = await asyncio.gather(
                one.start_many(same, inputs, ids=ids),
                two.start_many(same, inputs[::-1], ids=ids[::-1]),
            )
            for first, second in zip(shares[0], shares[1][::-1], strict=True):
                assert first.run_id == second.run_id
                assert first.is_new is not second.is_new
    assert await value(dsn, RUNS) == 5 * count


@pytest.mark.parametrize(
    ("inputs", "options", "error", "named"),
    [
        ([(1,), 2], {}, InvalidInput, r"inputs\[1\] must be a tuple"),
        ([(1,), "ab"], {}, InvalidInput, r"inputs\[1\] must be a tuple"),
        ([(1,), (2, "", 3)], {}, InvalidArguments, r"inputs\[1\]: .*takes at most 2"),
        ([(1,), (2,), ("x",)], {}, CodecError, r"inputs\[2\]: .*str"),
        ([(1,), (2,)], {"ids": ["a"]}, InvalidInput, "ids has 1 entries for 2 inputs"),
        ([(1,), (2,)], {"ids": "ab"}, InvalidInput, "ids must be a list"),
        ([(1,), (2,)], {"ids": ["a", ""]}, InvalidInput, r"inputs\[1\]: run id"),
        ([(1,), (2,)], {"keys": ["a", 7]}, InvalidInput, r"inputs\[1\]: key"),
        ([(1,), (2,)], {"keys": ["a"]}, InvalidInput, "keys has 1 entries"),
        ([(1,)], {"queue": ""}, InvalidInput, "queue"),
        ([(1,)], {"priority": 2**31}, InvalidInput, "priority"),
        ([(1,)], {"version": "9"}, UnknownWorkflow, "9"),
    ],
)
async def test_bad_input_is_named_by_its_place_and_nothing_is_written(
    client: kagzi.Client,
    dsn: str,
    inputs: list[Any],
    options: dict[str, Any],
    error: type[Exception],
    named: str,
) -> None:
    with pytest.raises(error, match=named):
        await client.start_many(same, inputs, **options)
    assert await value(dsn, RUNS) == 0


async def test_default_version_is_that_of_new_runs(client: kagzi.Client, dsn: str) -> None:
    @kagzi.workflow(name="of versions", version="1")
    async def first(ctx: Context, number: int) -> int:
        return 1

    @kagzi.workflow(name="of versions", version="2")
    async def second(ctx: Context, number: int) -> int:
        return 2

    await client.set_default_version("of versions", "1")
    await client.start_many(second, [(1,)])
    async with await psycopg.AsyncConnection.connect(dsn) as own:
        await client.start(second, 1, connection=own)
    assert await rows(dsn, "SELECT DISTINCT version FROM kagzi.workflow_runs") == [("1",)]


@pytest.mark.parametrize("count", [5, 300])
async def test_commit_whose_answer_is_lost_is_found_again(
    proxy: Proxy, dsn: str, count: int
) -> None:
    """Cut just before the server's answer to what it has committed."""
    cuts = 0

    async def hook(link: Link, message: Message) -> bool:
        nonlocal cuts
        said = " ".join(m.text for m in link.seen[-60:])
        written = "COPY" in said or "unnest" in said
        if cuts == 0 and message.is_ready and written and await value(dsn, RUNS) > 0:
            cuts += 1
            return False
        return True

    async with kagzi.connect(proxy.dsn, migrate=False) as client:
        await client.start_many(other, [])
        proxy.hook = hook
        handles = await client.start_many(same, [(n,) for n in range(count)], ids=ids_of(count))
    assert cuts == 1
    assert all(handle.is_new for handle in handles)
    stored = await rows(dsn, "SELECT id FROM kagzi.workflow_runs ORDER BY wake_at")
    assert [row[0] for row in stored] == [handle.run_id for handle in handles]


# --- in the caller's transaction ------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 100])
async def test_runs_exist_when_and_only_when_the_caller_commits(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str, count: int
) -> None:
    await rows(dsn, "CREATE TABLE orders (id int)")
    inputs = [(number,) for number in range(count)]
    for commits in (False, True):
        await own.execute("INSERT INTO orders VALUES (1)")
        handles = await client.start_many(same, inputs, queue="q", connection=own)
        handles.append(await client.start(same, 1, id=f"{commits}", connection=own))
        assert all(handle.is_new for handle in handles)
        assert await value(dsn, RUNS) == 0
        await (own.commit() if commits else own.rollback())
    assert await value(dsn, RUNS) == count + 1
    assert await value(dsn, "SELECT count(*) FROM orders") == 1


async def test_workers_hear_of_it_at_the_commit(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str
) -> None:
    async with started(dsn, processes=0, poll_s=60, heartbeat_s=10) as engine:
        claims = "SELECT count(*) FROM pg_stat_activity WHERE query = 'LISTEN \"kagzi_queues\"'"
        await until(lambda: value(dsn, claims))
        handle = await client.start(same, 7, connection=own)
        assert not engine.worker.runs
        await own.commit()
        assert await handle.result(PATIENCE_S) == 7


async def test_error_leaves_the_callers_transaction_as_it_was(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str
) -> None:
    await client.start(same, -1, id="run 7")
    await own.execute("CREATE TABLE orders (id int)")
    with pytest.raises(RunConflict):
        await client.start(same, 1, id="run 7", connection=own)
    for count in (10, 100):
        with pytest.raises(RunConflict):
            await client.start_many(
                same, [(n,) for n in range(count)], ids=ids_of(count), connection=own
            )
    with pytest.raises(InvalidArguments):
        await client.start(same, connection=own)
    known = await client.start(same, -1, id="run 7", connection=own)
    assert not known.is_new
    some = await client.start_many(same, [(-1,)] * 30, ids=ids_of(30), connection=own)
    assert [handle.is_new for handle in some] == [n != 7 for n in range(30)]
    await own.commit()
    assert await value(dsn, RUNS) == 30
    assert await value(dsn, "SELECT count(*) FROM orders") == 0


async def test_connection_may_be_set_up_in_any_way(client: kagzi.Client, dsn: str) -> None:
    class Odd(psycopg.AsyncRawCursor[Any]):
        """Takes $1 where ours has %(name)s."""

    async with await psycopg.AsyncConnection.connect(
        dsn, row_factory=dict_row, cursor_factory=Odd, autocommit=True
    ) as own:
        await own.execute("SET search_path = pg_temp")
        await own.execute("SET TimeZone = 'Asia/Tokyo'")
        await own.execute("SET DateStyle = 'German'")
        await own.execute("SET client_encoding = 'LATIN1'")
        async with own.transaction():
            await client.start(same, 1, "ü", id="ü", connection=own)
            await client.start_many(
                same, [(n,) for n in range(50)], ids=[f"é{n}" for n in range(50)], connection=own
            )
        async with own.pipeline(), own.transaction():
            await client.start_many(same, [(n,) for n in range(50)], connection=own)
    assert await value(dsn, RUNS) == 101
    assert await value(dsn, f"{RUNS} WHERE wake_at BETWEEN now() - interval '1 min' AND now()")
    assert (await client.get("ü")).id == "ü"
    assert (await client.get("é7")).id == "é7"


async def test_connection_that_cannot_take_part_is_refused(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str, databases: Databases
) -> None:
    async def refused(connection: Any, named: str) -> None:
        for start in (
            client.start(same, 1, connection=connection),
            client.start_many(same, [(1,)], connection=connection),
        ):
            with pytest.raises(InvalidInput, match=named):
                await start

    with psycopg.connect(dsn) as sync:
        await refused(sync, r"psycopg.AsyncConnection, got psycopg.Connection")
    await refused("a dsn", "got builtins.str")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as automatic:
        await refused(automatic, "autocommit")
    await refused(automatic, "closed")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await own.execute("SELECT 1/0")
    await refused(own, "failed: roll it back")
    copy, empty = databases.clone(), databases.create("template0")
    for name, named in ((copy, "leads to .*database 'kagzi_test"), (empty, "no kagzi tables")):
        async with await psycopg.AsyncConnection.connect(databases.dsn_of(name)) as elsewhere:
            await refused(elsewhere, named)
            assert elsewhere.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        databases.retire(name)
    assert await value(dsn, RUNS) == 0


async def test_server_of_the_same_name_elsewhere_is_told_apart_by_when_its_schema_was_made(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str
) -> None:
    """As if `own` led to a restored copy: it sees another time in its own transaction."""
    await own.execute("UPDATE kagzi.schema_migrations SET applied_at = now() WHERE version = 1")
    with pytest.raises(InvalidInput, match="leads to"):
        await client.start(same, 1, connection=own)


async def test_each_connection_is_looked_at_once(
    client: kagzi.Client, own: psycopg.AsyncConnection[Any], dsn: str
) -> None:
    await client.start(same, 1, connection=own)
    await own.commit()
    await rows(dsn, "ALTER TABLE kagzi.schema_migrations RENAME TO hidden")
    for _ in range(2):
        await client.start(same, 2, connection=own)
    await own.commit()
    assert await value(dsn, RUNS) == 3
