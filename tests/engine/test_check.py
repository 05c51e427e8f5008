"""`client.check` and `kagzi check`: which recorded runs today's code would break."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

import kagzi
from kagzi import (
    BrokenRun,
    CheckProblem,
    CheckReport,
    Context,
    ErrorStrategy,
    InvalidInput,
    RunFailed,
    StepFailed,
)
from kagzi.cli import main
from kagzi.registry import registry
from kagzi.store import checks
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

Code = Callable[[Context], Awaitable[Any]]
DAY_S = 86_400.0


class Deployed:
    """The code of `changing`, which a test changes under its recorded runs."""

    code: Code


@pytest.fixture(autouse=True)
def _nothing_deployed() -> Iterator[None]:
    yield
    if hasattr(Deployed, "code"):
        del Deployed.code


@kagzi.workflow
async def changing(ctx: Context) -> Any:
    return await Deployed.code(ctx)


async def only_broken(client: kagzi.Client, **options: Any) -> BrokenRun:
    report = await client.check(**options)
    assert len(report.broken) == 1, report
    assert not report.is_success
    return report.broken[0]


async def record(dsn: str, code: Code, **options: Any) -> kagzi.RunHandle[Any]:
    """A run of this code, driven to its end by a worker that is gone then."""
    Deployed.code = code
    async with started(dsn, processes=0) as engine:
        handle = await engine.start(changing, **options)
        await engine.outcome(handle)
        return handle


async def execute(dsn: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(query.encode(), values)
        return await cursor.fetchall() if cursor.description else []


async def forget_behind(dsn: str, number: int) -> None:
    """Make the database's runs unfinished, as if their worker had died at that moment."""
    await execute(
        dsn,
        "WITH steps AS (DELETE FROM kagzi.step_runs WHERE completed_number > %s),"
        " groups AS (DELETE FROM kagzi.parallel_groups WHERE completed_number > %s)"
        " UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL, output = NULL,"
        " error = NULL",
        *(number, number),
    )


async def numbers(dsn: str) -> list[int]:
    query = (
        "SELECT completed_number FROM kagzi.step_runs UNION "
        "SELECT completed_number FROM kagzi.parallel_groups ORDER BY 1 DESC"
    )
    return [row[0] for row in await execute(dsn, query)]


