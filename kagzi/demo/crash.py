"""`kagzi demo --crash`: kills a worker half-way; a second one finishes; then what ran twice?

Each body that measures a file first says so in a witness file. What it says is compared with the
checkpoints that the store had when the first worker was dead: those steps must not begin again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kagzi
from kagzi.client import Client
from kagzi.command.show import seconds
from kagzi.demo.steps import GROUP, WORKER_VARIABLE, analyse_before_witness
from kagzi.demo.telling import MODULE, POLL_S, Bar, Teller, choose_sources
from kagzi.errors import KagziError
from kagzi.handle import RunHandle
from kagzi.ids import uuid7

FIRST, SECOND = "first", "second"
STEPS_BESIDE = 2  # checkpoints of a run that measure no file: version, list
STOP_S = 30.0


async def show_crash(
    client: Client,
    *,
    place: str,
    folder: str | None,
    full: bool,
    processes: int | None,
    quiet: bool,
    environment: Mapping[str, str],
    schema: str,
    pause_s: float = 0.0,
) -> dict[str, Any]:
    """Run the demonstration; what it showed, as data. `holds`: no committed step ran again.

    Args:
        environment: Of the workers.
        pause_s: Makes each body longer, so that a few files have a half-way too.
    """
    teller = Teller(quiet)
    chosen, sources = choose_sources(folder, full)
    run_id = f"demo-{uuid7().hex[-10:]}"
    # -P: the kagzi that runs here, not one that may lie in the current folder.
    command = [sys.executable, "-P", "-m", "kagzi", "--schema", schema]
    command += ["worker", MODULE, "--quiet"]
    if processes is not None:
        command += ["--processes", str(processes)]
    teller.title(f"Analysing {len(sources):,} Python files in {chosen}, through a crash")
    teller.fact("runs are in", place)
    with tempfile.TemporaryDirectory(prefix="kagzi-demo-") as scratch:
        witness = Path(scratch, "witness")
        handle = await client.start(
            analyse_before_witness, chosen, full, str(witness), pause_s, id=run_id
        )
        total = len(sources) + STEPS_BESIDE
        async with _worker(command, environment, FIRST, Path(scratch)) as worker:
            async with Bar(teller, handle, total, "first worker "):
                await _until_half(handle, total, worker)
            worker.send_signal(signal.SIGKILL)
            await worker.wait()
        killed = time.perf_counter()
        at_death = await handle.describe()
        committed = {step.id for step in at_death.steps if step.group_path == GROUP}
        teller.fact(
            "killed",
            f"worker {worker.pid} got SIGKILL; {len(committed):,} of {len(sources):,} files had a "
            f"checkpoint",
            "bold red",
        )
        async with _worker(command, environment, SECOND, Path(scratch)) as worker:
            async with Bar(teller, handle, total, "second worker"):
                await _or_death(handle.result(), worker)
            took_s = time.perf_counter() - killed
            worker.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_S):
                drained = await worker.wait() == 0
        begun = _read_witness(witness)
    details = await handle.describe()
    measured = {step.id for step in details.steps if step.group_path == GROUP}
    told = {
        "run": run_id,
        "folder": chosen,
        "files": len(sources),
        "seconds_to_finish": took_s,
        "drained": drained,
        **judge(committed, measured, begun[FIRST], begun[SECOND]),
    }
    told["holds"] = told["holds"] and drained and len(measured) == len(sources)
    _tell(teller, told)
    return told


def judge(
    committed: set[str], measured: set[str], first: list[str], second: list[str]
) -> dict[str, Any]:
    """Compare what had a checkpoint at the kill, what has one now, and whose bodies began.

    `holds`: the kill came half-way, and the second worker began no committed step, nor another
    one twice. It need not begin all the others: what was on its way to the server at the kill
    may have been committed after `committed` was read.
    """
    repeated = sorted(committed & set(second))
    return {
        "committed_at_kill": len(committed),
        "begun_by_first": len(first),
        "begun_by_second": len(second),
        "cut_off": len(set(first) - committed),
        "repeated": repeated,
        "holds": not repeated
        and 0 < len(committed) < len(measured)
        and committed <= set(first)
        and measured <= set(first) | set(second)
        and len(second) == len(set(second)),
    }


def _tell(teller: Teller, told: dict[str, Any]) -> None:
    took = seconds(told["seconds_to_finish"])
    teller.fact("finished", f"by a second worker, {took} after the kill (its start included)")
    teller.fact(
        "bodies begun",
        f"{told['begun_by_first']:,} by the first worker, {told['begun_by_second']:,} by the "
        f"second; {told['cut_off']:,} had begun and had no checkpoint yet",
    )
    teller.verdict(
        not told["repeated"],
        f"of {told['committed_at_kill']:,} committed steps, {len(told['repeated']):,} ran again",
    )
    if not told["holds"] and not told["repeated"]:
        teller.verdict(False, "this proves nothing: the kill came too early, or too late")
    teller.fact("look at it", f"kagzi show {told['run']}")


async def _until_half(
    handle: RunHandle[Any], total: int, worker: asyncio.subprocess.Process
) -> None:
    async def half() -> None:
        while sum(await handle.progress()) < total / 2:  # noqa: ASYNC110 - asks the store
            await asyncio.sleep(POLL_S / 5)

    await _or_death(half(), worker)


async def _or_death(wait: Any, worker: asyncio.subprocess.Process) -> None:
    """Wait, unless the worker ends first."""
    waiting, ending = asyncio.ensure_future(wait), asyncio.ensure_future(worker.wait())
    try:
        await asyncio.wait((waiting, ending), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise KagziError(f"the demo's worker ended by itself, with {ending.result()}")
        waiting.result()
    finally:
        waiting.cancel()
        ending.cancel()


@asynccontextmanager
async def _worker(
    command: list[str], environment: Mapping[str, str], name: str, scratch: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a process of its own; what it says is shown when something goes wrong."""
    log = scratch / f"{name}.log"
    with log.open("wb") as output:
        worker = await asyncio.create_subprocess_exec(
            *command,
            env={**environment, WORKER_VARIABLE: name, "PYTHONPATH": _import_path(environment)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield worker
    except KagziError as error:
        said = log.read_text(errors="replace").strip()
        raise KagziError(f"{error}. It said: {said[-2_000:] or 'nothing'}") from error
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def _read_witness(witness: Path) -> dict[str, list[str]]:
    """Step ids whose bodies began, by worker, in order."""
    begun: dict[str, list[str]] = {FIRST: [], SECOND: []}
    for line in witness.read_text().splitlines() if witness.exists() else ():
        worker, _, step_id = line.partition(" ")
        begun[worker].append(step_id)
    return begun


def _import_path(environment: Mapping[str, str]) -> str:
    """Where this kagzi was imported from, before whatever the environment adds."""
    own = str(Path(kagzi.__file__).parents[1])
    return os.pathsep.join([own, *filter(None, [environment.get("PYTHONPATH")])])
