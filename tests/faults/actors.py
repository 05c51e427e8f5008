"""The processes of a trial: workers and clients, forked from one that has imported everything.

`python -m tests.faults.actors` reads one JSON object a line, forks a process for it, and says its
pid. Each is the leader of a session of its own, so that what it leaves behind can be found.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

import kagzi
from kagzi.store import fenced
from tests.faults import broken, points
from tests.faults.subjects import EVERY, FORK_FROM, FORK_SUFFIX, note


async def work(spec: dict[str, Any]) -> None:
    """A worker, until it is told to end."""
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    while True:
        try:
            async with kagzi.connect(spec["dsn"], migrate=False) as client:
                async with client.worker(**spec["options"]):
                    print("claims", flush=True)
                    await ending.wait()
            return
        except (kagzi.StoreUnavailable, kagzi.PoolStartFailed) as error:
            # No server, or a pool process that was killed as it began: a supervisor starts it anew.
            print(f"not started yet: {error}", flush=True)
            if ending.is_set():
                return
            await asyncio.sleep(0.05)


async def ask(spec: dict[str, Any]) -> None:
    """A client: starts runs, does to them what their program wants, and waits for them.

    Everything may be done twice: one that was killed is followed by another that does it all.
    """
    while True:
        try:
            async with kagzi.connect(spec["dsn"], migrate=False) as client:
                await asyncio.gather(*(_see_through(client, spec, key) for key in spec["keys"]))
            return
        except kagzi.StoreUnavailable as error:
            print(f"again: {error}", flush=True)
            await asyncio.sleep(0.05)


async def _see_through(client: kagzi.Client, spec: dict[str, Any], key: str) -> None:
    name, folder = spec["program"], spec["folder"]
    program = EVERY[name]
    queue = "default"
    if program.most_held is not None:
        queue = name
        await client.set_queue(queue, concurrency=program.most_held)
    handle = await client.start(program.workflow, folder, key, id=key, queue=queue)
    note(folder, "started", key, handle.run_id)
    handles = [handle]
    if name in ("timer", "paused", "cancelled", "busy"):
        with suppress(kagzi.RunEnded):
            await _act(client, handle, name, folder, key)
    elif program.is_forked:
        handles.append(await _fork(client, handle, folder, key))
    elif program.is_retried:
        await _mend(client, handle, folder, key)
    elif program.is_followed:
        await _follow(handle, folder, key)
    for one in handles:
        note(folder, "result", one.id, await _result(one))


async def _result(handle: kagzi.RunHandle[Any]) -> str:
    try:
        return json.dumps(await handle.result(), separators=(",", ":"))
    except kagzi.RunWasCancelled:
        return "cancelled"
    except kagzi.RunFailed as error:
        return f"failed {type(error).__name__}"


async def _fork(
    client: kagzi.Client, handle: kagzi.RunHandle[Any], folder: str, key: str
) -> kagzi.RunHandle[Any]:
    """Sends what it waits for, so that it goes on meanwhile; the fork gets that, too."""
    await _until_noted(f"{folder}/witness", f"ready {key}\n")
    with suppress(kagzi.RunEnded):
        await client.send(handle, "go", key, id="go")
        note(folder, "sent", key)
    try:
        made = await client.fork(handle, from_step=FORK_FROM, id=f"{key}{FORK_SUFFIX}")
    except kagzi.RunConflict:
        made = await client.get(f"{key}{FORK_SUFFIX}")
    note(folder, "started", made.id, made.run_id)
    return made


async def _mend(client: kagzi.Client, handle: kagzi.RunHandle[Any], folder: str, key: str) -> None:
    """Retry it if it has failed and was not retried yet."""
    with suppress(kagzi.RunFailed):
        await handle.result()
        return
    note(folder, "mended", key)
    with suppress(kagzi.InvalidInput):  # a client that was killed may have come this far, too
        await client.retry(handle)


async def _follow(handle: kagzi.RunHandle[Any], folder: str, key: str) -> None:
    async for _, state in handle.follow():
        note(folder, "followed", key, state)
    note(folder, "published", key, (await handle.published())["state"])


async def _act(
    client: kagzi.Client, handle: kagzi.RunHandle[Any], name: str, folder: str, key: str
) -> None:
    if name in ("paused", "cancelled", "busy"):
        await _until_noted(f"{folder}/witness", f"ready {key}\n")
    if name in ("cancelled", "busy"):
        await client.cancel(handle)
        note(folder, "asked", key, "cancel")
        return
    if name == "paused":
        await client.pause(handle)
        note(folder, "asked", key, "pause")
        await asyncio.sleep(0.1)
        await client.resume(handle)
        note(folder, "asked", key, "resume")
    await client.send(handle, "go", key, id="go")
    note(folder, "sent", key)


async def _until_noted(path: str, line: str) -> None:
    def is_noted() -> bool:
        return os.path.exists(path) and line in Path(path).read_text()

    while not is_noted():  # noqa: ASYNC110 - another process notes it
        await asyncio.sleep(0.01)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        spec = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be(spec)
        print(pid, flush=True)


def _be(spec: dict[str, Any]) -> None:
    """The life of a forked process."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        logging.basicConfig(
            level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s %(message)s"
        )
        logging.getLogger("psycopg.pool").setLevel(logging.WARNING)
        fenced.UNNEST_MOST = 4  # groups of a trial are small, and are to go by COPY
        if spec.get("broken"):
            broken.ENGINES[spec["broken"]].apply()
        if spec.get("armed"):
            points.arm(*spec["armed"])
        act = work if spec["kind"] == "worker" else ask
        if spec.get("uvloop"):
            uvloop.run(act(spec))
        else:
            asyncio.run(act(spec))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status) if spec["kind"] == "client" else sys.exit(status)


if __name__ == "__main__":
    main()
