"""Connecting: what each failure says, and that no password is ever shown."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import kagzi
from kagzi.errors import InvalidDsn, ServerTooOld, StoreForbidden, StoreUnavailable
from kagzi.store.connections import Connector, is_outage, redact
from kagzi.store.fenced import FencedConnection
from kagzi.store.migrate import migrate
from kagzi.store.store import Store
from tests.fix_engine import until
from tests.fix_faults import rows, value
from tests.fix_proxy import Link, Message, Proxy
from tests.store.samples import batch_of, settled

SECRET = "hunter2-Zq9"
HARD = f"{SECRET} @:/'\\?&{SECRET}"


# --- redaction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:{SECRET}@h/db",
        f"postgres://:{SECRET}@h:5432/db?sslmode=disable",
        f"postgresql://u:{SECRET}@{SECRET}@h/db",
        f"postgresql://u:{SECRET}:{SECRET}/{SECRET}@h/db",
        f"postgresql://u:a {SECRET} b@h/db",
        f"postgresql://u:{quote(HARD, safe='')}@h/db",
        f"postgresql://h/db?user=u&password={SECRET}&connect_timeout=3",
        f"postgresql://h/db?sslpassword={SECRET}",
        f"host=h password={SECRET} user=u",
        f"host=h password = {SECRET} user=u",
        f"host=h PASSWORD='{SECRET} it\\'s {SECRET}' user=u",
        f"host=h password='{SECRET} no end {SECRET}",
        f"host=h password={SECRET}\\ {SECRET} user=u",
        f"u:{SECRET}@h/db",
        f"mysql://u:{SECRET}@h/db",
        f"postgresql//u:{SECRET}@h/db",
        f"postgresql:/u:{SECRET}@h/db",
        f"postgresql://u:{SECRET}\n@h/db\n",
    ],
)
def test_no_spelling_of_a_connection_string_shows_its_password(dsn: str) -> None:
    shown = []
    try:
        connector = Connector(dsn)
    except InvalidDsn as error:
        shown += [str(error), *traceback.format_exception(error)]
    else:
        shown += [repr(connector), str(connector.unavailable(psycopg.OperationalError(dsn)))]
    assert not any(SECRET in text for text in shown)


def test_at_sign_in_a_password_is_told_in_words_that_redaction_leaves_whole() -> None:
    with pytest.raises(InvalidDsn) as failure:
        Connector("postgresql://u:se@cret@h/db")
    assert "write %40 or %2F" in redact(str(failure.value))
    assert "at sign" in redact(str(failure.value))


def test_redaction_keeps_what_is_no_password() -> None:
    assert redact("postgresql://u:x@h:5432/db?sslmode=disable") == (
        "postgresql://u:***@h:5432/db?sslmode=disable"
    )
    assert redact("postgresql://u@h/db") == "postgresql://u@h/db"
    assert redact("host=h user=u dbname=d") == "host=h user=u dbname=d"
    text = 'connection to server at "h" (10.0.0.1), port 5432 failed: FATAL: no role "a@b"'
    assert redact(text) == text


def test_explanation_hides_the_password_wherever_the_error_quotes_it() -> None:
    connector = Connector(make_conninfo(host="h", password=HARD))
    for error in (HARD, f"x{HARD}y", quote(HARD, safe=""), f"line one\n{HARD}"):
        assert SECRET not in connector.explain(psycopg.OperationalError(error))


async def test_nothing_that_is_logged_or_shown_holds_the_password(
    proxy: Proxy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through a whole life: connecting, working, losing every connection, and a server down."""
    caplog.set_level(logging.DEBUG)
    dsn = make_conninfo(proxy.dsn, password=HARD)
    shown: list[str] = []
    async with kagzi.connect(dsn) as client:
        async with client.worker(processes=0, lease_s=60, heartbeat_s=0.1, poll_s=0.05) as keeper:
            worker = keeper.incarnation
            store = worker.store
            fenced = worker._fenced
            await fenced.write(batch_of([settled("a", worker_id=worker.worker_id)]))
            shown += [repr(thing) for thing in (client, worker, store, store.connector, fenced)]
            shown += [repr(store._pool), str(store.counts()), repr(fenced._direct.current)]
            proxy.refusing = True
            await proxy.cut_all()
            writing = asyncio.ensure_future(fenced.write(batch_of([settled("b")])))
            await until(lambda: "checkpoints wait" in caplog.text)
            await until(lambda: "heartbeat failed" in caplog.text)
            await until(lambda: "listening stopped" in caplog.text)
            proxy.refusing = False
            await asyncio.wait_for(writing, 60)
    proxy.refusal = ("28P01", f"password authentication failed for user with {HARD}")
    with pytest.raises(StoreUnavailable) as caught:
        async with kagzi.connect(dsn):
            pass
    shown += [repr(caught.value), *traceback.format_exception(caught.value)]
    shown += [caplog.text, *capfd.readouterr()]
    assert "worker" in caplog.text
    for text in shown:
        assert SECRET not in text
    for record in caplog.records:
        assert SECRET not in repr(record.__dict__)


