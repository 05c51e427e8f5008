"""Faults: looks into the database from outside, and workers in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

ROOT = Path(__file__).parents[1]


async def rows(dsn: str, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    """What a statement gives, over a connection of its own."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(query.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []


async def value(dsn: str, query: str, **parameters: Any) -> Any:
    """The one value that a statement gives."""
    return (await rows(dsn, query, **parameters))[0][0]


async def orphans(dsn: str) -> list[tuple[Any, ...]]:
    """Rows that belong to no run."""
    query = " UNION ALL ".join(
        f"SELECT '{table}', t.run_id, count(*) FROM kagzi.{table} t"  # noqa: S608
        " WHERE NOT EXISTS (SELECT FROM kagzi.workflow_runs r WHERE r.id = t.run_id) GROUP BY 2"
        for table in ("step_runs", "step_attempts", "parallel_groups")
    )
    return await rows(dsn, query)


class WorkerProcess:
    """A worker as a program of its own, to be killed or stopped.

    Args:
        output: File that gets what it prints.
        options: Of `Client.worker`.
    """

    def __init__(self, dsn: str, output: Path, **options: Any) -> None:
        self._output = output
        with output.open("ab") as stream:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.faults.worker_process", dsn),
                    json.dumps({"processes": 0, "poll_s": 0.05, **options}),
                ],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                # Where a process group loses its last parent, the system wakes whoever is stopped.
                start_new_session=True,
            )
        self._family: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        return self._output.read_text()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """As `kill -9`, and wait until it is gone."""
        if self._process.poll() is None:
            self._family = psutil.Process(self.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()

    def relatives(self) -> list[psutil.Process]:
        """Processes that it had when it was killed and that still run."""
        return [
            process
            for process in self._family
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]


StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Starts worker processes; they are killed after the test."""
    started: list[WorkerProcess] = []

    def start(dsn: str, **options: Any) -> WorkerProcess:
        started.append(WorkerProcess(dsn, tmp_path / f"worker-{len(started)}.log", **options))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
