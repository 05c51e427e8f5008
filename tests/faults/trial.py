"""One trial: some runs, one fault at one point, and what must hold when all is over."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from kagzi.store.cluster import server_identity
from kagzi.store.migrate import migrate
from tests.faults import oracle
from tests.faults.points import WIRE
from tests.faults.subjects import PROGRAMS
from tests.faults.victims import COST_LEASE, LEASE_S, VICTIMS, Wire
from tests.fix_cluster import Cluster
from tests.fix_proxy import Proxy

ROOT = Path(__file__).parents[2]
PATIENCE_S = 40.0
OWN_NAME = "oracle"
OPTIONS = {"heartbeat_s": 0.25, "poll_s": 0.1}
QUICK_BEAT_S = 0.02  # where a heartbeat is the point: the runs of a trial are over sooner than most

SLOW_CLAIM = """
CREATE SEQUENCE audit.claims;
CREATE FUNCTION audit.take_long() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = 'running' AND OLD.status <> 'running' AND nextval('audit.claims') = 1 THEN
        FOR n IN 1..400 LOOP
            PERFORM pg_sleep(0.05);
            EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted
                AND pg_backend_pid() = ANY (pg_blocking_pids(pid)));
        END LOOP;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER long BEFORE UPDATE ON kagzi.workflow_runs
    FOR EACH ROW EXECUTE FUNCTION audit.take_long();
