"""Steps: typed results live and on replay, arguments, options, time, chance, and `current_step`."""

from __future__ import annotations

import dataclasses
import functools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

import kagzi
from kagzi import CodecError, Context, OutsideRun, Retry, StepFailed, StepTimeout
from tests.engine import steps
from tests.engine.typed_steps import CASES, CLOSURES, IN_POOL, SYNC_IN_POOL
from tests.engine.witness import Witness
from tests.fix_engine import PATIENCE_S, Engine, until
from tests.unit.codec_values import shape

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- typed results --------------------------------------------------------------------------


@kagzi.workflow
async def all_types(ctx: Context) -> list[str]:
    """Names of the cases in which a result differs from what its body returned."""
    wrong = []
    for name, (_, value) in CASES.items():
        wanted = shape(value)
        results = {
            "pool": await ctx.step(IN_POOL[name], value),
            "thread": await ctx.step(SYNC_IN_POOL[name], value),
            "closure": await ctx.step(CLOSURES[name], value),
        }
        results["group"], results["local group"] = await ctx.parallel(
            "group", IN_POOL[name].bind(value), SYNC_IN_POOL[name].bind(value)
        )
        results["map"] = (await ctx.map("map", IN_POOL[name], [value, value]))[1]
        results["race"] = (await ctx.race("race", [IN_POOL[name].bind(value)])).value
        async for one in ctx.as_completed("stream", [IN_POOL[name].bind(value)]):
            results["stream"] = one.value
        wrong += [f"{name}, {way}" for way, got in results.items() if shape(got) != wanted]
    return wrong


async def test_results_are_equal_in_value_and_type_to_what_the_body_returned(
    engine: Engine,
) -> None:
    result, handle = await engine.drive(all_types)
    assert result == []
    assert await engine.replay(handle) == []


@kagzi.workflow
async def sees_its_own_copy(ctx: Context) -> list[Any]:
    first = await ctx.step(steps.echo, [1, 2], id="list")
    first.append(3)
    second = await ctx.step(steps.echo, [1, 2], id="list")
    return [first, second]


async def test_what_a_workflow_does_to_a_result_does_not_reach_another_caller(
    engine: Engine,
) -> None:
    result, handle = await engine.drive(sees_its_own_copy)
    assert result == [[1, 2, 3], [1, 2]]
    assert await engine.replay(handle) == result


# A module that is read from the top: these refer to a class that comes later.


@kagzi.step
async def later_class(value: Later) -> Later:
    return value


@kagzi.workflow
async def with_later_class(ctx: Context, value: Later) -> Later:
    return await ctx.step(later_class, value)


@dataclasses.dataclass
class Later:
    at: datetime


async def test_annotations_may_name_classes_defined_further_down(engine: Engine) -> None:
    value = Later(datetime(2026, 1, 1, tzinfo=UTC))
    result, handle = await engine.drive(with_later_class, value)
    assert result == value
    assert await engine.replay(handle) == value


class Unencodable:
    pass


@kagzi.step(retry=Retry.fixed(5, 0.0))
async def returns_unencodable(folder: str) -> Any:
    Witness(folder).note("body")
    return {"deep": [Unencodable()]}


@kagzi.workflow
async def with_unencodable_result(ctx: Context, folder: str, where: str) -> Any:
    async def closure() -> Any:
        return await returns_unencodable(folder)

    if where == "closure":
        return await ctx.step(closure, retry=Retry.fixed(5, 0.0))
    return await ctx.step(returns_unencodable, folder)


@pytest.mark.parametrize("where", ["pool", "closure"])
async def test_a_result_that_cannot_be_stored_fails_its_step_at_once_and_names_the_place(
    engine: Engine, witness: Witness, where: str
) -> None:
    error = await engine.outcome(await engine.start(with_unencodable_result, witness.folder, where))
    assert isinstance(error, StepFailed)
    assert error.is_a(CodecError)
    assert "$.deep[0]" in str(error)
    assert witness.entries == ["body"], "another attempt would meet the same"


@kagzi.workflow
async def returns_nonsense(ctx: Context) -> list[int]:
    return [1, Unencodable()]  # type: ignore[list-item]


