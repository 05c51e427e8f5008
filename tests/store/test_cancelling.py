"""A cancellation that was swallowed on its way, as Python 3.11 can, takes effect all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest

from kagzi.background import cancel_all
from kagzi.store.connections import Connector
from kagzi.store.store import Store
from tests.fix_proxy import Proxy


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kagzi.background.AGAIN_S", 0.01)


async def swallow_one() -> None:
    """Await something, and lose a cancellation that comes meanwhile."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0.001)


async def test_task_that_swallowed_its_cancellation_is_ended_all_the_same() -> None:
    async def for_ever() -> None:
        await swallow_one()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError("nobody waits for this")

    tasks = [asyncio.create_task(for_ever()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await cancel_all(tasks)
    assert all(task.done() for task in tasks)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    made = Store(Connector(dsn))
    await made.open()
    yield made
    await made.close()


@pytest.mark.parametrize("where", ["getconn", "putconn"])
async def test_statement_ends_its_task_if_the_pool_of_connections_swallowed_a_cancellation(
    store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain = getattr(store._pool, where)

    async def swallowing(*args: Any, **options: Any) -> Any:
        result = await plain(*args, **options)
        asking.cancel()
        await swallow_one()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(store._pool, where, swallowing)
        asking = asyncio.create_task(store.find_expired())
        await asyncio.wait([asking])
    assert asking.cancelled()
    assert await store.find_expired() == [], "its connection was given back"


async def test_rescue_gets_through_although_every_connection_of_the_pool_was_cut(
    proxy: Proxy,
) -> None:
    """They are found broken one by one; a worker that begins anew does not wait for each."""
    store = Store(Connector(proxy.dsn))
    await store.open()
    try:
        await asyncio.gather(*(store.find_expired() for _ in range(20)))
        assert store.counts()["pool_size"] > 1
        await proxy.cut_all()
        assert await store.rescue(UUID(int=1), "a test") == 0
    finally:
        await store.close()
