"""What a client does in several statements, cut off at any message of them."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

import kagzi
from kagzi import Client, Context, RunHandle
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_faults import rows
from tests.fix_proxy import Link, Message, Proxy, pass_all

MESSAGES = 60  # more than either operation sends, or gets
STATE = """SELECT r.status,
        (SELECT count(*) FROM kagzi.step_runs s WHERE s.run_id = r.id),
        (SELECT count(*) FROM kagzi.parallel_groups g WHERE g.run_id = r.id)
    FROM kagzi.workflow_runs r WHERE r.external_id = %(id)s"""


class Cutter:
    """Cuts a connection at the nth message to the server, or where it says that it has done one."""

    def __init__(self, proxy: Proxy, from_client: bool, at: int) -> None:
        self._from_client = from_client
        self._at = at
        self._seen = 0
        proxy.hook = self._look

    async def _look(self, link: Link, message: Message) -> bool:
        if message.from_client is not self._from_client:
            return True
        if message.kind not in "CZ" and not message.from_client:
            return True
        self._seen += 1
        return self._seen != self._at

    @property
    def has_cut(self) -> bool:
        return self._seen >= self._at


@kagzi.workflow
async def stumbling(ctx: Context, folder: str) -> None:
    await ctx.step(programs.note, folder, "first", id="first")
    await ctx.parallel_vec("g", [programs.fails.bind(folder, "g/0")])


async def cut_off(proxy: Proxy, from_client: bool, at: int, operation: Any) -> bool:
    """Let a client do something over a connection that is cut there; whether it was."""
    proxy.hook = pass_all
    async with kagzi.connect(proxy.dsn, migrate=False) as client:
        handle = await client.get("source")
        cutter = Cutter(proxy, from_client, at)
        try:
            await operation(client, handle)
        except kagzi.StoreUnavailable:
            assert cutter.has_cut
        return cutter.has_cut


@pytest.mark.parametrize("from_client", [True, False], ids=["sent", "answered"])
async def test_fork_that_is_cut_off_at_any_message_is_there_whole_or_not_at_all(
    proxy: Proxy, dsn: str, witness: Witness, from_client: bool
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(processes=0):
            handle = await client.start(programs.story, witness.folder, id="source")
            assert await handle.result(timeout=20) == programs.STORY
        await client.fork(handle, from_step="outer", id="whole")
    whole = await rows(dsn, STATE, id="whole")
    assert whole[0][1] > programs.STORY[1]
    found = []
    for at in count(1):

        async def fork(client: Client, handle: RunHandle[Any], at: int = at) -> None:
            await client.fork(handle, from_step="outer", id=f"fork {at}")

        cut = await cut_off(proxy, from_client, at, fork)
        found.append(await rows(dsn, STATE, id=f"fork {at}"))
        assert found[-1] in ([], whole)
        if not cut:
            break
        assert at < MESSAGES
    assert found[-1] == whole, "nothing was cut"
    assert found.count([]) > 5


@pytest.mark.parametrize("from_client", [True, False], ids=["sent", "answered"])
async def test_retry_that_is_cut_off_at_any_message_has_cleared_all_or_nothing(
    proxy: Proxy, dsn: str, witness: Witness, from_client: bool
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        names = ["source", *(f"run {n}" for n in range(1, MESSAGES))]
        async with client.worker(processes=0):
            arguments = [(witness.folder,)] * len(names)
            for handle in await client.start_many(stumbling, arguments, ids=names):
                with pytest.raises(kagzi.StepFailed):
                    await handle.result(timeout=20)
    failed, cleared = [("failed", 2, 1)], [("pending", 1, 0)]
    assert await rows(dsn, STATE, id="source") == failed
    found = []
    for at in count(1):

        async def retry(client: Client, handle: RunHandle[Any], at: int = at) -> None:
            await client.retry(f"run {at}")

        cut = await cut_off(proxy, from_client, at, retry)
        found.append(await rows(dsn, STATE, id=f"run {at}"))
        assert found[-1] in (failed, cleared)
        if not cut:
            break
    assert found[-1] == cleared, "nothing was cut"
    assert found.count(failed) > 5


@pytest.mark.parametrize("migrate", [True, False], ids=["migrate", "verify"])
@pytest.mark.parametrize("from_client", [True, False], ids=["sent", "answered"])
async def test_connecting_that_is_cut_off_at_any_message_says_that_the_store_is_unavailable(
    proxy: Proxy, dsn: str, from_client: bool, migrate: bool
) -> None:
    refused = 0
    for at in count(1):
        cutter = Cutter(proxy, from_client, at)
        try:
            async with kagzi.connect(proxy.dsn, migrate=migrate):
                pass
        except kagzi.StoreUnavailable:
            assert cutter.has_cut
            refused += 1
        if not cutter.has_cut:
            break
        assert at < MESSAGES
    assert refused > 2
