"""Payloads encrypted on their way to the database, and nothing of them readable there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import kagzi
from kagzi import AesGcm, Context, InvalidInput, PayloadKeyError, Retry, RunConflict, StepFailed
from kagzi.cli import main
from kagzi.store.connections import Connector
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until
from tests.fix_faults import rows, value

SECRET = "the blue heron"
KEYS = {"first": bytes(range(32))}
NEXT_KEYS = {**KEYS, "second": bytes(range(1, 33))}

codec = AesGcm(KEYS)  # KAGZI_PAYLOAD_CODEC names it


@kagzi.step
async def repeat(text: str, times: int = 1) -> str:
    return text * times


@kagzi.step(memo="global")
async def remembered(folder: str, text: str) -> str:
    Witness(folder).note("ran")
    return text.upper().lower()


@kagzi.step(retry=Retry.fixed(2, delay=0.001))
async def refuse(text: str) -> None:
    raise ValueError(text)


@kagzi.step(transaction=True)
async def order(connection: psycopg.AsyncConnection[Any], text: str) -> str:
    await connection.execute("INSERT INTO drawings VALUES (%s)", [b"as it is"])
    return text


@kagzi.workflow
async def child(ctx: Context, text: str) -> str:
    await ctx.publish("state", text)
    return await ctx.wait_event("topic")


@kagzi.workflow
async def everything(ctx: Context, folder: str, text: str, child_id: str) -> list[str]:
    found = [await ctx.step(repeat, text), await ctx.step(remembered, folder, text)]
    await ctx.map("many", repeat, [f"{text} {number}" for number in range(200)])
    await ctx.step(repeat, text, 30_000)
    found.append(await ctx.run_child(child, text, id=child_id))
    try:
        await ctx.step(refuse, text)
    except StepFailed as failure:
        found.append(failure.message)
    return found


@kagzi.workflow
async def fails(ctx: Context, text: str) -> None:
    raise RuntimeError(text)


@kagzi.workflow
async def writes(ctx: Context, text: str) -> str:
    return await ctx.step(order, text)


@asynccontextmanager
async def opened(dsn: str, keys: AesGcm | None, **options: Any) -> AsyncIterator[Engine]:
    async with kagzi.connect(dsn, migrate=False, payload_codec=keys) as client:
        options = {"processes": 0, "poll_s": 0.05, **options}
        async with client.worker(**options) as worker:
            yield Engine(client, worker, dsn)


async def readable(dsn: str, secret: str = SECRET) -> list[str]:
    """Tables in which the secret can be read, as text or in the bytes."""
    found = []
    tables = await rows(dsn, "SELECT tablename FROM pg_tables WHERE schemaname = 'kagzi'")
    assert len(tables) > 10
    for (table,) in tables:
        query = (
            f"SELECT count(*) FROM kagzi.{table} t WHERE strpos(t::text, %(plain)s) > 0"  # noqa: S608
            " OR strpos(t::text, %(hex)s) > 0"
        )
        if await value(dsn, query, plain=secret, hex=secret.encode().hex()):
            found.append(table)
    return found


async def test_nothing_of_the_payloads_can_be_read_in_any_table(dsn: str, tmp_path: Any) -> None:
    witness = Witness(tmp_path)
    async with opened(dsn, AesGcm(KEYS), processes=1) as engine:
        handle = await engine.start(everything, witness.folder, SECRET, "the child")

        async def is_child() -> bool:
            return bool(await engine.rows("SELECT 1 FROM kagzi.run_values"))

        await until(is_child)
        await engine.client.send("the child", "topic", SECRET)
        assert await handle.result(PATIENCE_S) == [SECRET] * 4
        with pytest.raises(kagzi.RunFailed, match=SECRET):
            await (await engine.start(fails, SECRET)).result(PATIENCE_S)
        many = await engine.client.start_many(child, [(SECRET,)] * 30)
        async with await psycopg.AsyncConnection.connect(dsn) as own:
            many.append(await engine.client.start(child, SECRET, connection=own))
            many += await engine.client.start_many(child, [(SECRET,)] * 30, connection=own)
        await engine.client.schedule(child, "@yearly", SECRET, id="s")
        assert (await engine.client.schedules())[0].input == [SECRET]
        for one in many:
            await engine.client.send(one, "topic", SECRET)
        for one in many:
            assert await one.result(PATIENCE_S) == SECRET
        details = await handle.describe()
        assert details.input == [witness.folder, SECRET, "the child"]
        assert SECRET in details.attempts[0].error.message
        assert await engine.count("memos") == 1
        assert await engine.count("step_attempts") == 2
    assert await readable(dsn) == []
    assert await readable(dsn, "the child") != [], "ids can be read, and so can this test"


async def test_steps_own_transaction_seals_its_checkpoint_and_not_the_users_data(dsn: str) -> None:
    await rows(dsn, "CREATE TABLE drawings (data bytea)")
    async with opened(dsn, AesGcm(KEYS)) as engine:
        assert await engine.run(writes, SECRET) == SECRET
    assert await rows(dsn, "SELECT data FROM drawings") == [(b"as it is",)]
    assert await readable(dsn) == []


async def test_hashes_and_memo_keys_give_nothing_to_guess_by(dsn: str, tmp_path: Any) -> None:
    """Whoever can list the possible inputs cannot find out which one it was."""
    async with opened(dsn, AesGcm(KEYS)) as engine:
        witness = Witness(tmp_path)
        for number in range(2):
            handle = await engine.start(everything, witness.folder, "yes", f"c{number}")
            await engine.client.cancel(handle)
            with pytest.raises(kagzi.RunWasCancelled):
                await handle.result(PATIENCE_S)

        @kagzi.workflow(name="twice")
        async def twice(ctx: Context) -> None:
            await ctx.step(repeat, "yes", id="one")
            await ctx.step(repeat, "yes", id="two")
            await ctx.step(remembered, witness.folder, "yes")

        await engine.run(twice)
    stored = await rows(dsn, "SELECT input_hash, input, output FROM kagzi.step_runs")
    columns = list(zip(*stored, strict=True))
    assert all(len(set(column)) == len(column) for column in columns), "equal ones look different"
    async with opened(dsn, AesGcm(KEYS)) as engine:
        # The same workflow's results where nothing is sealed: the keys have nothing in common.
        (sealed,) = await rows(dsn, "SELECT key FROM kagzi.memos")
    await rows(dsn, "DELETE FROM kagzi.payload_keys; DELETE FROM kagzi.memos")
    async with opened(dsn, None) as engine:
        await engine.run(twice)
        (plain,) = await rows(dsn, "SELECT key FROM kagzi.memos")
    assert sealed != plain


async def test_replay_conflicts_and_changed_code_are_told_as_without(
    dsn: str, tmp_path: Any
) -> None:
    witness = Witness(tmp_path)
    changed = False

    @kagzi.workflow(name="recalls")
    async def recalls(ctx: Context, text: str) -> list[str]:
        text = f"{text}!" if changed else text
        return [await ctx.step(remembered, witness.folder, text), await ctx.step(repeat, text)]

    async with opened(dsn, AesGcm(KEYS)) as engine:
        result = await engine.run(recalls, SECRET, id="r")
    async with opened(dsn, AesGcm(KEYS)) as engine:
        again = await engine.client.start(recalls, SECRET, id="r")
        assert not again.is_new
        assert await engine.replay(again) == result
        with pytest.raises(RunConflict):
            await engine.client.start(recalls, "other", id="r")
        with pytest.raises(RunConflict):
            await engine.client.start_many(recalls, [("other",)], ids=["r"])
        assert await engine.run(recalls, SECRET) == result
        assert witness.counts["ran"] == 1, "the second run has it from the memo"
        changed = True
        error = await engine.replay(again)
        assert isinstance(error, kagzi.NonDeterminism)


async def test_keys_are_rotated_without_touching_what_is_stored(dsn: str, tmp_path: Any) -> None:
    witness = Witness(tmp_path)

    @kagzi.workflow(name="goes on")
    async def goes_on(ctx: Context, text: str) -> list[str]:
        first = await ctx.step(remembered, witness.folder, text)
        second = await ctx.wait_event("go")
        return [first, second]

    async with opened(dsn, AesGcm(KEYS)) as engine:
        handle = await engine.start(goes_on, SECRET, id="r")
        await until(lambda: witness.entries)
    async with opened(dsn, AesGcm(NEXT_KEYS)) as engine:
        await engine.client.send("r", "go", SECRET)
        again = await engine.client.get("r")
        assert await again.result(PATIENCE_S) == [SECRET, SECRET]
        assert witness.counts["ran"] == 1
        assert not (await engine.client.start(goes_on, SECRET, id="r")).is_new
    assert handle.run_id == again.run_id
    keys = await rows(dsn, "SELECT key_id FROM kagzi.payload_keys ORDER BY 1")
    assert keys == [("first",), ("second",)]
    query = "SELECT position('{}'::bytea IN {}) > 0 FROM kagzi.workflow_runs"
    assert await value(dsn, query.format("first", "input"))
    assert await value(dsn, query.format("second", "output"))
    async with kagzi.connect(dsn, payload_codec=AesGcm(NEXT_KEYS, current="first")) as client:
        assert (await client.describe("r")).input == [SECRET]


async def test_worker_that_lacks_a_new_key_says_so_and_fails_no_run(
    dsn: str, warnings_of_kagzi: Callable[[], list[str]]
) -> None:
    async with opened(dsn, AesGcm(KEYS)) as engine:
        async with kagzi.connect(dsn, payload_codec=AesGcm(NEXT_KEYS)) as client:
            handle = await client.start(writes_nothing, SECRET)
            await until(lambda: any("'second', which is not" in w for w in warnings_of_kagzi()))
            assert not engine.worker.runs
            assert not (await handle.status()).is_terminal
    async with opened(dsn, AesGcm(NEXT_KEYS)) as engine:
        again = await engine.client.get(handle.id)
        assert await again.result(PATIENCE_S) == SECRET


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (None, "encrypted.*'first'.*payload_codec"),
        ({"second": bytes(32)}, "'first', which is not among those given.*'second'"),
        ({"first": bytes(32)}, "'first' is another one here"),
    ],
)
async def test_wrong_or_missing_key_is_told_on_connecting(
    dsn: str, keys: dict[str, bytes] | None, named: str
) -> None:
    async with opened(dsn, AesGcm(KEYS)):
        pass
    before = len(asyncio.all_tasks())
    with pytest.raises(PayloadKeyError, match=named) as raised:
        async with kagzi.connect(dsn, payload_codec=None if keys is None else AesGcm(keys)):
            pass
    assert raised.value.key_id == "first"
    assert bytes(32).hex() not in str(raised.value)
    assert len(asyncio.all_tasks()) <= before, "one of those before may have ended"


async def test_changed_payload_is_refused(dsn: str) -> None:
    async with opened(dsn, AesGcm(KEYS)) as engine:
        _, handle = await engine.drive(writes_nothing, SECRET)
        await rows(
            dsn,
            "UPDATE kagzi.workflow_runs SET input = set_byte(input, length(input) - 1,"
            " get_byte(input, length(input) - 1) # 1)",
        )
        with pytest.raises(PayloadKeyError, match="was changed"):
            await handle.describe()


@kagzi.workflow
async def writes_nothing(ctx: Context, text: str) -> str:
    return text


async def test_what_was_stored_before_there_was_a_codec_stays_readable(dsn: str) -> None:
    async with opened(dsn, None) as engine:
        result, handle = await engine.drive(writes_nothing, SECRET, id="r")
        stored = await value(dsn, "SELECT input FROM kagzi.workflow_runs")
        assert stored == writes_nothing.arguments.encode((SECRET,), {}), "as it is"
    async with opened(dsn, AesGcm(KEYS)) as engine:
        again = await engine.client.start(writes_nothing, SECRET, id="r")
        assert not again.is_new
        assert await again.result(PATIENCE_S) == result
        assert await engine.replay(again) == result
    assert handle.run_id == again.run_id


async def test_without_a_codec_connections_have_no_adapters_of_ours(dsn: str) -> None:
    plain = await Connector(dsn).connect()
    sealing = await Connector(dsn, codec=AesGcm(KEYS)).connect()
    default = psycopg.adapters.get_dumper(bytes, psycopg.adapt.PyFormat.AUTO)
    assert plain.adapters.get_dumper(bytes, psycopg.adapt.PyFormat.AUTO) is default
    assert sealing.adapters.get_dumper(bytes, psycopg.adapt.PyFormat.AUTO) is not default
    await plain.close()
    await sealing.close()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AesGcm({}), "at least one"),
        (lambda: AesGcm([b"x"]), "mapping"),  # type: ignore[arg-type]
        (lambda: AesGcm({"a": b"short"}), "'a' must be 16, 24 or 32 bytes"),
        (lambda: AesGcm({"a": "x" * 32}), "'a' must be"),  # type: ignore[dict-item]
        (lambda: AesGcm({"": bytes(32)}), "key id"),
        (lambda: AesGcm({"a": bytes(32)}, current="b"), "'b' is not among"),
    ],
)
def test_bad_keys_are_refused(make: Callable[[], AesGcm], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        make()


async def test_what_is_no_codec_is_refused(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="payload_codec must have"):
        async with kagzi.connect(dsn, payload_codec=KEYS):  # type: ignore[arg-type]
            pass
    for target in ("nowhere:codec", "tests.engine.test_encryption:none", "x", ":"):
        monkeypatch.setenv("KAGZI_PAYLOAD_CODEC", target)
        with pytest.raises(InvalidInput, match="KAGZI_PAYLOAD_CODEC"):
            async with kagzi.connect(dsn):
                pass


def test_keys_are_not_shown() -> None:
    assert repr(AesGcm(NEXT_KEYS)) == "<AesGcm, keys ['first', 'second'], current 'second'>"


async def test_commands_take_the_codec_from_the_environment(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(dsn, AesGcm(KEYS)) as engine:
        await engine.drive(writes_nothing, SECRET, id="r")
    monkeypatch.setenv("DATABASE_URL", dsn)

    def show() -> Any:
        return CliRunner().invoke(main, ["show", "r", "--json"], prog_name="kagzi")

    told = await asyncio.to_thread(show)
    assert (told.exit_code, "payload_codec" in told.stderr) == (3, True)
    monkeypatch.setenv("KAGZI_PAYLOAD_CODEC", "tests.engine.test_encryption:codec")
    assert SECRET in (await asyncio.to_thread(show)).stdout


def test_every_seal_is_another() -> None:
    sealed = {codec.seal(b"yes") for _ in range(50)}
    assert len(sealed) == 50
    assert {codec.unseal(one, "first") for one in sealed} == {b"yes"}
    assert (
        codec.digest(b"yes") == codec.digest(b"yes") != AesGcm({"a": os.urandom(32)}).digest(b"yes")
    )
