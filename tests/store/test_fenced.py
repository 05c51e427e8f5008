"""The fenced connection on a real Postgres: forms and sizes, lost answers, and takeovers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from kagzi.errors import LeaseLost
from kagzi.ids import uuid7
from kagzi.store import fenced
from kagzi.store.checkpoints import CheckpointWriter, ContentRefused
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.queries import load_queries
from kagzi.store.rows import Batch
from kagzi.store.store import Store
from tests.fix_engine import until
from tests.fix_faults import rows, value
from tests.fix_proxy import Link, Message, Proxy
from tests.store.samples import (
    attempt_row,
    batch_of,
    group_row,
    mark,
    memo_row,
    release,
    settled,
    settled_many,
)

COUNT = "SELECT count(*) FROM kagzi.step_runs"
LARGE = 100_000  # bytes: some of these are a batch for COPY


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    made = Store(Connector(dsn))
    await made.open()
    yield made
    await made.close()


async def registered(store: Store, lease_s: float = 60.0) -> UUID:
    worker_id = uuid7()
    await store.register_worker(worker_id, "host", "boot", 1, "then", {}, lease_s)
    return worker_id


@asynccontextmanager
async def connected(dsn: str, worker_id: UUID) -> AsyncIterator[FencedConnection]:
    connection = FencedConnection(Connector(dsn), worker_id)
    try:
        yield connection
    finally:
        await connection.close()


async def held_run(store: Store, worker_id: UUID) -> UUID:
    """A run that the worker holds, at epoch 1."""
    run_id = uuid7()
    await store.insert_run(run_id, str(run_id), "w", "1", 0, b"[]")
    claimed = await store.claim_runs(worker_id, [("w", "1")], 10)
    assert [run.run_id for run in claimed] == [run_id]
    return run_id


def whole_batch(run_id: UUID, worker_id: UUID, size: int, clears: bool = True) -> Batch:
    """Steps, and of each other kind of row one or more; it lets go of the run."""
    options: dict[str, Any] = {"run_id": run_id, "worker_id": worker_id}
    steps = settled_many(size, **options)
    if size:
        steps[0] = settled("s/0", error=b'{"type":"ValueError"}', **options)
    batch = batch_of(steps)
    batch.attempts = [attempt_row("s/0", number, run_id) for number in (1, 2)]
    batch.groups = [group_row("s", run_id), group_row("t", run_id)]
    batch.memos = [memo_row(step, run_id.bytes + step.id.encode()) for step in steps[1:4]]
    batch.marks = [mark("s/0", 7, run_id=run_id), mark("t", 8, of_group=True, run_id=run_id)]
    batch.runs = [release(run_id)]
    batch.clears = [(run_id, "outer")] if clears else []
    return batch


async def check_whole(dsn: str, run_id: UUID, size: int) -> None:
    """That a `whole_batch` is there, once."""
    where = {"id": run_id}
    steps = await rows(
        dsn,
        "SELECT step_id, status, output, visible_number FROM kagzi.step_runs WHERE run_id = %(id)s",
        **where,
    )
    expected = [(f"s/{place}", "completed", b"1", None) for place in range(1, size)]
    # The mark comes in the batch of its step or later; in the same one it may find no row yet.
    assert sorted(row for row in steps if row[0] != "s/0") == sorted(expected)
    assert [row[:3] for row in steps if row[0] == "s/0"] == [("s/0", "failed", None)][:size]
    query = "SELECT step_id, attempt FROM kagzi.step_attempts WHERE run_id = %(id)s ORDER BY 2"
    assert await rows(dsn, query, **where) == [("s/0", 1), ("s/0", 2)]
    query = "SELECT path, succeeded FROM kagzi.parallel_groups WHERE run_id = %(id)s ORDER BY 1"
    assert await rows(dsn, query, **where) == [("s", 1), ("t", 1)]
    query = "SELECT count(*) FROM kagzi.memos WHERE run_id = %(id)s"
    assert await value(dsn, query, **where) == min(3, max(0, size - 1))
    query = "SELECT status, worker_id, crash_count FROM kagzi.workflow_runs WHERE id = %(id)s"
    assert await rows(dsn, query, **where) == [("completed", None, 0)]


# --- forms and sizes ------------------------------------------------------------------------

SIZES = [0, 1, 2, 64, 65, 512, 5000]


@pytest.mark.parametrize(
    ("size", "padding"), [*((size, 0) for size in SIZES[1:]), (1, LARGE), (5, LARGE), (30, LARGE)]
)
async def test_steps_of_any_number_and_length_are_stored_as_they_were(
    store: Store, proxy: Proxy, size: int, padding: int
) -> None:
    worker_id = await registered(store)
    steps = settled_many(size, worker_id=worker_id)
    for place, step in enumerate(steps):
        step.output = b"%d" % place + bytes(padding)
        step.group_id = UUID(int=place).bytes
        step.parent_id = "parent" if place % 2 else None
        step.call_number, step.completed_number, step.attempt = place, place + 1, place % 5 + 1
        step.process_id = place % 3 - 1
    async with connected(proxy.dsn, worker_id) as connection:
        await connection.write(batch_of([settled("first")]))  # connects and prepares
        before = proxy.statements()
        assert await connection.write(batch_of(steps)) == []
        assert proxy.statements() - before <= 5
    query = (
        "SELECT step_id, function, status, output, error, input, input_hash, attempts,"
        " parallel_group_id, parent_step_id, call_number, completed_number, worker_id, process_id,"
        " visible_number, (extract(epoch FROM started_at) * 1000000)::int8,"
        " (extract(epoch FROM completed_at) * 1000000)::int8 FROM kagzi.step_runs"
    )
    stored = {row[0]: row[1:] for row in await rows(proxy.dsn, query) if row[0] != "first"}
    assert len(stored) == size
    for place, step in enumerate(steps):
        assert stored[step.id] == (
            "tests.echo",
            "completed",
            b"%d" % place + bytes(padding),
            None,
            b"[]",
            step.input_hash,
            place % 5 + 1,
            UUID(int=place),
            "parent" if place % 2 else None,
            place,
            place + 1,
            worker_id,
            place % 3 - 1,
            None,
            step.started_us,
            step.completed_us,
        )


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("size", SIZES)
async def test_batch_with_every_kind_of_row_is_one_transaction_of_few_statements(
    store: Store, proxy: Proxy, size: int, clears: bool
) -> None:
    worker_id = await registered(store)
    run_id = await held_run(store, worker_id)
    async with connected(proxy.dsn, worker_id) as connection:
        await connection.write(whole_batch(uuid7(), worker_id, 0))  # connects and prepares
        link = proxy.links[-1]
        before, seen = proxy.statements(), len(link.seen)
        assert await connection.write(whole_batch(run_id, worker_id, size, clears)) == []
        assert proxy.statements() - before <= 5
        commits = [message for message in link.seen[seen:] if message.is_ready]
        assert len(commits) == 1
    await check_whole(proxy.dsn, run_id, size)


async def test_marks_reach_rows_of_earlier_batches(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    async with connected(dsn, worker_id) as connection:
        for size in (3, 100):
            run_id = uuid7()
            first = batch_of(settled_many(size, run_id=run_id, worker_id=worker_id))
            first.groups = [group_row("s", run_id)]
            await connection.write(first)
            second = batch_of(settled_many(size, "later", run_id=run_id, worker_id=worker_id))
            second.marks = [
                mark("s/1", 5, run_id=run_id),
                mark("s", 6, of_group=True, run_id=run_id),
            ]
            await connection.write(second)
            query = (
                "SELECT step_id, visible_number FROM kagzi.step_runs"
                " WHERE run_id = %(id)s AND visible_number IS NOT NULL UNION ALL"
                " SELECT path, visible_number FROM kagzi.parallel_groups WHERE run_id = %(id)s"
            )
            assert await rows(dsn, query, id=run_id) == [("s/1", 5), ("s", 6)]


async def test_clear_removes_failures_and_decisions_below_one_step_only(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    for size in (0, 100):
        run_id = uuid7()
        options: dict[str, Any] = {"run_id": run_id, "worker_id": worker_id}
        failed = ["outer/a", "outer/g/1", "outer", "outer#2/a", "outer0", "other/a"]
        batch = batch_of([settled(name, error=b"{}", **options) for name in failed])
        batch.add_steps([settled("outer/b", **options), settled("outer/g/0", **options)])
        batch.groups = [
            group_row("outer/g", run_id, succeeded=1, failed=1),
            group_row("outer/ok", run_id),
            group_row("other/g", run_id, failed=1),
        ]
        async with connected(dsn, worker_id) as connection:
            await connection.write(batch)
            clearing = batch_of(settled_many(size, **options))
            clearing.clears = [(run_id, "outer")]
            await connection.write(clearing)
        query = (
            "SELECT step_id FROM kagzi.step_runs WHERE run_id = %(id)s AND step_id NOT LIKE 's/%%'"
            " UNION ALL SELECT path FROM kagzi.parallel_groups WHERE run_id = %(id)s"
        )
        left = {row[0] for row in await rows(dsn, query, id=run_id)}
        assert left == {
            *("outer", "outer#2/a", "outer0", "other/a", "outer/b", "outer/g/0"),
            *("outer/ok", "other/g"),
        }


# --- lost connections -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nbytes", "whole", "clears"),
    [
        pytest.param(1, 1, False, False, id="one step"),
        pytest.param(20, 1, False, False, id="unnest"),
        pytest.param(100, 1, False, False, id="copy"),
        pytest.param(8, LARGE, False, False, id="copy in pieces"),
        pytest.param(20, 1, True, False, id="unnest, whole"),
        pytest.param(20, 1, True, True, id="unnest, whole, clears"),
        pytest.param(100, 1, True, False, id="copy, whole"),
        pytest.param(100, 1, True, True, id="copy, whole, clears"),
    ],
)
async def test_connection_cut_at_any_message_loses_and_doubles_nothing(
    store: Store,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    nbytes: int,
    whole: bool,
    clears: bool,
) -> None:
    """At the first message, then at the second, until a batch goes through untouched.

    Among these are a COMMIT that never reaches the server, and one whose answer is lost.
    """
    monkeypatch.setattr(fenced, "BACKOFF_S", (0.001,))
    worker_id = await registered(store)
    resent = 0
    for cut_at in range(1, 200):
        count = 0
        cut = False

        async def hook(link: Link, message: Message) -> bool:
            nonlocal count, cut
            count += 1
            cut = cut or count == cut_at  # noqa: B023
            return count != cut_at  # noqa: B023

        run_id = await held_run(store, worker_id)
        if whole:
            batch = whole_batch(run_id, worker_id, size, clears)
        else:
            output = b"1" * nbytes
            steps = settled_many(size, run_id=run_id, worker_id=worker_id, output=output)
            batch = batch_of(steps)
        proxy.hook = hook
        async with connected(proxy.dsn, worker_id) as connection:
            stored = await asyncio.wait_for(connection.write(batch), 60)
        resent += bool(stored)
        assert {step.id for step, _ in stored} <= {step.id for step in batch.steps}
        assert all(row.output == step.output for step, row in stored)
        if whole:
            await check_whole(store.connector.conninfo(), run_id, size)
        else:
            query = f"{COUNT} WHERE run_id = %(id)s"
            assert await value(store.connector.conninfo(), query, id=run_id) == size
        if not cut:
            break
    assert cut_at > 8
    assert resent > 0, "some answers of a COMMIT were lost"


async def test_write_waits_until_the_server_is_back(
    store: Store, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    worker_id = await registered(store)
    async with connected(proxy.dsn, worker_id) as connection:
        await connection.write(batch_of([settled("a")]))
        proxy.refusing = True
        await proxy.cut_all()
        with caplog.at_level(logging.WARNING, "kagzi.store"):
            writing = asyncio.ensure_future(connection.write(batch_of([settled("b")])))
            await until(lambda: any("checkpoints wait" in r.message for r in caplog.records))
        assert not writing.done()
        proxy.refusing = False
        assert await asyncio.wait_for(writing, 60) == []
    assert await value(proxy.dsn, COUNT) == 2


# sqlstate: disk full, too many connections, read only, in recovery, serialisation, admin shutdown
@pytest.mark.parametrize("state", ["53100", "53300", "25006", "57P03", "40001", "40P01", "57P01"])
@pytest.mark.parametrize("size", [1, 100])
async def test_server_in_trouble_is_asked_again_and_no_step_is_blamed(
    store: Store, dsn: str, monkeypatch: pytest.MonkeyPatch, state: str, size: int
) -> None:
    monkeypatch.setattr(fenced, "BACKOFF_S", (0.001,))
    worker_id = await registered(store)
    await raise_on_insert(dsn, state, times=3)
    async with connected(dsn, worker_id) as connection:
        await asyncio.wait_for(connection.write(batch_of(settled_many(size))), 60)
    assert await value(dsn, COUNT) == size


# not null, check, text, disallowed
@pytest.mark.parametrize("state", ["23502", "23514", "22021", "42501"])
@pytest.mark.parametrize(("size", "nbytes"), [(1, 1), (100, 1), (20, LARGE)])
async def test_refused_content_is_said_and_the_connection_goes_on(
    store: Store, dsn: str, state: str, size: int, nbytes: int
) -> None:
    worker_id = await registered(store)
    await raise_on_insert(dsn, state, times=1)
    async with connected(dsn, worker_id) as connection:
        with pytest.raises(ContentRefused, match="raised on purpose"):
            await connection.write(batch_of(settled_many(size, output=b"1" * nbytes)))
        await connection.write(batch_of(settled_many(size, output=b"1" * nbytes)))
    assert await value(dsn, COUNT) == size


async def raise_on_insert(dsn: str, state: str, times: int) -> None:
    """Let the next inserts into step_runs fail; sequences are not rolled back."""
    await rows(
        dsn,
        f"""
        CREATE SEQUENCE kagzi.tries;
        CREATE FUNCTION kagzi.fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('kagzi.tries') <= {times} THEN
                RAISE EXCEPTION 'raised on purpose' USING ERRCODE = '{state}';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER fail AFTER INSERT ON kagzi.step_runs
            FOR EACH STATEMENT EXECUTE FUNCTION kagzi.fail();
        """,
    )


# --- the writer over it ---------------------------------------------------------------------


@asynccontextmanager
async def writing(dsn: str, worker_id: UUID) -> AsyncIterator[tuple[CheckpointWriter, list[str]]]:
    """A writer over two real connections, and the ids of refused steps."""
    refused: list[str] = []
    lost: list[BaseException] = []

    def refuse(step: Any, reason: Exception) -> None:
        refused.append(step.id)
        step.status, step.output, step.error = "failed", None, b"{}"

    async with connected(dsn, worker_id) as small, connected(dsn, worker_id) as large:
        writer = CheckpointWriter(small.write, large.write, lambda *_: None, refuse, lost.append)
        yield writer, refused
        await writer.close()
    assert lost == []


@pytest.mark.parametrize("size", [1, 40, 300])
async def test_row_that_postgres_refuses_fails_its_own_step_alone(
    store: Store, dsn: str, size: int
) -> None:
    worker_id = await registered(store)
    await rows(dsn, "ALTER TABLE kagzi.step_runs ADD CHECK (output <> 'bad')")
    async with writing(dsn, worker_id) as (writer, refused):
        steps = settled_many(size)
        bad = {0, size // 2, size - 1}
        for place in bad:
            steps[place].output = b"bad"
        writer.put_steps(steps)
        writer.put_group(group_row())
        await asyncio.wait_for(writer.drain(), 60)
    assert set(refused) == {steps[place].id for place in bad}
    query = "SELECT status, count(*)::int FROM kagzi.step_runs GROUP BY 1"
    expected = {"completed": size - len(bad), "failed": len(bad)}
    assert dict(await rows(dsn, query)) == {k: v for k, v in expected.items() if v}
    assert await value(dsn, "SELECT count(*) FROM kagzi.parallel_groups") == 1


@pytest.mark.parametrize("size", [1, 100])
async def test_statement_that_somebody_cancels_fails_no_step(
    store: Store, proxy: Proxy, size: int
) -> None:
    worker_id = await registered(store)
    await raise_on_insert(proxy.dsn, "57014", times=1)
    async with writing(proxy.dsn, worker_id) as (writer, refused):
        writer.put_steps(settled_many(size))
        await asyncio.wait_for(writer.drain(), 60)
    assert refused == []
    assert await value(proxy.dsn, COUNT) == size


async def test_large_values_are_compressed_by_lz4_where_the_server_has_it(
    store: Store, dsn: str
) -> None:
    query = (
        "SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
    )
    wanted = "lz4" if await value(dsn, query) else "pglz"
    async with connected(dsn, await registered(store)) as connection:
        await connection.write(batch_of([settled("large", output=b"1" * LARGE)]))
    query = "SELECT pg_column_compression(output) FROM kagzi.step_runs"
    assert await value(dsn, query) == wanted


# --- first commit wins ----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "nbytes"), [(1, 1), (64, 1), (65, 1), (512, 1), (20, LARGE)])
@pytest.mark.parametrize("other", ["completed", "failed"])
async def test_first_commit_wins_and_the_later_one_learns_what_is_stored(
    store: Store, dsn: str, size: int, nbytes: int, other: str
) -> None:
    worker_id = await registered(store)
    known = settled(
        f"s/{size - 1}", output=b"first", error=b'{"e":1}' if other == "failed" else None
    )
    async with connected(dsn, worker_id) as connection:
        await connection.write(batch_of([known]))
        steps = settled_many(size, output=b"1" * nbytes)
        stored = dict(await connection.write(batch_of(steps)))
    row = stored[steps[-1]]
    assert (row.status, row.output, row.error) == (other, known.output, known.error)
    assert all(stored[step].output == step.output for step in stored if step is not steps[-1])
    query = "SELECT output FROM kagzi.step_runs WHERE step_id = %(id)s"
    assert await value(dsn, query, id=known.id) == known.output
    assert await value(dsn, COUNT) == size


@pytest.mark.parametrize("size", [0, 20, 100])
async def test_batch_sent_again_changes_nothing(store: Store, dsn: str, size: int) -> None:
    worker_id = await registered(store)
    run_id = await held_run(store, worker_id)
    tables = ("step_runs", "step_attempts", "parallel_groups", "memos", "workflow_runs")

    async def everything() -> list[list[tuple[Any, ...]]]:
        return [await rows(dsn, f"TABLE kagzi.{table} ORDER BY 1, 2") for table in tables]

    async with connected(dsn, worker_id) as connection:
        batch = whole_batch(run_id, worker_id, size)
        await connection.write(batch)
        before = await everything()
        before_marks = [mark_free(table) for table in before]
        stored = await connection.write(batch)
        assert {step.id for step, _ in stored} == {step.id for step in batch.steps}
        assert [mark_free(table) for table in await everything()] == before_marks


def mark_free(table: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without the last column: a mark may reach a row of its own batch only at the second time."""
    return [row[:17] for row in table]