async def test_a_workflow_result_that_cannot_be_stored_fails_the_run(engine: Engine) -> None:
    error = await engine.outcome(await engine.start(returns_nonsense))
    assert isinstance(error, CodecError)
    assert "$[1]" in str(error)


# --- durable before visible -----------------------------------------------------------------


async def _fails(ctx: Context, folder: str) -> None:
    try:
        await ctx.step(steps.fail, folder, "body")
    except StepFailed:
        return


async def _streams(ctx: Context, folder: str) -> None:
    async for _ in ctx.as_completed("s", [steps.note.bind(folder, "body")]):
        return


WAITS = {
    "step": lambda ctx, folder: ctx.step(steps.note, folder, "body"),
    "closure": lambda ctx, folder: ctx.step(lambda: Witness(folder).note("body")),
    "failure": _fails,
    "group": lambda ctx, folder: ctx.parallel("g", steps.note.bind(folder, "body")),
    "race": lambda ctx, folder: ctx.race("r", [steps.note.bind(folder, "body")]),
    "stream": _streams,
    "body": lambda ctx, folder: ctx.step(steps.noting_body, folder, "body"),
}


@kagzi.workflow
async def looks_at_once(ctx: Context, folder: str, what: str) -> None:
    await Witness(folder).pass_gate("locked")
    await WAITS[what](ctx, folder)
    Witness(folder).note("seen")


@pytest.mark.parametrize("what", WAITS)
async def test_a_result_is_visible_only_when_it_is_committed(
    engine: Engine, witness: Witness, what: str
) -> None:
    """While somebody holds the worker's fence, nothing of it commits, so nothing is seen."""
    handle = await engine.start(looks_at_once, witness.folder, what)
    await until(lambda: handle.run_id in engine.worker.runs)
    async with await psycopg.AsyncConnection.connect(engine.dsn) as holder:
        lock = "SELECT FROM kagzi.workers WHERE id = %s FOR UPDATE"
        await holder.execute(lock, [engine.worker.worker_id])
        witness.open("locked")
        await until(lambda: witness.entries)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

        async def commit_waits() -> bool:
            return (await engine.rows(waiting))[0][0] > 0

        await until(commit_waits)
        assert "seen" not in witness.entries
        assert await handle.progress() == (0, 0)
    await handle.result(PATIENCE_S)
    assert witness.entries[-1] == "seen"


# --- arguments and callables ----------------------------------------------------------------


@kagzi.step
async def many_parameters(a: int, /, b: int, *rest: int, c: int, d: int = 4, **more: int) -> str:
    return f"{a} {b} {rest} {c} {d} {sorted(more.items())}"


@kagzi.workflow
async def all_parameters(ctx: Context) -> list[str]:
    return [
        await ctx.step(many_parameters, 1, 2, c=3),
        await ctx.step(many_parameters, 1, 2, 5, 6, c=3, d=7, e=8),
        await ctx.step(many_parameters.bind(1, b=2, c=3, z=0)),
    ]


async def test_arguments_arrive_as_python_passes_them(engine: Engine) -> None:
    assert await engine.run(all_parameters) == [
        "1 2 () 3 4 []",
        "1 2 (5, 6) 3 7 [('e', 8)]",
        "1 2 () 3 4 [('z', 0)]",
    ]


def plain(a: int, b: int = 2) -> int:
    return a + b


class Adder:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, a: int) -> int:
        return a + self.by

    async def add(self, a: int) -> int:
        return a + self.by


@kagzi.workflow
async def all_callables(ctx: Context) -> list[Any]:
    base = 10

    async def closure(a: int) -> int:
        return a + base

    def sync_closure(a: int) -> int:
        return a + base

    async def with_context(ctx: Context, a: int) -> list[int]:
        return list(await ctx.parallel("two", plain, functools.partial(plain, a)))

    return [
        await ctx.step(closure, 1),
        await ctx.step(sync_closure, 2),
        await ctx.step(lambda a: a + base, 3),
        await ctx.step(plain, 4, b=1),
        await ctx.step(functools.partial(plain, 5)),
        await ctx.step(functools.partial(plain, b=0), 6),
        await ctx.step(Adder(7), 0),
        await ctx.step(Adder(8).add, 0),
        await ctx.step(steps.square, 3),
        await ctx.step(steps.cube, 3),
    ]


