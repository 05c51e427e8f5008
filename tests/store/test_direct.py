"""A connection that is kept for prepared statements."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from kagzi.errors import StoreForbidden, StoreUnavailable
from kagzi.store.connections import Connector
from kagzi.store.direct import DirectConnection
from kagzi.store.statements import INT_OID, TEXT_OID, Statement, typed_rows
from tests.fix_engine import until
from tests.fix_faults import value

ECHO = Statement("echo", "SELECT %(number)s + 1, %(text)s", {"number": INT_OID, "text": TEXT_OID})
SLEEP = Statement("sleep", "SELECT 1, pg_sleep(60) WHERE %(number)s = 1", {"number": INT_OID})


async def echo(direct: DirectConnection, number: int) -> list[tuple[Any, ...]]:
    return typed_rows(await direct.ask(ECHO, {"number": number, "text": "é"}))


async def test_statement_stays_prepared_when_a_transaction_is_rolled_back(dsn: str) -> None:
    direct = DirectConnection(Connector(dsn), "test")
    for number in range(3):
        assert await echo(direct, number) == [(number + 1, "é")]
        connection = await direct.open()
        for _ in range(8):  # often enough for psycopg to prepare it
            await connection.execute("SELECT 1")
        await connection.execute("BEGIN")
        await connection.execute("SELECT 1")
        await connection.rollback()
    assert direct.current is connection, "the same one all the time"
    await direct.close()


async def test_lost_connection_is_told_with_its_cause_and_replaced(dsn: str) -> None:
    direct = DirectConnection(Connector(dsn), "test")
    await echo(direct, 1)
    await value(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'test' AND datname = current_database()",
    )
    with pytest.raises(StoreUnavailable) as failure:
        await echo(direct, 2)
    assert isinstance(failure.value.__cause__, psycopg.Error), "its outcome is unknown"
    assert await echo(direct, 3) == [(4, "é")]
    await direct.close()


async def test_statement_that_fails_leaves_the_connection(dsn: str) -> None:
    direct = DirectConnection(Connector(dsn), "test")
    connection = await direct.open()
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        await echo(direct, 2**31 - 1)
    assert await echo(direct, 1) == [(2, "é")]
    assert direct.current is connection
    await direct.close()


async def test_right_that_is_lacking_is_told_as_such(dsn: str) -> None:
    direct = DirectConnection(Connector(dsn), "test")
    connection = await direct.open()
    await connection.execute("SET ROLE pg_monitor")
    look = Statement("look", "SELECT count(*) FROM kagzi.workflow_runs", {})
    with pytest.raises(StoreForbidden, match="workflow_runs"):
        await direct.ask(look, {})
    assert direct.current is connection
    await direct.close()


async def test_caller_that_is_cancelled_leaves_no_exchange_behind(dsn: str) -> None:
    direct = DirectConnection(Connector(dsn), "test")
    asking = asyncio.ensure_future(direct.ask(SLEEP, {"number": 1}))
    await until(lambda: not direct.is_free)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert direct.is_free
    assert await echo(direct, 1) == [(2, "é")]
    await direct.close()
