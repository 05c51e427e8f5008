"""Forks: a new run keeps what was called before a step, and makes the rest anew."""

from __future__ import annotations

from typing import Any

import pytest

import kagzi
from kagzi import Context, RunConflict, StepFailed, UnknownStep
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@kagzi.workflow
async def story(ctx: Context, folder: str) -> list[Any]:
    first = await ctx.step(steps.note, folder, "first", id="first")
    pages = await ctx.parallel_vec("pages", [steps.note.bind(folder, f"p{i}") for i in range(4)])
    won = await ctx.race("won", [steps.note.bind(folder, "r")])
    outer = await ctx.parallel_vec("outer", [steps.notes_below.bind(folder, "o")])
    heard = await ctx.wait_event("word")
    last = await ctx.step(steps.note, folder, "last", id="last")
    return [first, pages, won.value, outer, heard, last]


EXPECTED = ["first", ["p0", "p1", "p2", "p3"], "r", [["o0", "o1"]], "hello", "last"]
ALL = ["first", "p0", "p1", "p2", "p3", "r", "o0", "o1", "last"]


@pytest.mark.parametrize(
    ("from_step", "again"),
    [
        (None, ALL),
        ("first", ALL),
        ("pages", ALL[1:]),
        ("pages/2", ["p2", *ALL[5:]]),
        ("won", ALL[5:]),
        ("outer/0", ALL[6:]),
        ("outer/0/below/1", ["o1", "last"]),
        ("event:word", ["last"]),
        ("last", ["last"]),
    ],
)
async def test_fork_runs_again_what_was_called_from_the_step_on(
    engine: Engine, witness: Witness, from_step: str | None, again: list[str]
) -> None:
    handle = await engine.start(story, witness.folder)
    await handle.send("word", "hello")
    assert await handle.result(PATIENCE_S) == EXPECTED
    before = await engine.ids(handle)
    seen = len(witness.entries)
    forked = await engine.client.fork(handle, from_step=from_step)
    assert await forked.result(PATIENCE_S) == EXPECTED
    assert sorted(witness.entries[seen:]) == sorted(again)
    assert forked.id != handle.id
    assert await engine.ids(forked) == before == await engine.ids(handle), "the old one is whole"
    assert await engine.replay(forked) == EXPECTED
    origin = "SELECT forked_from FROM kagzi.workflow_runs WHERE id = %(id)s"
    assert await engine.rows(origin, id=forked.run_id) == [(handle.run_id,)]


@kagzi.workflow
async def two_tries(ctx: Context, folder: str) -> str:
    await ctx.step(steps.note, folder, "before")
    return await ctx.step(steps.fails_until, folder, "open", id="try")


async def test_fork_of_a_failed_run_from_the_failed_step(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(two_tries, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    witness.open("open")
    forked = await engine.client.fork(handle.id, from_step="try", id=f"again {witness.folder}")
    assert forked.id == f"again {witness.folder}"
    assert await forked.result(PATIENCE_S) == "at last"
    assert witness.counts["before"] == 1
    assert isinstance(await engine.outcome(handle), StepFailed), "the old run stays as it is"


async def test_fork_from_an_unknown_step_or_to_a_taken_id_makes_nothing(
    engine: Engine, witness: Witness
) -> None:
    witness.open("open")
    _, handle = await engine.drive(two_tries, witness.folder, id=f"one {witness.folder}")
    before = await engine.count("workflow_runs"), await engine.count("step_runs")
    with pytest.raises(UnknownStep, match="nowhere"):
        await engine.client.fork(handle, from_step="nowhere")
    with pytest.raises(RunConflict, match="one "):
        await engine.client.fork(handle, from_step="try", id=handle.id)
    assert (await engine.count("workflow_runs"), await engine.count("step_runs")) == before


@kagzi.workflow
async def telling(ctx: Context, folder: str) -> None:
    await ctx.publish("title", "kept")
    await ctx.publish("stage", "first")
    await ctx.step(steps.note, folder, "work", id="work")
    await ctx.publish("stage", "last")
    await ctx.step(steps.note, folder, "rest", id="rest")


async def test_fork_has_what_was_published_before_its_step(
    engine: Engine, witness: Witness
) -> None:
    _, handle = await engine.drive(telling, witness.folder)
    published = {"title": "kept", "stage": "last"}
    assert await handle.published() == published
    for from_step in (None, "publish", "work", "rest"):
        forked = await engine.client.fork(handle, from_step=from_step)
        await forked.result(PATIENCE_S)
        assert await forked.published() == published, from_step
    unserved = await engine.client.fork(handle, from_step="work", version="served by nobody")
    assert await unserved.published() == {"title": "kept"}, "it has not come to the last stage"
    await engine.client.cancel(unserved)
