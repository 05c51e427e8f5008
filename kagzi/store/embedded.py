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
import pwd
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import platformdirs

from kagzi.errors import EmbeddedServerFailed, InvalidInput, PostgresNotFound
from kagzi.store import supervisor
from kagzi.store.binaries import (
    Identity,
    Programs,
    find_programs,
    remove_copies,
    run_as,
    within_reach,
)

START_LOCK = "start.lock"
LINGER_S = 5.0

_LOCK_POLL_S = 0.01
_START_TIMEOUT_S = 120.0
_SUPERVISORS_TRIED = 5
_WATCH_S = 1.0
_SOCKET_PATH_LIMIT_BYTES = 100  # the kernel's limit: 103 on macOS, 107 on Linux
_SERVER_USERS = ("postgres", "_postgres", "nobody")  # whom the server runs as when we are root

_SETTINGS = """
# Set by kagzi when it made this folder; yours to change.
max_connections = 100
shared_buffers = 128MB
fsync = on
log_line_prefix = '%m [%p] %a '
"""

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
    _make_folder(folder)
    users_fd = _open_lock(folder / supervisor.USERS_LOCK)
    try:
        # Waits here while a supervisor stops the server.
        _lock(users_fd, fcntl.LOCK_SH)
        os.utime(users_fd)
        if not _is_served(folder):
            _start_if_needed(folder, progress)
        sockets = _socket_folder(folder)
        if sockets is None:
            raise EmbeddedServerFailed(f"{folder / 'run'} is gone while the server runs.")
        return EmbeddedServer(folder, sockets, users_fd)
    except BaseException:
        os.close(users_fd)
        raise


def _is_served(folder: Path) -> bool:
    sockets = _socket_folder(folder)
    return (
        sockets is not None
        and _supervisor_lives(folder)
        and supervisor.probe(str(sockets)) == supervisor.READY
    )


def _start_if_needed(folder: Path, progress: Progress) -> None:
    """Until the server serves. A supervisor that is killed meanwhile is replaced."""
    with _start_lock(folder):
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
    identity = _server_identity(folder)
    programs, data = _choose_programs(folder)
    sockets = _make_socket_folder(folder, identity)
    if identity is not None:
        _check_reach(folder, identity)
        programs = within_reach(programs, identity, folder)
        if supervisor.probe(str(sockets)) == supervisor.ABSENT:
            remove_copies(folder, keep=programs)
    for draft in folder.glob("pg*.new.*"):  # of a start that was killed
        shutil.rmtree(draft, ignore_errors=True)
    if not data.exists():
        progress(f"creating a PostgreSQL {programs.version} database in {data}")
        _create_cluster(programs, data, identity)
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


