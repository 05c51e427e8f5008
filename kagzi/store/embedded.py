"""Starts a private Postgres when the user named none, and shares it between processes.

A data folder holds the cluster (`pg18`), the socket's folder (`run`), logs and three lock files:
`users.lock` (shared: I use the server), `start.lock` (exclusive: I start it) and `supervisor.lock`
(exclusive: I watch it). The kernel drops them when their holder dies, so nothing has to be cleaned
up after a kill -9. Whether the server lives is decided by connecting to it, never by a number in a
file. The watching itself is the job of `supervisor.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import math
import os
import select
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import platformdirs

from kagzi.errors import EmbeddedServerFailed, InvalidInput
from kagzi.store import cluster, supervisor
from kagzi.store.binaries import find_programs, remove_copies, within_reach

START_LOCK = "start.lock"
LINGER_S = 5.0

_LOCK_POLL_S = 0.01
_START_TIMEOUT_S = 120.0
_SUPERVISORS_TRIED = 5
_WATCH_S = 1.0

_logger = logging.getLogger("kagzi.embedded")

Progress = Callable[[str], None]


def default_data_folder() -> Path:
    """`KAGZI_DATA`, else a folder per user; root's is one that the server's user can reach."""
    chosen = os.environ.get("KAGZI_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/kagzi" if sys.platform == "linux" else "/usr/local/var/kagzi")
    return platformdirs.user_data_path("kagzi")


def find_binaries() -> Path:
    """Folder of the Postgres programs that a new data folder would be made with.

    Raises:
        PostgresNotFound: None of version 14 or newer; the message names the ways out.
    """
    return find_programs().folder


class EmbeddedServer:
    """A use of the embedded server. The server runs while any process holds one.

    Attributes:
        dsn: Where to connect; it carries no password.
        data_folder: Where the data stays between uses.
        log_path: What Postgres says.
    """

    def __init__(self, data_folder: Path, sockets: Path, users_fd: int) -> None:
        self.data_folder = data_folder
        self.log_path = data_folder / supervisor.SERVER_LOG
        self.dsn = (
            f"postgresql://{supervisor.USER}@/{supervisor.DATABASE}"
            f"?host={quote(str(sockets), safe='')}&port={supervisor.PORT}"
        )
        self._users_fd = users_fd
        self._closed = threading.Event()
        _open_servers.add(self)
        threading.Thread(target=self._watch, name="kagzi-embedded", daemon=True).start()

    def close(self) -> None:
        """Stop using the server. The last one to leave lets it stop, a few seconds later."""
        if not self._closed.is_set():
            self._closed.set()
            self._ensure_supervisor()
            os.utime(self._users_fd)
            self._forget()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed.is_set() else "open"
        return f"<EmbeddedServer {self.data_folder} {state}>"

    def _forget_in_child(self) -> None:
        # A new event: the old one's lock may have been held by the watching thread at the fork.
        self._closed = threading.Event()
        self._forget()

    def _forget(self) -> None:
        self._closed.set()
        if self._users_fd >= 0:
            os.close(self._users_fd)
            self._users_fd = -1

    def _watch(self) -> None:
        """A supervisor that was killed is replaced, so that the server always has one."""
        while not self._closed.wait(_WATCH_S):
            self._ensure_supervisor()

    def _ensure_supervisor(self) -> None:
        try:
            if not _supervisor_lives(self.data_folder):
                _start_if_needed(self.data_folder, _logger.warning)
        except FileNotFoundError:
            self._closed.set()  # the folder is gone
        except Exception:
            _logger.warning("cannot start a new supervisor", exc_info=True)


_open_servers: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child shares the lock's file description: it must not hold it open for longer."""
    for server in list(_open_servers):
        server._forget_in_child()


def _close_all() -> None:
    for server in list(_open_servers):
        server.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)


def attach(data_folder: Path | None = None, *, progress: Progress | None = None) -> EmbeddedServer:
    """Use the embedded server of this folder; start it when it does not run. Blocks meanwhile.

    Args:
        data_folder: Created when it is not there; `default_data_folder()` when not given.
        progress: Receives a line for each thing that takes a while.

    Raises:
        PostgresNotFound: No Postgres programs, or none that fit the data.
        EmbeddedServerFailed: It did not start; the message ends with the last lines of its log.
    """
    folder = data_folder.expanduser().absolute() if data_folder else default_data_folder()
    _linger_s()  # refused now, not after the work
    try:
        return _attach(folder, progress or _ignore)
    except OSError as error:
        raise EmbeddedServerFailed(
            f"The embedded Postgres cannot use {folder}: {error}. "
            "Set KAGZI_DATA to a folder of yours, or DATABASE_URL to a server."
        ) from error


def _ignore(_line: str) -> None:
    pass


def _attach(folder: Path, progress: Progress) -> EmbeddedServer:
    cluster.make_folder(folder)
    users_fd = _open_lock(folder / supervisor.USERS_LOCK)
    try:
        # Waits here while a supervisor stops the server.
        _lock(users_fd, fcntl.LOCK_SH)
        os.utime(users_fd)
        if not _is_served(folder):
            _start_if_needed(folder, progress)
        sockets = cluster.socket_folder(folder)
        if sockets is None:
            raise EmbeddedServerFailed(f"{folder / 'run'} is gone while the server runs.")
        return EmbeddedServer(folder, sockets, users_fd)
    except BaseException:
        os.close(users_fd)
        raise