async def test_two_writers_of_one_step_leave_one_row_and_both_know_it(
    store: Store, dsn: str
) -> None:
    worker_id = await registered(store)
    async with connected(dsn, worker_id) as one, connected(dsn, worker_id) as other:
        for size in (5, 200):
            ours = [settled(f"r{size}/{n}", output=b"ours") for n in range(size)]
            theirs = [settled(f"r{size}/{n}", output=b"theirs") for n in range(size)]
            first, second = await asyncio.gather(
                one.write(batch_of(ours)), other.write(batch_of(theirs))
            )
            told = {step.id: row.output for step, row in [*first, *second]}
            query = "SELECT step_id, output FROM kagzi.step_runs WHERE step_id LIKE %(like)s"
            stored = dict(await rows(dsn, query, like=f"r{size}/%"))
            assert len(stored) == size
            assert told == stored


# --- the fence ------------------------------------------------------------------------------


async def test_ended_lease_refuses_every_form(store: Store, dsn: str) -> None:
    worker_id = await registered(store)
    run_id = await held_run(store, worker_id)
    await store.rescue(worker_id, "test", forced=True)
    async with connected(dsn, worker_id) as connection:
        for size in (0, 1, 64, 65, 512):
            for whole in (True, False):
                batch = whole_batch(run_id, worker_id, size)
                if not whole:
                    batch = batch_of(batch.steps)
                if not batch:
                    continue
                with pytest.raises(LeaseLost):
                    await connection.write(batch)
    assert await value(dsn, COUNT) == 0
    for table in ("step_attempts", "parallel_groups", "memos"):
        assert await rows(dsn, f"TABLE kagzi.{table}") == []
    query = "SELECT status, worker_id FROM kagzi.workflow_runs"
    assert await rows(dsn, query) == [("pending", None)]