async def everything(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, with the transaction that wrote it."""
    found = {}
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'kagzi'"
        for (name,) in await (await connection.execute(query)).fetchall():
            every = sql.SQL("SELECT xmin::text, ctid::text, t.* FROM kagzi.{} t")
            cursor = await connection.execute(every.format(sql.Identifier(name)))
            found[name] = await cursor.fetchall()
    assert found["step_runs"]
    return found


# --- code that is as it was -----------------------------------------------------------------


@kagzi.step
async def refuse(text: str) -> str:
    raise steps.Flaky(text)


@kagzi.step
async def refuse_behind(folder: str, gate: str) -> str:
    await Witness(folder).pass_gate(gate)
    raise steps.Flaky(gate)


@kagzi.step
async def open_gate(folder: str, gate: str) -> None:
    Witness(folder).open(gate)


@kagzi.step
async def wait_for_ever() -> None:
    await asyncio.Event().wait()


@kagzi.step
async def outer(ctx: Context, folder: str, size: int) -> int:
    Witness(folder).note("outer")
    return sum(await ctx.map("inner", steps.square, range(size)))


@kagzi.workflow
async def all_kinds(ctx: Context, folder: str) -> list[Any]:
    """One of everything that is recorded."""

    async def branch(index: int) -> str:
        await ctx.step(steps.note, folder, f"branch {index}")
        await ctx.sleep(0.001)
        return await ctx.step(steps.note, folder, f"end {index}", id=f"end-{index}")

    async def late() -> int:
        await ctx.step(steps.echo, "before the end of the block")
        await ctx.sleep(DAY_S)
        return await ctx.step(steps.echo, "never")

    await asyncio.sleep(0.01)  # of no consequence, and not recorded
    seen: list[Any] = [await ctx.step(steps.note, folder, "first")]
    closure = await ctx.step(lambda: 5, name="closure")
    seen.append(closure)
    seen.append(ctx.patched("some"))
    seen.append(await ctx.parallel_vec("group", [outer.bind(folder, n) for n in range(3)], limit=2))
    seen.append((await ctx.race("race", [steps.echo.bind(n) for n in range(3)])).index in range(3))
    done = await ctx.parallel_vec(
        "collected",
        [refuse.bind("one"), steps.echo.bind("two")],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    seen.append(sorted(done.errors))
    try:
        await ctx.map("first failure", refuse, ["x", "y"])
    except StepFailed as failure:
        seen.append(failure.message)
    seen.append(await asyncio.gather(*(branch(n) for n in range(3))))
    async for won in ctx.as_completed("stream", [steps.echo.bind(n) for n in range(3)]):
        seen.append(won.value is not None)
        break
    try:
        async with ctx.timeout(0.05):
            await late()
    except TimeoutError:
        seen.append("timeout")
    async with ctx.timeout(DAY_S):
        seen.append(await ctx.step(outer, folder, 4))
    seen.append(await ctx.parallel_vec("empty", []))
    now, chance, unique = await ctx.now(), await ctx.random(), await ctx.uuid4()
    ctx.step(wait_for_ever)  # nobody awaits it
    await asyncio.sleep(0.01)
    return [*seen, str(now), chance, str(unique)]


async def test_finished_and_interrupted_runs_of_the_same_code_are_fine(
    dsn: str, witness: Witness
) -> None:
    async with started(dsn, processes=0) as engine:
        handle = await engine.start(all_kinds, witness.folder)
        await handle.result(PATIENCE_S)
    entries = witness.entries
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(1, 1, 0, 0, [])
        # At whichever of its checkpoints a worker had died.
        for number in [*await numbers(dsn), 0]:
            await forget_behind(dsn, number)
            report = await client.check()
            assert report == CheckReport(1, 0, 1, 0, []), (number, report.broken)
    assert witness.entries == entries, "no body ran"


@kagzi.workflow
async def squared(ctx: Context, number: int) -> int:
    return await ctx.step(steps.square, number)


@kagzi.workflow
async def reaches_out(ctx: Context) -> list[Any]:
    await ctx.publish("stage", "begun")
    seen: list[Any] = [await ctx.run_child(squared, 3)]
    started_child = await ctx.start_child(squared, 4)
    seen.append(await ctx.wait_event("go", timeout=DAY_S))
    try:
        await ctx.wait_event("nothing", timeout=0.01)
    except kagzi.EventTimeout:
        seen.append("nothing")
    seen += await ctx.parallel_vec("children", [squared.bind(5), steps.echo.bind(6)])
    return [*seen, await started_child.result()]


async def test_events_and_children_are_recalled_and_nothing_is_sent_or_started(dsn: str) -> None:
    async with started(dsn, processes=0) as engine:
        handle = await engine.start(reaches_out)
        await engine.client.send(handle, "go", "on")
        assert await handle.result(PATIENCE_S) == [9, "on", "nothing", 25, 6, 16]
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(4, 4, 0, 0, [])
        await execute(dsn, "DELETE FROM kagzi.step_runs WHERE run_id <> %s", handle.run_id)
        await execute(dsn, "DELETE FROM kagzi.workflow_runs WHERE id <> %s", handle.run_id)
        before = await everything(dsn)
        assert (await client.check()).same == 1
        assert await everything(dsn) == before
        for number in [*await numbers(dsn), 0]:
            await forget_behind(dsn, number)
            report = await client.check()
            assert report == CheckReport(1, 0, 1, 0, []), (number, report.broken)


async def test_nothing_is_written(dsn: str, witness: Witness) -> None:
    async with started(dsn, processes=0) as engine:
        for _ in range(2):
            await (await engine.start(all_kinds, witness.folder)).result(PATIENCE_S)
        Deployed.code = parks
        await until_status(await engine.start(changing, id="sleeps"), "sleeping")
        Deployed.code = one_step
        await engine.run(changing)
    async with kagzi.connect(dsn, migrate=False) as client:
        await client.start(changing, id="pending")
    before, entries = await everything(dsn), witness.entries
    Deployed.code = two_steps
    read_only = make_conninfo(dsn, options="-c default_transaction_read_only=on")
    async with kagzi.connect(read_only, migrate=False) as client:
        report = await client.check()
    assert report.checked == 5
    assert [run.problem for run in report.broken] == [
        CheckProblem.MISSING_STEP,
        CheckProblem.UNUSED_STEP,
    ]
    assert await everything(dsn) == before
    assert witness.entries == entries


async def until_status(handle: kagzi.RunHandle[Any], status: str) -> None:
    async def stands() -> bool:
        return await handle.status() == status

    await until(stands)


async def test_a_role_that_can_only_read_may_check(dsn: str) -> None:
    await record(dsn, two_steps)
    role = f"kagzi_reader_{uuid4().hex[:8]}"
    await execute(dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    try:
        await execute(dsn, f"GRANT USAGE ON SCHEMA kagzi TO {role}")
        await execute(dsn, f"GRANT SELECT ON ALL TABLES IN SCHEMA kagzi TO {role}")
        reader = make_conninfo(dsn, user=role, password="secret")
        async with kagzi.connect(reader, migrate=False) as client:
            assert (await client.check()).same == 1
    finally:
        await execute(dsn, f"DROP OWNED BY {role}")
        await execute(dsn, f"DROP ROLE {role}")


# --- code that is not -----------------------------------------------------------------------


async def one_step(ctx: Context) -> Any:
    return await ctx.step(steps.echo, "one")


async def two_steps(ctx: Context) -> Any:
    return [await ctx.step(steps.echo, "one"), await ctx.step(steps.echo, "two")]


async def renamed(ctx: Context) -> Any:
    return [await ctx.step(steps.echo, "one"), await ctx.step(steps.echo, "two", name="second")]


async def other_function(ctx: Context) -> Any:
    return [await ctx.step(steps.add, 1, 2, name="echo"), await ctx.step(steps.echo, "two")]


async def other_input(ctx: Context) -> Any:
    return [await ctx.step(steps.echo, "one"), await ctx.step(steps.echo, "three")]


async def other_result(ctx: Context) -> Any:
    return (await two_steps(ctx))[::-1]


async def raises(ctx: Context) -> Any:
    await ctx.step(steps.echo, "one")
    raise KeyError("new and wrong")


async def waits_outside(ctx: Context) -> Any:
    await two_steps(ctx)
    await asyncio.Event().wait()


async def grouped(ctx: Context) -> Any:
    return await ctx.map("group", steps.echo, [0, 1, 2])


async def larger(ctx: Context) -> Any:
    return await ctx.map("group", steps.echo, [0, 1, 2, 3])


async def raced(ctx: Context) -> Any:
    return (await ctx.race("group", [steps.echo.bind(n) for n in range(3)])).index


async def keyed(ctx: Context) -> Any:
    return await ctx.map("other", steps.echo, [0, 1, 2], key=str)


async def pauses(ctx: Context) -> Any:
    await ctx.sleep(0.001)


async def pauses_longer(ctx: Context) -> Any:
    await ctx.sleep(0.002)


async def parks(ctx: Context) -> Any:
    await ctx.step(steps.echo, "before", name="before")
    await ctx.sleep(30 * DAY_S)


BREAKS = [
    (one_step, two_steps, "missing_step", "echo#2", "'echo#2' (tests.engine.steps.echo)"),
    (two_steps, one_step, "unused_step", "echo#2", "no longer asks for 'echo#2', recorded"),
    (two_steps, renamed, "missing_step", "second", "not asked for: 'echo#2'"),
    (two_steps, other_function, "non_determinism", "echo", "recorded 'tests.engine.steps.echo'"),
    (two_steps, other_input, "non_determinism", "echo#2", "the same with another"),
    (two_steps, other_result, "other_result", None, """now returns ["two","one"]"""),
    (two_steps, raises, "exception", "echo#2", "raises builtins.KeyError: 'new and wrong' (File "),
    (two_steps, waits_outside, "no_end", None, "now waits for something that is no step"),
    (grouped, larger, "non_determinism", "group", "parallel of 3 steps"),
    (grouped, raced, "non_determinism", "group", "asked for race of 3"),
    (grouped, keyed, "missing_step", "other/0", "and 1 more"),
    (pauses, pauses_longer, "non_determinism", "sleep", "kagzi.sleep"),
]


@pytest.mark.parametrize(
    ("recorded", "deployed", "problem", "step_id", "says"),
    BREAKS,
    ids=[f"{old.__name__}-{new.__name__}" for old, new, *_ in BREAKS],
)
async def test_a_finished_run_that_today_s_code_would_break_is_named(
    dsn: str, recorded: Code, deployed: Code, problem: str, step_id: str | None, says: str
) -> None:
    handle = await record(dsn, recorded, id="some run")
    async with kagzi.connect(dsn, migrate=False) as client:
        assert (await client.check()).is_success
        Deployed.code = deployed
        found = await only_broken(client)
    assert (found.id, found.run_id, found.status) == ("some run", handle.run_id, "completed")
    assert (found.problem, found.step_id) == (problem, step_id)
    assert says in found.message, found.message


@pytest.mark.parametrize("deployed", [other_function, renamed, one_step, raises])
async def test_an_interrupted_run_breaks_where_it_would(dsn: str, deployed: Code) -> None:
    await record(dsn, two_steps)
    first = min(await numbers(dsn))
    await execute(
        dsn, "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL, output = NULL"
    )
    Deployed.code = deployed
    async with kagzi.connect(dsn, migrate=False) as client:
        found = await only_broken(client)
        assert found.status == "pending"
        await forget_behind(dsn, first)
        report = await client.check()
    # With one step recorded, what comes behind it may be anything; except an error.
    fine = {one_step, renamed}
    assert report.is_success == (deployed in fine), report


async def test_an_interrupted_run_whose_group_has_other_keys_breaks(dsn: str) -> None:
    async def by_name(ctx: Context) -> Any:
        return await ctx.map("group", steps.echo, ["a", "b"], key=str)

    async def by_other_name(ctx: Context) -> Any:
        return await ctx.map("group", steps.echo, ["a", "b"], key=str.upper)

    await record(dsn, by_name)
    await forget_behind(dsn, 10**6)
    async with kagzi.connect(dsn, migrate=False) as client:
        assert (await client.check()).is_success
        Deployed.code = by_other_name
        found = await only_broken(client)
    assert (found.problem, found.step_id) == (CheckProblem.UNUSED_STEP, "group/a")
    assert "asks for 'group/A'" in found.message


async def test_a_run_goes_on_behind_what_is_recorded(dsn: str) -> None:
    await record(dsn, one_step)
    await forget_behind(dsn, 10**6)
    Deployed.code = two_steps
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(1, 0, 1, 0, [])


async def test_patched_code_breaks_no_run(dsn: str) -> None:
    async def patched(ctx: Context) -> Any:
        seen = [await ctx.step(steps.echo, "one")]
        if ctx.patched("middle"):
            await ctx.step(steps.echo, "new", name="middle")
        return [*seen, await ctx.step(steps.echo, "two")]

    async def unpatched(ctx: Context) -> Any:
        seen = [await ctx.step(steps.echo, "one")]
        await ctx.step(steps.echo, "new", name="middle")
        return [*seen, await ctx.step(steps.echo, "two")]

    await record(dsn, two_steps)
    async with kagzi.connect(dsn, migrate=False) as client:
        first = min(await numbers(dsn))
        for number in [*await numbers(dsn), 0]:
            Deployed.code = patched
            assert (await client.check()).is_success
            Deployed.code = unpatched
            report = await client.check()
            assert report.is_success == (number <= first), (number, report)
            await forget_behind(dsn, number - 1)


async def test_a_patch_at_the_end_or_one_whose_call_is_gone_breaks_no_run(dsn: str) -> None:
    async def patched(ctx: Context) -> Any:
        done = await one_step(ctx)
        if ctx.patched("end"):
            await ctx.step(steps.echo, "new", name="end")
        return done

    async def patched_for_good(ctx: Context) -> Any:
        done = await one_step(ctx)
        await ctx.step(steps.echo, "new", name="end")
        return done

    old = await record(dsn, one_step)
    Deployed.code = patched
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(1, 1, 0, 0, []), "it had passed by its end"
    await record(dsn, patched)
    Deployed.code = patched_for_good
    async with kagzi.connect(dsn, migrate=False) as client:
        found = await only_broken(client)
        assert found.run_id == old.run_id


async def test_runs_that_sleep_for_weeks_are_checked_at_once(dsn: str) -> None:
    Deployed.code = parks
    async with started(dsn, processes=0) as engine:
        await until_status(await engine.start(changing), "sleeping")
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check(status="sleeping") == CheckReport(1, 0, 1, 0, [])
        Deployed.code = pauses
        assert (await only_broken(client)).step_id == "sleep"


async def test_a_failed_run_must_fail_the_same_way_or_go_on(dsn: str) -> None:
    async def fails(ctx: Context) -> Any:
        await ctx.step(steps.echo, "one")
        await ctx.step(refuse, "refused")

    async def fails_itself(ctx: Context) -> Any:
        await ctx.step(steps.echo, "one")
        await handled(ctx)
        raise ValueError("another")

    async def handled(ctx: Context) -> Any:
        try:
            await ctx.step(refuse, "refused")
        except StepFailed:
            return await ctx.step(steps.echo, "instead")

    await record(dsn, fails)
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(1, 1, 0, 0, [])
        Deployed.code = lambda ctx: handled_after(ctx)

        async def handled_after(ctx: Context) -> Any:
            await ctx.step(steps.echo, "one")
            return await handled(ctx)

        assert await client.check() == CheckReport(1, 0, 1, 0, [])
        Deployed.code = raises
        assert (await only_broken(client)).problem is CheckProblem.EXCEPTION


async def test_a_run_that_failed_for_changed_code_breaks_until_it_is_mended(dsn: str) -> None:
    await record(dsn, two_steps)
    await forget_behind(dsn, 10**6)
    Deployed.code = other_input
    async with started(dsn, processes=0) as engine:
        (summary,) = await engine.client.runs()
        error = await engine.outcome(await engine.client.get(summary.run_id))
        assert isinstance(error, RunFailed)
        assert error.step_id == "echo#2"
        assert "ctx.patched()" in str(error)
        assert (await only_broken(engine.client)).problem is CheckProblem.NON_DETERMINISM
        Deployed.code = two_steps
        assert (await engine.client.check()).is_success


async def test_branches_that_were_cut_off_are_no_cause_for_alarm(
    dsn: str, witness: Witness
) -> None:
    async def first_failure(ctx: Context) -> Any:
        async def long_branch() -> None:
            for n in range(5):
                await ctx.step(steps.echo, n)
                await asyncio.sleep(0)
            await ctx.step(open_gate, witness.folder, "far enough")
            await ctx.step(wait_for_ever)

        async def failing_branch() -> None:
            await ctx.step(refuse_behind, witness.folder, "far enough")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(failing_branch())  # on replay the first to go on, and to fail
                group.create_task(long_branch())
        except* StepFailed:
            pass
        return "failed"

    await record(dsn, first_failure)
    async with kagzi.connect(dsn, migrate=False) as client:
        assert await client.check() == CheckReport(1, 1, 0, 0, [])


# --- code that is not here ------------------------------------------------------------------


async def test_runs_without_code_break_unless_they_have_ended(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(dsn, one_step)
    async with kagzi.connect(dsn, migrate=False) as client:
        await execute(dsn, "UPDATE kagzi.workflow_runs SET version = '9'")
        assert await client.check() == CheckReport(1, 0, 0, 1, [])
        await forget_behind(dsn, 10**6)
        found = await only_broken(client)
        assert found.problem is CheckProblem.UNKNOWN_VERSION
        assert "version '9' is not registered here, but 1" in found.message
        monkeypatch.delitem(registry._workflows, changing.name)
        assert (await only_broken(client)).problem is CheckProblem.UNKNOWN_WORKFLOW


async def test_nothing_is_loaded_of_runs_without_code(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be another team's, and large."""
    await record(dsn, one_step)

    async def load(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpoints were loaded")

    monkeypatch.setattr(checks, "load_checkpoints", load)
    async with kagzi.connect(dsn, migrate=False) as client:
        with pytest.raises(AssertionError, match="were loaded"):
            await client.check()  # the control
        await execute(dsn, "UPDATE kagzi.workflow_runs SET version = '9'")
        assert (await client.check()).without_code == 1


# --- many -----------------------------------------------------------------------------------


async def test_every_run_is_checked_with_progress_and_up_to_a_limit(dsn: str) -> None:
    await record(dsn, two_steps)
    await execute(
        dsn,
        "INSERT INTO kagzi.workflow_runs (id, external_id, workflow, version, status, epoch,"
        " input, output, completed_at) SELECT gen_random_uuid(), n::text, workflow, version,"
        " status, epoch, input, output, completed_at"
        " FROM kagzi.workflow_runs, generate_series(1, 299) n",
    )
    columns = (
        "function, status, output, input, input_hash, attempts, started_at, completed_at,"
        " call_number, completed_number, worker_id, process_id"
    )
    await execute(
        dsn,
        f"INSERT INTO kagzi.step_runs (run_id, step_id, {columns}) SELECT r.id, s.step_id, "  # noqa: S608
        f"s.{columns.replace(', ', ', s.')} FROM kagzi.step_runs s, kagzi.workflow_runs r"
        " WHERE r.id <> s.run_id",
    )
    told: list[tuple[int, int]] = []
    async with kagzi.connect(dsn, migrate=False) as client:
        report = await client.check(progress=lambda *counts: told.append(counts))
        assert report == CheckReport(300, 300, 0, 0, [])
        assert told == [(checked, 300) for checked in range(25, 301, 25)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kagzi.store.checks.BATCH_BYTES", 5_000)  # of 600 each
            told.clear()
            assert (await client.check(progress=lambda *counts: told.append(counts))).same == 300
            assert told[0][0] == 8, "large runs come in smaller batches"
        assert (await client.check(limit=40)).checked == 40
        assert (await client.check(workflow="changing", status=["completed"])).checked == 300
        assert (await client.check(status="failed")).checked == 0
        assert (await client.check(workflow=all_kinds)).checked == 0
        Deployed.code = one_step
        assert len((await client.check()).broken) == 300


async def test_bad_options_are_refused(dsn: str) -> None:
    async with kagzi.connect(dsn, migrate=False) as client:
        with pytest.raises(InvalidInput, match="status 'done' is none of pending"):
            await client.check(status=["done"])
        with pytest.raises(InvalidInput, match="limit must be a whole number"):
            await client.check(limit=0)


async def test_a_check_beside_a_worker_leaves_its_runs_alone(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(gated, witness.folder)
    await until(lambda: "before" in witness.entries)
    assert (await engine.client.check(workflow=gated)).goes_on == 1
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "g"
    assert witness.entries == ["before"]


@kagzi.workflow
async def gated(ctx: Context, folder: str) -> str:
    await ctx.step(steps.note, folder, "before")
    return await ctx.step(steps.text_behind, folder, "go", 1)


# --- the command ----------------------------------------------------------------------------


async def test_the_command_ends_with_1_if_a_run_would_break(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))

    async def invoke(*arguments: str) -> Any:
        runner, command = CliRunner(), ["check", "tests.engine.test_check", *arguments]
        return await asyncio.to_thread(runner.invoke, main, command, prog_name="kagzi")

    handle = await record(dsn, two_steps, id="some run")
    fine = await invoke()
    assert fine.exit_code == 0, fine.output
    assert "1 runs checked: 1 end the same way, 0 go on, 0 would break" in fine.output
    Deployed.code = one_step
    broken = await invoke()
    assert broken.exit_code == 1
    assert "some run" in broken.output
    assert "echo#2" in broken.output
    data = json.loads((await invoke("--json")).stdout)
    assert data["checked"] == 1
    assert data["broken"][0]["run_id"] == str(handle.run_id)
    assert data["broken"][0]["problem"] == "unused_step"
    assert data["broken"][0]["step_id"] == "echo#2"
    assert (await invoke("--status", "running,sleeping")).exit_code == 0
    assert (await invoke("--status", "done")).exit_code == 2
    assert (await invoke("--workflow", "changing", "--limit", "5")).exit_code == 1
