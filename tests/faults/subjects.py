"""What a trial runs: a workflow of each kind, whose bodies and whose eyes leave traces in a file.

Each execution of a body draws a nonce and notes it (`ran`); the workflow notes what it sees of each
step whenever it sees it, on each replay again (`saw`). `name` is the id that the step should have.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg

import kagzi
from kagzi import Context, ErrorStrategy, Retry
from tests.faults.points import around_body

FAILS = 2  # attempts of `flaky`
STATES = 4  # that `told` publishes
BLOCKED_S = 8.0  # by `blocking`
# A pool process that is killed takes the step with it that it was at; these are not to fail by it.
UNHURT = Retry.fixed(6, 0.0, on=kagzi.StepCrashed)


def note(folder: str, *words: object) -> None:
    """Append one line, in one piece."""
    descriptor = os.open(f"{folder}/witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (" ".join(str(word) for word in words) + "\n").encode())
    finally:
        os.close(descriptor)


def draw(folder: str, key: str, name: str) -> str:
    """Note an execution; its nonce."""
    nonce = secrets.token_hex(8)
    note(folder, "ran", key, kagzi.current_step().step_id, name, nonce, os.getpid())
    return nonce


def saw(folder: str, key: str, name: str, value: Any) -> None:
    note(folder, "saw", key, name, json.dumps(value, separators=(",", ":")))


def noted(folder: str, line: str) -> bool:
    if not os.path.exists(f"{folder}/witness"):
        return False
    with open(f"{folder}/witness") as witness:
        return line in witness.read().splitlines()


# --- bodies ---------------------------------------------------------------------------------


@kagzi.step(retry=UNHURT)
async def mark(folder: str, key: str, name: str) -> str:
    with around_body():
        nonce = draw(folder, key, name)
        await asyncio.sleep(random.random() * 0.004)
        return nonce


@kagzi.step(retry=UNHURT)
def mark_sync(folder: str, key: str, name: str) -> str:
    with around_body():
        nonce = draw(folder, key, name)
        time.sleep(random.random() * 0.004)
        return nonce


@kagzi.step(retry=UNHURT)
async def fails(folder: str, key: str, name: str) -> str:
    with around_body():
        raise ValueError(draw(folder, key, name))


@kagzi.step(retry=Retry.fixed(FAILS + 4, 0.02))
async def flaky(folder: str, key: str, name: str) -> str:
    with around_body():
        nonce = draw(folder, key, name)
        if kagzi.current_step().attempt <= FAILS:
            raise ValueError(nonce)
        return nonce


@kagzi.step(retry=UNHURT)
async def with_inner(ctx: Context, folder: str, key: str, name: str) -> list[str]:
    own = draw(folder, key, name)
    calls = [mark.bind(folder, key, f"{name}/in/{n}") for n in range(3)]
    return [own, *await ctx.parallel_vec("in", calls)]


@kagzi.step(retry=UNHURT)
async def mark_of_run(folder: str, name: str) -> str:
    """As `mark`, by the run's id: a fork has the input of the run that it comes from."""
    with around_body():
        return draw(folder, str(kagzi.current_step().run_id), name)


@kagzi.step(retry=UNHURT)
async def stumbles(folder: str, key: str, name: str) -> str:
    """Fails until a person has mended what it needs."""
    with around_body():
        nonce = draw(folder, key, name)
        if not noted(folder, f"mended {key}"):
            raise ValueError(nonce)
        return nonce


@kagzi.step(transaction=True, retry=UNHURT)
async def enter(connection: psycopg.AsyncConnection[Any], folder: str, key: str, name: str) -> str:
    """Writes to a table of its own in the transaction of its checkpoint."""
    with around_body():
        nonce = draw(folder, key, name)
        entry = "INSERT INTO audit.ledger (key, step, nonce) VALUES (%s, %s, %s)"
        await connection.execute(entry, [key, name, nonce])
        return nonce


@kagzi.step(retry=UNHURT)
async def endless(folder: str, key: str) -> None:
    await asyncio.Event().wait()


# --- workflows ------------------------------------------------------------------------------

Seen = dict[str, Any]


@kagzi.workflow
async def sequential(ctx: Context, folder: str, key: str) -> Seen:
    seen: Seen = {}
    for n in range(5):
        step = mark_sync if n % 2 else mark
        seen[f"s{n}"] = await ctx.step(step, folder, key, f"s{n}", id=f"s{n}")
        saw(folder, key, f"s{n}", seen[f"s{n}"])
    return seen