async def test_functions_of_every_kind_can_be_steps(engine: Engine) -> None:
    result, handle = await engine.drive(all_callables)
    assert result == [11, 12, 13, 5, 7, 6, 7, 8, 9, 27]
    assert await engine.replay(handle) == result


async def test_a_decorated_step_stays_callable_as_it_was() -> None:
    assert steps.square(4) == 16
    assert steps.square.__name__ == "square"


# --- where and what -------------------------------------------------------------------------


@kagzi.workflow
async def asks_every_body(ctx: Context) -> dict[str, tuple[str, str, int]]:
    async def closure() -> tuple[str, str, int]:
        return steps.where_am_i()

    def sync_closure() -> tuple[str, str, int]:
        return steps.where_am_i()

    with pytest.raises(OutsideRun):
        kagzi.current_step()
    calls = {
        "async": steps.info_async.bind(),
        "sync": steps.info_sync.bind(),
        "cpu": steps.info_cpu.bind(),
        "coordinator": steps.info_coordinator.bind(),
        "closure": closure,
        "sync closure": sync_closure,
    }
    found: dict[str, tuple[str, str, int]] = await ctx.parallel("all", calls)
    found["alone"] = await ctx.step(steps.info_async)
    with pytest.raises(OutsideRun):
        kagzi.current_step()
    return found


async def test_current_step_tells_every_kind_of_body_who_it_is(engine: Engine) -> None:
    result, handle = await engine.drive(asks_every_body)
    kinds = ["async", "sync", "cpu", "coordinator", "closure", "sync closure"]
    run_id = str(handle.run_id)
    expected = {kind: (run_id, f"all/{kind}", 1) for kind in kinds}
    assert result == {**expected, "alone": (run_id, "info_async", 1)}
    with pytest.raises(OutsideRun):
        kagzi.current_step()


@kagzi.step(retry=Retry.fixed(3, 0.0))
async def keys_of_attempts(folder: str) -> str:
    info = kagzi.current_step()
    Witness(folder).note(f"{info.attempt} {info.idempotency_key}")
    if info.attempt < 3:
        raise steps.Flaky
    return info.idempotency_key


@kagzi.workflow
async def two_keys(ctx: Context, folder: str) -> list[str]:
    return await ctx.parallel_vec("keys", [keys_of_attempts.bind(folder) for _ in range(2)])


async def test_the_idempotency_key_is_the_same_for_every_attempt_and_no_other_step(
    engine: Engine, witness: Witness
) -> None:
    first, second = await engine.run(two_keys, witness.folder)
    assert first != second
    for key in (first, second):
        assert {f"{attempt} {key}" for attempt in (1, 2, 3)} <= set(witness.entries)


@kagzi.workflow
async def processes_used(ctx: Context) -> list[int]:
    """Bodies that may block: short ones that do not would all be given to one process."""
    return await ctx.parallel_vec("pids", [steps.process_id_sync.bind() for _ in range(40)])


async def test_registered_steps_run_in_the_pool_and_in_all_of_it(engine: Engine) -> None:
    assert engine.worker.pool is not None
    used, handle = await engine.drive(processes_used)
    assert set(used) == set(engine.worker.pool.process_ids)
    assert {step.process_id for step in (await handle.describe()).steps} == set(used)


# --- time and chance ------------------------------------------------------------------------


@kagzi.workflow
async def asks_the_world(ctx: Context) -> tuple[datetime, float, UUID, list[float]]:
    return (
        await ctx.now(),
        await ctx.random(),
        await ctx.uuid4(),
        [await ctx.random() for _ in range(3)],
    )


async def test_now_random_and_uuid4_are_recorded(engine: Engine) -> None:
    before = datetime.now(UTC)
    result, handle = await engine.drive(asks_the_world)
    now, chance, unique, more = result
    assert before - timedelta(seconds=5) <= now <= datetime.now(UTC) + timedelta(seconds=5)
    assert now.utcoffset() == timedelta(0)
    assert 0 <= chance < 1
    assert unique.version == 4
    assert len({chance, *more}) == 4
    assert await engine.replay(handle) == result
    other = await engine.run(asks_the_world)
    assert other[2] != unique


