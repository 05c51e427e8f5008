"""A step that misbehaves fails that attempt of its own, and nothing else notices."""

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

import kagzi
from kagzi import Context, ErrorStrategy, ParallelResult, StepFailed
from kagzi.pool import child, pool
from tests.engine import steps
from tests.engine.witness import Witness
from tests.faults import bodies
from tests.fix_engine import PATIENCE_S, Engine, started, until
from tests.fix_faults import orphans, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")

BY_LANE = {"async": bodies.die, "sync": bodies.die_sync, "cpu": bodies.die_cpu}
NEIGHBOURS = 8


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _whole_pool(engine: Engine) -> AsyncIterator[None]:
    """After each test: the worker lives, its pool has its size, and no process is left over."""
    yield
    await check_pool(engine)


async def check_pool(engine: Engine) -> None:
    workers_pool = engine.worker.pool
    assert workers_pool is not None
    assert engine.worker.lost is None
    await until(lambda: workers_pool._quarantine is None and len(workers_pool.process_ids) == 2)
    forkserver = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    expected = set(workers_pool.process_ids)
    await until(lambda: {p.pid for p in psutil.Process(forkserver).children()} == expected)
    mine = psutil.Process().children(recursive=True)
    assert [p for p in mine if p.status() == psutil.STATUS_ZOMBIE] == []
    places = [link.place for link in workers_pool._links]
    await until(lambda: all(place.held(lane) == 0 for place in places for lane in range(3)))
    assert await engine.run(one_of_each) == [3, 3]
    assert await orphans(engine.dsn) == []


@kagzi.workflow
async def one_of_each(ctx: Context) -> list[int]:
    return [await ctx.step(bodies.add, 1, 2), await ctx.step(bodies.add_sync, 1, 2)]


# --- processes that go down -----------------------------------------------------------------


@kagzi.workflow
async def culprit_among_neighbours(
    ctx: Context, folder: str, lane: str, how: str
) -> tuple[list[Any], dict[str, str]]:
    calls = [BY_LANE[lane].bind(folder, "culprit", how)]
    for number in range(NEIGHBOURS):
        step = bodies.neighbour if number % 2 else bodies.neighbour_sync
        calls.append(step.bind(folder, f"n{number}"))
    found = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return list(found.values), {str(index): e.type for index, e in found.errors.items()}


async def begun(witness: Witness, count: int = NEIGHBOURS) -> None:
    """Wait until the neighbours run."""
    await until(lambda: sum(entry.startswith("+") for entry in witness.entries) >= count)


def culprits(witness: Witness) -> list[int]:
    """Process ids of the culprit's executions."""
    return [int(e.split()[1]) for e in witness.entries if e.startswith("culprit ")]


async def check_neighbours(engine: Engine, handle: kagzi.RunHandle[Any]) -> None:
    """That only the culprit was charged an attempt."""
    details = await handle.describe()
    assert {attempt.step_id for attempt in details.attempts} == {"g/0"}
    assert [attempt.attempt for attempt in details.attempts] == [1]
    steps = {step.id: step for step in details.steps}
    assert steps.pop("g/0").status == "failed"
    assert {step.status for step in steps.values()} == {"completed"}
    assert {step.attempts for step in steps.values()} == {1}


@pytest.mark.parametrize("how", ["exit", "segfault", "kill", "abort"])
@pytest.mark.parametrize("lane", BY_LANE)
async def test_step_that_takes_its_process_down_fails_alone(
    engine: Engine, witness: Witness, lane: str, how: str
) -> None:
    handle = await engine.start(culprit_among_neighbours, witness.folder, lane, how)
    await begun(witness)
    deaths = engine.worker.pool.deaths
    witness.open("die")
    await until(lambda: engine.worker.pool.deaths > deaths)
    witness.open("neighbours")
    values, errors = await handle.result(timeout=PATIENCE_S)
    assert errors == {"0": "kagzi.errors.StepCrashed"}
    assert values == [None, *(f"n{number}" for number in range(NEIGHBOURS))]
    await check_neighbours(engine, handle)


