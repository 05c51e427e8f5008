"""Steps that misbehave, and their neighbours; at module level, for pool processes to import."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from typing import Any

import kagzi
from kagzi import Context, Retry
from tests.engine.witness import Witness


def end_process(how: str) -> None:
    """Take this process down."""
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        os.close(2)  # no dump of the stack among the test's output
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)  # a signal to oneself may be handled by another thread a moment later
    if how == "abort":
        os.close(2)
        os.abort()
    raise AssertionError(how)


# --- bodies that take their process down ----------------------------------------------------


@kagzi.step
async def die(folder: str, entry: str, how: str) -> str:
    """Waits for the gate `die`, and takes the process down unless `mended` is open."""
    witness = Witness(folder)
    witness.note(f"{entry} {os.getpid()}")
    await witness.pass_gate("die")
    if witness.is_open("mended"):
        return entry
    if how == "wait":  # to be killed from outside
        await asyncio.sleep(30)
    end_process(how)
    return ""


@kagzi.step
def die_sync(folder: str, entry: str, how: str) -> str:
    witness = Witness(folder)
    witness.note(f"{entry} {os.getpid()}")
    witness.block_at_gate("die")
    if witness.is_open("mended"):
        return entry
    if how == "wait":
        time.sleep(30)
    end_process(how)
    return ""


@kagzi.step(cpu=True)
def die_cpu(folder: str, entry: str, how: str) -> str:
    witness = Witness(folder)
    witness.note(f"{entry} {os.getpid()}")
    witness.block_at_gate("die")
    if witness.is_open("mended"):
        return entry
    if how == "wait":
        time.sleep(30)
    end_process(how)
    return ""


@kagzi.step(retry=Retry.fixed(5, 0.0))
async def die_twice(folder: str, entry: str) -> int:
    """Survives its third attempt."""
    attempt = kagzi.current_step().attempt
    Witness(folder).note(f"{entry} {attempt}")
    if attempt < 3:
        os._exit(3)
    return attempt


@kagzi.step(retry=Retry.fixed(5, 0.0))
def die_twice_sync(folder: str, entry: str) -> int:
    attempt = kagzi.current_step().attempt
    Witness(folder).note(f"{entry} {attempt}")
    if attempt < 3:
        os._exit(3)
    return attempt


@kagzi.step
async def task_dies(folder: str) -> str:
    """A task that the body made raises what ends an event loop."""

    async def inner() -> None:
        raise SystemExit(4)

    Witness(folder).note(str(os.getpid()))
    await asyncio.create_task(inner())
    return "unreachable"


# --- bodies that do not end -----------------------------------------------------------------


@kagzi.step(timeout=0.3)
def hang(folder: str, entry: str) -> str:
    Witness(folder).note(f"{entry} {os.getpid()}")
    time.sleep(30)
    return entry


@kagzi.step(timeout=0.3, cpu=True)
def hang_cpu(folder: str, entry: str) -> str:
    Witness(folder).note(f"{entry} {os.getpid()}")
    while True:
        sum(range(1000))


@kagzi.step(timeout=0.3)
def hang_with_the_gil(folder: str, entry: str) -> str:
    """Compiled code that never lets another thread run, as a regular expression may."""
    Witness(folder).note(f"{entry} {os.getpid()}")
    ctypes.PyDLL(None).sleep(30)
    return entry


@kagzi.step(timeout=0.3)
async def hang_on_loop(folder: str, entry: str) -> str:
    Witness(folder).note(f"{entry} {os.getpid()}")
    time.sleep(30)  # noqa: ASYNC251
    return entry


@kagzi.step(timeout=0.3)
async def swallow_cancel(folder: str, entry: str) -> str:
    Witness(folder).note(f"{entry} {os.getpid()}")
    while True:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            Witness(folder).note("swallowed")


@kagzi.step(timeout=0.3)
async def late_answer(folder: str, entry: str) -> str:
    """Swallows its cancellation and returns."""
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        return f"{entry} returned all the same"
    return entry


@kagzi.step(timeout=0.3)
async def slow(folder: str, entry: str) -> str:
    await asyncio.sleep(30)
    return entry


@kagzi.step
def linger(folder: str, entry: str) -> str:
    """A sync body that only the gate `linger` ends."""
    witness = Witness(folder)
    witness.note(f"+{entry}")
    witness.block_at_gate("linger")
    witness.note(f"-{entry}")
    return entry


# --- bodies that return what cannot be stored -----------------------------------------------


class Opaque:
    """Nothing knows how to store it."""


class Hostile:
    """Raises wherever it is looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __reduce__(self) -> Any:
        os._exit(9)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep() -> Any:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    return value


UNENCODABLE = {
    "object": Opaque,
    "hostile": Hostile,
    "function": lambda: end_process,
    "generator": lambda: (number for number in range(3)),
    "not a number": lambda: float("nan"),
    "infinity": lambda: [float("inf")],
    "cycle": endless,
    "depth": deep,
    "half a surrogate": lambda: "\ud800",
    "file": lambda: sys.stdin,
}


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def give(folder: str, name: str) -> Any:
    Witness(folder).note(name)
    return UNENCODABLE[name]()


