"""Versions of a workflow side by side: which one a new run gets, which one a worker drives."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
import pytest_asyncio
from click.testing import CliRunner

import kagzi
from kagzi import Context, UnknownWorkflow
from kagzi.cli import main
from kagzi.registry import registry
from tests.engine import steps
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@kagzi.workflow(name="greet", version="1")
async def greet_1(ctx: Context, name: str) -> str:
    return await ctx.step(steps.echo, f"good day, {name}")


@kagzi.workflow(name="greet", version="2")
async def greet_2(ctx: Context, name: str) -> str:
    return await ctx.step(steps.echo, f"hello {name}")


@pytest_asyncio.fixture(loop_scope="module")
async def no_default(engine: Engine) -> Any:
    """Puts things back: the module's tests share a database."""
    yield
    await engine.client.set_default_version("greet", None)


# --- which version a new run gets -----------------------------------------------------------


async def test_versions_run_side_by_side_each_by_its_own_code(engine: Engine) -> None:
    assert await engine.run(greet_1, "Ada") == "good day, Ada"
    assert await engine.run(greet_2, "Ada") == "hello Ada"
    assert await engine.run("greet", "Ada") == "hello Ada", "the one registered last"
    assert await engine.run("greet", "Ada", version="1") == "good day, Ada"
    assert await engine.run(greet_2, "Ada", version="1") == "good day, Ada"


@pytest.mark.usefixtures("no_default")
async def test_a_default_holds_for_new_runs_unless_they_name_a_version(engine: Engine) -> None:
    await engine.client.set_default_version("greet", "1")
    for workflow in ("greet", greet_1, greet_2):
        handle = await engine.start(workflow, "Bob")
        assert handle.version == "1"
        assert await handle.result(PATIENCE_S) == "good day, Bob"
    assert (await engine.start("greet", "Bob", version="2")).version == "2"
    await engine.client.set_default_version(greet_1, "2")
    assert (await engine.start("greet", "Bob")).version == "2"
    assert (await engine.start(greet_1, "Bob")).version == "2"
    await engine.client.set_default_version("greet", None)
    assert (await engine.start(greet_1, "Bob")).version == "1"


@pytest.mark.usefixtures("no_default")
async def test_each_of_many_starts_at_once_has_the_version_that_it_should(engine: Engine) -> None:
    await engine.client.set_default_version("greet", "1")
    starts = [
        call
        for n in range(10)
        for call in (
            engine.start("greet", "Di", id=f"default {n}"),
            engine.start(greet_2, "Di", id=f"function {n}"),
            engine.start(greet_1, "Di", id=f"named {n}", version="2"),
        )
    ]
    handles = await asyncio.gather(*starts)
    assert [handle.version for handle in handles] == ["1", "1", "2"] * 10
    many = await engine.client.start_many("greet", [("Ed",)] * 3)
    assert [handle.version for handle in many] == ["1"] * 3
    for handle in [*handles, *many]:
        words = "hello" if handle.version == "2" else "good day,"
        assert (await handle.result(PATIENCE_S)).startswith(words)


@pytest.mark.usefixtures("no_default")
async def test_a_default_is_seen_by_other_clients_at_once(engine: Engine) -> None:
    async with kagzi.connect(engine.dsn, migrate=False) as other:
        assert (await other.start("greet", "Cy")).version == "2"
        await engine.client.set_default_version("greet", "1")
        assert (await other.start("greet", "Cy")).version == "1"


