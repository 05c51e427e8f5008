"""Runs, claims, releases, requests, events and rescues in any order, against a model of them."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from kagzi.errors import LeaseLost, RunEnded
from kagzi.ids import uuid7
from kagzi.store.connections import Connector
from kagzi.store.fenced import FencedConnection
from kagzi.store.operations import change_run, send_event, tell_ends
from kagzi.store.rows import Batch, RunRow
from kagzi.store.store import Store
from tests.store.samples import NOW

NAMES = [("w", "1")]
ENDED = ("completed", "failed", "cancelled")
FAR = NOW + timedelta(days=365_000)


@dataclass
class Run:
    """What is expected of one."""

    run_id: UUID
    priority: int
    due: int  # its place among the due runs
    status: str = "pending"
    owner: UUID | None = None
    epoch: int = 0
    request: str | None = None
    crashes: int = 0
    news: int = 0

    def let_go(self, status: str, known: int, now: int) -> None:
        """By its worker, which knew of so much news."""
        if status in ("completed", "failed"):
            self.status = status
        elif self.request == "cancel":
            self.status = "cancelled"
        elif self.request == "pause":
            self.status = "paused"
        elif status == "sleeping" and self.news > known:
            self.status, self.due = "pending", now
        else:
            self.status = status
        self.owner, self.request, self.crashes = None, None, 0


class StoreAgainstItsModel(RuleBasedStateMachine):
    """One database; each operation is done to it and to the model."""

    dsn = ""
    runs = Bundle("runs")
    workers = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model: dict[UUID, Run] = {}
        self.alive: dict[UUID, FencedConnection] = {}
        self.gone: dict[UUID, FencedConnection] = {}
        self.moments = itertools.count(1)

    def do(self, action: Any) -> Any:
        return self.runner.run(action)

    @initialize()
    def open(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                "TRUNCATE kagzi.workflow_runs, kagzi.workers, kagzi.worker_leases, kagzi.run_events"
            )
        self.store = Store(Connector(self.dsn))
        self.do(self.store.open())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for connection in (*self.alive.values(), *self.gone.values()):
                self.do(connection.close())
            self.do(self.store.close())
        self.runner.close()

    # --- workers ------------------------------------------------------------------------------

    @rule(target=workers)
    def worker_comes(self) -> UUID:
        worker_id = uuid7()
        self.do(
            self.store.register_worker(worker_id, "host", "boot", 1, "then", {}, lease_s=3600.0)
        )
        self.alive[worker_id] = FencedConnection(Connector(self.dsn), worker_id)
        return worker_id

    @rule(worker=workers)
    def worker_is_rescued_from(self, worker: UUID) -> None:
        held = [run for run in self.model.values() if run.owner == worker]
        freed = self.do(self.store.rescue(worker, "gone", forced=True))
        assert freed == len(held)
        for run in held:
            status = {"cancel": "cancelled", "pause": "paused", None: "pending"}[run.request]
            run.status, run.owner, run.request = status, None, None
            run.due = next(self.moments)
        if worker in self.alive:
            self.gone[worker] = self.alive.pop(worker)

    # --- runs ---------------------------------------------------------------------------------

    @rule(target=runs, priority=st.integers(0, 2))
    def run_starts(self, priority: int) -> UUID:
        run_id = uuid7()
        self.do(self.store.insert_run(run_id, str(run_id), "w", "1", priority, b"[]"))
        self.model[run_id] = Run(run_id, priority, next(self.moments))
        return run_id

    @rule(target=runs)
    def several_start(self) -> Any:
        return multiple(*(self.run_starts(0) for _ in range(3)))

    @rule(worker=workers, most=st.integers(1, 3))
    def worker_claims(self, worker: UUID, most: int) -> None:
        claimed = self.do(self.store.claim_runs(worker, NAMES, most))
        waiting = sorted(
            (run for run in self.model.values() if run.status == "pending"),
            key=lambda run: (-run.priority, run.due),
        )
        innocent = [run for run in waiting if run.crashes < 2][:most]
        suspects = [run for run in waiting if run.crashes >= 2][:1]
        chosen = sorted([*innocent, *suspects], key=lambda run: (-run.priority, run.due))[:most]
        if worker not in self.alive:
            chosen = []
        assert {run.run_id for run in claimed} == {run.run_id for run in chosen}
        for run in chosen:
            run.status, run.owner = "running", worker
            run.epoch, run.crashes = run.epoch + 1, run.crashes + 1
        for one in claimed:
            assert one.epoch == self.model[one.run_id].epoch

    @rule(
        worker=workers,
        run_id=runs,
        status=st.sampled_from(["completed", "failed", "sleeping", "pending"]),
        knows=st.booleans(),
        late=st.booleans(),
    )
    def worker_lets_go(
        self, worker: UUID, run_id: UUID, status: str, knows: bool, late: bool
    ) -> None:
        """Also of a run that is not its own, of an earlier epoch, or when its lease has ended."""
        run = self.model[run_id]
        known = run.news if knows else 0
        row = RunRow(run_id, run.epoch - late, status, news=known)
        if status == "completed":
            row.output = b"1"
        elif status == "failed":
            row.error = b'{"type":"builtins.ValueError","message":"no"}'
        elif status == "sleeping":
            row.wake_at = FAR
        batch = Batch()
        batch.runs = [row]
        try:
            self.do((self.alive.get(worker) or self.gone[worker]).write(batch))
        except LeaseLost:
            assert worker in self.gone
            return
        assert worker in self.alive
        if run.owner == worker and not late:
            run.let_go(status, known, next(self.moments))

    # --- from outside -------------------------------------------------------------------------

    @rule(run_id=runs, change=st.sampled_from(["cancel", "pause", "resume"]))
    def somebody_asks(self, run_id: UUID, change: Any) -> None:
        run = self.model[run_id]
        told = self.do(change_run(self.store, run_id, change))
        if run.status not in ENDED:
            self._ask(run, change)
        assert told == run.status

    def _ask(self, run: Run, change: str) -> None:
        held = run.status == "running"
        if change == "cancel":
            if held:
                run.request = "cancel"
            else:
                run.status = "cancelled"
            run.news += 1
        elif change == "pause":
            if held:
                run.request = run.request or "pause"
            else:
                run.status = "paused"
            run.news += 1
        elif run.status == "paused" or run.request == "pause":
            if not held:
                run.status, run.due = "pending", next(self.moments)
            run.request = None
            run.news += 1

    @rule(run_id=runs)
    def somebody_sends(self, run_id: UUID) -> None:
        run = self.model[run_id]
        try:
            self.do(send_event(self.store, run_id, "topic", b"1", None))
        except RunEnded:
            assert run.status in ENDED
            return
        assert run.status not in ENDED
        run.news += 1
        if run.status == "sleeping":
            run.status, run.due = "pending", next(self.moments)

    @rule()
    def ends_are_told(self) -> None:
        self.do(tell_ends(self.store))

    # --- always -------------------------------------------------------------------------------

    @invariant()
    def rows_are_as_the_model_has_them(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            found = connection.execute(
                "SELECT id, CASE WHEN status = 'sleeping' AND wake_at <= clock_timestamp()"
                " THEN 'pending' ELSE status END, worker_id, epoch, request"
                " FROM kagzi.workflow_runs"
            ).fetchall()
        assert {row[0]: tuple(row[1:]) for row in found} == {
            run.run_id: (run.status, run.owner, run.epoch, run.request)
            for run in self.model.values()
        }


@pytest.mark.timeout(120)
def test_store_does_what_its_model_does(dsn: str) -> None:
    machine = type("OnThisDatabase", (StoreAgainstItsModel,), {"dsn": dsn})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