@pytest.mark.parametrize("lane", BY_LANE)
async def test_process_that_is_killed_from_outside_costs_at_most_whoever_ran(
    engine: Engine, witness: Witness, lane: str
) -> None:
    """Steps that it ran run again; where one alone was running, it is taken for the culprit."""
    handle = await engine.start(culprit_among_neighbours, witness.folder, lane, "wait")
    await begun(witness)
    await until(lambda: culprits(witness))
    deaths = engine.worker.pool.deaths
    os.kill(culprits(witness)[0], signal.SIGKILL)
    await until(lambda: engine.worker.pool.deaths > deaths)
    witness.open("mended", "die", "neighbours")
    values, errors = await handle.result(timeout=PATIENCE_S)
    # Sync neighbours ran in its process too: nobody is known to be the one, all run once more.
    assert errors == {}
    assert values == ["culprit", *(f"n{number}" for number in range(NEIGHBOURS))]
    details = await handle.describe()
    assert len(details.attempts) <= 1
    assert sum(step.attempts - 1 for step in details.steps) == len(details.attempts)


@kagzi.workflow
async def single(ctx: Context, folder: str, lane: str, how: str) -> str:
    return await ctx.step(BY_LANE[lane], folder, "culprit", how)


@pytest.mark.parametrize("lane", BY_LANE)
async def test_step_that_alone_was_running_in_a_killed_process_has_crashed(
    engine: Engine, witness: Witness, lane: str
) -> None:
    handle = await engine.start(single, witness.folder, lane, "wait")
    await until(lambda: culprits(witness))
    os.kill(culprits(witness)[0], signal.SIGKILL)
    error = await engine.outcome(handle)
    assert isinstance(error, StepFailed)
    assert error.is_a(kagzi.StepCrashed)
    assert len(culprits(witness)) == 1


async def test_idle_process_that_is_killed_is_replaced(engine: Engine) -> None:
    for process_id in list(engine.worker.pool.process_ids):
        os.kill(process_id, signal.SIGKILL)
    assert await engine.run(one_of_each) == [3, 3]


@kagzi.workflow
async def dies_twice(ctx: Context, folder: str) -> list[int]:
    return list(
        await ctx.parallel(
            "g", bodies.die_twice.bind(folder, "a"), bodies.die_twice_sync.bind(folder, "s")
        )
    )


async def test_crashed_step_is_retried_and_its_attempts_are_recorded(
    engine: Engine, witness: Witness
) -> None:
    result, handle = await engine.drive(dies_twice, witness.folder)
    assert result == [3, 3]
    details = await handle.describe()
    assert {(a.step_id, a.attempt) for a in details.attempts} == {
        ("g/0", 1),
        ("g/0", 2),
        ("g/1", 1),
        ("g/1", 2),
    }
    assert {a.error.type for a in details.attempts} == {"kagzi.errors.StepCrashed"}
    assert {step.attempts for step in details.steps} == {3}


@kagzi.workflow
async def suspects_all(ctx: Context, folder: str, culprits: int) -> dict[str, str]:
    calls = [bodies.die_sync.bind(folder, f"culprit{number}", "exit") for number in range(culprits)]
    calls += [bodies.neighbour_sync.bind(folder, f"n{number}") for number in range(10)]
    found = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return {str(index): error.type for index, error in found.errors.items()}


@pytest.mark.parametrize("count", [1, 3])
async def test_culprits_among_busy_threads_are_found_by_running_each_suspect_alone(
    engine: Engine, witness: Witness, count: int
) -> None:
    handle = await engine.start(suspects_all, witness.folder, count)
    await begun(witness, 10)
    deaths = engine.worker.pool.deaths
    witness.open("die")
    await until(lambda: engine.worker.pool.deaths > deaths)
    witness.open("neighbours")
    assert await handle.result(timeout=PATIENCE_S) == {
        str(number): "kagzi.errors.StepCrashed" for number in range(count)
    }
    details = await handle.describe()
    assert {a.step_id for a in details.attempts} == {f"g/{number}" for number in range(count)}
    assert {step.attempts for step in details.steps} == {1}
    entries = [entry.split()[0] for entry in witness.entries]
    again = [entry for entry in set(entries) if entries.count(entry) > 1 and entry[0] == "+"]
    assert again, "some neighbours were suspects and ran again"