async def test_unknown_worker_may_write_nothing(store: Store, dsn: str) -> None:
    async with connected(dsn, uuid4()) as connection:
        for size in (1, 100):
            with pytest.raises(LeaseLost):
                await connection.write(batch_of(settled_many(size)))
    assert await value(dsn, COUNT) == 0


Weaken = Callable[[str], str]


async def weaken(dsn: str, change: Weaken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the fence in all forms."""
    queries = load_queries("kagzi")
    changed = {
        name: change(text) if name.startswith("write_") else text for name, text in queries.items()
    }
    monkeypatch.setattr(fenced, "load_queries", lambda _: changed)
    source = await value(dsn, "SELECT pg_get_functiondef('kagzi.hold_fence(uuid)'::regprocedure)")
    await rows(dsn, change(source))


def without_lock(text: str) -> str:
    return text.replace("FOR SHARE", "")


def with_key_share(text: str) -> str:
    return text.replace("FOR SHARE", "FOR KEY SHARE")


def untouched(text: str) -> str:
    return text


async def paused_write(
    store: Store, proxy: Proxy, worker_id: UUID, form: str
) -> tuple[asyncio.Task[Any], Callable[[], Any]]:
    """A write that has passed the fence and not committed, and how to let it go on."""
    dsn = store.connector.conninfo()
    steps = settled_many({"copy": 100, "unnest": 10, "alone": 1}[form])
    if form == "copy":
        reached, going = asyncio.Event(), asyncio.Event()

        async def hook(link: Link, message: Message) -> bool:
            if link.is_fenced and message.from_client and message.kind == "c":
                reached.set()
                await going.wait()
            return True

        proxy.hook = hook
        task = asyncio.ensure_future(write_once(proxy.dsn, worker_id, steps))
        await asyncio.wait_for(reached.wait(), 60)

        async def go_on_copy() -> None:
            going.set()

        return task, go_on_copy
    # Another transaction has the last row, uncommitted: the INSERT waits for its end.
    rival = await psycopg.AsyncConnection.connect(dsn)
    await rival.execute(
        "INSERT INTO kagzi.step_runs (run_id, step_id, function, status, input_hash, attempts,"
        " started_at, completed_at, call_number, completed_number, worker_id, process_id)"
        " VALUES (%s, %s, '', '', '', 1, now(), now(), 1, 1, %s, 0)",
        [UUID(bytes=steps[-1].run_id), steps[-1].id, worker_id],
    )
    task = asyncio.ensure_future(write_once(proxy.dsn, worker_id, steps))
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %(name)s"
        " AND wait_event_type = 'Lock'"
    )
    await until(lambda: value(dsn, waiting, name=f"kagzi:{worker_id}"))

    async def go_on_unnest() -> None:
        await rival.rollback()
        await rival.close()

    return task, go_on_unnest


async def write_once(dsn: str, worker_id: UUID, steps: list[Any]) -> Any:
    async with connected(dsn, worker_id) as connection:
        return await connection.write(batch_of(steps))


@pytest.mark.parametrize("form", ["alone", "unnest", "copy"])
@pytest.mark.parametrize(
    ("change", "stale"), [(untouched, False), (without_lock, True), (with_key_share, True)]
)
async def test_write_under_way_at_a_takeover_lets_no_stale_row_in_unless_the_fence_is_weakened(
    store: Store,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    change: Weaken,
    stale: bool,
) -> None:
    """The weakened fences show that this test can see stale rows."""
    dsn = store.connector.conninfo()
    worker_id = await registered(store)
    await weaken(dsn, change, monkeypatch)
    task, go_on = await paused_write(store, proxy, worker_id, form)
    await asyncio.wait_for(store.rescue(worker_id, "test", forced=True), 60)
    assert await value(dsn, "SELECT status FROM kagzi.workers") == "ended"
    await go_on()
    outcome = (await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 60))[0]
    assert (await value(dsn, COUNT) > 0) is stale
    assert isinstance(outcome, LeaseLost) is not stale


@pytest.mark.parametrize("size", [1, 10, 100])
async def test_no_row_appears_after_a_takeover_that_races_writes(
    store: Store, dsn: str, size: int
) -> None:
    for trial in range(4):
        worker_id = await registered(store)
        commits = 0

        async def write_for_ever(prefix: str) -> None:
            nonlocal commits
            async with connected(dsn, worker_id) as connection:  # noqa: B023
                for number in range(10_000):
                    steps = settled_many(size, f"{trial}/{prefix}/{number}")  # noqa: B023
                    await connection.write(batch_of(steps))
                    commits += 1

        writers = [asyncio.ensure_future(write_for_ever(name)) for name in "ab"]
        await until(lambda wanted=5 + 3 * trial: commits >= wanted)  # noqa: B023
        await store.rescue(worker_id, "test", forced=True)
        after = await value(dsn, COUNT)
        ends = await asyncio.wait_for(asyncio.gather(*writers, return_exceptions=True), 60)
        assert [type(end) for end in ends] == [LeaseLost, LeaseLost]
        assert await value(dsn, COUNT) == after


async def test_backend_that_is_frozen_inside_copy_is_terminated_by_rescue(
    store: Store, proxy: Proxy
) -> None:
    dsn = store.connector.conninfo()
    worker_id = await registered(store)
    run_id = await held_run(store, worker_id)
    task, go_on = await paused_write(store, proxy, worker_id, "copy")
    alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %(name)s"
    name = f"kagzi:{worker_id}"
    assert await value(dsn, alive, name=name) == 1
    freed = await asyncio.wait_for(store.rescue(worker_id, "frozen", forced=True), 60)
    assert freed == 1
    assert await value(dsn, "SELECT status FROM kagzi.workflow_runs") == "pending"
    await go_on()
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(task, 60)
    await until(lambda: no_longer(dsn, alive, name))
    assert await value(dsn, COUNT) == 0
    assert run_id is not None


async def no_longer(dsn: str, query: str, name: str) -> bool:
    return bool(await value(dsn, query, name=name) == 0)


async def test_heartbeat_does_not_wait_for_a_write_in_flight(store: Store, proxy: Proxy) -> None:
    worker_id = await registered(store)
    task, go_on = await paused_write(store, proxy, worker_id, "copy")
    queries = load_queries("kagzi")
    query = queries["renew_lease"]
    await asyncio.wait_for(rows(store.connector.conninfo(), query, id=worker_id, lease_s=30.0), 60)
    await go_on()
    assert await asyncio.wait_for(task, 60) == []


# --- letting go -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("status", ["completed", "failed", "pending", "sleeping", "cancelled"])
async def test_release_lets_go_of_the_run_that_this_worker_holds_at_this_epoch(
    store: Store, dsn: str, size: int, status: str
) -> None:
    worker_id = await registered(store)
    run_id = await held_run(store, worker_id)
    if status == "cancelled":
        await rows(dsn, "UPDATE kagzi.workflow_runs SET request = 'cancel'")
    async with connected(dsn, worker_id) as connection:
        batch = batch_of(settled_many(size))
        batch.runs = [release(run_id, 1, status)]
        await connection.write(batch)
    query = "SELECT status, worker_id, completed_at IS NOT NULL FROM kagzi.workflow_runs"
    final = status in ("completed", "failed", "cancelled")
    assert await rows(dsn, query) == [(status, None, final)]


@pytest.mark.parametrize("size", [1, 100])
async def test_release_leaves_a_run_of_another_epoch_or_worker_alone(
    store: Store, dsn: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    worker_id, other_id = await registered(store), await registered(store)
    run_id = await held_run(store, other_id)
    queries = "SELECT status, worker_id, epoch FROM kagzi.workflow_runs"
    for place, (owner, epoch) in enumerate([(worker_id, 1), (other_id, 2), (other_id, 0)]):
        async with connected(dsn, owner) as connection:
            batch = batch_of(settled_many(size, f"t{place}"))
            batch.runs = [release(run_id, epoch)]
            await connection.write(batch)
        assert await rows(dsn, queries) == [("running", other_id, 1)]
    assert sum("taken over or deleted" in record.message for record in caplog.records) >= 2
