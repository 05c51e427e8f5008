"""Steps that write user data in the transaction of their checkpoint: once, whatever dies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio

import kagzi
from kagzi import Context, ErrorStrategy, InvalidDefinition, StepFailed
from kagzi.definition import Definition
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, started, until
from tests.fix_faults import rows, value
from tests.fix_proxy import Link, Message, Proxy

pytestmark = pytest.mark.asyncio(loop_scope="module")

Connection = psycopg.AsyncConnection[Any]


@pytest_asyncio.fixture(loop_scope="module")
async def account(dsn: str) -> AsyncIterator[str]:
    """A database with a table of a user's own, empty."""
    await rows(dsn, "CREATE TABLE account (run text, name text UNIQUE, sum int)")
    yield dsn


@kagzi.step(transaction=True)
async def book(connection: Connection, folder: str, name: str, amount: int) -> int:
    Witness(folder).note(name)
    await connection.execute(
        "INSERT INTO account VALUES (%s, %s, %s)", [str(kagzi.current_step().run_id), name, amount]
    )
    cursor = await connection.execute("SELECT count(*) FROM account")
    return (await cursor.fetchone())[0]  # type: ignore[index]


@kagzi.step(transaction=True)
async def book_and_fail(connection: Connection, name: str) -> None:
    await connection.execute("INSERT INTO account VALUES ('', %s, 1)", [name])
    raise ValueError("not so")


@kagzi.step(transaction=True)
async def book_behind(connection: Connection, folder: str, name: str) -> None:
    await connection.execute("INSERT INTO account VALUES ('', %s, 1)", [name])
    Witness(folder).note(name)
    await Witness(folder).pass_gate("go")


@kagzi.step(transaction=True)
async def commits_itself(connection: Connection) -> None:
    await connection.commit()


@kagzi.workflow
async def one(ctx: Context, folder: str, name: str) -> int:
    return await ctx.step(book, folder, name, 5)


@kagzi.workflow
async def several(ctx: Context, folder: str) -> list[int]:
    calls = [book.bind(folder, f"n{index}", index) for index in range(70)]
    return await ctx.parallel_vec("all", calls)


@kagzi.workflow
async def failing(ctx: Context, name: str) -> None:
    await ctx.step(book_and_fail, name)


@kagzi.workflow
async def twice_the_same(ctx: Context, folder: str) -> list[Any]:
    calls = [book.bind(folder, "same", 1), book.bind(folder, "same", 1)]
    done = await ctx.parallel_vec("same", calls, on_error=ErrorStrategy.COLLECT_ALL, limit=1)
    return [error.type for error in done.errors.values()]


@kagzi.workflow
async def behind(ctx: Context, folder: str) -> None:
    await ctx.step(book_behind, folder, "held")


@kagzi.workflow
async def own_commit(ctx: Context) -> None:
    await ctx.step(commits_itself)


async def test_data_and_checkpoint_are_there_together(account: str, witness: Witness) -> None:
    async with started(account, processes=0) as engine:
        result, handle = await engine.drive(one, witness.folder, "a")
        assert result == 1
        assert await rows(account, "TABLE account") == [(str(handle.run_id), "a", 5)]
        assert await engine.replay(handle) == 1
    assert witness.entries == ["a"]


async def test_many_in_a_group_each_write_once(account: str, witness: Witness) -> None:
    async with started(account, processes=0) as engine:
        result, handle = await engine.drive(several, witness.folder)
        assert len(result) == 70
        assert await value(account, "SELECT count(*) FROM account") == 70
        assert await engine.replay(handle) == result
    assert len(witness.entries) == 70


async def test_body_that_fails_takes_back_what_it_wrote(account: str) -> None:
    async with started(account, processes=0) as engine:
        error = await engine.outcome(await engine.start(failing, "x"))
    assert isinstance(error, StepFailed)
    assert error.is_a(ValueError)
    assert await rows(account, "TABLE account") == []


async def test_database_error_of_the_body_is_its_own_failure(
    account: str, witness: Witness
) -> None:
    async with started(account, processes=0) as engine:
        assert await engine.run(twice_the_same, witness.folder) == [
            "psycopg.errors.UniqueViolation"
        ]
        assert engine.worker.lost is None
    assert await value(account, "SELECT count(*) FROM account") == 1


