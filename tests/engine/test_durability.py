"""Which commits wait for the server's disk: all, but those of relaxed steps alone."""

from __future__ import annotations

import pytest

import kagzi
from kagzi import Context, InvalidDefinition
from kagzi.definition import Definition
from tests.fix_engine import started
from tests.fix_faults import rows


@kagzi.step(durability="relaxed")
async def relaxed(number: int) -> int:
    return number


@kagzi.step
async def strict(number: int) -> int:
    return number


@kagzi.workflow
async def one_by_one(ctx: Context) -> None:
    await ctx.step(strict, 1, id="strict")
    await ctx.step(relaxed, 2, id="relaxed")


@kagzi.workflow
async def groups(ctx: Context, size: int) -> None:
    await ctx.parallel_vec("relaxed", [relaxed.bind(number) for number in range(size)])
    calls = [relaxed.bind(number) if number % 2 else strict.bind(number) for number in range(size)]
    await ctx.parallel_vec("mixed", calls)


async def watch(dsn: str) -> None:
    """Note how each checkpoint's transaction commits."""
    await rows(dsn, "CREATE TABLE public.commits (step_id text, setting text)")
    await rows(
        dsn,
        "CREATE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " INSERT INTO public.commits VALUES (NEW.step_id, current_setting('synchronous_commit'));"
        " RETURN NEW; END$$",
    )
    await rows(
        dsn,
        "CREATE CONSTRAINT TRIGGER note AFTER INSERT ON kagzi.step_runs DEFERRABLE INITIALLY"
        " DEFERRED FOR EACH ROW EXECUTE FUNCTION note_commit()",
    )


async def test_commits_of_relaxed_steps_alone_do_not_wait(dsn: str) -> None:
    await watch(dsn)
    async with started(dsn, processes=0) as engine:
        await engine.run(one_by_one)
        await engine.run(groups, 2000)
    found = await rows(dsn, "SELECT step_id, setting FROM public.commits")
    settings: dict[str, set[str]] = {}
    for step_id, setting in found:
        settings.setdefault(step_id.partition("/")[0], set()).add(setting)
    assert settings["strict"] == {"on"}
    assert settings["relaxed"] == {"off", "on"}, "the group's last part goes with its row"
    assert settings["mixed"] == {"on"}
    assert len(found) == 4002


def test_other_words_are_refused() -> None:
    async def step() -> None: ...

    with pytest.raises(InvalidDefinition, match="'none'"):
        Definition(step, durability="none")  # type: ignore[arg-type]