@kagzi.step(retry=Retry.fixed(3, 0.0))
def give_sync(folder: str, name: str) -> Any:
    Witness(folder).note(name)
    return UNENCODABLE[name]()


@kagzi.step
async def give_letters(count: int) -> str:
    return "x" * count


# --- bodies that raise ----------------------------------------------------------------------


class Needy(Exception):
    """Cannot be made from its `args`."""

    def __init__(self, one: int, *, two: int) -> None:
        super().__init__()
        self.pair = one, two


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Deadly(Exception):
    """Ends the process of whoever pickles it, and raises worse than errors elsewhere."""

    def __reduce__(self) -> Any:
        os._exit(9)

    def __str__(self) -> str:
        raise SystemExit(9)


class Killing(Exception):
    """Takes down the process that asks for its text."""

    def __str__(self) -> str:
        os._exit(9)


class Sly(Exception):
    @property
    def __class__(self) -> Any:
        raise KeyboardInterrupt

    @property
    def __traceback__(self) -> Any:
        raise KeyboardInterrupt

    @property
    def __notes__(self) -> Any:
        raise KeyboardInterrupt


class Base(BaseException):
    """No `Exception`."""


def long_chain() -> Exception:
    error: Exception = ValueError("the first")
    for number in range(5_000):
        following = ValueError(str(number))
        following.__cause__ = error
        error = following
    return error


def circle() -> Exception:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    return one


RAISED = {
    "ValueError": lambda: ValueError("no"),
    "Needy": lambda: Needy(1, two=2),
    "Mute": Mute,
    "Deadly": Deadly,
    "Sly": Sly,
    "Base": lambda: Base("no error"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "StopIteration": lambda: StopIteration(3),
    "StopAsyncIteration": StopAsyncIteration,
    "MemoryError": MemoryError,
    "RecursionError": RecursionError,
    "ExceptionGroup": lambda: ExceptionGroup("two", [ValueError("a"), Needy(1, two=2)]),
    "long chain": long_chain,
    "circle": circle,
    "long text": lambda: ValueError("x" * 5_000_000),
    "surrogate": lambda: ValueError("\ud800\x00"),
}


def throw(name: str) -> None:
    raise Killing if name == "Killing" else RAISED[name]()


@kagzi.step
async def raises(name: str) -> str:
    throw(name)
    return name


@kagzi.step
def raises_sync(name: str) -> str:
    throw(name)
    return name


@kagzi.step(cpu=True)
def raises_cpu(name: str) -> str:
    throw(name)
    return name


@kagzi.step(where="coordinator")
async def raises_here(name: str) -> str:
    throw(name)
    return name


@kagzi.step(where="coordinator")
def raises_here_sync(name: str) -> str:
    throw(name)
    return name


@kagzi.step(retry=Retry(5, 0.0, on=lambda error: 1 / 0))
async def raises_before_a_broken_predicate(name: str) -> str:
    throw(name)
    return name


@kagzi.step(retry=Retry(5, 0.0, on=lambda error: sys.exit(1)))
def raises_before_a_deadly_predicate(name: str) -> str:
    throw(name)
    return name


# --- neighbours -----------------------------------------------------------------------------

# They look at their gate every few milliseconds. A process that is killed from outside just then
# is taken to have died of that look, so they have attempts to spare.


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def neighbour(folder: str, entry: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry} {os.getpid()}")
    await witness.pass_gate("neighbours")
    return entry


@kagzi.step(retry=Retry.fixed(3, 0.0))
def neighbour_sync(folder: str, entry: str) -> str:
    witness = Witness(folder)
    witness.note(f"+{entry} {os.getpid()}")
    witness.block_at_gate("neighbours")
    return entry


@kagzi.step
async def outer(ctx: Context, folder: str, entry: str) -> list[str]:
    """Opens an inner group around a gate."""
    Witness(folder).note(f"+{entry} {os.getpid()}")
    return await ctx.parallel_vec(
        "inner", [neighbour.bind(folder, f"{entry}.{number}") for number in range(2)]
    )


@kagzi.step(limit=1)
async def outer_one_at_a_time(ctx: Context, folder: str, entry: str, gate: str) -> list[str]:
    """Passes a gate, and opens an inner group; while it waits there the next one may begin."""
    witness = Witness(folder)
    witness.note(f"+{entry} {os.getpid()}")
    await witness.pass_gate(gate)
    calls = [neighbour.bind(folder, f"{entry}.{number}") for number in range(2)]
    return await ctx.parallel_vec("inner", calls)


@kagzi.step
async def slow_to_leave_inner(ctx: Context, folder: str, entry: str) -> None:
    """Takes its time when it is cancelled, and leaves a step of its own under way meanwhile."""
    witness = Witness(folder)
    inner = asyncio.ensure_future(ctx.step(neighbour, folder, "inner"))
    try:
        await witness.pass_gate("never")
    except asyncio.CancelledError:
        witness.note(f"{entry} {os.getpid()}")
        await witness.pass_gate("leave")
        raise
    await inner


@kagzi.step
async def add(a: int, b: int) -> int:
    return a + b


@kagzi.step
def add_sync(a: int, b: int) -> int:
    return a + b
