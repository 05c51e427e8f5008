"""`ctx.patched`: new code under runs that are under way, and which of them takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import kagzi
from kagzi import Context, InvalidInput, InvalidName, RunFailed
from kagzi.store.checkpoints import LARGE_BYTES
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Code:
    """What of the code is deployed: 1 before the patch, 2 with it, 3 when its call is gone."""

    stage = 1


@pytest.fixture(autouse=True)
def first_stage() -> Iterator[None]:
    Code.stage = 1
    yield
    Code.stage = 1


async def markers(engine: Engine, handle: kagzi.RunHandle[Any]) -> dict[str, bool]:
    """Recorded answers by step id."""
    rows = await engine.rows(
        "SELECT step_id, output FROM kagzi.step_runs WHERE run_id = %(id)s"
        " AND function = 'kagzi.patched'",
        id=handle.run_id,
    )
    return {step_id: bytes(output) == b"true" for step_id, output in rows}


def takes_new_code(ctx: Context, patch: str) -> bool:
    return Code.stage == 3 or (Code.stage == 2 and ctx.patched(patch))


# --- one path -------------------------------------------------------------------------------


@kagzi.workflow
async def changed(ctx: Context) -> list[str]:
    seen = [await ctx.step(steps.echo, "before")]
    if takes_new_code(ctx, "taxes"):
        seen.append(await ctx.step(steps.echo, "new", name="new"))
    else:
        seen += await ctx.map("old", steps.echo, ["old 0", "old 1"])
    seen.append(await ctx.step(steps.echo, "after", name="after"))
    return seen


OLD = ["before", "old 0", "old 1", "after"]
NEW = ["before", "new", "after"]


async def test_a_new_run_takes_the_new_code_and_every_replay_does(engine: Engine) -> None:
    Code.stage = 2
    result, handle = await engine.drive(changed)
    assert result == NEW
    assert await markers(engine, handle) == {"patched:taxes": True}
    for number in await engine.numbers(handle):
        assert await engine.replay(handle, keep=number) == NEW
    Code.stage = 3
    assert await engine.replay(handle) == NEW, "an answer that nobody asks for is ignored"


async def test_only_runs_that_had_not_gone_past_take_the_new_code(engine: Engine) -> None:
    # Wherever an old run was interrupted, it goes on under the new code.
    _, first = await engine.drive(changed)
    numbers = [0, *await engine.numbers(first)]
    results = []
    for place in range(len(numbers)):
        Code.stage = 1
        result, handle = await engine.drive(changed)
        assert result == OLD
        own_numbers = [0, *await engine.numbers(handle)]
        Code.stage = 2
        result = await engine.replay(handle, keep=own_numbers[place])
        results.append(result)
        assert await markers(engine, handle) == {"patched:taxes": result == NEW}
        # The answer stays, also over a life that ends where the first one did.
        assert await engine.replay(handle, keep=own_numbers[place]) == result
        assert await engine.replay(handle) == result
    passed = results.index(OLD)
    assert results == [NEW] * passed + [OLD] * (len(results) - passed)
    assert passed == 2, "nothing recorded, or only what comes before the patch"


async def test_a_marker_comes_before_what_rests_on_it(engine: Engine) -> None:
    Code.stage = 2
    _, handle = await engine.drive(changed)
    rows = await engine.rows(
        "SELECT step_id FROM kagzi.step_runs WHERE run_id = %(id)s ORDER BY completed_number",
        id=handle.run_id,
    )
    assert [row[0] for row in rows] == ["echo", "patched:taxes", "new", "after"]


async def test_a_step_that_was_tried_and_has_no_checkpoint_counts_as_passed(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(tried, witness.folder)

    async def attempted() -> int:
        return await engine.count("step_attempts", handle.run_id)

    await until(attempted)
    engine.worker.runs[handle.run_id].give_back()
    Code.stage = 2
    witness.open("go")
    assert await engine.outcome(handle) == "old"
    assert await markers(engine, handle) == {"patched:other": False}


@kagzi.workflow
async def tried(ctx: Context, folder: str) -> str:
    if takes_new_code(ctx, "other"):
        return "new"
    return await ctx.step(fails_at_first, folder)


@kagzi.step(retry=kagzi.Retry.fixed(3, 0.0))
async def fails_at_first(folder: str) -> str:
    if kagzi.current_step().attempt == 1:
        raise steps.Flaky("at first")
    await Witness(folder).pass_gate("go")
    return "old"


async def test_the_same_id_has_one_answer_in_one_task(engine: Engine) -> None:
    _, handle = await engine.drive(asks_often, 3)
    numbers = await engine.numbers(handle)
    Code.stage = 2
    assert await engine.replay(handle, keep=numbers[1]) == [False] * 4
    assert list((await markers(engine, handle)).values()) == [False]
    assert await engine.run(asks_often, 3) == [True] * 4


@kagzi.workflow
async def asks_often(ctx: Context, rounds: int) -> list[bool]:
    answers = []
    for _ in range(rounds):
        answers.append(takes_new_code(ctx, "round"))
        await ctx.step(steps.echo, 1)
    return [*answers, takes_new_code(ctx, "round")]


async def test_a_removed_patch_does_not_speak_for_another(engine: Engine) -> None:
    Code.stage = 2
    _, handle = await engine.drive(two_patches)
    assert await markers(engine, handle) == {"patched:first": True, "patched:second": True}
    first = (await engine.numbers(handle))[0]
    Code.stage = 3
    # As if it had been stopped right behind the first answer, whose call is gone by now.
    assert await engine.replay(handle, keep=first) == [True]


@kagzi.workflow
async def two_patches(ctx: Context) -> list[bool]:
    answers = []
    if Code.stage < 3:
        answers.append(ctx.patched("first"))
    answers.append(ctx.patched("second"))
    await ctx.step(steps.echo, 1)
    return answers


async def test_a_retried_run_keeps_its_answer(engine: Engine, witness: Witness) -> None:
    Code.stage = 2
    handle = await engine.start(retried, witness.folder)
    assert isinstance(await engine.outcome(handle), RunFailed)
    witness.open("mended")
    await engine.client.retry(handle.id)
    assert await engine.outcome(handle) == [True, "mended"]
    assert await markers(engine, handle) == {"patched:retry": True}


@kagzi.workflow
async def retried(ctx: Context, folder: str) -> list[Any]:
    patched = ctx.patched("retry")
    return [patched, await ctx.step(needs_gate, folder, "mended")]


@kagzi.step
async def needs_gate(folder: str, gate: str) -> str:
    if not Witness(folder).is_open(gate):
        raise steps.Flaky(gate)
    return gate


# --- branches -------------------------------------------------------------------------------


@kagzi.workflow
async def branches(ctx: Context, explicit: bool) -> list[list[str]]:
    async def branch(index: int) -> list[str]:
        def call(text: str) -> Any:
            name = {"id": f"{text}-{index}"} if explicit else {"name": text}
            return ctx.step(steps.echo, f"{text} {index}", **name)

        seen = [await call("before")]
        if takes_new_code(ctx, "branch"):
            seen.append(await call("new"))
        else:
            seen.append(await call("old"))
        seen.append(await call("after"))
        return seen

    return await asyncio.gather(*(branch(index) for index in range(3)))


async def last_marker(engine: Engine, handle: kagzi.RunHandle[Any]) -> int:
    query = (
        "SELECT max(completed_number) FROM kagzi.step_runs WHERE run_id = %(id)s"
        " AND function = 'kagzi.patched'"
    )
    return (await engine.rows(query, id=handle.run_id))[0][0]


@pytest.mark.parametrize("explicit", [False, True])
async def test_each_branch_has_an_answer_of_its_own_that_stays(
    engine: Engine, explicit: bool
) -> None:
    _, first = await engine.drive(branches, explicit)
    places = len(await engine.numbers(first))
    mixed = 0
    for place in range(places):
        Code.stage = 1
        _, handle = await engine.drive(branches, explicit)
        number = (await engine.numbers(handle))[place]
        rows = await engine.rows(
            "SELECT convert_from(output, 'utf8') FROM kagzi.step_runs"
            " WHERE run_id = %(id)s AND completed_number <= %(number)s",
            id=handle.run_id,
            number=number,
        )
        passed = {int(row[0][-2]) for row in rows if "old" in row[0]}
        Code.stage = 2
        result = await engine.replay(handle, keep=number)
        kinds = [seen[1].partition(" ")[0] for seen in result]
        for index, kind in enumerate(kinds):
            if index in passed:
                assert kind == "old", (place, kinds)
            elif not explicit:
                assert kind == "new", (place, kinds)
        mixed += len(set(kinds)) == 2
        answers = await markers(engine, handle)
        assert list(answers.values()).count(True) == kinds.count("new")
        if explicit:  # what is not recorded yet may be decided anew, by what is left to ask for
            number = await last_marker(engine, handle)
        for again in await engine.numbers(handle):
            if again >= number:
                assert await engine.replay(handle, keep=again) == result
    assert mixed > 0 or explicit


# --- where it does not belong ---------------------------------------------------------------


@kagzi.step
async def asks_inside(ctx: Context) -> bool:
    return ctx.patched("inside")


@kagzi.step(where="coordinator")
async def asks_inside_here(ctx: Context) -> bool:
    return ctx.patched("inside")


@kagzi.workflow
async def asks_in_a_step(ctx: Context, here: bool) -> bool:
    return await ctx.step(asks_inside_here if here else asks_inside)


@pytest.mark.parametrize("here", [False, True])
async def test_a_steps_body_is_told_to_ask_in_the_workflow(engine: Engine, here: bool) -> None:
    error = await engine.outcome(await engine.start(asks_in_a_step, here))
    assert "ctx.patched belongs into workflow code" in str(error)
    assert error.is_a(InvalidInput)


@pytest.mark.parametrize("name", ["", "a/b", "a#2", 5, "x" * 300])
async def test_a_name_that_cannot_be_stored_is_refused(engine: Engine, name: Any) -> None:
    handle = await engine.start(asks_for, name)
    error = await engine.outcome(handle)
    assert isinstance(error, InvalidName)
    assert "patch id" in str(error)
    assert await markers(engine, handle) == {}


@kagzi.workflow
async def asks_for(ctx: Context, name: Any) -> bool:
    return ctx.patched(name)


# --- what commits otherwise than in the stream ----------------------------------------------


@kagzi.step(transaction=True)
async def note_in_transaction(connection: Any, folder: str) -> int:
    Witness(folder).note("in transaction")
    cursor = await connection.execute(
        "SELECT count(*) FROM kagzi.step_runs WHERE run_id = %s AND function = 'kagzi.patched'",
        [kagzi.current_step().run_id],
    )
    return (await cursor.fetchone())[0]  # type: ignore[no-any-return]


@kagzi.workflow
async def transacts(ctx: Context, folder: str) -> int:
    if ctx.patched("transaction"):
        return await ctx.step(note_in_transaction, folder)
    return -1


@kagzi.workflow
async def large(ctx: Context) -> int:
    if ctx.patched("large"):
        return len(await ctx.step(steps.text_of, LARGE_BYTES * 2))
    return -1


async def test_a_checkpoint_of_its_own_transaction_comes_behind_the_marker(
    engine: Engine, witness: Witness
) -> None:
    async with held_writer(engine) as writer:
        handle = await engine.start(transacts, witness.folder)
        await until(lambda: writer.held)
        await turns()
        assert witness.entries == []
    assert await engine.outcome(handle) == 1, "the marker was there"


async def test_a_large_checkpoint_comes_behind_the_marker(engine: Engine) -> None:
    async with held_writer(engine) as writer:
        handle = await engine.start(large)
        await until(lambda: writer.held)
        await turns()
        assert await engine.count("step_runs", handle.run_id) == 0
    assert await engine.outcome(handle) == LARGE_BYTES * 2


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0.002)


class held_writer:
    """Holds every write of the worker's first connection, for as long as the block lasts."""

    def __init__(self, engine: Engine) -> None:
        self._writer = engine.worker.writer
        self._open = asyncio.Event()
        self.held = 0

    async def __aenter__(self) -> held_writer:
        self._write = self._writer._write

        async def write(batch: Any) -> Any:
            self.held += 1
            await self._open.wait()
            return await self._write(batch)

        self._writer._write = write
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open.set()
        self._writer._write = self._write
