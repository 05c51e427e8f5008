"""PgBouncer before a test's database, in transaction mode with few backends; where it is installed.

On Debian: `apt-get install pgbouncer`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from kagzi.store.binaries import run_as
from kagzi.store.cluster import server_identity
from tests.fix_db import data_folder_of_tests

BACKENDS = 5
START_S = 20.0


def find_pgbouncer() -> str | None:
    folders = "/usr/sbin:/usr/local/sbin:/opt/homebrew/bin"
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path=folders)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def pooled_dsn(dsn: str) -> Iterator[str]:
    """The test's database, through PgBouncer."""
    program = find_pgbouncer()
    if program is None:
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    parts = {key: str(found) for key, found in conninfo_to_dict(dsn).items()}
    known = ("host", "port", "user", "password", "dbname")
    target = " ".join(f"{key}='{parts[key]}'" for key in known if key in parts)
    identity = server_identity(data_folder_of_tests())  # it refuses to be root, too
    folder = Path(tempfile.mkdtemp(prefix="kagzi-pgbouncer-", dir="/tmp"))
    port = _free_port()
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\nkagzi = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
        f"default_pool_size = {BACKENDS}\nmax_client_conn = 200\nlogfile = {folder}/log\n"
    )
    (folder / "log").touch()
    if identity is not None:
        for path in (folder, config, folder / "log"):
            shutil.chown(path, identity.user, identity.group)
    process = subprocess.Popen(
        [program, "-q", str(config)], cwd="/", stdin=subprocess.DEVNULL, **run_as(identity)
    )
    pooled = make_conninfo(
        host="127.0.0.1", port=port, dbname="kagzi", user=parts.get("user", ""), sslmode="disable"
    )
    try:
        until_s = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(pooled).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < until_s, (folder / "log").read_text()
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.02)
        yield pooled
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)
