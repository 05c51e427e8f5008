"""What must hold after a trial, judged by what bodies noted and triggers wrote down.

The engine's own tables are read as well, but only believed where these two agree with them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import psycopg

from tests.faults.subjects import EVERY, FORK, FORK_SUFFIX, STATES, Program

AUDIT = Path(__file__).with_name("audit.sql").read_text()
TERMINAL = ("completed", "failed", "cancelled")


def install(connection: psycopg.Connection[Any]) -> None:
    """Let triggers write down every change of this database."""
    connection.execute(AUDIT.encode())


@dataclass
class Witnessed:
    """What bodies, workflows and clients noted, by the key of the run."""

    ran: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    saw: dict[tuple[str, str], list[Any]] = field(default_factory=lambda: defaultdict(list))
    won: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    heard: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    started: dict[str, str] = field(default_factory=dict)
    results: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sent: set[str] = field(default_factory=set)
    followed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    published: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    strange: list[str] = field(default_factory=list)


def read_witness(path: Path, keys: Mapping[str, str] = MappingProxyType({})) -> Witnessed:
    """What is noted in a file; `keys`: of runs whose notes are by their id."""
    found = Witnessed()
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        kind, key, *rest = line.split(" ")
        key = keys.get(key, key)
        if kind == "ran":
            step_id, name, nonce, _pid = rest
            if step_id != name:
                found.strange.append(f"{key}: step {name!r} has the id {step_id!r}")
            found.ran[key, name].append(nonce)
        elif kind == "saw":
            found.saw[key, rest[0]].append(json.loads(" ".join(rest[1:])))
        elif kind == "won":
            found.won[key].add(rest[0])
        elif kind == "heard":
            found.heard[key].add(rest[0])
        elif kind == "started":
            found.started[key] = rest[0]
        elif kind == "result":
            found.results[key].add(" ".join(rest))
        elif kind == "sent":
            found.sent.add(key)
        elif kind == "followed":
            found.followed[key].append(int(rest[0]))
        elif kind == "published":
            found.published[key].add(int(rest[0]))
    return found


@dataclass
class Verdict:
    """What was found wrong, and what was counted."""

    problems: list[str]
    runs: int
    steps: int
    executions: int


def judge(
    connection: psycopg.Connection[Any],
    witness: Path,
    programs: dict[str, str],
    faults: int,
    owed: Mapping[int, int] | None = None,
) -> Verdict:
    """All that must hold of runs after so many faults.

    Args:
        programs: By the key of each run that was asked for: which program it is.
        owed: How many of the faults cost a worker its lease, by the id of its process. Leases may
            run out beyond those, as where the machine stalls: then bodies of the runs that were
            held may run again. None: no lease may.
    """
    runs = _runs_by_key(connection)
    seen = read_witness(witness, {str(run.id): key for key, run in runs.items()})
    problems = list(seen.strange)
    expected = _expected(programs)
    wanted_of = {run.id: expected[key] for key, run in runs.items() if key in expected}
    values = _committed(connection, wanted_of, problems)
    lapses = {} if owed is None else _lapses(connection)
    entered = _entered(connection)
    for key, wanted in expected.items():
        if key not in runs:
            problems.append(f"{key}: no such run")
        else:
            if wanted.is_entered:
                problems += _judge_entered(key, values[runs[key].id], entered)
            if wanted.is_followed:
                problems += _judge_followed(key, seen)
            again = faults
            for process, times in lapses.get(runs[key].id, {}).items():
                again += max(0, times - (owed or {}).get(process, 0))
            problems += _judge_run(key, wanted, runs[key], values, seen, again)
            if wanted.kept and origin_of(key) in runs:
                origin = values.get(runs[origin_of(key)].id, {})
                problems += _judge_kept(key, wanted, values[runs[key].id], origin, seen)
    problems += [f"{key}: a run that nobody asked for" for key in runs.keys() - expected.keys()]
    for key, run_id in seen.started.items():
        if key not in runs or str(runs[key].id) != run_id:
            problems.append(f"{key}: its start was acknowledged as {run_id}, and it is not there")
    problems += _judge_writes(connection, wanted_of)
    return Verdict(
        problems, len(runs), sum(map(len, values.values())), sum(map(len, seen.ran.values()))
    )


def _expected(programs: dict[str, str]) -> dict[str, Program]:
    """What is to come of each run, by its key: of those asked for, their children and forks."""
    expected: dict[str, Program] = {}
    for key, name in programs.items():
        program = EVERY[name]
        expected[key] = program
        expected |= {f"{key}{suffix}": one for suffix, one in program.children.items()}
        if program.is_forked:
            expected[f"{key}{FORK_SUFFIX}"] = FORK
    return expected


# --- one run --------------------------------------------------------------------------------


@dataclass
class Run:
    """A row of workflow_runs."""

    id: UUID
    status: str
    output: bytes | None


def _runs_by_key(connection: psycopg.Connection[Any]) -> dict[str, Run]:
    query = "SELECT id, status, output, input, forked_from IS NULL FROM kagzi.workflow_runs"
    found = {}
    for run_id, status, output, payload, is_first in connection.execute(query):
        key = _key_of(payload)
        found[key if is_first else f"{key}{FORK_SUFFIX}"] = Run(run_id, status, output)
    return found


def _key_of(payload: bytes) -> str:
    arguments = json.loads(payload)
    while isinstance(arguments, list) and len(arguments) == 1:
        arguments = arguments[0]
    if isinstance(arguments, dict):
        return str(arguments["key"])
    return next(str(one) for one in arguments if isinstance(one, str) and "/" not in one)


def origin_of(key: str) -> str:
    """Key of the run that a fork comes from; of any other its own."""
    return key.removesuffix(FORK_SUFFIX)


def _value(status: str, output: bytes | None, error: bytes | None) -> Any:
    """What a step's row says that the workflow sees: its result, or its error's message."""
    if status == "completed":
        return json.loads(output or b"null")
    return json.loads(error or b"{}")["message"]


def _committed(
    connection: psycopg.Connection[Any], wanted: dict[UUID, Program], problems: list[str]
) -> dict[UUID, dict[str, Any]]:
    """Per run: the one value that was ever committed of each step, by the triggers.

    Only a person's retry takes a failed one away.
    """
    found: dict[UUID, dict[str, Any]] = defaultdict(dict)
    query = (
        "SELECT op, run, step, status, output, error, was_status, was_output, was_error"
        ", writer FROM audit.writes WHERE what = 'step' ORDER BY seq"
    )
    for op, run, step, status, output, error, *was, writer in connection.execute(query):
        if op == "DELETE":
            by_retry = writer is None and run in wanted and wanted[run].is_retried
            if not by_retry or status != "failed" or found[run].pop(step, None) is None:
                problems.append(f"{run}: checkpoint {step!r} was deleted")
        elif op == "UPDATE":
            if [status, output, error] != was:
                problems.append(f"{run}: checkpoint {step!r} was changed")
        elif step in found[run]:
            problems.append(f"{run}: checkpoint {step!r} was committed twice")
        else:
            found[run][step] = _value(status, output, error)
    query = "SELECT run_id, step_id, status, output, error FROM kagzi.step_runs"
    stored = {(row[0], row[1]): _value(*row[2:]) for row in connection.execute(query)}
    written = {(run, step): value for run, steps in found.items() for step, value in steps.items()}
    if stored != written:
        problems.append(f"stored is something else than was written: {stored.keys() ^ written}")
    return found


def _lapses(connection: psycopg.Connection[Any]) -> dict[UUID, Counter[int]]:
    """How often each run was taken from workers whose lease ran out, by their processes."""
    query = (
        "SELECT w.id, w.pid FROM kagzi.workers w JOIN kagzi.worker_events e ON e.worker_id = w.id"
        " WHERE e.event = 'ended' AND e.detail = 'lease ran out'"
    )
    processes: dict[UUID, int] = dict(connection.execute(query).fetchall())
    owners: dict[UUID, UUID | None] = {}
    ended: set[UUID] = set()
    found: dict[UUID, Counter[int]] = defaultdict(Counter)
    query = (
        "SELECT what, status, run, owner FROM audit.writes WHERE what IN ('run', 'worker')"
        " ORDER BY seq"
    )
    for what, status, run, owner in connection.execute(query):
        if what == "worker":
            if status == "ended":
                ended.add(owner)
            continue
        before, owners[run] = owners.get(run), owner
        if before in processes and before in ended and owner != before:
            found[run][processes[before]] += 1
    return found


def _judge_run(
    key: str,
    wanted: Program,
    run: Run,
    values: dict[UUID, dict[str, Any]],
    seen: Witnessed,
    again: int,
) -> list[str]:
    """`again`: how often whatever befell it may have made a body run once more."""
    problems: list[str] = []
    committed = values.get(run.id, {})
    if run.status != wanted.status:
        problems.append(f"{key}: is {run.status}, not {wanted.status}")
    for step in wanted.steps:
        if step not in committed:
            problems.append(f"{key}: step {step!r} has no checkpoint")
    for step in (*wanted.steps, *wanted.maybe):
        ran = seen.ran.get((key, step), [])
        most = wanted.attempts.get(step, 1) + again
        if len(ran) > most:
            problems.append(f"{key}: {step!r} ran {len(ran)} times, not at most {most}")
        if step in committed and step not in wanted.kept:
            value = committed[step]
            own = value[0] if isinstance(value, list) else value
            if own not in ran:
                problems.append(f"{key}: no body gave what is committed of {step!r}")
    for (whose, step), observed in seen.saw.items():
        if whose == key and any(one != committed.get(step) for one in observed):
            problems.append(
                f"{key}: saw {observed} of {step!r}, and {committed.get(step)} is committed"
            )
    if len(seen.won[key]) > 1:
        problems.append(f"{key}: saw several winners of one race: {sorted(seen.won[key])}")
    if any(heard != origin_of(key) for heard in seen.heard[key]):
        problems.append(f"{key}: heard {seen.heard[key]}")
    if run.status == "completed" and wanted.status == "completed":
        problems += _judge_value(key, wanted, json.loads(run.output or b"null"), committed, seen)
    return problems


def _judge_kept(
    key: str, wanted: Program, committed: dict[str, Any], origin: dict[str, Any], seen: Witnessed
) -> list[str]:
    """Of a fork: what it kept is what the other run has, and no body of its own ran for it."""
    problems = []
    for step in wanted.kept:
        if step not in origin or committed.get(step) != origin[step]:
            problems.append(f"{key}: kept {committed.get(step)} of {step!r}")
        if (key, step) in seen.ran:
            problems.append(f"{key}: {step!r} ran again, which it had kept")
    return problems


def _entered(connection: psycopg.Connection[Any]) -> dict[str, list[tuple[str, str]]]:
    """What the ledger has of each run: step and nonce."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key, *entry in connection.execute("SELECT key, step, nonce FROM audit.ledger"):
        found[key].append((entry[0], entry[1]))
    return found