@pytest.mark.usefixtures("no_default")
async def test_a_run_keeps_its_version_when_the_default_changes(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(gated_2, witness.folder, id="kept")
    await until(lambda: "2" in witness.entries)
    await engine.client.set_default_version("gated_flow", "1")
    again = await engine.start(gated_1, witness.folder, id="kept")
    assert (again.version, again.is_new) == ("2", False)
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "2"
    assert await engine.replay(handle) == "2"
    await engine.client.set_default_version("gated_flow", None)


@kagzi.workflow(name="gated_flow", version="1")
async def gated_1(ctx: Context, folder: str) -> str:
    return await ctx.step(steps.note, folder, "1")


@kagzi.workflow(name="gated_flow", version="2")
async def gated_2(ctx: Context, folder: str) -> str:
    seen = await ctx.step(steps.note, folder, "2")
    await ctx.step(steps.text_behind, folder, "go", 1)
    return seen


@pytest.mark.usefixtures("no_default")
async def test_many_who_set_a_default_at_once_leave_exactly_one(engine: Engine) -> None:
    choices = ["1", "2"] * 6
    await asyncio.gather(*(engine.client.set_default_version("greet", v) for v in choices))
    rows = await engine.rows(
        "SELECT version FROM kagzi.workflow_versions WHERE workflow = 'greet' AND is_default"
    )
    assert len(rows) == 1


@pytest.mark.usefixtures("no_default")
async def test_a_default_whose_code_is_not_here_is_an_error_that_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.client.set_default_version("greet", "1")
    known = dict(registry._workflows["greet"])
    monkeypatch.setitem(registry._workflows, "greet", {"2": known["2"]})
    before = await engine.count("workflow_runs")
    with pytest.raises(UnknownWorkflow, match=r"version '1', which is not registered here.*2"):
        await engine.start(greet_2, "Eve")
    assert await engine.count("workflow_runs") == before
    assert (await engine.start(greet_2, "Eve", version="2")).version == "2"


@pytest.mark.parametrize(
    ("workflow", "version", "says"),
    [
        ("greet", "3", "no version '3': registered here or in the database are 1, 2"),
        ("nobody", "1", "nothing is known of a workflow 'nobody'"),
    ],
)
async def test_a_default_that_does_not_exist_is_refused(
    engine: Engine, workflow: str, version: str, says: str
) -> None:
    with pytest.raises(UnknownWorkflow, match=says):
        await engine.client.set_default_version(workflow, version)
    assert await engine.rows("SELECT 1 FROM kagzi.workflow_versions WHERE is_default") == []


# --- what a worker leaves alone -------------------------------------------------------------


@pytest.mark.parametrize("queue", ["default", "narrow"])
async def test_a_worker_leaves_runs_of_unknown_names_and_versions_alone(
    dsn: str, queue: str
) -> None:
    async with started(dsn, processes=0) as engine:
        if queue == "narrow":
            await engine.client.set_queue(queue, concurrency=1)
        stranger = await engine.start(greet_1, "Ada", id="of another version", queue=queue)
        foreign = await engine.start(greet_1, "Ada", id="of another name", queue=queue)
        await until(lambda: not engine.worker.runs)
        await engine.outcome(stranger)
        await engine.outcome(foreign)
        await engine.rows(
            "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL,"
            " output = NULL, version = '9', epoch = 0 WHERE id = %(id)s",
            id=stranger.run_id,
        )
        await engine.rows(
            "UPDATE kagzi.workflow_runs SET status = 'pending', completed_at = NULL,"
            " output = NULL, workflow = 'elsewhere', epoch = 0 WHERE id = %(id)s",
            id=foreign.run_id,
        )
        # A run that is due after them is driven: the worker has looked past both.
        assert await engine.run(greet_2, "Bob", queue=queue) == "hello Bob"
        assert await engine.run(greet_2, "Cy", queue=queue) == "hello Cy"
        rows = await engine.rows(
            "SELECT status, epoch, worker_id, crash_count FROM kagzi.workflow_runs"
            " WHERE version = '9' OR workflow = 'elsewhere'"
        )
        assert rows == [("pending", 0, None, 0)] * 2
        assert engine.worker.lost is None


# --- what there is --------------------------------------------------------------------------


async def test_versions_are_listed_with_their_unfinished_runs(dsn: str, witness: Witness) -> None:
    async with started(dsn, processes=0) as engine:
        client = engine.client
        assert [(v.version, v.unfinished) for v in await client.versions("greet")] == [
            ("1", 0),
            ("2", 0),
        ]
        await engine.run(greet_1, "Ada")
        handle = await engine.start(gated_2, witness.folder)
        await until(lambda: "2" in witness.entries)
        await client.set_default_version("greet", "1")
        one, two = await client.versions(greet_1)
        assert (one.is_default, one.is_registered, one.unfinished, one.finished) == (
            *(True, True, 0, 1),
        )
        assert (two.is_default, two.finished, two.latest_start) == (False, 0, None)
        assert [v.unfinished for v in await client.versions("gated_flow")] == [0, 1]
        assert {"greet", "gated_flow"} <= {v.workflow for v in await client.versions()}
        witness.open("go")
        await handle.result(PATIENCE_S)


async def test_the_command_lists_versions_and_sets_the_default(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))

    async def invoke(*arguments: str) -> Any:
        runner, command = CliRunner(), ["versions", *arguments]
        return await asyncio.to_thread(runner.invoke, main, command, prog_name="kagzi")

    module = ("-m", "tests.engine.test_versions")
    shown = await invoke("greet", "--default", "1", *module)
    assert shown.exit_code == 0, shown.output
    assert "greet" in shown.output
    records = json.loads((await invoke("greet", "--json")).stdout)
    assert [(r["version"], r["is_default"]) for r in records] == [("1", True), ("2", False)]
    assert [r["is_registered"] for r in records] == [None, None], "no module was named"
    records = json.loads((await invoke("greet", "--no-default", "--json", *module)).stdout)
    assert [r["is_default"] for r in records] == [False, False]
    assert (await invoke("greet", "--default", "7", *module)).exit_code == 4
    assert (await invoke("--default", "1")).exit_code == 2
    assert (await invoke("greet", "--default", "1", "--no-default")).exit_code == 2
