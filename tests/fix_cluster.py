"""Postgres servers of a test's own, to be restarted, killed and promoted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from kagzi.store import supervisor
from kagzi.store.binaries import find_programs, run_as, within_reach
from kagzi.store.cluster import create_cluster, server_identity
from kagzi.store.migrate import migrate

START_S = 30.0


class Cluster:
    """One server with its data in a folder of its own; no network, a socket in the same folder.

    Attributes:
        dsn: Of its database for kagzi.
    """

    def __init__(self, folder: Path) -> None:
        self._identity = server_identity(folder)
        self._programs = find_programs()
        if self._identity is not None:
            self._programs = within_reach(self._programs, self._identity, folder.parent)
        self._folder = folder
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.dsn = f"host={folder} user={supervisor.USER} dbname={supervisor.DATABASE}"

    def create(self) -> None:
        create_cluster(self._programs, self._data, self._identity)

    def copy_from(self, primary: Cluster) -> None:
        """Become its standby."""
        program = self._programs.folder / "pg_basebackup"
        command = [program, "-h", primary._folder, "-U", supervisor.USER, "-D", self._data]
        subprocess.run(
            [*command, "-R", "-c", "fast", "-X", "stream"],
            check=True,
            cwd="/",
            capture_output=True,
            **run_as(self._identity),
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-c", "listen_addresses=", "-k", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs.postgres, "-D", str(self._data), *options],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=supervisor.server_environment(),
                **run_as(self._identity),
            )
        self.wait()

    def wait(self) -> None:
        """Until it serves."""
        assert self._process is not None, "started"
        until_s = time.monotonic() + START_S
        while supervisor.probe(str(self._folder), 1.0) != supervisor.READY:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < until_s, (self._folder / "log").read_text()
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast; SIGQUIT: immediate. Waits until it is gone."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


MakeCluster = Callable[[], Cluster]


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    """Makes clusters below a folder that the server's user can reach; empty, and not running."""
    made: list[Cluster] = []
    base = "/var/tmp" if os.geteuid() == 0 else None
    parent = Path(tempfile.mkdtemp(prefix="kagzi-cluster-", dir=base))
    identity = server_identity(parent)
    if identity is not None:
        parent.chmod(0o755)

    def make() -> Cluster:
        folder = parent / str(len(made))
        folder.mkdir(mode=0o700)
        if identity is not None:
            os.chown(folder, identity.user, identity.group)
        made.append(Cluster(folder))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop(signal.SIGQUIT)
    shutil.rmtree(parent)


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """A running server with kagzi's schema."""
    made = make_cluster()
    made.create()
    made.start()
    migrate(made.dsn)
    return made
