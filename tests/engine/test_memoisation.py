"""What is committed does not run again: over kills, over second starts, and from run to run."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

import kagzi
from kagzi import Context, ErrorStrategy, RunConflict
from tests.engine import programs, steps
from tests.engine.witness import Witness
from tests.engine.worker_process import worker_process
from tests.fix_engine import PATIENCE_S, Engine, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- over kills -----------------------------------------------------------------------------


async def test_a_worker_killed_again_and_again_repeats_no_committed_step(
    dsn: str, witness: Witness
) -> None:
    """Killed at four moments of a run; what was committed at each has run for the last time."""
    size = 12
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(programs.long_story, witness.folder, size)
        settled: dict[str, tuple[int, Counter[str]]] = {}
        for moment, threshold in enumerate((1, 15, 60, 150)):
            with worker_process(dsn) as worker:
                await until(lambda threshold=threshold: len(witness.entries) >= threshold)  # type: ignore[misc]
                worker.kill()
            counts = witness.counts
            for record in (await handle.describe()).steps:
                settled.setdefault(record.id, (moment, counts))
        with worker_process(dsn):
            result = await handle.result(PATIENCE_S)

    expected = []
    for index in range(size):
        expected += [f"single {index}", *(f"{index}.{n}" for n in range(12))]
        expected += [f"{index} inner {n}" for n in range(4)]
    assert result == expected
    final = witness.counts
    assert set(final) == set(expected), "and nothing is missing"
    names = {step_id: entry_of(step_id) for step_id in settled}
    assert len([name for name in names.values() if name]) > 20, "some were committed before a kill"
    for step_id, (_, counts) in settled.items():
        name = names[step_id]
        if name is not None:
            assert final[name] == counts[name], f"{step_id} ran again"
    assert max(final.values()) <= 5


def entry_of(step_id: str) -> str | None:
    """What the step of `long_story` with this id notes; None for a body that notes nothing."""
    first, *rest = step_id.split("/")
    name, _, number = first.partition("#")
    index = int(number or 1) - 1
    if name == "note":
        return f"single {index}"
    if name == "group":
        return f"{index}.{rest[0]}"
    return f"{index} inner {rest[1]}" if rest else None


async def test_attempts_are_counted_over_a_kill_and_a_cut_off_one_is_not(
    dsn: str, witness: Witness
) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        handle = await client.start(programs.flaky_then_gate, witness.folder)
        with worker_process(dsn, processes=1) as worker:
            await until(lambda: witness.entries == ["attempt 1", "attempt 2"])
            worker.kill()
        assert [attempt.attempt for attempt in (await handle.describe()).attempts] == [1]
        witness.open("fail", "on")
        with worker_process(dsn, processes=1):
            with pytest.raises(kagzi.StepFailed) as failure:
                await handle.result(PATIENCE_S)
        assert failure.value.attempts == 3
        assert witness.entries == ["attempt 1", "attempt 2", "attempt 2", "attempt 3"]
        attempts = (await handle.describe()).attempts
        assert [(attempt.attempt, attempt.error.message) for attempt in attempts] == [
            (1, "the first attempt"),
            (2, "attempt 2"),
            (3, "attempt 3"),
        ]


# --- over second starts ---------------------------------------------------------------------


async def test_a_second_start_with_the_same_id_is_the_same_run(
    engine: Engine, witness: Witness
) -> None:
    first = await engine.start(programs.one_note, witness.folder, "x", id="order-7")
    assert first.is_new
    assert await first.result(PATIENCE_S) == "x"
    again = await engine.start(programs.one_note, witness.folder, "x", id="order-7")
    assert not again.is_new
    assert again.run_id == first.run_id
    assert await again.result(PATIENCE_S) == "x"
    found = await engine.client.get("order-7")
    assert found.run_id == first.run_id
    with pytest.raises(RunConflict, match="another input"):
        await engine.start(programs.one_note, witness.folder, "y", id="order-7")
    other = await engine.start(programs.halves, witness.folder, 0, id="order-7")
    assert other.is_new, "ids are unique within a workflow"
    assert await other.result(PATIENCE_S) == ["before", "after"]
    assert witness.counts["x"] == 1


async def test_many_starts_of_one_id_at_once_make_one_run(engine: Engine, witness: Witness) -> None:
    handles = await asyncio.gather(
        *(engine.start(programs.one_note, witness.folder, "x", id="rush") for _ in range(30))
    )
    assert [handle.is_new for handle in handles].count(True) == 1
    assert len({handle.run_id for handle in handles}) == 1
    assert await asyncio.gather(*(h.result(PATIENCE_S) for h in handles)) == ["x"] * 30
    assert witness.entries == ["x"]


# --- from run to run ------------------------------------------------------------------------


@kagzi.step(memo="global")
async def known_everywhere(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step(memo="global", memo_version=1)
async def versioned(folder: str) -> str:
    Witness(folder).note("version 1")
    return "version 1"


@kagzi.step(memo="global")
async def known_failure(folder: str, gate: str) -> str:
    return await steps.unless(folder, "body", gate)


@kagzi.step(memo="global")
def known_sync(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.step(memo="global", where="coordinator")
async def known_here(folder: str, entry: str) -> str:
    Witness(folder).note(entry)
    return entry


@kagzi.workflow
async def uses_memos(ctx: Context, folder: str, number: int) -> list[Any]:
    """`number` keeps the inputs of runs apart; those of the steps are alike."""
    alone = await ctx.step(known_everywhere, folder, "alone")
    mixed = await ctx.parallel(
        "mixed",
        steps.note.bind(folder, "never known"),
        known_everywhere.bind(folder, "a"),
        known_sync.bind(folder, "b"),
        known_here.bind(folder, "c"),
    )
    won = await ctx.race("race", [known_everywhere.bind(folder, "raced")])
    return [alone, *mixed, won.value]


async def test_steps_with_a_memo_answer_later_runs_whatever_they_are_grouped_with(
    engine: Engine, witness: Witness
) -> None:
    expected = ["alone", "never known", "a", "b", "c", "raced"]
    for number in range(3):
        assert await engine.run(uses_memos, witness.folder, number) == expected
    assert witness.counts == {**dict.fromkeys(expected, 1), "never known": 3}


@kagzi.workflow
async def uses_version(ctx: Context, folder: str, number: int) -> str:
    return await ctx.step(versioned, folder)


async def test_another_memo_version_is_another_memo(
    engine: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.run(uses_version, witness.folder, 1)
    await engine.run(uses_version, witness.folder, 2)
    assert len(witness.entries) == 1
    monkeypatch.setattr(versioned.definition, "memo_version", "2")
    await engine.run(uses_version, witness.folder, 3)
    assert len(witness.entries) == 2
    await engine.run(uses_version, witness.folder, 4)
    assert len(witness.entries) == 2


@kagzi.workflow
async def uses_failure(ctx: Context, folder: str, number: int) -> bool:
    result = await ctx.parallel_vec(
        "g", [known_failure.bind(folder, "mended")], on_error=ErrorStrategy.COLLECT_ALL
    )
    return result.is_success


async def test_only_successes_are_memos(engine: Engine, witness: Witness) -> None:
    assert await engine.run(uses_failure, witness.folder, 1) is False
    witness.open("mended")
    assert await engine.run(uses_failure, witness.folder, 2) is True
    assert await engine.run(uses_failure, witness.folder, 3) is True
    assert witness.entries == ["body", "body"]


@kagzi.step
async def body_with_memos(ctx: Context, folder: str) -> list[str]:
    return await ctx.parallel_vec("g", [known_everywhere.bind(folder, f"i{n}") for n in range(3)])


@kagzi.workflow
async def uses_memos_within(ctx: Context, folder: str, number: int) -> list[str]:
    return await ctx.step(body_with_memos, folder)


async def test_memos_answer_steps_inside_bodies(engine: Engine, witness: Witness) -> None:
    for number in range(2):
        assert await engine.run(uses_memos_within, witness.folder, number) == ["i0", "i1", "i2"]
    assert len(witness.entries) == 3


@kagzi.workflow
async def large_memo(ctx: Context, folder: str, number: int) -> int:
    return len(await ctx.step(known_everywhere, folder, "x" * 600_000))


async def test_a_large_result_can_be_a_memo(engine: Engine, witness: Witness) -> None:
    for number in range(2):
        assert await engine.run(large_memo, witness.folder, number) == 600_000
    assert len(witness.entries) == 1
