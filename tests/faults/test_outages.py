"""The server's trouble pauses a worker and fails nothing; a step's trouble is its own."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import kagzi
from kagzi import Context, ErrorStrategy
from kagzi.engine import parking
from kagzi.engine.parking import Parking
from kagzi.errors import LeaseLost, StoreUnavailable
from tests.engine.witness import Witness
from tests.faults import programs
from tests.fix_engine import started, until
from tests.fix_faults import rows
from tests.fix_proxy import Link, Message, Proxy

# --- the server's trouble -------------------------------------------------------------------


async def test_server_without_a_free_connection_pauses_the_worker(
    proxy: Proxy, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(proxy.dsn, processes=1, lease_s=30.0, heartbeat_s=0.1) as engine:
        handle = await engine.start(programs.behind_gate, witness.folder, 8)
        await until(lambda: len(witness.entries) >= 9, 20)
        proxy.refusal = ("53300", "sorry, too many clients already")
        await proxy.cut_all()
        witness.open("go")
        await until(lambda: said(caplog, "checkpoints wait", "no connection left"))
        await until(lambda: said(caplog, "heartbeat failed", "no connection left"))
        proxy.refusal = None
        assert len(await handle.result(timeout=30)) == 8
        assert engine.worker.lost is None
        assert (await handle.describe()).attempts == []
    assert witness.counts["before"] == witness.counts["after"] == 1


async def test_server_that_takes_no_writes_pauses_the_worker(
    proxy: Proxy, dsn: str, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = (await rows(dsn, "SELECT quote_ident(current_database())"))[0]
    options: dict[str, Any] = {"lease_s": 30.0, "heartbeat_s": 0.1}
    async with started(proxy.dsn, processes=0, **options) as engine:
        handle = await engine.start(programs.behind_gate, witness.folder, 8)
        await until(lambda: len(witness.entries) >= 9, 20)
        await rows(dsn, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await proxy.cut_all()
        witness.open("go")
        for who in ("checkpoints wait", "heartbeat failed", "claiming waits"):
            await until(lambda w=who: said(caplog, w, "takes no writes now"))
        assert len((await handle.describe()).steps) == 1
        writable = make_conninfo(dsn, options="-c default_transaction_read_only=off")
        await rows(writable, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await proxy.cut_all()
        assert len(await handle.result(timeout=30)) == 8
        assert engine.worker.lost is None
    assert witness.counts["after"] == 1


async def test_full_disk_pauses_the_worker(
    dsn: str, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    """In the small form of a batch and in the large one, and for runs that are to be claimed."""
    for table, event in (("step_runs", "INSERT"), ("workflow_runs", "UPDATE")):
        await rows(
            dsn,
            """
            CREATE OR REPLACE FUNCTION kagzi.fill_disk() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE EXCEPTION 'could not extend file: no space left on device'
                    USING ERRCODE = '53100';
            END $$;
            """
            f"CREATE TRIGGER full_disk BEFORE {event} ON kagzi.{table}"
            " EXECUTE FUNCTION kagzi.fill_disk()",
        )
    async with started(dsn, processes=1, poll_s=0.05) as engine:
        handle = await engine.start(programs.story, witness.folder)
        await until(lambda: said(caplog, "claiming waits", "disk is full"))
        await rows(dsn, "DROP TRIGGER full_disk ON kagzi.workflow_runs")
        await until(lambda: said(caplog, "checkpoints wait", "disk is full"))
        await rows(dsn, "DROP TRIGGER full_disk ON kagzi.step_runs")
        assert await handle.result(timeout=30) == programs.STORY
        assert engine.worker.lost is None
    assert witness.counts["first"] == 1


async def test_disk_that_is_full_in_the_midst_of_a_copy_pauses_the_worker(
    dsn: str, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    await rows(
        dsn,
        """
        CREATE SEQUENCE kagzi.tries;
        CREATE FUNCTION kagzi.fill_disk() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.step_id = 'g/69' AND nextval('kagzi.tries') <= 2 THEN
                RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER full_disk BEFORE INSERT ON kagzi.step_runs FOR EACH ROW
            EXECUTE FUNCTION kagzi.fill_disk()
        """,
    )
    async with started(dsn, processes=1) as engine:
        handle = await engine.start(programs.story, witness.folder)
        assert await handle.result(timeout=30) == programs.STORY
    assert said(caplog, "checkpoints wait", "disk is full")
    assert witness.counts["g/69"] == 1


def said(caplog: pytest.LogCaptureFixture, *parts: str) -> bool:
    """Whether one line holds all of these."""
    return any(
        all(part in record.getMessage() for part in parts)
        for record in caplog.records
        if record.name.startswith("kagzi")
    )


# --- the steps' own -------------------------------------------------------------------------

ERRORS = {
    "cut": lambda: psycopg.OperationalError("server closed the connection unexpectedly"),
    "full": lambda: psycopg.errors.DiskFull("could not extend file"),
    "many": lambda: psycopg.errors.TooManyConnections("sorry, too many clients already"),
    "read-only": lambda: psycopg.errors.ReadOnlySqlTransaction("cannot execute INSERT"),
    "unique": lambda: psycopg.errors.UniqueViolation("duplicate key value"),
    "ours": lambda: StoreUnavailable("no connection to a database of the user's own"),
    "lease": lambda: LeaseLost("of another system"),
}


@kagzi.step
async def raise_in_pool(which: str) -> None:
    raise ERRORS[which]()


@kagzi.step
def raise_in_thread(which: str) -> None:
    raise ERRORS[which]()


@kagzi.step(where="coordinator")
async def raise_in_coordinator(which: str) -> None:
    raise ERRORS[which]()


@kagzi.workflow
async def raising(ctx: Context, which: str) -> list[str]:
    """What each of three places gives, and then the same from the workflow itself."""
    calls = [step.bind(which) for step in (raise_in_pool, raise_in_thread, raise_in_coordinator)]
    found = await ctx.parallel_vec("g", calls, on_error=ErrorStrategy.COLLECT_ALL)
    types = {type(ERRORS[which]())}
    assert all(error.is_a(cls) for error in found.errors.values() for cls in types)
    assert len(found.errors) == 3
    raise ERRORS[which]()


async def test_database_errors_of_user_code_fail_what_raised_them_and_pause_nobody(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(dsn, processes=1, lease_s=30.0) as engine:
        for which, make in ERRORS.items():
            handle = await engine.start(raising, which)
            error = await engine.outcome(handle)
            assert isinstance(error, kagzi.RunFailed), which
            assert type(make()).__name__ in error.type, which
            statuses = {step.status for step in (await handle.describe()).steps}
            assert statuses == {"failed"}
        assert engine.worker.lost is None
    own_words = [str(record.msg) for record in caplog.records if record.name.startswith("kagzi")]
    assert not [words for words in own_words if "wait" in words]


# --- slow commits ---------------------------------------------------------------------------


@kagzi.workflow
async def some_of_each(ctx: Context, folder: str) -> list[object]:
    """A step, a group, a sleep and an event, one after the other."""
    first = await ctx.step(programs.note, folder, "single")
    group = await ctx.parallel_vec("g", [programs.note.bind(folder, "of the group")])
    await ctx.sleep(0.01)
    event = await ctx.wait_event("topic")
    return [first, group, event]


async def test_run_whose_results_wait_for_a_slow_commit_is_not_parked(
    proxy: Proxy, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would wait for ever for what is there already."""
    monkeypatch.setattr(parking, "QUIET_S", 0.002)
    monkeypatch.setattr(parking, "HEAR_S", 0.004)
    looks = 0
    look = Parking._look

    def count(self: Parking, number: int, patient: bool) -> None:
        nonlocal looks
        looks += 1
        look(self, number, patient)

    monkeypatch.setattr(Parking, "_look", count)

    async def slow(link: Link, message: Message) -> bool:
        """Each answer to a fenced connection waits until parking was thought of, three times."""
        if link.is_fenced and message.is_ready and engine.worker.runs:
            run = next(iter(engine.worker.runs.values()))
            before = looks

            def thought_of() -> bool:
                if run._parking._handle is None:
                    run.settle_down()
                return looks >= before + 3 or run.leaving

            await until(thought_of)
        return True

    async with started(proxy.dsn, processes=0, lease_s=60.0) as engine:
        proxy.hook = slow
        handle = await engine.start(some_of_each, witness.folder)
        await engine.client.send(handle, "topic", "news")
        assert await handle.result(timeout=60) == ["single", ["of the group"], "news"]
        assert looks > 4
