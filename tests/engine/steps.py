"""Steps for the tests of the engine, at module level so that pool processes can import them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import kagzi
from kagzi import Context, ErrorStrategy, Retry
from tests.engine.witness import Witness


class Flaky(Exception):
    """What bodies here raise on purpose."""


class Fatal(Flaky):
    """The same, for predicates to tell apart."""


# --- values ---------------------------------------------------------------------------------


@kagzi.step
async def add(a: int, b: int) -> int:
    return a + b


@kagzi.step
def square(x: int) -> int:
    return x * x


@kagzi.step(cpu=True)
def cube(x: int) -> int:
    return x * x * x


@kagzi.step
async def echo(value: Any) -> Any:
    return value


@kagzi.step
async def text_of(size: int, letter: str = "x") -> str:
    return letter * size


@kagzi.step
async def text_behind(folder: str, gate: str, size: int) -> str:
    """`size` letters, when the gate is open."""
    await Witness(folder).pass_gate(gate)
    return gate[0] * size


# --- bodies that are seen -------------------------------------------------------------------


@kagzi.step
async def note(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step
def note_sync(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step(cpu=True)
def note_cpu(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step
async def gated(folder: str, entry: str, gate: str) -> str:
    """Notes its beginning and its end (or that it was cancelled); between them a gate."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    try:
        await witness.pass_gate(gate)
    except asyncio.CancelledError:
        witness.note(f"!{entry}")
        raise
    witness.note(f"-{entry}")
    return entry


@kagzi.step
def gated_sync(folder: str, entry: str, gate: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry}")
    witness.block_at_gate(gate)
    witness.note(f"-{entry}")
    return entry


@kagzi.step(cpu=True)
def gated_cpu(folder: str, entry: str, gate: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry}")
    witness.block_at_gate(gate)
    witness.note(f"-{entry}")
    return entry


@kagzi.step
async def brief(folder: str, entry: str) -> str:
    """Open for a moment: long enough for others to be open at the same time."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    await asyncio.sleep(0.003)
    witness.note(f"-{entry}")
    return entry


@kagzi.step
def brief_sync(folder: str, entry: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry}")
    time.sleep(0.003)
    witness.note(f"-{entry}")
    return entry


@kagzi.step(limit=2)
async def brief_limited(folder: str, entry: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry}")
    await asyncio.sleep(0.003)
    witness.note(f"-{entry}")
    return entry


# --- bodies that fail -----------------------------------------------------------------------


@kagzi.step
async def fail(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    raise Flaky(f"{entry} failed")


@kagzi.step
def fail_sync(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    raise Flaky(f"{entry} failed")


@kagzi.step
async def fail_behind(folder: str, entry: str, gate: str) -> str:
    """Fails when the gate is open."""
    await Witness(folder).pass_gate(gate)
    Witness(folder).note(entry)
    raise Flaky(f"{entry} failed")


@kagzi.step
async def unless(folder: str, entry: str, gate: str) -> str:
    """Fails as long as the gate is shut."""
    witness = Witness(folder)
    witness.note(entry)
    if not witness.is_open(gate):
        raise Flaky(f"{entry} met a shut gate")
    return entry


@kagzi.step(retry=Retry.fixed(5, 0.0))
async def third_time(folder: str, entry: str) -> int:
    """Succeeds at its third attempt."""
    attempt = kagzi.current_step().attempt
    Witness(folder).note(f"{entry} {attempt}")
    if attempt < 3:
        raise Flaky(f"attempt {attempt} of {entry}")
    return attempt


@kagzi.step(retry=Retry.fixed(5, 0.0))
def third_time_sync(folder: str, entry: str) -> int:
    attempt = kagzi.current_step().attempt
    Witness(folder).note(f"{entry} {attempt}")
    if attempt < 3:
        raise Flaky(f"attempt {attempt} of {entry}")
    return attempt


# --- bodies that open groups ----------------------------------------------------------------


@kagzi.step
async def squares_of(ctx: Context, count: int, limit: int | None = None) -> list[int]:
    return await ctx.map("squares", square, range(count), limit=limit)


@kagzi.step
async def process_id() -> int:
    return os.getpid()


@kagzi.step
def process_id_sync() -> int:
    return os.getpid()


def where_am_i() -> tuple[str, str, int]:
    info = kagzi.current_step()
    return str(info.run_id), info.step_id, info.attempt


@kagzi.step
async def info_async() -> tuple[str, str, int]:
    await asyncio.sleep(0)
    return where_am_i()


@kagzi.step
def info_sync() -> tuple[str, str, int]:
    return where_am_i()


@kagzi.step(cpu=True)
def info_cpu() -> tuple[str, str, int]:
    return where_am_i()


@kagzi.step(where="coordinator")
async def info_coordinator() -> tuple[str, str, int]:
    return where_am_i()


Everything = Callable[..., Any]
ALL_STRATEGIES = tuple(ErrorStrategy)


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def fails_then_waits(folder: str) -> int:
    """The first attempt fails, later ones wait at the gate `on`; the third fails again."""
    attempt = kagzi.current_step().attempt
    witness = Witness(folder)
    witness.note(f"attempt {attempt}")
    if attempt == 1:
        raise Flaky("the first attempt")
    await witness.pass_gate("on")
    if witness.is_open("fail"):
        raise Flaky(f"attempt {attempt}")
    return attempt


@kagzi.step
async def relay(folder: str, index: int) -> str:
    """Waits for the gate of the next index and opens its own: the last is the first to end."""
    witness = Witness(folder)
    witness.note("begun")
    await witness.pass_gate(str(index + 1))
    witness.note(str(index))
    witness.open(str(index))
    return str(index)


@kagzi.step(cpu=True)
def brief_cpu(folder: str, entry: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry}")
    time.sleep(0.003)
    witness.note(f"-{entry}")
    return entry


@kagzi.step(limit=1)
async def one_at_a_time(folder: str, entry: str) -> str:
    """Waits at the gate `on` while it is the first."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    await witness.pass_gate("on")
    witness.note(f"-{entry}")
    return entry