def _judge_entered(
    key: str, committed: dict[str, Any], entered: dict[str, list[tuple[str, str]]]
) -> list[str]:
    """What was written with a checkpoint is there as often as the checkpoint."""
    if sorted(entered[key]) == sorted(committed.items()):
        return []
    return [f"{key}: entered are {sorted(entered[key])}, and committed {sorted(committed.items())}"]


def _judge_followed(key: str, seen: Witnessed) -> list[str]:
    """What is published goes forward, and to the end."""
    problems = []
    if seen.followed[key] != sorted(seen.followed[key]):
        problems.append(f"{key}: what it published went back: {seen.followed[key]}")
    if seen.published[key] != {STATES - 1}:
        problems.append(f"{key}: in the end it had published {seen.published[key]}")
    return problems


def _judge_value(
    key: str, wanted: Program, output: Any, committed: dict[str, Any], seen: Witnessed
) -> list[str]:
    problems = []
    for name, value in output.items():
        if name == "event":
            if value != origin_of(key):
                problems.append(f"{key}: its event was {value!r}")
        elif name == "children":
            if len(value) != len(wanted.children):
                problems.append(f"{key}: has the results of {len(value)} children")
        elif name not in committed or committed[name] != value:
            problems.append(f"{key}: its result says {value!r} of {name!r}")
    missing = {step for step in wanted.steps if "/in/" not in step} - output.keys()
    if missing:
        problems.append(f"{key}: its result lacks {sorted(missing)}")
    for told in seen.results.get(key, ()):
        if told.startswith(("failed", "cancelled")) or json.loads(told) != output:
            problems.append(f"{key}: a client was told {told}")
    return problems


