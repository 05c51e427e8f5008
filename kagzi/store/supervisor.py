"""Keeps one embedded Postgres running for as long as somebody uses it, then stops it.

Runs as a detached process of its own, by path and on the standard library alone, so that it is
small, starts at once and depends on nothing that the user's program may replace. Starting it,
creating the database and finding the programs is left to `embedded.py`.

Who uses the server is told by a shared lock on the file `users.lock`, which the kernel drops when
its holder dies, however it dies. While somebody holds it, a Postgres that dies is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import IO, NamedTuple

PORT = 5432  # only part of the socket's name: the server opens no TCP port
USER = DATABASE = "kagzi"

USERS_LOCK = "users.lock"  # shared by users; exclusive while the supervisor stops the server
SUPERVISOR_LOCK = "supervisor.lock"  # exclusive for a supervisor's whole life
SERVER_LOG = "server.log"
SUPERVISOR_LOG = "supervisor.log"

READY, STARTING, ABSENT = "ready", "starting", "absent"

_TICK_S = 0.25
_STARTING_TICK_S = 0.01
_RESTART_MIN_S = 0.1
_RESTART_MAX_S = 5.0
_PREDECESSOR_WAIT_S = 0.2
_FAILURES_FORGIVEN = 100  # while a predecessor is in the way: 20 s and more
_FAST_STOP_S = 30.0
_IMMEDIATE_STOP_S = 5.0
_LOG_LIMIT_BYTES = 8 * 1024 * 1024


class Plan(NamedTuple):
    """What to run, and where.

    Attributes:
        folder: Holds the locks and logs; belongs to the user (or root).
        data: The database cluster.
        programs: Folder of `postgres`.
        sockets: Folder of the server's socket, mode 0700.
        uid, gid: Whom the server runs as; None for the supervisor's own user.
        linger_s: How long the server outlives its last user.
    """

    folder: str
    data: str
    programs: str
    sockets: str
    uid: int | None
    gid: int | None
    linger_s: float


def socket_path(sockets: str) -> str:
    return f"{sockets}/.s.PGSQL.{PORT}"


def probe(sockets: str, timeout_s: float = 5.0) -> str:
    """Connect as a client would, up to the server's "ready for query".

    Returns:
        READY when it serves (or has no connection left), STARTING while it starts, recovers or
        shuts down, ABSENT when nobody answers.

    Source: PostgreSQL manual, "Message Flow" and "Message Formats".
    """
    fields = f"user\0{USER}\0database\0{DATABASE}\0application_name\0kagzi-probe\0\0".encode()
    hello = struct.pack("!ii", 8 + len(fields), 196608) + fields
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(socket_path(sockets))
            connection.sendall(hello)
            with connection.makefile("rb") as stream:
                answer = _read_until_decided(stream)
            if answer == READY:
                connection.sendall(b"X\0\0\0\4")
            return answer
        except BlockingIOError:  # a listener whose queue is full
            return STARTING
        except OSError:
            return ABSENT


def _read_until_decided(stream: IO[bytes]) -> str:
    while True:
        head = stream.read(5)
        if len(head) < 5:
            return ABSENT
        kind, length = struct.unpack("!ci", head)
        body = stream.read(length - 4)
        if kind == b"Z":
            return READY
        if kind == b"E":
            # 57P03: cannot connect now. Any other refusal comes from a server that works.
            return STARTING if b"C57P03\0" in body else READY


def is_postmaster(pid: int, data: str) -> bool:
    """Whether this process is the Postgres of this data folder, and not another with its number."""
    if os.path.exists("/proc/self/cwd"):
        try:
            return os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(data)
        except OSError:
            return False
    listed = subprocess.run(
        ["/bin/ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return f"-D {data} " in listed.stdout


def read_pid(lock_file: str) -> int | None:
    """The first line of `postmaster.pid` or of a socket's lock file."""
    try:
        with open(lock_file, encoding="utf-8", errors="replace") as lines:
            return abs(int(lines.readline()))
    except (OSError, ValueError):
        return None