@kagzi.workflow
async def crashing_task(ctx: Context, folder: str) -> str:
    calls = [bodies.task_dies.bind(folder), bodies.neighbour.bind(folder, "n")]
    found: ParallelResult[Any] = await ctx.parallel_vec(
        "g", calls, on_error=ErrorStrategy.COLLECT_ALL
    )
    return found.errors[0].type + " " + found.values[1]


async def test_task_of_a_body_that_ends_the_loop_fails_its_own_step_alone(
    engine: Engine, witness: Witness
) -> None:
    witness.open("neighbours")
    assert await engine.run(crashing_task, witness.folder) in (
        "kagzi.errors.StepCrashed n",
        "builtins.SystemExit n",
    )


async def test_ends_and_starts_of_processes_are_looked_at_by_one_thread_at_a_time(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would read from one descriptor, and the second from whatever it had become by then."""
    inside = threading.Semaphore()
    met: list[str] = []

    def alone(method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if not inside.acquire(blocking=False):
                met.append(method.__name__)
                return method(*args, **options)
            try:
                time.sleep(0.003)
                return method(*args, **options)
            finally:
                inside.release()

        return watched

    for name in ("poll", "_launch", "close"):
        monkeypatch.setattr(Popen, name, alone(getattr(Popen, name)))
    async with started(dsn, processes=4) as engine:
        workers_pool = engine.worker.pool
        assert workers_pool is not None
        for _ in range(5):
            deaths = workers_pool.deaths
            for process_id in workers_pool.process_ids:
                os.kill(process_id, signal.SIGKILL)
            await until(lambda: workers_pool.deaths == deaths + 4)  # noqa: B023
            await until(lambda: sum(link.joined for link in workers_pool._links) == 4)
        assert met == []
        assert not set(multiprocessing.active_children()) & workers_pool._unreaped


@kagzi.workflow
async def outer_steps(ctx: Context, folder: str) -> list[list[str]]:
    return await ctx.parallel_vec(
        "g", [bodies.outer.bind(folder, f"o{number}") for number in range(4)]
    )


async def test_outer_steps_whose_processes_die_join_their_inner_steps_again(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(outer_steps, witness.folder)
    await begun(witness, 12)
    deaths = engine.worker.pool.deaths
    for process_id in list(engine.worker.pool.process_ids):
        os.kill(process_id, signal.SIGKILL)
    await until(lambda: engine.worker.pool.deaths >= deaths + 2)
    witness.open("neighbours")
    expected = [[f"o{number}.{inner}" for inner in range(2)] for number in range(4)]
    assert await handle.result(timeout=PATIENCE_S) == expected
    assert len((await handle.describe()).attempts) <= 2


@kagzi.workflow
async def one_outer_at_a_time(ctx: Context, folder: str) -> list[Any]:
    """Among others, so that none is known to have taken its process down."""
    calls: list[Any] = [bodies.outer_one_at_a_time.bind(folder, name, name) for name in ("a", "b")]
    calls += [steps.gated.bind(folder, f"n{number}", "b") for number in range(6)]
    return (await ctx.parallel_vec("g", calls))[:2]


async def test_outer_step_whose_process_dies_as_it_waits_for_its_permit_has_its_inner_results(
    engine: Engine, witness: Witness
) -> None:
    """Its inner steps are committed, and the other one has the permit that it needs to go on."""
    handle = await engine.start(one_outer_at_a_time, witness.folder)
    witness.open("a")
    await begun(witness, 10)  # with the inner steps of the first
    witness.open("neighbours")
    await until(lambda: engine.worker.executor._resumed)
    deaths = engine.worker.pool.deaths
    for process_id in list(engine.worker.pool.process_ids):
        os.kill(process_id, signal.SIGKILL)
    await until(lambda: engine.worker.pool.deaths >= deaths + 2)
    witness.open("b")
    assert await handle.result(timeout=PATIENCE_S) == [["a.0", "a.1"], ["b.0", "b.1"]]
    ran = Counter(entry.split()[0] for entry in witness.entries)
    assert (ran["+a.0"], ran["+a.1"]) == (1, 1), "what is committed does not run again"


@kagzi.workflow
async def loser_that_takes_its_time(ctx: Context, folder: str) -> int:
    winner = functools.partial(steps.gated.__wrapped__, folder, "winner", "win")
    won = await ctx.race("r", [bodies.slow_to_leave_inner.bind(folder, "loser"), winner])
    if not Witness(folder).is_open("after"):
        await ctx.step(steps.gated.__wrapped__, folder, "after", "after")
    return won.index


async def test_inner_work_of_a_loser_ends_with_the_process_of_both(
    dsn: str, witness: Witness
) -> None:
    def noted(start: str) -> list[str]:
        return [entry for entry in witness.entries if entry.startswith(start)]

    async with started(dsn, processes=1) as engine:
        handle = await engine.start(loser_that_takes_its_time, witness.folder)
        await until(lambda: noted("+inner") and noted("+winner"))
        witness.open("win")
        await until(lambda: noted("loser") and noted("+after"))
        assert engine.worker.answers._inner
        os.kill(int(noted("loser")[0].split()[1]), signal.SIGKILL)
        await until(lambda: not engine.worker.answers._inner)
        await engine.run(one_of_each)  # so the pool is whole again
        witness.open("after")
        assert await handle.result(timeout=PATIENCE_S) == 1
    assert len(noted("+inner")) == 1, "nobody waits for it: it does not run again"


async def test_inner_work_of_a_loser_is_not_said_to_be_unawaited(
    engine: Engine, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    witness.open("after")
    handle = await engine.start(loser_that_takes_its_time, witness.folder)
    await until(lambda: any(entry.startswith("+inner") for entry in witness.entries))
    witness.open("win")
    assert await handle.result(timeout=PATIENCE_S) == 1
    witness.open("leave")
    assert "without awaiting" not in caplog.text


async def test_forkserver_that_is_killed_takes_nothing_down_for_good(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(outer_steps, witness.folder)
    await begun(witness, 12)
    deaths = engine.worker.pool.deaths
    forkserver = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(forkserver, signal.SIGKILL)
    await until(lambda: engine.worker.pool.deaths >= deaths + 2)
    witness.open("neighbours")
    assert len(await handle.result(timeout=PATIENCE_S)) == 4


# --- bodies that do not end -----------------------------------------------------------------


@kagzi.workflow
async def hangs_among_neighbours(ctx: Context, folder: str, name: str) -> tuple[list[Any], str]:
    calls = [getattr(bodies, name).bind(folder, "culprit")]
    calls += [bodies.neighbour.bind(folder, f"n{number}") for number in range(4)]
    calls += [bodies.neighbour_sync.bind(folder, f"n{number}") for number in range(4, 8)]
    found = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    return list(found.values)[1:], found.errors[0].type


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("hang", True),
        ("hang_cpu", True),
        ("hang_with_the_gil", True),
        ("hang_on_loop", True),
        ("swallow_cancel", True),
        ("late_answer", False),
        ("slow", False),
    ],
)
async def test_step_that_does_not_end_within_its_timeout_fails_alone(
    engine: Engine,
    witness: Witness,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    replaced: bool,
) -> None:
    """Its process is replaced where it cannot be stopped; neighbours run again, not charged."""
    monkeypatch.setattr(pool, "NEIGHBOUR_GRACE_S", 0.2)
    monkeypatch.setattr(child, "CANCEL_GRACE_S", 0.5)  # of the coordinator's own watch
    before = set(engine.worker.pool.process_ids)
    handle = await engine.start(hangs_among_neighbours, witness.folder, name)
    await begun(witness, 1)
    if replaced:
        await until(lambda: set(engine.worker.pool.process_ids) != before)
    witness.open("neighbours")
    values, error = await handle.result(timeout=PATIENCE_S)
    assert error == "kagzi.errors.StepTimeout"
    assert values == [f"n{number}" for number in range(8)]
    await check_neighbours(engine, handle)
    assert (set(engine.worker.pool.process_ids) != before) is replaced
    for process_id in culprits(witness):
        await until(lambda process_id=process_id: not psutil.pid_exists(process_id) or not replaced)


@kagzi.workflow
async def first_of_many(ctx: Context, folder: str, losers: int) -> str:
    calls = [bodies.linger.bind(folder, f"l{number}") for number in range(losers)]
    won = await ctx.race("r", [*calls, bodies.neighbour.bind(folder, "winner")])
    return won.value


async def test_threads_of_losers_count_as_busy_until_they_end_and_a_full_process_is_replaced(
    engine: Engine, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "NEIGHBOUR_GRACE_S", 0.2)
    workers_pool = engine.worker.pool
    before = set(workers_pool.process_ids)
    handle = await engine.start(first_of_many, witness.folder, 5)
    await begun(witness, 6)
    witness.open("neighbours")
    assert await handle.result(timeout=PATIENCE_S) == "winner"
    assert await engine.run(one_of_each) == [3, 3]
    await until(lambda: sum(link.place.room(1) for link in workers_pool._links) == 16 - 5)
    witness.open("linger")
    await until(lambda: sum(link.place.room(1) for link in workers_pool._links) == 16)
    assert set(workers_pool.process_ids) == before, "nobody had to be replaced"
    witness.shut("linger")
    witness.shut("neighbours")
    handle = await engine.start(first_of_many, witness.folder, 16)
    await begun(witness, 6 + 17)
    witness.open("neighbours")
    assert await handle.result(timeout=PATIENCE_S) == "winner"
    await until(lambda: not before & set(workers_pool.process_ids))
    witness.open("linger")


# --- results and errors ---------------------------------------------------------------------


@kagzi.workflow
async def gives_all(ctx: Context, folder: str) -> dict[str, str]:
    names = list(bodies.UNENCODABLE)
    calls = {f"a {name}": bodies.give.bind(folder, name) for name in names}
    calls |= {f"s {name}": bodies.give_sync.bind(folder, name) for name in names}
    found = {}
    for key, call in calls.items():
        try:
            found[key] = f"returned {await ctx.step(call)!r}"
        except StepFailed as error:
            found[key] = error.type
    return found


async def test_result_that_cannot_be_stored_fails_its_step_and_is_never_retried(
    engine: Engine, witness: Witness
) -> None:
    before = set(engine.worker.pool.process_ids)
    found, handle = await engine.drive(gives_all, witness.folder)
    assert set(found.values()) == {"kagzi.errors.CodecError"}, found
    assert set(witness.counts.values()) == {2}
    assert {a.attempt for a in (await handle.describe()).attempts} == {1}
    assert set(engine.worker.pool.process_ids) == before


RAISING = {
    "async": bodies.raises,
    "sync": bodies.raises_sync,
    "cpu": bodies.raises_cpu,
    "coordinator": bodies.raises_here,
    "coordinator's thread": bodies.raises_here_sync,
}


@kagzi.workflow
async def raises_all(ctx: Context, lane: str) -> dict[str, str]:
    names = list(bodies.RAISED)
    found = await ctx.parallel(
        "g",
        {name: RAISING[lane].bind(name) for name in names},
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    again = [await ctx.step(bodies.add, 1, 1), await ctx.step(bodies.add_sync, 1, 1)]
    assert again == [2, 2]
    return {names[index]: error.type for index, error in found.errors.items()}


@pytest.mark.parametrize("lane", RAISING)
async def test_whatever_a_body_raises_is_its_own_failure_and_nobody_elses(
    engine: Engine, lane: str
) -> None:
    before = set(engine.worker.pool.process_ids)
    found, handle = await engine.drive(raises_all, lane)
    assert set(found) == set(bodies.RAISED)
    for name in ("Needy", "Mute", "Deadly", "Sly", "Base"):
        assert found[name] == f"tests.faults.bodies.{name}"
    for name in ("ValueError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError"):
        assert found[name] == f"builtins.{name}"
    assert found["CancelledError"].endswith("CancelledError")
    assert found["long text"] == "builtins.ValueError"
    assert set(engine.worker.pool.process_ids) == before
    assert await engine.replay(handle) == found
    longest = max(len(step.error.message) for step in (await handle.describe()).steps if step.error)
    assert longest < 10_000


@kagzi.workflow
async def raises_one(ctx: Context, lane: str, name: str) -> str:
    try:
        return await ctx.step(RAISING[lane], name)
    except StepFailed as error:
        return error.type


@pytest.mark.parametrize("lane", ["async", "sync", "cpu"])
async def test_error_whose_text_takes_the_process_down_is_its_steps_crash(
    engine: Engine, lane: str
) -> None:
    assert await engine.run(raises_one, lane, "Killing") == "kagzi.errors.StepCrashed"


@kagzi.workflow
async def bad_predicates(ctx: Context) -> list[str]:
    found = await ctx.parallel_vec(
        "g",
        [
            bodies.raises_before_a_broken_predicate.bind("ValueError"),
            bodies.raises_before_a_deadly_predicate.bind("ValueError"),
            bodies.add.bind(1, 2),
        ],
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    return [found.errors[0].type, found.errors[1].type, str(found.values[2])]


async def test_retry_predicate_that_raises_does_not_hide_the_steps_own_error(
    engine: Engine,
) -> None:
    before = set(engine.worker.pool.process_ids)
    assert await engine.run(bad_predicates) == ["builtins.ValueError", "builtins.ValueError", "3"]
    assert set(engine.worker.pool.process_ids) == before


@kagzi.workflow
async def huge_among_small(ctx: Context, count: int) -> tuple[int, int]:
    calls = [bodies.give_letters.bind(count), *(bodies.give_letters.bind(1) for _ in range(50))]
    found = await ctx.parallel_vec("g", calls)
    return len(found[0]), sum(map(len, found[1:]))


async def test_result_of_64_mb_is_stored_like_any_other(engine: Engine) -> None:
    count = 64 << 20
    result, handle = await engine.drive(huge_among_small, count)
    assert result == (count, 50)
    sizes = {step.id: step.output_bytes for step in (await handle.describe()).steps}
    assert sizes["g/0"] == count + 2
    await rows(engine.dsn, "DELETE FROM kagzi.step_runs WHERE octet_length(output) > 1000000")


# --- rows that Postgres refuses -------------------------------------------------------------


@kagzi.workflow
async def poisoned(ctx: Context, size: int, letter: str) -> tuple[list[int], list[str]]:
    calls = [bodies.give_letters.bind(number) for number in range(size)]
    found = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    race = await ctx.race("r", [bodies.give_letters.bind(0)])
    return sorted(found.errors), [found.errors[1].message, race.value]


@pytest.mark.parametrize("size", [3, 400])
async def test_row_that_postgres_refuses_fails_its_own_step_and_the_groups_row_says_so(
    engine: Engine, size: int
) -> None:
    await rows(
        engine.dsn,
        "ALTER TABLE kagzi.step_runs ADD CONSTRAINT poison CHECK (output <> '\"x\"') NOT VALID",
    )
    try:
        (failed, (message, value)), handle = await engine.drive(poisoned, size, "x")
    finally:
        await rows(engine.dsn, "ALTER TABLE kagzi.step_runs DROP CONSTRAINT poison")
    assert failed == [1]
    assert "Postgres refused" in message
    assert value == ""
    details = await handle.describe()
    group = next(group for group in details.groups if group.path == "g")
    assert (group.succeeded, group.failed) == (size - 1, 1)
    assert await engine.replay(handle) == ([1], [message, ""])


# --- modules that the pool cannot import ----------------------------------------------------


def module_that_is_only_here(name: str) -> types.ModuleType:
    """A module of this process that no file holds, with a step `work`."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    source = "import kagzi\n@kagzi.step(retry=kagzi.Retry.fixed(3, 0.0))\ndef work(): return 1\n"
    exec(source, module.__dict__)
    return module


@kagzi.workflow
async def unimportable(ctx: Context, name: str) -> tuple[str, str, int]:
    step = sys.modules[name].work
    try:
        await ctx.step(step)
    except StepFailed as error:
        return error.type, error.message, error.attempts
    return "", "", 0


async def test_step_of_a_module_that_the_pool_cannot_import_fails_with_the_reason(
    engine: Engine,
) -> None:
    module_that_is_only_here("only_here")
    type_, message, attempts = await engine.run(unimportable, "only_here")
    assert type_ == "kagzi.errors.InvalidDefinition"
    assert "only_here" in message
    assert attempts == 1


IMPORTS = {
    "raises": "raise ValueError('at import')",
    "exits": "import sys; sys.exit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "dies": "import os; os._exit(3)",
}


@pytest.fixture
def broken_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """Modules that can be imported here, and break in a pool process."""
    for name, fault in IMPORTS.items():
        source = (
            "import multiprocessing, kagzi\n"
            "if multiprocessing.current_process().name != 'MainProcess':\n"
            f"    {fault}\n"
            "@kagzi.step(retry=kagzi.Retry.fixed(2, 0.0))\n"
            "def work(): return 1\n"
        )
        (tmp_path / f"broken_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in IMPORTS:
        sys.modules.pop(f"broken_{name}", None)


async def test_module_that_breaks_a_pool_process_at_import_fails_its_step_alone(
    dsn: str, broken_modules: None
) -> None:
    for name in IMPORTS:
        __import__(f"broken_{name}")
    async with started(dsn) as engine:
        found = {name: await engine.run(unimportable, f"broken_{name}") for name in IMPORTS}
        assert await engine.run(one_of_each) == [3, 3]
    assert {name: type_.rpartition(".")[2] for name, (type_, _, _) in found.items()} == {
        "raises": "ValueError",
        "exits": "SystemExit",
        "interrupts": "KeyboardInterrupt",
        "dies": "StepCrashed",
    }
    assert found["dies"][2] == 2


# --- the pool's own life --------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What a reference cycle keeps stays, and is seen."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_pool_that_is_closed_while_it_replaces_a_process_leaves_none_behind(
    dsn: str, no_collector: None
) -> None:
    forkserver = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    before = {process.pid for process in psutil.Process(forkserver).children()}
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for turns in range(4):
        async with started(dsn) as engine:
            deaths = engine.worker.pool.deaths
            for process_id in list(engine.worker.pool.process_ids):
                os.kill(process_id, signal.SIGKILL)
            await until(lambda: engine.worker.pool.deaths > deaths)  # noqa: B023
            for _ in range(turns):
                await asyncio.sleep(0)
    await until(lambda: {p.pid for p in psutil.Process(forkserver).children()} == before)
    if sys.platform == "linux":
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2)