"""

# Which programs come to a point at all; those not named here: every program.
COME_BY: dict[str, tuple[str, ...]] = {
    "group.start": ("group", "nested", "retry", "forked", "retried", "ledger"),
    "race.decided": ("group",),
    "retry.decided": ("retry", "group"),
    "copy.before": ("group", "nested"),
    "copy.open": ("group", "nested"),
    "copy.after": ("group", "nested"),
    "copy.messages": ("group", "nested"),
    "timer.fires": ("timer", "retry"),
    "event.taken": ("timer", "paused", "forked"),
    "child.before": ("child", "cancelled"),
    "child.after": ("child", "cancelled"),
    "request.heard": ("cancelled", "paused"),
}


@dataclass(frozen=True)
class Plan:
    """What is to happen. The same plan again meets the same point, if not the same microsecond.

    Attributes:
        nth: At which time that the point is reached.
        runs: Of the program, at once.
        processes: Of each worker's pool.
        broken: Name of an engine of `broken.py`.
        workers: At first. Another comes when something has struck.
        deaf: No notification reaches a worker.
        slow_claim: The first claim takes until a rescue waits for it; its worker is stopped in it.
        lease_s: Of every worker.
    """

    seed: int
    program: str
    point: str
    victim: str
    nth: int = 1
    runs: int = 2
    processes: int = 1
    uvloop: bool = False
    broken: str = ""
    workers: int = 1
    deaf: bool = False
    slow_claim: bool = False
    patience_s: float = PATIENCE_S
    lease_s: float = LEASE_S

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass
class Report:
    """What came of it.

    Attributes:
        faults: What struck, in order; empty: the point was not reached.
        problems: What should have held and does not.
        refused: Writes of ended incarnations that were refused, as seen on the wire.
    """

    plan: Plan
    faults: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    steps: int = 0
    executions: int = 0
    refused: int = 0
    seconds: float = 0.0
    folder: str = ""


class Server:
    """A server of our own, and the process that all workers and clients are forked from."""

    def __init__(self) -> None:
        base = "/var/tmp" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="kagzi-faults-", dir=base))
        identity = server_identity(self.folder)
        data = self.folder / "server"
        data.mkdir(mode=0o700)
        if identity is not None:
            self.folder.chmod(0o755)
            os.chown(data, identity.user, identity.group)
        self.cluster = Cluster(data)
        self.keep = False  # the folder, for its logs
        self._count = 0

    def __enter__(self) -> Server:
        self.cluster.create()
        self.cluster.start()
        # Processes die here, not the machine.
        self.cluster.execute("ALTER SYSTEM SET fsync = off")
        self.cluster.execute("ALTER SYSTEM SET max_connections = 200")
        self.cluster.execute("ALTER SYSTEM SET deadlock_timeout = '200ms'")
        self.cluster.stop()
        self.cluster.start()
        migrate(self.cluster.dsn)
        with psycopg.connect(self.cluster.dsn, autocommit=True) as connection:
            oracle.install(connection)
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.actors"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._zygote.stdin is not None, "a pipe"
        self._zygote.stdin.close()
        self._zygote.wait(10)
        assert self._zygote.stdout is not None, "a pipe"
        self._zygote.stdout.close()
        self.cluster.stop(signal.SIGQUIT)
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fork(self, spec: dict[str, Any]) -> int:
        """A new process that lives as `actors` says; its id."""
        assert self._zygote.stdin is not None, "a pipe"
        assert self._zygote.stdout is not None, "a pipe"
        self._zygote.stdin.write(json.dumps(spec) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())

    def execute(self, database: str, statement: str) -> None:
        with psycopg.connect(self.dsn_of(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def dsn_of(self, database: str) -> str:
        return make_conninfo(self.cluster.dsn, dbname=database, application_name=OWN_NAME)

    @contextmanager
    def database(self) -> Iterator[str]:
        """A database with schema and triggers, and no rows; its DSN."""
        self._count += 1
        name = f"trial_{os.getpid()}_{self._count}"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE kagzi")
        try:
            yield self.dsn_of(name)
        finally:
            self.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")


class Actor:
    """A forked process, leader of a session of its own.

    A number that was its process's may be that of another later: a long soak starts more of them
    than there are numbers. So it is told by the moment of its start, too, and nobody else is
    signalled.
    """

    def __init__(self, trial: Trial, spec: dict[str, Any]) -> None:
        self.log = Path(spec["log"])
        self.pid = trial.server.fork(spec)
        self._started_at = started_at(self.pid)
        self._is_gone = self._started_at is None
        trial.actors.append(self)

    @property
    def is_alive(self) -> bool:
        return self._started_at is not None and started_at(self.pid) == self._started_at

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def end(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def family(self) -> list[psutil.Process]:
        """The others of its session: pool processes and what starts them.

        While there are any, no new process gets the session's number.
        """
        found = []
        if not self._is_gone and started_at(self.pid) in (None, self._started_at):
            for number in psutil.pids():
                with suppress(OSError, psutil.Error):
                    if number != self.pid and os.getsid(number) == self.pid and is_alive(number):
                        found.append(psutil.Process(number))
        self._is_gone = not found and not self.is_alive
        return found


class WorkerActor(Actor):
    """A worker behind a proxy of its own."""

    wire: Wire


def is_alive(pid: int) -> bool:
    """Whether a process runs, or could; not one that has ended and was not waited for."""
    return started_at(pid) is not None


def started_at(pid: int) -> int | None:
    """When a process that runs, or could, was started: in ticks since the machine was.

    Source: proc(5), /proc/pid/stat.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Trial:
    """One of them, from start to verdict.

    Attributes:
        options: Of every worker, besides the plan's.
    """

    options: ClassVar[dict[str, Any]] = OPTIONS

    def __init__(self, server: Server, plan: Plan) -> None:
        self.server = server
        self.plan = plan
        self.chance = random.Random(plan.seed)
        self.report = Report(plan)
        self.keys = [f"r{n}" for n in range(plan.runs)]
        self.actors: list[Actor] = []
        self.workers: list[WorkerActor] = []
        self.client: Actor | None = None
        self._proxies: list[Proxy] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._owed: Counter[int] = Counter()
        self._hit = False
        self._ending = False

    async def run(self) -> Report:
        began = time.monotonic()
        self.folder = Path(tempfile.mkdtemp(dir=self.server.folder))
        self.report.folder = str(self.folder)
        with self.server.database() as self.dsn:
            control = await asyncio.start_unix_server(self._hear, self._control)
            try:
                await self._act()
                await self._settle()
            finally:
                control.close()
                await self._clear_up()
        if not self.report.problems:
            shutil.rmtree(self.folder)
        self.report.seconds = time.monotonic() - began
        return self.report

    @property
    def _control(self) -> str:
        return str(self.folder / "control")

    # --- what happens -----------------------------------------------------------------------

    async def _act(self) -> None:
        rescue = self.plan.point.startswith("rescue")
        if self.plan.slow_claim:
            await self.ask_nothing(SLOW_CLAIM)
        first = await self.start_worker(armed=not rescue)
        for _ in range(self.plan.workers - 1):
            await self.start_worker()
        if self.plan.deaf:
            first.wire.deaf = True
            await self._until(lambda: asyncio.sleep(0, "claims" in first.said), 10)
        self.start_client()
        if self.plan.slow_claim:
            query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            await self._until(lambda: self._is_more(query), 20)
            await self.strike(first)
        if rescue:
            await self._until(self._is_claimed, 10)
            first.kill()
            self.note_fault("worker", first, " (to be rescued from)")
            await self.start_worker(armed=True)
        await self._until(self._is_over, self.plan.patience_s)

    async def _is_more(self, query: str) -> bool:
        return bool((await self.ask(query))[0][0])

    async def _is_over(self) -> bool:
        """Every run has ended, whatever was to strike has struck, and everybody knows."""
        if self._tasks:
            return False
        if self.client is not None and self.client.is_alive:
            return False
        query = (
            "SELECT count(*) FROM kagzi.workflow_runs"
            " WHERE status NOT IN ('completed', 'failed', 'cancelled')"
        )
        return bool((await self.ask(query))[0][0] == 0)

    async def _is_claimed(self) -> bool:
        return await self._is_more(
            "SELECT count(*) FROM kagzi.workflow_runs WHERE status = 'running'"
        )

    async def start_worker(self, armed: bool = False) -> WorkerActor:
        """One more, behind a proxy of its own."""
        plan, number = self.plan, len(self.workers)
        proxy = Proxy(self.dsn)
        await proxy.start()
        self._proxies.append(proxy)
        wire = Wire(proxy)
        on_wire = plan.point in WIRE
        options = {**self.options, "lease_s": plan.lease_s, "processes": plan.processes}
        if plan.point.startswith("heartbeat"):
            options["heartbeat_s"] = QUICK_BEAT_S
        actor = WorkerActor(
            self,
            {
                "kind": "worker",
                "dsn": proxy.dsn,
                "log": str(self.folder / f"worker-{number}.log"),
                "options": options,
                "armed": [self._control, plan.point, plan.nth] if armed and not on_wire else None,
                "uvloop": plan.uvloop,
                "broken": plan.broken,
            },
        )
        actor.wire = wire
        if armed and on_wire:
            wire.point, wire.nth = plan.point, plan.nth
            wire.strike = lambda: self.strike(actor)
        self.workers.append(actor)
        return actor

    def start_client(self) -> None:
        self.client = Actor(
            self,
            {
                "kind": "client",
                "dsn": self.dsn,
                "log": str(self.folder / "client.log"),
                "folder": str(self.folder),
                "program": self.plan.program,
                "keys": self.keys,
                "broken": self.plan.broken,
            },
        )

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """An armed process has come to its point, and waits."""
        try:
            said = json.loads(await reader.readline())
            actor = next(one for one in self.workers if one.pid == said["owner"])
            await self.strike(actor)
            writer.write(b"!")
            await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writer.close()

    async def strike(self, actor: WorkerActor) -> None:
        """Do it, once, while there are runs; then another worker is there to go on."""
        if self._hit or self._ending:
            return
        self._hit = True
        if await VICTIMS[self.plan.victim](self, actor):
            self.note_fault(self.plan.victim, actor, f" at {self.plan.point}")
        self.later(self.start_worker())

    def note_fault(self, victim: str, actor: WorkerActor, where: str = "") -> None:
        """It struck; this worker, if that costs a worker its lease."""
        self.report.faults.append(victim + where)
        if victim in COST_LEASE:
            self._owed[actor.pid] += 1

    def later(self, action: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(action)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def restart_server(self) -> None:
        await asyncio.to_thread(self.server.cluster.stop, signal.SIGQUIT)
        await asyncio.to_thread(self.server.cluster.start)

    async def ask(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Directly, and again if the server is just away."""
        for attempt in range(100):
            try:
                return await asyncio.to_thread(self._ask, query, parameters)
            except psycopg.OperationalError:
                if attempt == 99:
                    raise
                await asyncio.sleep(0.05)
        raise AssertionError

    async def ask_nothing(self, statement: str) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _ask(self, query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(query.encode(), parameters or None).fetchall()

    async def _until(self, condition: Any, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while not await condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.03)
        return True

    # --- what must hold ---------------------------------------------------------------------

    async def _settle(self) -> None:
        """Let the workers end, and judge."""
        self._ending = True
        report, problems = self.report, self.report.problems
        for task in list(self._tasks):
            await asyncio.wait([task], timeout=5)
        if self._hit:  # it may have come in the last moment
            await self._until(self._is_over, 10)
        if self.client is not None and self.client.is_alive:
            problems.append("the client still waits")
            self.client.kill()
        if not await self._is_over():
            rows = await self.ask(
                "SELECT external_id, workflow, status, worker_id, request FROM kagzi.workflow_runs"
                " WHERE status NOT IN ('completed', 'failed', 'cancelled')"
            )
            problems += [f"not ended: {row}" for row in rows]
        for actor in self.workers:
            actor.end()

        async def all_ended() -> bool:
            return not any(actor.is_alive or actor.family() for actor in self.actors)

        if not await self._until(all_ended, 60):
            problems += [
                f"process {actor.pid} ({actor.log.name}) or its pool is left"
                for actor in self.actors
                if actor.is_alive or actor.family()
            ]

        async def no_backend() -> bool:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name <> %s AND backend_type = 'client backend'"
            )
            return bool((await self.ask(query, OWN_NAME))[0][0] == 0)

        if not await self._until(no_backend, 20):
            problems.append("backends are left")
        verdict = await asyncio.to_thread(self._judge)
        problems += verdict.problems
        report.runs, report.steps = verdict.runs, verdict.steps
        report.executions = verdict.executions
        report.refused = sum(one.wire.refused for one in self.workers)
        for actor in {actor.log: actor for actor in self.actors}.values():
            for line in actor.said.splitlines():
                if "Traceback" in line or "never awaited" in line:
                    problems.append(f"{actor.log.name} says {line}")

    def _judge(self) -> oracle.Verdict:
        return self._judge_all(dict.fromkeys(self.keys, self.plan.program))

    def _judge_all(self, programs: dict[str, str]) -> oracle.Verdict:
        """Where nothing was to strike, no lease may run out."""
        faults = len(self.report.faults)
        owed = self._owed if self._hit or faults else None
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return oracle.judge(connection, self.folder / "witness", programs, faults, owed)

    async def _clear_up(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for actor in self.actors:
            family = actor.family()
            actor.kill()
            for one in family:
                with suppress(psutil.Error):
                    one.kill()
        for actor in self.workers:
            with suppress(Exception):
                await actor.wire.close_hole()
        for proxy in self._proxies:
            await proxy.stop()


def plans_of_matrix(seed: int) -> list[Plan]:
    """Every point with every victim and every program that comes by."""
    from tests.faults.points import POINTS

    chance = random.Random(seed)
    found = []
    for point in POINTS:
        for program in COME_BY.get(point, tuple(PROGRAMS)):
            for victim in VICTIMS:
                found.append(
                    Plan(
                        seed=chance.getrandbits(32),
                        program=program,
                        point=point,
                        victim=victim,
                        nth=chance.choice((1, 1, 1, 2, 3)),
                        processes=1 if victim == "pool" else chance.choice((0, 1)),
                        uvloop=chance.random() < 0.5,
                    )
                )
    return found