def _is_served(folder: Path) -> bool:
    sockets = cluster.socket_folder(folder)
    return (
        sockets is not None
        and _supervisor_lives(folder)
        and supervisor.probe(str(sockets)) == supervisor.READY
    )


def _start_if_needed(folder: Path, progress: Progress) -> None:
    """Until the server serves. A supervisor that is killed meanwhile is replaced."""
    with _start_lock(folder):
        if _is_served(folder):  # another process was first
            return
        for _ in range(_SUPERVISORS_TRIED):
            if _supervisor_lives(folder):
                if _wait_until_served(folder, progress):
                    return
            elif _start(folder, progress):
                return
    raise EmbeddedServerFailed(_with_log("The supervisor of the embedded Postgres dies", folder))


def _wait_until_served(folder: Path, progress: Progress) -> bool:
    """The supervisor is at work: the server was killed, and is being started again.

    Returns:
        False when the supervisor died over it.
    """
    progress("waiting for PostgreSQL, which is being started again")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if _is_served(folder):
            return True
        if not _supervisor_lives(folder):
            return False
        time.sleep(_LOCK_POLL_S)
    raise EmbeddedServerFailed(_with_log("The embedded Postgres does not come back", folder))


# --- starting -------------------------------------------------------------------------------


def _start(folder: Path, progress: Progress) -> bool:
    """Make what is missing and start a supervisor. The caller holds the start lock.

    Returns:
        False when the supervisor died before the server was ready.
    """
    identity = cluster.server_identity(folder)
    programs, data = cluster.choose_programs(folder)
    sockets = cluster.make_socket_folder(folder, identity)
    if identity is not None:
        cluster.check_reach(folder, identity)
        programs = within_reach(programs, identity, folder)
        if supervisor.probe(str(sockets)) == supervisor.ABSENT:
            remove_copies(folder, keep=programs)
    for draft in folder.glob("pg*.new.*"):  # of a start that was killed
        shutil.rmtree(draft, ignore_errors=True)
    if not data.exists():
        progress(f"creating a PostgreSQL {programs.version} database in {data}")
        cluster.create_cluster(programs, data, identity)
    progress(f"starting PostgreSQL {programs.version} in {data}")
    plan = supervisor.Plan(
        folder=str(folder),
        data=str(data),
        programs=str(programs.folder),
        sockets=str(sockets),
        uid=identity.user if identity is not None else None,
        gid=identity.group if identity is not None else None,
        linger_s=_linger_s(),
    )
    return _spawn_supervisor(plan, folder)


def _spawn_supervisor(plan: supervisor.Plan, folder: Path) -> bool:
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as report:
        try:
            # By path, isolated: it must not depend on the user's folder, environment or packages.
            subprocess.run(
                [
                    *(sys.executable or "python3", "-I", "-S", supervisor.__file__),
                    *(str(write_fd), json.dumps(plan._asdict())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write_fd,),
                start_new_session=True,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            if error.returncode < 0:
                return False
            raise EmbeddedServerFailed(f"The supervisor cannot be started: {error}") from error
        finally:
            os.close(write_fd)
        readable, _, _ = select.select([report], [], [], _START_TIMEOUT_S)
        told = report.read(4096).decode().strip() if readable else "not in time"
    if told in ("ready", ""):
        return told == "ready"
    raise EmbeddedServerFailed(_with_log(f"The embedded Postgres did not start: {told}", folder))


def _with_log(message: str, folder: Path) -> str:
    """The message, and the last lines of what Postgres and the supervisor said."""
    parts = [f"{message}."]
    for name in (supervisor.SERVER_LOG, supervisor.SUPERVISOR_LOG):
        path = folder / name
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            parts.append(f"End of {path}:\n" + "\n".join(f"  {line}" for line in lines))
    return "\n".join(parts)


def _linger_s() -> float:
    text = os.environ.get("KAGZI_EMBEDDED_LINGER_S", str(LINGER_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InvalidInput(f"KAGZI_EMBEDDED_LINGER_S must be seconds from 0 upwards, not {text!r}.")
    return seconds


# --- locks ----------------------------------------------------------------------------------


def _open_lock(path: Path) -> int:
    """A file description of its own: one that came through fork would share its lock."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock(fd: int, operation: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EmbeddedServerFailed(
                    f"Another process starts or stops the embedded Postgres since more than "
                    f"{_START_TIMEOUT_S:.0f} s."
                ) from None
            time.sleep(_LOCK_POLL_S)


@contextlib.contextmanager
def _start_lock(folder: Path) -> Iterator[None]:
    fd = _open_lock(folder / START_LOCK)
    try:
        _lock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _supervisor_lives(folder: Path) -> bool:
    fd = _open_lock(folder / supervisor.SUPERVISOR_LOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