# --- options of a step ----------------------------------------------------------------------


@kagzi.step(timeout=0.05)
async def overstays(folder: str) -> None:
    await Witness(folder).pass_gate("never")


@kagzi.workflow
async def with_timeout(ctx: Context, folder: str, where: str) -> None:
    if where == "pool":
        await ctx.step(overstays, folder)
    elif where == "call":
        await ctx.step(steps.gated, folder, "x", "never", timeout=0.05)
    else:
        await ctx.step(overstays.__wrapped__, folder, timeout=timedelta(milliseconds=50))


@pytest.mark.parametrize("where", ["pool", "call", "closure"])
async def test_a_step_that_overstays_its_timeout_fails(
    engine: Engine, witness: Witness, where: str
) -> None:
    error = await engine.outcome(await engine.start(with_timeout, witness.folder, where))
    assert isinstance(error, StepFailed)
    assert error.is_a(StepTimeout)
    assert error.is_a(TimeoutError)
    assert "0.05 s" in error.message


@kagzi.workflow
async def catches_failures(ctx: Context, folder: str) -> list[Any]:
    async def local() -> None:
        Witness(folder).note("local")
        raise steps.Fatal("deep down") from ValueError("the cause")

    found: list[Any] = []
    for function, args in ((steps.fail, ("pool",)), (steps.fail_sync, ("thread",))):
        try:
            await ctx.step(function, folder, *args)
        except StepFailed as error:
            found.append([error.step_id, error.type, error.message, error.attempts])
            found.append(error.is_a(steps.Flaky) and not error.is_a(ValueError))
            found.append(
                f"{args[0]} failed" in error.traceback and "raise Flaky" in error.traceback
            )
    try:
        await ctx.step(local)
    except StepFailed as error:
        found.append([error.step_id, error.message, error.is_a(steps.Flaky)])
        found.append("the cause" in error.traceback)
    return found


async def test_a_failure_says_the_same_live_and_on_replay(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(catches_failures, witness.folder)
    name = "tests.engine.steps.Flaky"
    assert result == [
        ["fail", name, "pool failed", 1],
        True,
        True,
        ["fail_sync", name, "thread failed", 1],
        True,
        True,
        ["local", "deep down", True],
        True,
    ]
    assert await engine.replay(handle) == result
    assert witness.entries == ["pool", "thread", "local"]


@kagzi.workflow
async def gives_a_coroutine(ctx: Context) -> None:
    await ctx.step(steps.add(1, 2))  # type: ignore[arg-type]


async def test_a_coroutine_is_refused_as_a_step_and_leaves_no_warning(engine: Engine) -> None:
    error = await engine.outcome(await engine.start(gives_a_coroutine))
    assert isinstance(error, kagzi.InvalidDefinition)
    assert "fetch.bind(url)" in str(error)


@kagzi.workflow
async def large_results(ctx: Context, folder: str) -> list[int]:
    sizes = [300_000, 10, 2_000_000, 300_001]
    texts = await ctx.map("texts", steps.text_of, sizes)
    alone = await ctx.step(steps.text_of, 3_000_000)
    return [len(text) for text in (*texts, alone)]


async def test_large_results_keep_their_place(engine: Engine, witness: Witness) -> None:
    result, handle = await engine.drive(large_results, witness.folder)
    assert result == [300_000, 10, 2_000_000, 300_001, 3_000_000]
    assert await engine.replay(handle) == result


@kagzi.workflow
async def waits_for_gate(ctx: Context, folder: str) -> str:
    return await ctx.step(steps.gated, folder, "body", "go")


async def test_a_result_that_is_not_there_in_time_is_a_timeout_and_the_run_goes_on(
    engine: Engine, witness: Witness
) -> None:
    handle = await engine.start(waits_for_gate, witness.folder)
    await until(lambda: witness.entries)
    with pytest.raises(TimeoutError):
        await handle.result(timeout=0.01)
    assert await handle.status() == "running"
    witness.open("go")
    assert await handle.result(PATIENCE_S) == "body"