def _server_identity(folder: Path) -> Identity | None:
    """Whom the server runs as, since Postgres refuses to be root. None: the present user."""
    if os.geteuid() != 0:
        return None
    for cluster in _clusters(folder).values():
        owner = cluster.stat()  # stays the same when a better user appears on this machine
        return Identity(owner.st_uid, owner.st_gid)
    for name in _SERVER_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Identity(entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerFailed(
        "Postgres refuses to run as root, and none of the users "
        f"{', '.join(_SERVER_USERS)} exists here. Run kagzi as an ordinary user, or set "
        "DATABASE_URL."
    )


def _clusters(folder: Path) -> dict[int, Path]:
    """Data folders by major version, the newest first."""
    found = {
        int(name[1]): path
        for path in folder.glob("pg*")
        if (name := re.fullmatch(r"pg(\d+)", path.name)) and (path / "PG_VERSION").exists()
    }
    return dict(sorted(found.items(), reverse=True))


def _choose_programs(folder: Path) -> tuple[Programs, Path]:
    """Programs that fit the data that is there; a folder per major version, the newest first."""
    clusters = _clusters(folder)
    if not clusters or os.environ.get("KAGZI_PG_BIN"):
        programs = find_programs()
        return programs, folder / f"pg{programs.major}"
    for major, cluster in clusters.items():
        with contextlib.suppress(PostgresNotFound):
            return find_programs(major), cluster
    newest = max(clusters)
    raise PostgresNotFound(
        f"The data in {clusters[newest]} was made by PostgreSQL {newest}, and no programs of that "
        "version were found. Install them (pip install 'kagzi[embedded]', or your distribution's "
        "packages), set KAGZI_PG_BIN to their folder, or set KAGZI_DATA to another folder to "
        "start with empty data."
    )


def _check_reach(folder: Path, identity: Identity) -> None:
    """As root: whether the server's user can pass to its data. No folder is opened up for it."""
    test = shutil.which("test") or "/usr/bin/test"
    passed = subprocess.run([test, "-x", folder], cwd="/", check=False, **run_as(identity))
    if passed.returncode != 0:
        raise EmbeddedServerFailed(
            f"As root, Postgres runs as user {identity.user}, which cannot reach {folder}. Set "
            "KAGZI_DATA to a folder below ones that everybody may pass, such as /var/lib/kagzi."
        )


def _create_cluster(programs: Programs, data: Path, identity: Identity | None) -> None:
    """All of it or nothing: made under another name, then renamed."""
    draft = Path(tempfile.mkdtemp(prefix=f"{data.name}.new.", dir=data.parent))
    try:
        if identity is not None:
            os.chown(draft, identity.user, identity.group)
        initdb = [programs.initdb, "-D", str(draft), "-U", supervisor.USER]
        options = ["--auth-local=trust", "--auth-host=reject", "-E", "UTF8", "--locale=C"]
        _run(initdb + options, "", identity)
        # As the server's user: root should not write where another may have put a link.
        append = ["/bin/sh", "-c", 'cat >> "$0"', str(draft / "postgresql.conf")]
        _run(append, _SETTINGS, identity)
        single = [programs.postgres, "--single", "-D", str(draft), "template1"]
        _run(single, f"CREATE DATABASE {supervisor.DATABASE}\n", identity)
        draft.rename(data)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _run(command: list[str], stdin: str, identity: Identity | None) -> None:
    done = subprocess.run(
        command,
        input=stdin,
        text=True,
        errors="replace",
        capture_output=True,
        check=False,
        cwd="/",
        env=supervisor.server_environment(),
        umask=0o077,
        **run_as(identity),
    )
    if done.returncode != 0:
        raise EmbeddedServerFailed(
            f"{command[0]} failed with {done.returncode}: {done.stderr.strip()[-2000:]}"
        )


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


# --- folders --------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    """Ours alone; as root, the server's user may pass to its two folders in it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise EmbeddedServerFailed(
                f"{folder} belongs to another user or is writable by everybody. "
                "Set KAGZI_DATA to a folder of yours."
            ) from None
    else:
        if os.geteuid() == 0:
            folder.chmod(0o755)


def _make_socket_folder(folder: Path, identity: Identity | None) -> Path:
    """`run` in the data folder; where that is too long for a socket, a link to a short one."""
    existing = _socket_folder(folder)
    if existing is not None:
        return existing
    run = folder / "run"
    run.unlink(missing_ok=True)  # a link whose target is gone
    path_bytes = os.fsencode(supervisor.socket_path(str(run)))
    # A comma or a space would need quoting that the server and its clients understand differently.
    plain = re.fullmatch(rb"[A-Za-z0-9/._@+-]+", path_bytes) is not None
    if plain and len(path_bytes) <= _SOCKET_PATH_LIMIT_BYTES:
        run.mkdir(mode=0o700)
        made = run
    else:
        made = Path(tempfile.mkdtemp(prefix="kagzi-", dir="/tmp"))  # new, 0700
        run.symlink_to(made)
    if identity is not None:
        os.chown(made, identity.user, identity.group)
    return made


def _socket_folder(folder: Path) -> Path | None:
    """Where the socket is; None when the folder is not there, or not one that we made."""
    run = folder / "run"
    target = Path(os.readlink(run)) if run.is_symlink() else run
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    identity = _server_identity(folder)
    owner = os.geteuid() if identity is None else identity.user
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == owner and found.st_mode & 0o077 == 0
    return target if is_ours else None


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