@kagzi.step
async def open_around(ctx: Context, folder: str, entry: str, limit: int) -> list[str]:
    """Open from its first to its last instruction, with an inner group between them."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    calls = [brief.bind(folder, f"inner of {entry}, {index}") for index in range(3)]
    found = await ctx.parallel_vec("inner", calls, limit=limit)
    witness.note(f"-{entry}")
    return found


@kagzi.step
async def noting_body(ctx: Context, folder: str, name: str) -> list[str]:
    """A body whose inner steps are noted; itself it may run again when it is cut off."""
    calls = [note.bind(folder, f"{name} inner {index}") for index in range(4)]
    return await ctx.parallel_vec("inner", calls, limit=2)


@kagzi.step
async def slow_start(folder: str, entry: str, gate: str) -> str:
    """As `gated`, and takes a moment even when the gate is open."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    try:
        await asyncio.sleep(0.05)
        await witness.pass_gate(gate)
    except asyncio.CancelledError:
        witness.note(f"!{entry}")
        raise
    witness.note(f"-{entry}")
    return entry


@kagzi.step
async def slow_to_leave(folder: str, entry: str, gate: str) -> str:
    """As `gated`; when it is cancelled it has something to do until the gate `leave` is open."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    try:
        await witness.pass_gate(gate)
    except asyncio.CancelledError:
        witness.note(f"leaving {entry}")
        await witness.pass_gate("leave")
        witness.note(f"!{entry}")
        raise
    witness.note(f"-{entry}")
    return entry


@kagzi.step
async def fails_until(folder: str, gate: str) -> str:
    """Fails while the gate is shut."""
    if not Witness(folder).is_open(gate):
        raise Flaky(f"{gate} is shut")
    return "at last"


@kagzi.step
async def notes_below(ctx: Context, folder: str, entry: str) -> list[str]:
    """Two inner steps, `below/0` and `below/1`."""
    calls = [note.bind(folder, f"{entry}{index}") for index in range(2)]
    return await ctx.parallel_vec("below", calls)