async def test_body_must_not_end_its_transaction(account: str) -> None:
    async with started(account, processes=0) as engine:
        error = await engine.outcome(await engine.start(own_commit))
    assert isinstance(error, StepFailed)
    assert "commit" in error.message


@pytest.mark.parametrize("answered", [False, True], ids=["before it", "after it"])
async def test_connection_cut_at_the_commit_writes_once(
    account: str, witness: Witness, answered: bool
) -> None:
    proxy = Proxy(account)
    await proxy.start()
    cut: set[Link] = set()

    async def hook(link: Link, message: Message) -> bool:
        if cut - {link} or "INSERT INTO account" not in "".join(m.text for m in link.seen):
            return True
        if message.text == "COMMIT":
            cut.add(link)
            return answered
        return not (link in cut and message.is_ready)

    proxy.hook = hook
    try:
        async with started(proxy.dsn, processes=0) as engine:
            assert await engine.run(one, witness.folder, "b") == 1
    finally:
        await proxy.stop()
    assert len(cut) == 1
    assert await value(account, "SELECT count(*) FROM account") == 1
    assert witness.entries == (["b"] if answered else ["b", "b"])


async def test_worker_whose_lease_was_ended_commits_no_data(account: str, witness: Witness) -> None:
    async with started(account, processes=0) as engine:
        await engine.start(behind, witness.folder)
        await until(lambda: witness.entries)
        await rows(account, "UPDATE kagzi.workers SET status = 'ended'")
        witness.open("go")
        query = "SELECT count(*) FROM kagzi.step_runs"
        await until(lambda: is_there(account, "SELECT count(*) FROM account"))
        assert await value(account, query) == 1
        done = await rows(
            account,
            "SELECT s.worker_id = w.id FROM kagzi.step_runs s,"
            " kagzi.workers w ORDER BY w.started_at LIMIT 1",
        )
        assert done == [(False,)], "the next incarnation wrote both"
    assert await value(account, "SELECT count(*) FROM account") == 1


async def test_body_whose_connection_is_cut_runs_again_only_under_a_lease_that_holds(
    account: str, witness: Witness
) -> None:
    async with started(account, processes=0) as engine:
        handle = await engine.start(behind, witness.folder)
        await until(lambda: witness.entries)
        await rows(account, "UPDATE kagzi.workers SET status = 'ended'")
        await rows(
            account,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %(name)s",
            name=f"kagzi:{engine.worker.worker_id}",
        )
        witness.open("go")
        await handle.result(PATIENCE_S)
    assert len(witness.entries) == 2, "here, and by the next incarnation"


async def is_there(dsn: str, query: str) -> bool:
    return bool(await value(dsn, query))


async def test_functions_that_cannot_write_in_a_transaction_are_refused() -> None:
    async def with_context(ctx: Context, connection: Any) -> None: ...

    async def without() -> None: ...

    def not_async(connection: Any) -> None: ...

    async def right(connection: Any) -> None: ...

    for function, options in (
        (with_context, {}),
        (without, {}),
        (not_async, {}),
        (right, {"where": "pool"}),
        (right, {"cpu": True}),
        (right, {"memo": "global"}),
    ):
        with pytest.raises(InvalidDefinition, match="transaction=True"):
            Definition(function, transaction=True, **options)  # type: ignore[arg-type]


async def test_transaction_on_a_server_that_was_replaced_is_not_begun(
    account: str, witness: Witness
) -> None:
    """The worker loads its runs again first; nothing of the step is booked twice, or recorded."""
    async with started(account, processes=0, lease_s=60.0) as engine:
        worker = engine.worker
        assert await engine.run(one, witness.folder, "before") == 1
        assert worker.history.known is not None
        worker.history.known = (worker.history.known[0], "0000000F")
        await worker._transactions.close()
        worker._transactions._pool = None
        handle = await engine.start(one, witness.folder, "after")
        assert await handle.result(timeout=20) == 2
        assert isinstance(worker.lost, kagzi.ServerReplaced)
        assert witness.entries == ["before", "after"]
        steps = (await handle.describe()).steps
        assert [(step.status, step.attempts) for step in steps] == [("completed", 1)]
