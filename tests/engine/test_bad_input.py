"""Bad input gets an error of its own that names the value and the way out, before any row."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import kagzi
from kagzi import (
    CodecError,
    Context,
    DuplicateName,
    InvalidDefinition,
    InvalidDsn,
    InvalidInput,
    InvalidName,
    PayloadTooLarge,
    StepFailed,
    StoreUnavailable,
    UnknownRun,
    UnknownWorkflow,
)
from tests.engine import steps
from tests.fix_engine import PATIENCE_S, Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAN = float("nan")
ROOT = Path(__file__).parents[2]


@kagzi.workflow
async def takes(ctx: Context, number: int) -> int:
    return number


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        (("x",), {}, CodecError, "int"),
        ((), {}, InvalidInput, "number"),
        ((1, 2), {}, InvalidInput, "takes"),
        ((1,), {"nmber": 2}, InvalidInput, "nmber"),
        ((1,), {"id": "a\x00b"}, InvalidName, "printed"),
        ((1,), {"id": "x" * 10_000}, InvalidName, "10000 bytes"),
        ((1,), {"id": ""}, InvalidName, "empty"),
        ((1,), {"priority": 2**40}, InvalidInput, "32-bit"),
        ((1,), {"priority": True}, InvalidInput, "32-bit"),
        ((1,), {"version": "9"}, UnknownWorkflow, "version"),
    ],
)
async def test_a_start_that_makes_no_sense_is_refused_and_leaves_no_row(
    engine: Engine, args: Any, options: Any, error: type[Exception], says: str
) -> None:
    before = await engine.count("workflow_runs")
    target = takes.name if "version" in options else takes
    with pytest.raises(error, match=says):
        await engine.client.start(target, *args, **options)
    assert await engine.count("workflow_runs") == before


@pytest.mark.parametrize("target", ["no.such", takes.function, 7, None])
async def test_what_is_no_workflow_is_refused(engine: Engine, target: Any) -> None:
    with pytest.raises(UnknownWorkflow):
        await engine.client.start(target, 1)


async def test_a_run_id_may_be_a_path_or_an_address(engine: Engine) -> None:
    name = "https://shop.example/orders/7#latest"
    handle = await engine.client.start(takes, 7, id=name)
    assert (handle.id, await handle.result(PATIENCE_S)) == (name, 7)
    assert (await engine.client.get(name)).run_id == handle.run_id


async def test_a_payload_above_the_limit_is_refused_with_its_size(engine: Engine) -> None:
    before = await engine.count("workflow_runs")

    @kagzi.workflow
    async def takes_text(ctx: Context, text: str) -> int:
        return len(text)

    with pytest.raises(PayloadTooLarge, match="above the limit of 268,435,456"):
        await engine.client.start(takes_text, "x" * (257 << 20))
    assert await engine.count("workflow_runs") == before


@kagzi.workflow
async def asks(ctx: Context, what: str) -> list[str]:
    """The class and text of the error that a call raises at once."""
    call = steps.square.bind(2)
    attempts: dict[str, Any] = {
        "limit 0": lambda: ctx.parallel_vec("g", [call], limit=0),
        "limit -1": lambda: ctx.parallel_vec("g", [call], limit=-1),
        "limit nan": lambda: ctx.parallel_vec("g", [call], limit=NAN),  # type: ignore[call-overload]
        "timeout nan": lambda: ctx.parallel_vec("g", [call], timeout=NAN),
        "timeout -1": lambda: ctx.step(call, timeout=-1),
        "timeout 0": lambda: call.options(timeout=0),
        "priority": lambda: ctx.parallel_vec("g", [call], priority=1.5),  # type: ignore[call-overload]
        "on_error": lambda: ctx.parallel_vec("g", [call], on_error="all"),  # type: ignore[call-overload]
        "name": lambda: ctx.parallel_vec("a/b", [call]),
        "keys": lambda: ctx.parallel_vec("g", [call], keys=["a", "b"]),
        "same keys": lambda: ctx.parallel_vec("g", [call, call], keys=["a", "a"]),
        "argument": lambda: ctx.step(steps.square, object()),
        "in a group": lambda: ctx.parallel_vec("g", [call, steps.square.bind({1, 2})]),  # type: ignore[arg-type]
        "no calls": lambda: ctx.race("r", []),
        "a number": lambda: ctx.parallel_vec("g", [7]),  # type: ignore[list-item]
        "too many": lambda: ctx.step(steps.square, 1, 2),
        "twice": lambda: ctx.step(call, 3),
    }
    try:
        attempts[what]()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("limit 0", "InvalidInput", "0"),
        ("limit -1", "InvalidInput", "-1"),
        ("limit nan", "InvalidInput", "nan"),
        ("timeout nan", "InvalidInput", "nan"),
        ("timeout -1", "InvalidInput", "-1"),
        ("timeout 0", "InvalidInput", "0"),
        ("priority", "InvalidInput", "1.5"),
        ("on_error", "InvalidInput", "ErrorStrategy"),
        ("name", "InvalidName", "a/b"),
        ("keys", "InvalidInput", "2 keys"),
        ("same keys", "InvalidName", "twice"),
        ("argument", "CodecError", "object"),
        ("in a group", "CodecError", "set"),
        ("no calls", "InvalidInput", "no calls"),
        ("a number", "InvalidDefinition", "7"),
        ("too many", "InvalidArguments", "square"),
        ("twice", "InvalidInput", "arguments already"),
    ],
)
async def test_a_call_that_makes_no_sense_is_refused_and_leaves_no_row(
    engine: Engine, what: str, error: str, says: str
) -> None:
    (kind, text), handle = await engine.drive(asks, what)
    assert kind == error, text
    assert says in text
    assert await engine.count("step_runs", handle.run_id) == 0
    assert await engine.count("parallel_groups", handle.run_id) == 0


async def test_definitions_that_cannot_work_are_refused_when_they_are_made() -> None:
    with pytest.raises(InvalidDefinition, match="async def"):
        kagzi.workflow(lambda ctx: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidDefinition, match="'n', is annotated 'int'"):

        @kagzi.workflow
        async def takes_no_context(n: int) -> int:
            return n

    with pytest.raises(InvalidDefinition, match="ctx: Context"):

        @kagzi.workflow
        async def no_context() -> None: ...

    with pytest.raises(InvalidDefinition, match="async def"):

        @kagzi.step
        def sync_with_context(ctx: Context) -> None: ...

    with pytest.raises(InvalidDefinition, match="generator"):

        @kagzi.step
        def generator() -> Any:
            yield 1

    for options in ({"timeout": NAN}, {"timeout": -1}, {"limit": 0}, {"where": "moon"}):
        with pytest.raises(InvalidInput, match=r"nan|-1|0|moon"):
            kagzi.step(**options)(asyncio.sleep)  # type: ignore[call-overload]
    with pytest.raises(InvalidDefinition, match="pool process"):
        kagzi.step(where="pool")(lambda: 1)


async def test_two_functions_of_one_registered_name_are_refused() -> None:
    @kagzi.step(name="twice-used")
    async def first() -> None: ...

    with pytest.raises(DuplicateName, match="twice-used"):

        @kagzi.step(name="twice-used")
        async def second() -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"processes": -1},
        {"processes": 1.5},
        {"concurrency": 0},
        {"lease_s": NAN},
        {"lease_s": 1, "heartbeat_s": 5},
        {"poll_s": 0},
    ],
)
async def test_a_worker_with_settings_that_cannot_work_is_refused(
    engine: Engine, options: Any
) -> None:
    before = await engine.count("workers")
    with pytest.raises(InvalidInput):
        async with engine.client.worker(**options):
            pass
    assert await engine.count("workers") == before


# --- connecting -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dsn", "error", "says"),
    [
        ("postgresql://[broken", InvalidDsn, "write postgresql://"),
        ("nonsense", InvalidDsn, "write postgresql://"),
        ("host=/nowhere/at/all dbname=x", StoreUnavailable, "Is PostgreSQL running"),
        ("postgresql://u:secret@127.0.0.1:1/x", StoreUnavailable, "Check the DSN"),
    ],
)
async def test_a_server_that_cannot_be_reached_is_said_with_what_to_check(
    dsn: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        async with kagzi.connect(dsn):
            pass
    assert "secret" not in str(raised.value)


async def test_a_database_that_does_not_exist_is_named(dsn: str) -> None:
    with pytest.raises(StoreUnavailable, match="no_such_database"):
        async with kagzi.connect(make_conninfo(dsn, dbname="no_such_database")):
            pass


@pytest.mark.parametrize("schema", ["", "a/b", "x" * 64, "a\x00b", 5])
async def test_a_schema_that_cannot_be_named_so_is_refused(dsn: str, schema: Any) -> None:
    with pytest.raises(InvalidName, match="schema"):
        async with kagzi.connect(dsn, schema=schema):
            pass


# --- what is asked of a run -----------------------------------------------------------------


@pytest.mark.parametrize("timeout", [NAN, -1, 0, "5", True])
async def test_a_wait_that_makes_no_sense_is_refused(engine: Engine, timeout: Any) -> None:
    handle = await engine.client.start(takes, 1)
    with pytest.raises(InvalidInput, match="timeout"):
        await handle.result(timeout=timeout)
    assert await handle.result(PATIENCE_S) == 1


async def test_what_is_not_there_is_said(engine: Engine) -> None:
    handle = await engine.client.start(takes, 1)
    await handle.result(PATIENCE_S)
    with pytest.raises(UnknownRun, match="kagzi runs"):
        await engine.client.get("no such run")
    with pytest.raises(UnknownRun):
        await engine.client.describe(uuid4())
    with pytest.raises(InvalidInput, match="completed"):
        await engine.client.retry(handle)


# --- what the pool cannot run ---------------------------------------------------------------


@kagzi.workflow
async def calls_the_unimportable(ctx: Context) -> int:
    return await ctx.step(_unimportable["step"])


_unimportable: dict[str, Any] = {}


async def test_a_step_of_a_module_that_the_pool_cannot_import_fails_and_says_what_to_do(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("made_up_in_memory")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(
        "import kagzi\n@kagzi.step\nasync def lost() -> int:\n    return 1\n",
        module.__dict__,
    )
    _unimportable["step"] = module.__dict__["lost"]
    handle = await engine.client.start(calls_the_unimportable)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.is_a(InvalidDefinition), error
    assert "made_up_in_memory" in error.message
    assert "where='coordinator'" in error.message


UNGUARDED = """
import kagzi
from kagzi import Context

@kagzi.step
async def one() -> int:
    return 1

@kagzi.workflow
async def unguarded(ctx: Context) -> int:
    return await ctx.step(one)

try:
    print(kagzi.run(unguarded, processes=1))
except kagzi.KagziError as error:
    print(type(error).__name__, error)
"""


async def test_a_script_without_a_main_guard_is_told_so_and_leaves_no_row(
    dsn: str, tmp_path: Path
) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, script],
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "MissingMainGuard" in done.stdout, done.stderr
    assert 'if __name__ == "__main__":' in done.stdout
    with psycopg.connect(dsn) as connection:
        for table in ("workflow_runs", "workers", "worker_leases"):
            query = sql.SQL("SELECT count(*) FROM kagzi.{}").format(sql.Identifier(table))
            assert connection.execute(query).fetchone() == (0,)