@kagzi.workflow
async def brings_down(ctx: Context, folder: str) -> str:
    Witness(folder).note("driven")
    return await ctx.step(bodies.neighbour, folder, "done")


async def test_run_whose_workers_end_abruptly_again_and_again_is_failed_until_it_is_retried(
    engine: Engine, witness: Witness
) -> None:
    witness.open("neighbours")
    await engine.settled()
    most = engine.worker.max_crashes
    for crashes, survives in ((most - 1, True), (most, False)):
        async with held_back(engine):
            handle = await engine.start(brings_down, witness.folder)
            query = "UPDATE kagzi.workflow_runs SET crash_count = %(crashes)s WHERE id = %(id)s"
            await engine.rows(query, crashes=crashes, id=handle.run_id)
        outcome = await engine.outcome(handle)
        if survives:
            assert outcome == "done"
            query = "SELECT crash_count FROM kagzi.workflow_runs WHERE id = %(id)s"
            assert await engine.rows(query, id=handle.run_id) == [(0,)]
    assert isinstance(outcome, kagzi.RunFailed)
    assert isinstance(outcome, kagzi.RunCrashed)
    assert f"{most} workers" in str(outcome)
    assert witness.entries.count("driven") == 1
    assert await (await engine.client.retry(handle)).result(timeout=PATIENCE_S) == "done"


@asynccontextmanager
async def held_back(engine: Engine) -> AsyncIterator[None]:
    """No run is claimed meanwhile."""
    concurrency, engine.worker.concurrency = engine.worker.concurrency, 0
    try:
        yield
    finally:
        engine.worker.concurrency = concurrency
        engine.worker.wake()
