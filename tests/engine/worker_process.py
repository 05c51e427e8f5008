"""A worker as a program of its own, to be killed: `python -m tests.engine.worker_process DSN`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

import kagzi
from tests.engine import programs

ROOT = Path(__file__).parents[2]


class WorkerProcess:
    """One such program."""

    def __init__(self, dsn: str, processes: int = 2) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, dsn, str(processes)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """As `kill -9`, and wait until it is gone, and its pool with it."""
        family: list[psutil.Process] = []
        if self._process.poll() is None:
            family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(family, timeout=20)


@contextmanager
def worker_process(dsn: str, processes: int = 2) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(dsn, processes)
    try:
        yield worker
    finally:
        worker.kill()


async def main(dsn: str, processes: int) -> None:
    assert programs, "imported for the workflows that it registers"
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(processes=processes, poll_s=0.1, max_crashes=100):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