@kagzi.workflow
async def group(ctx: Context, folder: str, key: str) -> Seen:
    """A group of 16, one that fails in part, a race, and branches that each run two steps."""
    seen: Seen = {}
    calls = [(mark_sync if n % 3 == 0 else mark).bind(folder, key, f"g/{n}") for n in range(16)]
    for n, value in enumerate(await ctx.parallel_vec("g", calls)):
        seen[f"g/{n}"] = value
        saw(folder, key, f"g/{n}", value)
    some = [mark.bind(folder, key, "c/0"), fails.bind(folder, key, "c/1")]
    found = await ctx.parallel_vec("c", some, on_error=ErrorStrategy.COLLECT_ALL)
    seen |= {"c/0": found.values[0], "c/1": found.errors[1].message}
    saw(folder, key, "c/0", seen["c/0"])
    saw(folder, key, "c/1", seen["c/1"])
    won = await ctx.race("r", [mark.bind(folder, key, f"r/{n}") for n in range(3)])
    note(folder, "won", key, won.index)
    saw(folder, key, f"r/{won.index}", won.value)
    seen[f"r/{won.index}"] = won.value

    async def branch(place: str) -> None:
        for name in (f"{place}-a", f"{place}-b"):
            seen[name] = await ctx.step(mark, folder, key, name, id=name)
            saw(folder, key, name, seen[name])

    await asyncio.gather(branch("left"), branch("right"))
    return seen


@kagzi.workflow
async def nested(ctx: Context, folder: str, key: str) -> Seen:
    seen: Seen = {}
    calls = [with_inner.bind(folder, key, f"o/{n}") for n in range(3)]
    for n, value in enumerate(await ctx.parallel_vec("o", calls, limit=2)):
        seen[f"o/{n}"] = value
        saw(folder, key, f"o/{n}", value)
        for place, inner in enumerate(value[1:]):
            saw(folder, key, f"o/{n}/in/{place}", inner)
    return seen


@kagzi.workflow
async def small(ctx: Context, folder: str, key: str) -> Seen:
    seen: Seen = {}
    for name in ("a", "b"):
        seen[name] = await ctx.step(mark, folder, key, name, id=name)
        saw(folder, key, name, seen[name])
    return seen


@kagzi.workflow
async def waiting(ctx: Context, folder: str, key: str) -> None:
    """Until its parent is cancelled."""
    await ctx.step(mark, folder, key, "a", id="a")
    await ctx.step(endless, folder, key, id="endless")


@kagzi.workflow
async def child(ctx: Context, folder: str, key: str) -> Seen:
    first = await ctx.step(mark, folder, key, "first", id="first")
    saw(folder, key, "first", first)
    started = await ctx.start_child(small, folder, f"{key}.0")
    one, two, three = await asyncio.gather(
        started.result(),
        ctx.run_child(small, folder, f"{key}.1"),
        ctx.parallel_vec("g", [small.bind(folder, f"{key}.{n}") for n in (2, 3)]),
    )
    last = await ctx.step(mark, folder, key, "last", id="last")
    saw(folder, key, "last", last)
    return {"first": first, "last": last, "children": [one, two, *three]}


@kagzi.workflow
async def retry(ctx: Context, folder: str, key: str) -> Seen:
    seen: Seen = {"before": await ctx.step(mark, folder, key, "before", id="before")}
    saw(folder, key, "before", seen["before"])
    seen["f"] = await ctx.step(flaky, folder, key, "f", id="f")
    saw(folder, key, "f", seen["f"])
    calls = [flaky.bind(folder, key, f"g/{n}") for n in range(3)]
    for n, value in enumerate(await ctx.parallel_vec("g", calls)):
        seen[f"g/{n}"] = value
        saw(folder, key, f"g/{n}", value)
    return seen


@kagzi.workflow
async def timer(ctx: Context, folder: str, key: str) -> Seen:
    """A pause, a block that runs out of time, and an event."""
    seen: Seen = {"before": await ctx.step(mark, folder, key, "before", id="before")}
    saw(folder, key, "before", seen["before"])
    await ctx.sleep(0.1)
    try:
        async with ctx.timeout(0.1):
            await ctx.step(endless, folder, key, id="endless")
    except TimeoutError:
        note(folder, "timed-out", key)
    seen["event"] = await ctx.wait_event("go", timeout=60)
    note(folder, "heard", key, seen["event"])
    seen["after"] = await ctx.step(mark, folder, key, "after", id="after")
    saw(folder, key, "after", seen["after"])
    return seen


@kagzi.workflow
async def cancelled(ctx: Context, folder: str, key: str) -> Seen:
    """Waits for ever, and so does a child; the client cancels it, and not the other child."""
    first = await ctx.step(mark, folder, key, "first", id="first")
    saw(folder, key, "first", first)
    await ctx.start_child(waiting, folder, f"{key}.0")
    await ctx.start_child(small, folder, f"{key}.1", on_parent_cancel="abandon")
    note(folder, "ready", key)
    await ctx.step(endless, folder, key, id="endless")
    return {"first": first}