# --- all writes -----------------------------------------------------------------------------


def _judge_writes(
    connection: psycopg.Connection[Any], wanted: Mapping[UUID, Program] = MappingProxyType({})
) -> list[str]:
    problems = [
        f"{run}: {writer} committed {what} {step!r} after its lease was ended"
        for what, run, step, writer in connection.execute(
            "SELECT what, run, step, writer FROM audit.late ORDER BY seq"
        )
    ]
    owners: dict[UUID, UUID | None] = {}
    let_go: dict[UUID, tuple[str, UUID | None]] = {}  # in which transaction, and by whom
    epochs: dict[UUID, int] = {}
    ended: set[UUID] = set()
    retried: set[UUID] = set()
    held: set[UUID] = set()  # of the one queue that has a limit
    query = (
        "SELECT what, run, step, status, was_status, owner, epoch, writer, xact::text"
        " FROM audit.writes ORDER BY seq"
    )
    for what, run, step, status, was, owner, epoch, writer, xact in connection.execute(query):
        if what == "worker":
            if status == "ended":
                ended.add(owner)
            continue
        if writer in ended:
            problems.append(f"{run}: {writer} wrote {what} {step!r} after its lease was ended")
        if what != "run":
            holder = owners.get(run)
            if holder is None and let_go.get(run, ("", None))[0] == xact:
                holder = let_go[run][1]  # of one statement that writes both, in whichever order
            if writer is not None and holder != writer:
                problems.append(f"{run}: {writer} wrote {what} {step!r} and did not hold the run")
            continue
        program = wanted.get(run)
        by_retry = was == "failed" and status == "pending" and writer is None
        if by_retry and program is not None and program.is_retried and run not in retried:
            retried.add(run)
        elif was in TERMINAL and status != was:
            problems.append(f"{run}: was {was}, and became {status}")
        given = owner is not None and owners.get(run) != owner
        if given and owner in ended:  # not: was told something while it was still held
            problems.append(f"{run}: was given to {owner}, whose lease had been ended")
        if epoch < epochs.get(run, 0):
            problems.append(f"{run}: its epoch went back")
        if owner is None and owners.get(run) is not None:
            let_go[run] = xact, owners[run]
        owners[run], epochs[run] = owner, epoch
        if program is not None and program.most_held is not None:
            (held.discard if owner is None else held.add)(run)
            if len(held) > program.most_held:
                problems.append(f"{run}: its queue had {len(held)} held at once")
    problems += [
        f"{count} rows of {table} belong to no run"
        for table, count in _orphans(connection).items()
        if count
    ]
    left = connection.execute(
        "SELECT count(*) FROM kagzi.workflow_runs WHERE worker_id IS NOT NULL"
    ).fetchone()
    if left != (0,):
        problems.append(f"{left[0]} runs are held by somebody")  # type: ignore[index]
    return problems


def _orphans(connection: psycopg.Connection[Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for table in ("step_runs", "step_attempts", "parallel_groups", "run_events"):
        row = connection.execute(
            f"SELECT count(*) FROM kagzi.{table} t WHERE NOT EXISTS"  # noqa: S608
            " (SELECT FROM kagzi.workflow_runs r WHERE r.id = t.run_id)"
        ).fetchone()
        assert row is not None, "a count"
        found[table] = row[0]
    return found
