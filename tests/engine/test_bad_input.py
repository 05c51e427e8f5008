"""Bad input gets an error of its own that names the value and the way out, before any row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kagzi
from kagzi import (
    CodecError,
    Context,
    DuplicateName,
    InvalidDefinition,
    InvalidInput,
    InvalidName,
    PayloadTooLarge,
    UnknownWorkflow,
)
from tests.engine import steps
from tests.fix_engine import PATIENCE_S, Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAN = float("nan")


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