@kagzi.workflow
async def paused(ctx: Context, folder: str, key: str) -> Seen:
    """The client pauses it, and lets it go on."""
    seen: Seen = {"first": await ctx.step(mark, folder, key, "first", id="first")}
    saw(folder, key, "first", seen["first"])
    note(folder, "ready", key)
    await ctx.wait_event("go")
    for n in range(3):
        seen[f"s{n}"] = await ctx.step(mark, folder, key, f"s{n}", id=f"s{n}")
        saw(folder, key, f"s{n}", seen[f"s{n}"])
    return seen


@kagzi.workflow
async def forked(ctx: Context, folder: str, key: str) -> Seen:
    """The client forks it from one step of its group while it goes on behind that."""
    own = str(ctx.run_id)
    seen: Seen = {"a": await ctx.step(mark_of_run, folder, "a", id="a")}
    saw(folder, own, "a", seen["a"])
    calls = [mark_of_run.bind(folder, f"g/{n}") for n in range(3)]
    for n, value in enumerate(await ctx.parallel_vec("g", calls)):
        seen[f"g/{n}"] = value
        saw(folder, own, f"g/{n}", value)
    note(folder, "ready", key)
    seen["event"] = await ctx.wait_event("go", timeout=60)
    note(folder, "heard", own, seen["event"])
    for name in ("b", "c"):
        seen[name] = await ctx.step(mark_of_run, folder, name, id=name)
        saw(folder, own, name, seen[name])
    return seen


@kagzi.workflow
async def retried(ctx: Context, folder: str, key: str) -> Seen:
    """Fails, and goes on when the client retries it."""
    seen: Seen = {"a": await ctx.step(mark, folder, key, "a", id="a")}
    saw(folder, key, "a", seen["a"])
    calls = [(stumbles if n == 1 else mark).bind(folder, key, f"g/{n}") for n in range(3)]
    for n, value in enumerate(await ctx.parallel_vec("g", calls)):
        seen[f"g/{n}"] = value
        saw(folder, key, f"g/{n}", value)
    seen["b"] = await ctx.step(mark, folder, key, "b", id="b")
    saw(folder, key, "b", seen["b"])
    return seen


@kagzi.workflow
async def ledger(ctx: Context, folder: str, key: str) -> Seen:
    seen: Seen = {"a": await ctx.step(enter, folder, key, "a", id="a")}
    saw(folder, key, "a", seen["a"])
    calls = [enter.bind(folder, key, f"g/{n}") for n in range(6)]
    for n, value in enumerate(await ctx.parallel_vec("g", calls)):
        seen[f"g/{n}"] = value
        saw(folder, key, f"g/{n}", value)
    return seen


@kagzi.workflow
async def told(ctx: Context, folder: str, key: str) -> Seen:
    """Lets clients see how far it is."""
    seen: Seen = {}
    for n in range(STATES):
        seen[f"s{n}"] = await ctx.step(mark, folder, key, f"s{n}", id=f"s{n}")
        saw(folder, key, f"s{n}", seen[f"s{n}"])
        await ctx.publish("state", n)
    return seen


# --- for engines that are broken in a way that the others would hardly show -----------------


@kagzi.step
async def contend(folder: str, key: str, name: str) -> str:
    """The first wins the race, and once it has, the last would."""
    nonce = draw(folder, key, name)
    quick = "r/2" if noted(folder, f"won {key} 0") else "r/0"
    await asyncio.sleep(0 if name == quick else 0.3)
    return nonce


@kagzi.workflow
async def racing(ctx: Context, folder: str, key: str) -> Seen:
    won = await ctx.race("r", [contend.bind(folder, key, f"r/{n}") for n in range(3)])
    note(folder, "won", key, won.index)
    after = await ctx.step(mark, folder, key, "after", id="after")
    return {f"r/{won.index}": won.value, "after": after}


@kagzi.workflow
async def branches(ctx: Context, folder: str, key: str) -> Seen:
    """Steps whose ids the engine makes, in tasks that overtake each other."""
    seen: Seen = {}

    async def branch(number: int) -> None:
        task = "branches.<locals>.branch" + (f"#{number}" if number > 1 else "")
        for place in range(3):
            name = f"{task}/mark" + (f"#{place + 1}" if place else "")
            seen[name] = await ctx.step(mark, folder, key, name)

    await asyncio.gather(*(branch(number) for number in range(1, 5)))
    return seen


@kagzi.workflow
async def blocking(ctx: Context, folder: str, key: str) -> Seen:
    """Holds up its worker's loop for much longer than the lease of its plan, once."""
    seen: Seen = {"a": await ctx.step(mark, folder, key, "a", id="a")}
    if not noted(folder, f"blocked {key}"):
        note(folder, "blocked", key)
        time.sleep(BLOCKED_S)  # noqa: ASYNC251 - that is the point
    seen["b"] = await ctx.step(mark, folder, key, "b", id="b")
    saw(folder, key, "b", seen["b"])
    return seen


