"""Step ids: stable under any interleaving, and what becomes of conflicts and of changed code."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import kagzi
from kagzi import Context, InvalidName, NonDeterminism, OutsideRun, StepConflict, StepFailed
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

Said = Callable[[], list[str]]


# --- interleavings --------------------------------------------------------------------------


@kagzi.workflow
async def interleaved(ctx: Context, folder: str, kind: str) -> dict[str, list[str]]:
    """Three branches of three steps each, every step behind a gate of its own."""

    async def branch(name: str) -> list[str]:
        entries = [await ctx.step(steps.gated, folder, f"{name}{n}", f"{name}{n}") for n in (1, 2)]
        group = await ctx.parallel("pair", steps.gated.bind(folder, f"{name}3", f"{name}3"))
        return [*entries, *group]

    if kind == "gather":
        results = await asyncio.gather(*map(branch, "abc"))
    elif kind == "TaskGroup":
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(name)) for name in "abc"]
        results = [task.result() for task in tasks]
    else:
        results = await asyncio.gather(*(asyncio.wait_for(branch(name), 60) for name in "abc"))
    return dict(zip("abc", results, strict=True))


@pytest.mark.parametrize("kind", ["gather", "TaskGroup", "wait_for"])
async def test_ids_of_branches_do_not_depend_on_which_branch_is_faster(
    engine: Engine, witness: Witness, kind: str
) -> None:
    """Steps end one at a time, in several orders; what is recorded is the same."""
    orders = [
        ["a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3"],
        ["c1", "c2", "c3", "b1", "b2", "b3", "a1", "a2", "a3"],
        ["b1", "a1", "c1", "c2", "a2", "b2", "a3", "b3", "c3"],
    ]
    recorded = []
    for order in orders:
        for gate in order:
            witness.shut(gate)
        begun = len(witness.entries)

        def ended(gate: str, begun: int) -> bool:
            return f"-{gate}" in witness.entries[begun:]

        handle = await engine.start(interleaved, witness.folder, kind)
        for gate in order:
            witness.open(gate)
            await until(partial(ended, gate, begun))
        expected = {name: [f"{name}1", f"{name}2", f"{name}3"] for name in "abc"}
        assert await handle.result(PATIENCE_S) == expected
        entries = [entry[1:] for entry in witness.entries[begun:] if entry.startswith("-")]
        assert entries == order
        rows = await engine.rows(
            "SELECT step_id, function, output FROM kagzi.step_runs WHERE run_id = %(id)s"
            " ORDER BY step_id",
            id=handle.run_id,
        )
        recorded.append(rows)
        assert await engine.replay(handle) == expected
    assert recorded[0] == recorded[1] == recorded[2]


@kagzi.workflow
async def unevenly_awaited(ctx: Context, folder: str, order: list[int]) -> list[str]:
    futures = [ctx.step(steps.gated, folder, f"{n}", f"{n}") for n in range(3)]
    assert [future.id for future in futures] == ["gated", "gated#2", "gated#3"]
    for number in order:
        await futures[number]
    return [await future for future in futures]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_ids_are_given_at_the_call_whatever_is_awaited_first(
    engine: Engine, witness: Witness, order: tuple[int, ...]
) -> None:
    witness.open("0", "1", "2")
    assert await engine.run(unevenly_awaited, witness.folder, list(order)) == ["0", "1", "2"]


# --- explicit ids and single flight ---------------------------------------------------------


@kagzi.workflow
async def two_callers(ctx: Context, folder: str, who: str) -> list[str]:
    """Two callers of one explicit id, of whom one (or each) is cancelled while the step runs."""
    witness = Witness(folder)
    first = asyncio.create_task(_ask(ctx, folder))
    second = asyncio.create_task(_ask(ctx, folder))
    await witness.pass_gate("begun")
    outcomes = []
    for name, task in (("first", first), ("second", second)):
        if name in who:
            task.cancel()
    await asyncio.sleep(0)
    witness.open("cancelled")
    for task in (first, second):
        try:
            outcomes.append(await task)
        except asyncio.CancelledError:
            outcomes.append("cancelled")
    if outcomes == ["cancelled", "cancelled"]:
        outcomes.append(await ctx.step(steps.note, folder, "after"))
    return outcomes


async def _ask(ctx: Context, folder: str) -> str:
    return await ctx.step(steps.gated, folder, "body", "on", id="shared")


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        ("first", ["cancelled", "body"]),
        ("second", ["body", "cancelled"]),
        ("first second", ["cancelled", "cancelled", "after"]),
    ],
)
async def test_cancellation_of_one_caller_of_an_id_never_touches_another(
    engine: Engine, witness: Witness, who: str, expected: list[str]
) -> None:
    handle = await engine.start(two_callers, witness.folder, who)
    await until(lambda: "+body" in witness.entries)
    witness.open("begun")
    await until(lambda: witness.is_open("cancelled"))
    if len(expected) == 3:
        await until(lambda: "!body" in witness.entries)
    witness.open("on")
    assert await handle.result(PATIENCE_S) == expected
    assert witness.counts["+body"] == 1
    assert witness.counts["-body"] == (len(expected) == 2)


@kagzi.workflow
async def same_id_again_and_again(ctx: Context, folder: str) -> list[Any]:
    found: list[Any] = []
    for _ in range(3):
        found.append(await ctx.step(steps.note, folder, "once", id="it"))
        try:
            await ctx.step(steps.fail, folder, "fails once", id="not")
        except StepFailed as error:
            found.append(error.message)
    future = ctx.step(steps.note, folder, "once", id="it")
    return [*found, await future, await future]


async def test_an_explicit_id_stands_for_one_step_all_through_the_run(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(same_id_again_and_again, witness.folder)
    assert result == ["once", "fails once failed"] * 3 + ["once"] * 2
    assert witness.entries == ["once", "fails once"]
    assert await engine.replay(handle) == result
    assert len(witness.entries) == 2


async def _explicit_twice(ctx: Context) -> None:
    await ctx.step(steps.add, 1, 2, id="x")
    await ctx.step(steps.add, 1, 3, id="x")


async def _explicit_twice_at_once(ctx: Context) -> None:
    await asyncio.gather(
        ctx.step(steps.echo, 1, id="x"), ctx.step(steps.square, 1, id="x"), return_exceptions=False
    )


async def _unnamed_then_explicit(ctx: Context) -> None:
    await ctx.step(steps.add, 1, 2)
    await ctx.step(steps.echo, 1, id="add")


async def _explicit_then_unnamed(ctx: Context) -> None:
    await ctx.step(steps.echo, 1, id="add")
    await ctx.step(steps.add, 1, 2)


async def _unnamed_then_explicit_with_the_same_work(ctx: Context) -> None:
    await ctx.step(steps.add, 1, 2)
    await ctx.step(steps.add, 1, 2, id="add")


async def _group_then_explicit(ctx: Context) -> None:
    await ctx.map("pages", steps.square, [1])
    await ctx.step(steps.echo, 1, id="pages")


async def _explicit_then_group(ctx: Context) -> None:
    await ctx.step(steps.echo, 1, id="pages")
    await ctx.map("pages", steps.square, [1])


async def _explicit_in_a_branch_then_unnamed(ctx: Context) -> None:
    async def branch() -> None:
        await ctx.step(steps.echo, 1, id="add")

    await asyncio.create_task(branch())
    await ctx.step(steps.add, 1, 2)


async def _sleep_then_explicit(ctx: Context) -> None:
    await ctx.sleep(0)
    await ctx.step(steps.echo, 1, id="sleep")


CONFLICTS = {
    function.__name__: function
    for function in (
        _explicit_twice,
        _explicit_twice_at_once,
        _unnamed_then_explicit,
        _explicit_then_unnamed,
        _unnamed_then_explicit_with_the_same_work,
        _group_then_explicit,
        _explicit_then_group,
        _explicit_in_a_branch_then_unnamed,
        _sleep_then_explicit,
    )
}


@kagzi.workflow
async def conflicting(ctx: Context, name: str) -> None:
    await CONFLICTS[name](ctx)


@kagzi.step
async def conflicting_body(ctx: Context, name: str) -> None:
    await CONFLICTS[name](ctx)


@kagzi.workflow
async def conflicting_inside(ctx: Context, name: str) -> None:
    await ctx.step(conflicting_body, name)


@pytest.mark.parametrize("name", CONFLICTS)
async def test_one_id_for_two_pieces_of_work_is_a_step_conflict(engine: Engine, name: str) -> None:
    error = await engine.outcome(await engine.start(conflicting, name))
    assert isinstance(error, StepConflict), error
    assert "give one of them another" in str(error)


@pytest.mark.parametrize("name", [name for name in CONFLICTS if "sleep" not in name])
async def test_one_id_for_two_pieces_of_work_is_a_step_conflict_inside_a_body(
    engine: Engine, name: str
) -> None:
    error = await engine.outcome(await engine.start(conflicting_inside, name))
    assert isinstance(error, StepFailed), error
    assert error.is_a(StepConflict), error
    assert "give one of them another" in str(error)


@kagzi.workflow
async def odd_ids(ctx: Context, step_id: str) -> None:
    await ctx.step(steps.echo, 1, id=step_id)


@pytest.mark.parametrize(
    "step_id",
    ["", " ", "a/b", "a#2", "x" * 10_000, "é" * 501, "\x00", "tab\t", "\u2028", "\ud800", " edge"],
    ids=ascii,
)
async def test_an_id_that_cannot_be_stored_is_refused_before_anything_is_written(
    engine: Engine, step_id: str
) -> None:
    @kagzi.workflow(name=f"odd id {ascii(step_id)[:50].replace('/', ':').replace('#', ':')}")
    async def odd(ctx: Context) -> None:
        await ctx.step(steps.echo, 1, id=step_id)

    handle = await engine.start(odd)
    error = await engine.outcome(handle)
    assert isinstance(error, InvalidName), error
    assert len(str(error)) < 500
    assert await engine.count("step_runs", handle.run_id) == 0


@pytest.mark.parametrize("step_id", ["x" * 1000, "é" * 500, "a b", "$%&'\"\\", "日本", "%2F"])
async def test_any_other_id_is_kept_as_it_is(engine: Engine, step_id: str) -> None:
    _, handle = await engine.drive(odd_ids, step_id)
    assert list(await engine.ids(handle)) == [step_id]
    assert await engine.replay(handle) is None


# --- code that changed ----------------------------------------------------------------------

_now_reads: dict[str, Any] = {}


@kagzi.workflow
async def editable(ctx: Context, folder: str) -> list[Any]:
    """What it does is decided by what the test put down, as if its code were edited."""
    first = await ctx.step(steps.note, folder, "first")
    result = await _now_reads["second"](ctx, folder)
    await ctx.step(steps.unless, folder, "third", "mended")
    return [first, result]


EDITS = {
    "another function": lambda ctx, folder: ctx.step(steps.note_sync, folder, "2", name="second"),
    "another input": lambda ctx, folder: ctx.step(steps.note, folder, "3", name="second"),
    "a group instead": lambda ctx, folder: ctx.map("second", steps.square, [1, 2]),
}


@pytest.mark.parametrize("edit", ["another function", "another input"])
async def test_changed_code_parks_the_run_and_a_retry_after_mending_goes_on(
    engine: Engine, witness: Witness, edit: str
) -> None:
    def original(ctx: Context, folder: str) -> Any:
        return ctx.step(steps.note, folder, "2", name="second")

    _now_reads["second"] = original
    handle = await engine.start(editable, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    assert witness.entries == ["first", "2", "third"]

    _now_reads["second"] = EDITS[edit]
    witness.open("mended")
    error = await engine.replay(handle)
    assert isinstance(error, NonDeterminism)
    assert "'second'" in str(error)
    assert ("note_sync" in str(error)) == (edit == "another function")
    assert "input" in str(error) or edit == "another function"
    assert await handle.status() == "failed"
    assert witness.entries == ["first", "2", "third"], "nothing ran under the wrong code"

    _now_reads["second"] = original
    await engine.client.retry(handle)
    error = await engine.outcome(handle)
    # The failure of `third` was not the cause of the run's error this time: it is still recorded.
    assert isinstance(error, StepFailed)
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == ["first", "2"]
    assert witness.entries == ["first", "2", "third", "third"]


@kagzi.workflow
async def shrinking_group(ctx: Context, folder: str) -> list[int]:
    found: list[int] = await ctx.map("squares", steps.square, range(_now_reads["size"]))
    return found


async def test_a_group_of_another_size_is_non_determinism(engine: Engine, witness: Witness) -> None:
    _now_reads["size"] = 3
    _, handle = await engine.drive(shrinking_group, witness.folder)
    _now_reads["size"] = 2
    error = await engine.replay(handle)
    assert isinstance(error, NonDeterminism)
    assert "'squares'" in str(error)
    _now_reads["size"] = 3
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == [0, 1, 4]


@kagzi.workflow
async def swallows_everything(ctx: Context, folder: str) -> str:
    with suppress(Exception):
        await ctx.step(steps.note, folder, _now_reads["entry"], name="it")
    return await ctx.step(steps.note, folder, "went on")


async def test_non_determinism_cannot_be_swallowed_by_the_workflow(
    engine: Engine, witness: Witness
) -> None:
    _now_reads["entry"] = "one"
    _, handle = await engine.drive(swallows_everything, witness.folder)
    _now_reads["entry"] = "two"
    assert isinstance(await engine.replay(handle), NonDeterminism)
    assert witness.entries == ["one", "went on"]


@kagzi.step
async def editable_body(ctx: Context, folder: str, which: str) -> str:
    witness = Witness(folder)
    entry = "old" if not witness.is_open("edited") else "new"
    inner = await ctx.step(steps.note, folder, entry, id="inner")
    await ctx.step(steps.unless, folder, "late", "mended")
    return inner


@kagzi.workflow
async def outer_of_editable(ctx: Context, folder: str) -> str:
    return await ctx.step(editable_body, folder, "x")


async def test_changed_code_of_a_body_parks_the_run_and_a_retry_after_mending_goes_on(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(outer_of_editable, witness.folder)
    assert isinstance(await engine.outcome(handle), StepFailed)
    witness.open("edited", "mended")
    await engine.client.retry(handle)
    error = await engine.outcome(handle)
    assert isinstance(error, NonDeterminism), error
    assert "editable_body/inner" in str(error)
    witness.shut("edited")
    await engine.client.retry(handle)
    assert await handle.result(PATIENCE_S) == "old"
    assert witness.entries == ["old", "late", "late"]


# --- steps nobody awaits --------------------------------------------------------------------


@kagzi.workflow
async def forgetful(ctx: Context, folder: str, wait_for: str) -> str:
    forgotten = [
        ctx.step(steps.gated, folder, "one", "never", id="forgotten"),
        ctx.parallel("group", steps.gated.bind(folder, "two", "never")),
        ctx.sleep(3600),
    ]
    listened = ctx.step(steps.gated, folder, "three", "never", id="listened to")
    listened.add_done_callback(lambda future: None)
    assert len(forgotten) == 3
    await Witness(folder).pass_gate(wait_for)
    return "done"


async def test_steps_that_nobody_awaited_are_cancelled_with_a_warning_that_names_them(
    engine: Engine, witness: Witness, warnings_of_kagzi: Said
) -> None:
    handle = await engine.start(forgetful, witness.folder, "go")
    await until(lambda: len(witness.entries) == 3)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "done"
    await until(lambda: sum(entry.startswith("!") for entry in witness.entries) == 3)
    (said,) = [message for message in warnings_of_kagzi() if "without awaiting" in message]
    assert "'forgotten', 'group', 'sleep'" in said
    assert "listened to" not in said
    assert list(await engine.ids(handle)) == ["sleep"]


@kagzi.workflow
async def tasks_left_behind(ctx: Context, folder: str) -> str:
    async def branch() -> None:
        witness = Witness(folder)
        try:
            await ctx.step(steps.gated, folder, "inside", "never")
        except asyncio.CancelledError:
            witness.note("branch cancelled")
            raise
        witness.note("branch went on")

    _left.append(asyncio.create_task(branch()))
    await Witness(folder).pass_gate("go")
    return "done"


_left: list[asyncio.Task[None]] = []


async def test_a_task_that_the_workflow_leaves_behind_is_cancelled_with_it(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(tasks_left_behind, witness.folder)
    await until(lambda: "+inside" in witness.entries)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "done"
    task = _left.pop()
    await until(task.done)
    assert task.cancelled()
    await until(lambda: "!inside" in witness.entries)
    assert "branch went on" not in witness.entries


# --- where a Context works ------------------------------------------------------------------

_stolen: list[Context] = []


@kagzi.workflow
async def gives_its_context_away(ctx: Context, folder: str) -> str:
    _stolen.append(ctx)
    return await ctx.step(steps.gated, folder, "body", "go")


@kagzi.workflow
async def uses_the_context_of_another_run(ctx: Context) -> None:
    await _stolen[-1].step(steps.echo, 1)


async def test_a_context_refuses_to_work_outside_its_run(engine: Engine, witness: Witness) -> None:
    handle = await engine.start(gives_its_context_away, witness.folder)
    await until(lambda: witness.entries)
    with pytest.raises(OutsideRun, match="own run's tasks"):
        _stolen[-1].step(steps.echo, 1)
    error = await engine.outcome(await engine.start(uses_the_context_of_another_run))
    assert isinstance(error, OutsideRun)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "body"
    assert list(await engine.ids(handle)) == ["gated"]
