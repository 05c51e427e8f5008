"""Engines that are broken on purpose, each in one way that the oracle must notice.

Each is applied in the process that is to be broken: by other methods, or another text of a
statement. `plan` is a trial in which it shows.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from kagzi.administration import Administration
from kagzi.engine.group import Group
from kagzi.engine.work import Work
from kagzi.errors import LeaseLost
from kagzi.host import GroupRequest
from kagzi.model import GroupKind
from kagzi.scope import Scope
from kagzi.store.checkpoints import CheckpointWriter, ContentRefused
from kagzi.store.connections import is_outage
from kagzi.store.fenced import FencedConnection
from kagzi.store.queries import load_queries
from kagzi.store.store import Store
from kagzi.store.transactions import Transactions
from kagzi.worker.heartbeat import Heartbeat
from kagzi.worker.worker import Worker
from tests.faults.subjects import BLOCKED_S


@dataclass(frozen=True)
class Broken:
    """How to break it, and what problem shows in a trial with this plan."""

    apply: Callable[[], None]
    shows: str
    plan: dict[str, Any]


def _rewrite(name: str, old: str, new: str) -> None:
    """Change a statement of this process. It must have been as expected."""
    queries = load_queries("kagzi")
    assert re.search(old, queries[name]), f"{name} is not as it was: {old}"
    queries[name] = re.sub(old, new, queries[name])


FROZEN = {"program": "group", "point": "batch.before", "victim": "freeze", "runs": 1}


def no_fence() -> None:
    """Writes do not look at the worker's row."""
    for name in ("write_step", "write_run", "write_steps", "write_group", "write_rows"):
        _rewrite(name, r"AND status <> 'ended' FOR SHARE", "")
    plain = FencedConnection.__init__

    def init(self: FencedConnection, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        start = re.sub(rb'SELECT "kagzi".hold_fence\(.*?\); ', b"", self._copy_start)
        assert start != self._copy_start, "the fence was in it"
        self._copy_start = start

    FencedConnection.__init__ = init  # type: ignore[method-assign]


def visible_early() -> None:
    """A workflow sees results that are not committed yet."""

    def at_once(self: CheckpointWriter, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback)

    CheckpointWriter.after_commit = at_once  # type: ignore[method-assign]


def blind_resend() -> None:
    """After an unknown outcome rows are sent as if they were new, and those refused as failed."""
    for name in ("write_steps", "write_group", "write_rows"):
        _rewrite(name, r"(%\(s16\)s\) AS s\s+)ON CONFLICT DO NOTHING", r"\1")
    _rewrite("write_step", r"ON CONFLICT DO NOTHING", "")

    async def write(self: FencedConnection, batch: Any) -> Any:
        while True:
            try:
                return await self._send(await self._direct.open(), batch, False)
            except psycopg.Error as error:
                if is_outage(error):
                    await self.close()
                    await asyncio.sleep(0.05)
                    continue
                await self._rollback()
                if any(step.status == "failed" for step in batch.steps):
                    return []
                raise ContentRefused(str(error)) from error

    FencedConnection.write = write  # type: ignore[method-assign]


def ids_by_completion() -> None:
    """Steps are numbered over the whole run, in the order in which their calls happen to come."""

    def next_id(self: Scope, name: str) -> str:
        self.settle_branch()
        return self.root._numbered(name)

    Scope.next_id = next_id  # type: ignore[method-assign]


def rescue_leaves_lease() -> None:
    """Runs are freed, and the worker that had them may still write."""
    _rewrite("end_lease", r"SET status = 'ended', ended_at = \S+", "SET status = w.status")
    _rewrite(
        "free_runs",
        r"coalesce\(w\.status, 'ended'\) = 'ended'",
        'NOT EXISTS (SELECT FROM "kagzi".worker_leases l WHERE l.worker_id = w.id)',
    )


def rescue_in_one() -> None:
    """Both parts of a rescue are one statement, with one snapshot."""

    async def rescue(self: Store, worker_id: Any, reason: str, forced: bool = False) -> int:
        statement = """
            WITH lease AS (
                SELECT worker_id FROM kagzi.worker_leases
                WHERE worker_id = %(id)s AND (%(forced)s OR expires_at <= kagzi.now_at())
                FOR UPDATE
            ), ended AS (
                UPDATE kagzi.workers w SET status = 'ended', ended_at = kagzi.now_at()
                FROM lease WHERE w.id = lease.worker_id AND w.status <> 'ended'
                RETURNING w.id
            ), gone AS (
                DELETE FROM kagzi.worker_leases WHERE worker_id IN (SELECT worker_id FROM lease)
            )
            UPDATE kagzi.workflow_runs r SET status = 'pending', worker_id = NULL
            FROM ended WHERE r.worker_id = ended.id"""
        async with self.connection() as connection:
            cursor = await connection.execute(statement, {"id": worker_id, "forced": forced})
            return cursor.rowcount

    Store.rescue = rescue  # type: ignore[method-assign]


def requests_at_once() -> None:
    """A client's cancel takes a run out of its worker's hands."""
    _rewrite(
        "cancel_run", r"status = CASE WHEN .*? END,", "status = 'cancelled', worker_id = NULL,"
    )
    _rewrite("cancel_run", r"request = CASE WHEN .*? END,", "request = NULL,")
    _rewrite("cancel_run", r"completed_at = CASE WHEN .*? END,", "completed_at = now(),")


def no_poll() -> None:
    """A worker looks for runs only when it is told of one."""
    plain = Worker.__init__

    def init(self: Worker, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        self.poll_s = 1e6

    Worker.__init__ = init  # type: ignore[method-assign]


def heartbeat_on_loop() -> None:
    """The lease is renewed by the loop in which workflows run."""

    def start(self: Heartbeat) -> None:
        connection = psycopg.connect(self._connector.conninfo(), autocommit=True)

        async def beat() -> None:
            while not self._stop.is_set():
                await asyncio.sleep(self._heartbeat_s)
                asked_at = time.time()
                parameters = {"id": self._worker_id, "lease_s": self._lease_s}
                row = connection.execute(self._query, parameters).fetchone()
                if row is None:
                    self._on_lost(LeaseLost("another worker ended the lease"))
                    break
                self.tries += 1
                self.beats += 1
                self._on_beat(row[0], asked_at, time.time())
            connection.close()

        self._beating = asyncio.ensure_future(beat())  # type: ignore[attr-defined]

    Heartbeat.start = start  # type: ignore[method-assign]
    Heartbeat.stop = lambda self: self._stop.set()  # type: ignore[method-assign]


def no_conflict_guard() -> None:
    """A checkpoint answers whatever is asked under its id."""
    Work._check_recorded = lambda self, *_: None  # type: ignore[method-assign]


def race_forgotten() -> None:
    """Who won a race is not recorded."""
    fill, decided = Group._fill_row, Group._decided_by_record

    def forgetful(self: Group, row: Any) -> None:
        fill(self, row)
        if _is_race(self.request):
            row.decision = row.decided_index = None

    Group._fill_row = forgetful  # type: ignore[method-assign]
    Group._decided_by_record = (  # type: ignore[method-assign]
        lambda self: not _is_race(self.request) and decided(self)
    )


def _is_race(request: GroupRequest) -> bool:
    return request.kind is GroupKind.RACE


def fork_keeps_step() -> None:
    """A fork has the result of the step that it is to make anew."""
    _rewrite("fork_steps", r" AND step_id <> ALL\(%\(dropped\)s::text\[\]\)", "")


def fork_forgets() -> None:
    """A fork has no checkpoints."""
    _rewrite("fork_steps", r"AND call_number <= %\(number\)s", "AND false")


def retry_clears_all() -> None:
    """A person's retry begins from the top."""
    _rewrite("delete_steps", r" AND step_id = ANY\(%\(step_ids\)s::text\[\]\)", "")


def no_limits() -> None:
    """What a queue is set to is forgotten."""

    async def forget(self: Administration, name: str, **limits: Any) -> None: ...

    Administration.set_queue = forget  # type: ignore[method-assign, assignment]


def data_apart() -> None:
    """What a body writes is committed before its checkpoint."""

    async def attempt(self: Transactions, step: Any, body: Any) -> Any:
        pool = await self._opened()
        async with pool.connection() as connection:
            value = await body(connection)
            await self._write_step(connection, step, step.definition.returns.encode(value))
            return value

    Transactions._try = attempt  # type: ignore[method-assign]


def publishes_at_first() -> None:
    """What is published later is lost."""
    _rewrite("publish_value", r"r\.epoch = %\(epoch\)s", "r.epoch = %(epoch)s AND %(number)s < 4")


def _only(program: str) -> dict[str, Any]:
    """Nothing strikes."""
    return {"program": program, "point": "none", "victim": "none"}


ENGINES: dict[str, Broken] = {
    "no_fence": Broken(no_fence, "after its lease was ended", FROZEN),
    "visible_early": Broken(
        visible_early,
        "saw",
        {"program": "sequential", "point": "commit.sent", "victim": "worker", "runs": 6},
    ),
    "blind_resend": Broken(
        blind_resend,
        "is failed",
        {"program": "group", "point": "commit.answer", "victim": "reset", "nth": 2},
    ),
    "ids_by_completion": Broken(
        ids_by_completion,
        "has the id",
        {"program": "branches", "point": "batch.before", "victim": "worker", "nth": 4},
    ),
    "rescue_leaves_lease": Broken(rescue_leaves_lease, "did not hold the run", FROZEN),
    "rescue_in_one": Broken(
        rescue_in_one,
        "not ended",
        {
            **{"program": "sequential", "point": "none", "victim": "freeze", "slow_claim": True},
            **{"runs": 1, "patience_s": 9.0},
        },
    ),
    "requests_at_once": Broken(
        requests_at_once,
        "did not hold the run",
        {"program": "busy", "point": "none", "victim": "none", "runs": 1},
    ),
    "no_poll": Broken(
        no_poll,
        "not ended",
        {
            **{"program": "sequential", "point": "none", "victim": "none", "deaf": True},
            "patience_s": 6.0,
        },
    ),
    "heartbeat_on_loop": Broken(
        heartbeat_on_loop,
        "ran 2 times",
        {
            **{"program": "blocking", "point": "none", "victim": "none", "workers": 2, "runs": 1},
            "lease_s": BLOCKED_S / 2,  # so long that a machine that stalls costs nobody a lease
        },
    ),
    "no_conflict_guard": Broken(
        no_conflict_guard,
        "not failed",
        {"program": "fickle", "point": "body.before", "victim": "worker", "runs": 1},
    ),
    "race_forgotten": Broken(
        race_forgotten,
        "several winners",
        {"program": "racing", "point": "body.before", "victim": "worker", "runs": 1},
    ),
    "fork_keeps_step": Broken(fork_keeps_step, "no body gave", _only("forked")),
    "fork_forgets": Broken(fork_forgets, "which it had kept", _only("forked")),
    "retry_clears_all": Broken(retry_clears_all, "was deleted", _only("retried")),
    "no_limits": Broken(no_limits, "held at once", _only("queued")),
    "data_apart": Broken(
        data_apart,
        "entered",
        {"program": "ledger", "point": "body.after", "victim": "worker", "runs": 1},
    ),
    "publishes_at_first": Broken(publishes_at_first, "had published", _only("told")),
}