@kagzi.step
async def mark_of(folder: str, key: str, name: str, what: int) -> str:
    return draw(folder, key, name)


@kagzi.workflow
async def fickle(ctx: Context, folder: str, key: str) -> Seen:
    """Asks for something else when it runs again."""
    again = int(noted(folder, f"began {key}"))
    note(folder, "began", key)
    seen: Seen = {"s": await ctx.step(mark_of, folder, key, "s", again, id="s")}
    seen["t"] = await ctx.step(mark, folder, key, "t", id="t")
    return seen


@kagzi.workflow
async def busy(ctx: Context, folder: str, key: str) -> Seen:
    """Many steps, until the client cancels it."""
    for n in range(2000):
        await ctx.step(mark, folder, key, f"s{n}", id=f"s{n}")
        if n == 0:
            note(folder, "ready", key)
    return {}


@dataclass(frozen=True)
class Program:
    """A workflow and what must come of it.

    Attributes:
        steps: Ids of the steps with a nonce that must be committed.
        maybe: Ids of those that may be (losers of a race).
        attempts: Of steps that fail by themselves: how many executions that makes.
        children: By what follows its own key in theirs.
        kept: Of a fork: steps that it has from the run that it comes from.
        is_forked: The client forks it; the fork is judged as `FORK`.
        is_retried: It fails, and the client retries it, once.
        most_held: Runs of it at once, by the limit of a queue that has its name.
        is_entered: Each step has written to the ledger, too.
        is_followed: The client notes what it publishes.
    """

    workflow: Any
    steps: tuple[str, ...]
    maybe: tuple[str, ...] = ()
    status: str = "completed"
    attempts: dict[str, int] = field(default_factory=dict)
    children: dict[str, Program] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    is_forked: bool = False
    is_retried: bool = False
    most_held: int | None = None
    is_entered: bool = False
    is_followed: bool = False


SMALL = Program(small, ("a", "b"))
WAITING = Program(waiting, (), maybe=("a",), status="cancelled")

PROGRAMS: dict[str, Program] = {
    "sequential": Program(sequential, tuple(f"s{n}" for n in range(5))),
    "group": Program(
        group,
        (
            *(f"g/{n}" for n in range(16)),
            *("c/0", "c/1", "left-a", "left-b", "right-a", "right-b"),
        ),
        maybe=("r/0", "r/1", "r/2"),
    ),
    "nested": Program(
        nested,
        (*(f"o/{n}" for n in range(3)), *(f"o/{n}/in/{m}" for n in range(3) for m in range(3))),
    ),
    "child": Program(
        child, ("first", "last"), children={f".{number}": SMALL for number in range(4)}
    ),
    "retry": Program(
        retry,
        ("before", "f", "g/0", "g/1", "g/2"),
        attempts={"f": FAILS + 1, **{f"g/{n}": FAILS + 1 for n in range(3)}},
    ),
    "timer": Program(timer, ("before", "after")),
    "cancelled": Program(
        cancelled, ("first",), status="cancelled", children={".0": WAITING, ".1": SMALL}
    ),
    "paused": Program(paused, ("first", "s0", "s1", "s2")),
    "forked": Program(forked, ("a", "g/0", "g/1", "g/2", "b", "c"), is_forked=True),
    "retried": Program(
        retried,
        ("a", "g/0", "g/1", "g/2", "b"),
        attempts={f"g/{n}": 2 for n in range(3)},  # the failure may stop the others
        is_retried=True,
    ),
    "queued": Program(sequential, tuple(f"s{n}" for n in range(5)), most_held=1),
    "ledger": Program(ledger, ("a", *(f"g/{n}" for n in range(6))), is_entered=True),
    "told": Program(told, tuple(f"s{n}" for n in range(STATES)), is_followed=True),
}
FORK_FROM, FORK_SUFFIX = "g/1", ".fork"
FORK = replace(PROGRAMS["forked"], kept=("a", "g/0", "g/2"), is_forked=False)

_TASKS = ("branches.<locals>.branch", *(f"branches.<locals>.branch#{n}" for n in (2, 3, 4)))
SPECIAL: dict[str, Program] = {
    "racing": Program(racing, ("after",), maybe=("r/0", "r/1", "r/2")),
    "branches": Program(branches, tuple(f"{t}/mark{n}" for t in _TASKS for n in ("", "#2", "#3"))),
    "blocking": Program(blocking, ("a", "b")),
    "fickle": Program(fickle, ("s",), status="failed"),
    "busy": Program(busy, ("s0",), status="cancelled"),
}
EVERY = {**PROGRAMS, **SPECIAL}