# --- failures -------------------------------------------------------------------------------


async def fails(dsn: str, error: type[Exception]) -> Any:
    """What `connect` raises. It leaves no connection behind: an unclosed one is a warning."""
    with pytest.raises(error) as caught:
        async with kagzi.connect(dsn):
            pass
    return caught.value


async def test_server_that_is_down_is_named_with_what_to_check(proxy: Proxy) -> None:
    proxy.refusing = True
    error = await fails(proxy.dsn, StoreUnavailable)
    parts = conninfo_to_dict(proxy.dsn)
    assert (error.host, error.database) == ("127.0.0.1", parts["dbname"])
    assert "127.0.0.1" in str(error)
    assert "DATABASE_URL" in str(error)
    await proxy.stop()
    assert "refused" in str(await fails(proxy.dsn, StoreUnavailable))


async def test_host_that_does_not_exist_is_named() -> None:
    error = await fails("host=nowhere.invalid dbname=d user=u", StoreUnavailable)
    assert error.host == "nowhere.invalid"


async def test_wrong_database_is_named(dsn: str) -> None:
    error = await fails(make_conninfo(dsn, dbname="there_is_none"), StoreUnavailable)
    assert error.database == "there_is_none"
    assert "does not exist" in str(error)


async def test_wrong_user_is_named(dsn: str) -> None:
    error = await fails(make_conninfo(dsn, user="nobody_like_this"), StoreUnavailable)
    assert "nobody_like_this" in str(error)


async def test_wrong_password_is_said_without_it(proxy: Proxy) -> None:
    proxy.refusal = ("28P01", 'password authentication failed for user "u"')
    error = await fails(make_conninfo(proxy.dsn, password=SECRET), StoreUnavailable)
    assert "password authentication failed" in str(error)
    assert SECRET not in str(error)


async def test_server_that_has_no_connection_left_is_unavailable(proxy: Proxy) -> None:
    proxy.refusal = ("53300", "sorry, too many clients already")
    assert "too many clients" in str(await fails(proxy.dsn, StoreUnavailable))


async def test_server_before_14_is_refused_by_its_number(proxy: Proxy) -> None:
    async def pretend(link: Link, message: Message) -> bool | Message:
        if message.kind == "S" and not message.from_client:
            name = message.body.split(b"\0")[0]
            if name == b"server_version":
                return Message(False, "S", b"server_version\x0013.14\0")
        return True

    proxy.hook = pretend
    error = await fails(proxy.dsn, ServerTooOld)
    assert "13" in str(error)
    assert "14" in str(error)


async def test_connection_lost_while_it_is_set_up_leaves_none_behind(proxy: Proxy) -> None:
    async def cut(link: Link, message: Message) -> bool:
        return not any(word in message.text for word in ("idle_in_transaction", "backend_pid"))

    proxy.hook = cut
    connector = Connector(proxy.dsn)
    with pytest.raises(psycopg.OperationalError):
        await connector.connect()
    await fails(proxy.dsn, StoreUnavailable)


async def test_connecting_that_is_cancelled_leaves_no_connection_behind(proxy: Proxy) -> None:
    reached = asyncio.Event()

    async def hold(link: Link, message: Message) -> bool:
        if any(word in message.text for word in ("idle_in_transaction", "backend_pid")):
            reached.set()
            await asyncio.Event().wait()
        return True

    proxy.hook = hold
    task = asyncio.ensure_future(Connector(proxy.dsn).connect())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()


async def test_server_that_never_answers_is_given_up_after_the_timeout(proxy: Proxy) -> None:
    async def hold(link: Link, message: Message) -> bool:
        await asyncio.Event().wait()
        return True

    proxy.hook = hold
    connector = Connector(make_conninfo(proxy.dsn, connect_timeout=2))
    with pytest.raises(StoreUnavailable, match="timeout"):
        await asyncio.wait_for(connector.check_server(), 10)


# --- rights ---------------------------------------------------------------------------------