class Supervisor:
    def __init__(self, plan: Plan, report_fd: int) -> None:
        self.plan = plan
        self.report_fd = report_fd
        self.users_fd = os.open(f"{plan.folder}/{USERS_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
        self.child: subprocess.Popen[bytes] | None = None
        self.has_adopted = False
        self.is_ready = False
        self.failures = 0  # since it was last ready
        self.restart_wait_s = 0.0
        self.idle_since: float | None = None  # wall clock, comparable with the lock file's mtime
        self.stop_signalled = False
        self.log_offset = 0
        self._wake_r, wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop_signal)

    def run(self) -> int:
        """Until nobody uses the server, a signal asks for the end, or the folder is gone."""
        tick_s = min(_TICK_S, max(self.plan.linger_s / 4, _STARTING_TICK_S))
        self._adopt()
        while not self.stop_signalled:
            if not self._server_lives():
                if self._gives_up():
                    return 1
                self._start()
            elif not self.is_ready:
                self._look_whether_ready()
            if self._folder_is_gone():
                self._stop(signal.SIGQUIT)
                return 0
            if self._nobody_is_left():
                break
            self._sleep(tick_s if self.is_ready else _STARTING_TICK_S)
        self._stop(signal.SIGINT)
        return 0

    # --- the server -------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the Postgres of a supervisor that was killed."""
        self.has_adopted = self._an_orphan_lives()
        if self.has_adopted:
            log(f"takes over the running Postgres, process {self._orphan_pid()}")

    def _orphan_pid(self) -> int | None:
        return read_pid(f"{self.plan.data}/postmaster.pid")

    def _an_orphan_lives(self) -> bool:
        pid = self._orphan_pid()
        if pid is not None and is_postmaster(pid, self.plan.data):
            return True
        return probe(self.plan.sockets) != ABSENT

    def _server_lives(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return self.has_adopted and self._an_orphan_lives()

    def _look_whether_ready(self) -> None:
        if probe(self.plan.sockets) == READY:
            self.is_ready = True
            self.failures = 0
            self.restart_wait_s = 0.0
            self._report("ready")

    def _gives_up(self) -> bool:
        """After a first start that failed for good; later ones are tried again and again."""
        if self.child is None:
            return False
        ended = self.child.returncode
        self.child = None
        log(f"Postgres ended with {ended}")
        self.failures += 1
        if self._a_predecessor_is_in_the_way():
            self.restart_wait_s = _PREDECESSOR_WAIT_S
            forgiven = self.failures < _FAILURES_FORGIVEN
        else:
            self.restart_wait_s = min(max(_RESTART_MIN_S, 2 * self.restart_wait_s), _RESTART_MAX_S)
            forgiven = ended == -signal.SIGKILL
        if forgiven or self.report_fd < 0:
            return False
        self._report(f"postgres ended with {ended}")
        return True

    def _a_predecessor_is_in_the_way(self) -> bool:
        """Backends of a killed server take a moment to notice and leave."""
        with open(f"{self.plan.folder}/{SERVER_LOG}", "rb") as server_log:
            server_log.seek(self.log_offset)
            said = server_log.read(65536)
        return b"pre-existing shared memory block" in said or b"lock file" in said

    def _start(self) -> None:
        plan = self.plan
        self.is_ready = False
        self.has_adopted = False
        self._sleep(self.restart_wait_s)
        disown_lock_file(f"{plan.data}/postmaster.pid", plan.data)
        disown_lock_file(f"{socket_path(plan.sockets)}.lock", plan.data)
        with open_log(f"{plan.folder}/{SERVER_LOG}") as server_log:
            self.log_offset = server_log.seek(0, os.SEEK_END)
            self.child = subprocess.Popen(
                [
                    f"{plan.programs}/postgres",
                    *("-D", plan.data),
                    *("-p", str(PORT)),
                    *("-c", "listen_addresses="),
                    *("-c", f"unix_socket_directories={plan.sockets}"),
                    *("-c", "unix_socket_permissions=0700"),
                    *("-c", "logging_collector=off"),
                    *("-c", "log_destination=stderr"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=server_log,
                stderr=server_log,
                env=server_environment(),
                cwd=plan.data,
                start_new_session=True,
                umask=0o077,
                user=plan.uid,
                group=plan.gid,
                extra_groups=None if plan.uid is None else (),
            )
        log(f"started Postgres, process {self.child.pid}")

    def _stop(self, first_signal: signal.Signals) -> None:
        for number, patience_s in (
            (first_signal, _FAST_STOP_S),
            (signal.SIGQUIT, _IMMEDIATE_STOP_S),
            (signal.SIGKILL, _IMMEDIATE_STOP_S),
        ):
            pid = self.child.pid if self.child is not None else self._orphan_pid()
            if pid is None or not self._server_lives():
                return
            log(f"stops Postgres, process {pid}, with {number.name}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + patience_s
            while self._server_lives() and time.monotonic() < deadline:
                self._sleep(_STARTING_TICK_S)

    # --- its users --------------------------------------------------------------------------

    def _nobody_is_left(self) -> bool:
        """True at the end of the linger; the users' lock is then held, so that nobody comes in."""
        try:
            fcntl.flock(self.users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.idle_since = None
            return False
        now = time.time()
        if self.idle_since is None:
            self.idle_since = now
        # Users touch the file when they come and go: a short visit between two looks counts too.
        last_use = max(self.idle_since, min(now, os.fstat(self.users_fd).st_mtime))
        if now - last_use >= self.plan.linger_s:
            log("nobody uses the server any more")
            return True
        fcntl.flock(self.users_fd, fcntl.LOCK_UN)
        return False

    def _folder_is_gone(self) -> bool:
        try:
            there = os.stat(f"{self.plan.folder}/{USERS_LOCK}")
        except OSError:
            there = None
        gone = there is None or not os.path.samestat(there, os.fstat(self.users_fd))
        if gone:
            log("its folder is gone")
        return gone

    # --- small things -----------------------------------------------------------------------

    def _report(self, line: str) -> None:
        """Tell whoever started the supervisor, once."""
        if self.report_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self.report_fd, line.encode() + b"\n")
            os.close(self.report_fd)
            self.report_fd = -1

    def _sleep(self, seconds: float) -> None:
        """Until then, or until a child ends or a signal comes."""
        readable, _, _ = select.select([self._wake_r], [], [], seconds)
        if readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)

    def _on_stop_signal(self, number: int, _frame: object) -> None:
        self.stop_signalled = True


def disown_lock_file(path: str, data: str) -> None:
    """Mend a lock file of a dead server whose process number now belongs to somebody else.

    Postgres refuses to start while that number is alive. It takes its own parent's number for a
    stale one, and then still looks for backends left behind, which deleting the file would skip.

    Source: PostgreSQL, src/backend/utils/init/miscinit.c, CreateLockFile.
    """
    pid = read_pid(path)
    if pid is None or pid == os.getpid() or is_postmaster(pid, data):
        return
    try:
        os.kill(pid, 0)
    except OSError:
        return
    log(f"{path} names process {pid}, which is no Postgres of this folder")
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    with os.fdopen(fd, "r+", encoding="utf-8", errors="surrogateescape") as lock_file:
        lines = lock_file.readlines()
        lines[0] = f"{os.getpid()}\n"
        lock_file.seek(0)
        lock_file.truncate()
        lock_file.writelines(lines)


def server_environment() -> dict[str, str]:
    """Nothing of the user's environment that changes how Postgres behaves (PGPORT, PGDATA, …)."""
    kept = ("PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | {"LC_ALL": "C"}


def open_log(path: str) -> IO[bytes]:
    """Open for appending; a log that grew large is set aside first."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_size > _LOG_LIMIT_BYTES:
            os.replace(path, f"{path}.1")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "ab")


def log(line: str) -> None:
    at = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        os.write(2, f"{at} [{os.getpid()}] {line}\n".encode())


def hold_supervisor_lock(folder: str) -> bool:
    """Become the one supervisor of this folder. Held until this process ends.

    Users that look whether there is a supervisor hold the lock for an instant, hence the retries.
    """
    lock_fd = os.open(f"{folder}/{SUPERVISOR_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            select.select([], [], [], 0.005)
    return False


def main() -> int:
    report_fd = int(sys.argv[1])
    plan = Plan(**json.loads(sys.argv[2]))
    if os.fork() > 0:
        os._exit(0)  # the user's process has no child left to wait for
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # whatever the user's thread had blocked
    os.chdir("/")
    os.umask(0o077)
    with open_log(f"{plan.folder}/{SUPERVISOR_LOG}") as own_log:
        for fd in (1, 2):
            os.dup2(own_log.fileno(), fd)
    if not hold_supervisor_lock(plan.folder):
        log("another supervisor is at work")
        return 1
    return Supervisor(plan, report_fd).run()


if __name__ == "__main__":
    sys.exit(main())