@pytest.fixture
async def poor_role(dsn: str) -> AsyncIterator[str]:
    """A role that may connect and nothing else."""
    name = f"kagzi_test_{secrets.token_hex(4)}"
    role = sql.Identifier(name).as_string(None)
    try:
        await rows(dsn, f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    except psycopg.errors.InsufficientPrivilege:
        pytest.skip("the tests' own role may not create roles")
    yield name
    await rows(dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")


def as_role(dsn: str, role: str) -> str:
    """Connected as the tests' own user, acting as another: authentication is not asked."""
    return make_conninfo(dsn, options=f"-c role={role}")


async def test_role_that_may_not_create_the_schema_is_told_what_to_do(
    empty_dsn: str, poor_role: str
) -> None:
    error = await fails(as_role(empty_dsn, poor_role), StoreForbidden)
    assert "kagzi migrate --print" in str(error)
    query = "SELECT count(*) FROM pg_namespace WHERE nspname = 'kagzi'"
    assert await value(empty_dsn, query) == 0


async def test_role_that_may_not_use_the_schema_is_told_what_to_do(
    dsn: str, poor_role: str
) -> None:
    error = await fails(as_role(dsn, poor_role), StoreForbidden)
    assert "grant" in str(error).lower()


async def test_role_with_rights_on_the_tables_alone_is_enough(dsn: str, poor_role: str) -> None:
    role = sql.Identifier(poor_role).as_string(None)
    await rows(
        dsn,
        f"GRANT USAGE ON SCHEMA kagzi TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA kagzi TO {role};"
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA kagzi TO {role}",
    )
    store = Store(Connector(as_role(dsn, poor_role)))
    await store.open()
    worker_id = uuid4()
    await store.register_worker(worker_id, "host", "boot", 1, "then", {}, 30.0)
    run_id = uuid4()
    await store.insert_run(run_id, "a", "w", "1", 0, b"[]")
    assert len(await store.claim_runs(worker_id, [("w", "1")], 1)) == 1
    connection = FencedConnection(store.connector, worker_id)
    for size in (1, 100):
        steps = [settled(f"{size}/{number}") for number in range(size)]
        await connection.write(batch_of(steps))
    assert await store.rescue(worker_id, "test", forced=True) == 1
    await connection.close()
    await store.close()


async def test_missing_right_on_a_table_is_a_store_error(dsn: str, poor_role: str) -> None:
    role = sql.Identifier(poor_role).as_string(None)
    await rows(
        dsn,
        f"GRANT USAGE ON SCHEMA kagzi TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA kagzi TO"
        f" {role}",
    )
    store = Store(Connector(as_role(dsn, poor_role)))
    await store.open()
    with pytest.raises(StoreForbidden):
        await store.insert_run(uuid4(), "a", "w", "1", 0, b"[]")
    await store.close()


def test_migration_prints_what_such_a_role_needs(empty_dsn: str) -> None:
    assert len(migrate(empty_dsn)) >= 1
    assert migrate(empty_dsn) == []


# --- what an error means --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "outage"),
    [
        *(("08006", True), ("53100", True), ("53200", True), ("57P01", True), ("58030", True)),
        *(("25006", True), ("40001", True), ("55P03", True), ("26000", True), ("42P05", True)),
        *(("22021", False), ("23505", False), ("42P01", False), ("57014", False)),
    ],
)
def test_error_is_an_outage_or_speaks_of_what_was_sent(state: str, outage: bool) -> None:
    error = psycopg.errors.lookup(state)("text")
    assert is_outage(error) is outage


def test_libpqs_own_error_without_a_state_is_an_outage() -> None:
    assert is_outage(psycopg.OperationalError("the connection is lost"))
    assert is_outage(psycopg.InterfaceError("the connection is closed"))
    assert not is_outage(psycopg.DataError("cannot dump this"))


async def test_cancellation_that_meets_something_else_is_not_lost(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a task that tries again after an outage would go on for ever."""
    made = Store(Connector(dsn))
    await made.open()
    found = made._pool.getconn

    async def found_all_the_same(timeout: float | None = None) -> Any:
        """As the pool: the connection came at the same moment."""
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await found(timeout)

    fenced = FencedConnection(made.connector, uuid4())

    async def breaks(**_: Any) -> Any:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        raise psycopg.OperationalError("broken")

    try:
        monkeypatch.setattr(made._pool, "getconn", found_all_the_same)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.ensure_future(made.ask("find_expired"))
        monkeypatch.setattr(made.connector, "connect", breaks)
        writing = asyncio.ensure_future(fenced.write(batch_of([settled("a")])))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(writing, 60)
    finally:
        await made.close()


async def test_task_that_was_cancelled_before_may_still_put_its_things_in_order(
    dsn: str,
) -> None:
    made = Store(Connector(dsn))
    await made.open()

    async def end() -> list[tuple[Any, ...]]:
        try:
            await asyncio.sleep(60)
        finally:
            await made.ask("find_expired")
            put_in_order.set()
        return []

    put_in_order = asyncio.Event()
    task = asyncio.ensure_future(end())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await made.close()
    assert put_in_order.is_set()
