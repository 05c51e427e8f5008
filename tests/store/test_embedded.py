"""The embedded server: shared, stopped when nobody uses it, and hard to break.

Users are processes of their own here, since what counts is what happens when one is killed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import psycopg
import pytest

from kagzi.errors import EmbeddedServerFailed, InvalidInput, PostgresNotFound
from kagzi.store import binaries, embedded, supervisor

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root changes its user")

ATTACH = "import sys, pathlib; from kagzi.store import embedded; "
ATTACH += "server = embedded.attach(pathlib.Path(sys.argv[1])); print(server.dsn, flush=True); "
WAIT_FOR_END_OF_INPUT = "sys.stdin.read()"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """A database folder as kagzi makes it, for copying: creating one takes half a second."""
    with place_for_data() as folder:
        with embedded.attach(folder):
            pass
        wait_until_nothing_runs(folder)
        yield next(folder.glob("pg*"))


@pytest.fixture
def empty_folder() -> Iterator[Path]:
    """A folder that is not there yet, but can be; nothing of it runs on afterwards."""
    with place_for_data() as folder:
        yield folder


@pytest.fixture
def folder(empty_folder: Path, cluster: Path) -> Path:
    """A folder with data in it."""
    empty_folder.mkdir(mode=0o755 if IS_ROOT else 0o700)
    subprocess.run(["cp", "-a", cluster, empty_folder], check=True)
    return empty_folder


@contextmanager
def place_for_data() -> Iterator[Path]:
    """Below a folder that the user of root's server can pass, which pytest's own are not."""
    parent = Path(tempfile.mkdtemp(prefix="kagzi-embedded-", dir="/var/tmp" if IS_ROOT else None))
    if IS_ROOT:
        parent.chmod(0o755)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("KAGZI_EMBEDDED_LINGER_S", "0.1")
        yield parent / "data"
    for process in processes_of(parent):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run = parent / "data" / "run"
    if run.is_symlink():
        shutil.rmtree(os.readlink(run), ignore_errors=True)
    shutil.rmtree(parent, ignore_errors=True)


class Users:
    """Starts processes that use a server, and ends those that are left."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def begin(self, folder: Path, then: str = WAIT_FOR_END_OF_INPUT) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", ATTACH + then, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def start(self, folder: Path, then: str = WAIT_FOR_END_OF_INPUT) -> subprocess.Popen[str]:
        process = self.begin(folder, then)
        assert line_of(process.stdout).startswith("postgresql:"), line_of(process.stderr)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def users() -> Iterator[Users]:
    made = Users()
    yield made
    made.close()


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Postgres and supervisors whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            ours = "supervisor.py" in words or "postgres" in words
            if ours and f"{folder}/" in words and is_alive(process):
                found.append(process)
    return found


def supervisor_of(folder: Path) -> psutil.Process:
    (found,) = [p for p in processes_of(folder) if "supervisor.py" in " ".join(p.cmdline())]
    return found


def postmaster_pid(folder: Path) -> int:
    (cluster,) = folder.glob("pg*")
    pid = supervisor.read_pid(str(cluster / "postmaster.pid"))
    assert pid is not None
    return pid


def wait_for_looks(folder: Path) -> None:
    """Until the supervisor has looked after its users three more times."""
    process = supervisor_of(folder)
    enough = process.num_ctx_switches().voluntary + 3
    wait_until(lambda: process.num_ctx_switches().voluntary >= enough, "the supervisor looks")


def kill_and_wait(process: psutil.Process) -> None:
    process.kill()
    wait_until(lambda: not is_alive(process), "the process is gone")


def is_alive(process: psutil.Process) -> bool:
    """Zombies, which nobody may be there to collect, are dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_nothing_runs(folder: Path) -> None:
    wait_until(lambda: not processes_of(folder), "no process left behind")


def ask(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
    return row[0] if row is not None else None


def answers(dsn: str) -> bool:
    try:
        return ask(dsn, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def modes(*starts: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode and owners of these paths and of all folders above them."""
    paths = {path for start in starts for path in (start, *start.parents)}
    return {p: (s.st_mode, s.st_uid, s.st_gid) for p in paths for s in [p.stat()]}


# --- sharing and stopping -------------------------------------------------------------------


def test_second_attach_shares_the_running_server(folder: Path) -> None:
    with embedded.attach(folder) as first, embedded.attach(folder) as second:
        assert first.dsn == second.dsn
        assert ask(first.dsn, "SELECT current_database()") == "kagzi"
        wait_until(lambda: len(processes_of(folder)) == 2, "one Postgres, one supervisor")
        assert first.log_path.exists()
    wait_until_nothing_runs(folder)


def test_eight_processes_attaching_at_once_share_one_server(
    empty_folder: Path, users: Users
) -> None:
    processes = [users.begin(empty_folder) for _ in range(8)]
    told = {line_of(process.stdout) for process in processes}
    assert len(told) == 1
    assert told.pop().startswith("postgresql://")
    wait_until(lambda: len(processes_of(empty_folder)) == 2, "one Postgres, one supervisor")
    assert len(list(empty_folder.glob("pg*"))) == 1
    users.close()
    wait_until_nothing_runs(empty_folder)


def test_data_stays_between_uses(folder: Path) -> None:
    with embedded.attach(folder) as server:
        with psycopg.connect(server.dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS number")
    wait_until_nothing_runs(folder)
    with embedded.attach(folder) as server:
        assert ask(server.dsn, "SELECT number FROM kept") == 42


def test_server_stops_after_its_only_user_is_killed(folder: Path, users: Users) -> None:
    users.start(folder).kill()
    wait_until_nothing_runs(folder)
    assert "database system is shut down" in (folder / supervisor.SERVER_LOG).read_text()


def test_server_stays_while_another_user_is_there(folder: Path, users: Users) -> None:
    first = users.start(folder)
    with embedded.attach(folder) as server:
        pid = postmaster_pid(folder)
        first.kill()
        first.wait()
        closing = embedded.attach(folder)
        closing.close()
        wait_for_looks(folder)
        assert answers(server.dsn)
        assert postmaster_pid(folder) == pid


def test_closing_twice_is_harmless(folder: Path) -> None:
    server = embedded.attach(folder)
    server.close()
    server.close()
    wait_until_nothing_runs(folder)


def test_interrupt_in_the_terminal_does_not_reach_the_server(folder: Path, users: Users) -> None:
    starter = users.start(folder)
    with embedded.attach(folder) as server:
        pid = postmaster_pid(folder)
        os.killpg(starter.pid, signal.SIGINT)
        starter.wait(timeout=20)
        assert answers(server.dsn)
        assert postmaster_pid(folder) == pid


@pytest.mark.parametrize(
    "outliving",
    [
        "import os; child = os.fork(); child or __import__('time').sleep(60); sys.stdin.read()",
        "import subprocess as s; s.Popen(['sleep', '60'], close_fds=False); sys.stdin.read()",
    ],
    ids=["forked", "executed"],
)
def test_child_that_outlives_the_user_does_not_keep_the_server(
    folder: Path, users: Users, outliving: str
) -> None:
    user = users.start(folder, outliving)
    wait_until(lambda: psutil.Process(user.pid).children(), "the child")
    (child,) = psutil.Process(user.pid).children()
    try:
        user.kill()
        wait_until_nothing_runs(folder)
        assert child.is_running()
    finally:
        child.kill()


# --- kill -9 --------------------------------------------------------------------------------


def test_killed_server_comes_back_while_it_has_users_and_keeps_what_was_committed(
    folder: Path,
) -> None:
    with embedded.attach(folder) as server:
        with psycopg.connect(server.dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS number")
        pid = postmaster_pid(folder)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: answers(server.dsn), "the server is back")
        assert postmaster_pid(folder) != pid
        assert ask(server.dsn, "SELECT number FROM kept") == 42
    wait_until_nothing_runs(folder)


def test_killed_server_comes_back_while_a_connection_of_it_is_busy(folder: Path) -> None:
    with embedded.attach(folder) as server:
        with psycopg.connect(server.dsn) as connection:
            connection.execute("SET client_min_messages = 'warning'")
            os.kill(postmaster_pid(folder), signal.SIGKILL)
            with embedded.attach(folder) as again:
                assert answers(again.dsn)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")


def test_attach_starts_a_server_again_that_was_killed_with_its_supervisor(
    folder: Path, users: Users
) -> None:
    user = users.start(folder)
    pid = postmaster_pid(folder)
    user.kill()
    supervisor_of(folder).kill()
    os.kill(pid, signal.SIGKILL)
    with embedded.attach(folder) as server:
        assert answers(server.dsn)
    wait_until_nothing_runs(folder)


def test_killed_supervisor_is_replaced_by_one_of_the_users(folder: Path) -> None:
    with embedded.attach(folder) as server:
        pid = postmaster_pid(folder)
        killed = supervisor_of(folder)
        killed.kill()
        wait_until(
            lambda: [p for p in processes_of(folder) if p.pid not in (pid, killed.pid)],
            "another supervisor",
        )
        assert answers(server.dsn)
        assert postmaster_pid(folder) == pid
        os.kill(pid, signal.SIGKILL)  # it can start a server that it has only taken over
        wait_until(lambda: answers(server.dsn), "the server is back")
    wait_until_nothing_runs(folder)


def test_supervisor_killed_just_before_the_last_user_leaves_is_replaced(folder: Path) -> None:
    server = embedded.attach(folder)
    kill_and_wait(supervisor_of(folder))
    server.close()
    wait_until_nothing_runs(folder)


def test_attach_takes_over_a_server_without_supervisor(
    folder: Path, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGZI_EMBEDDED_LINGER_S", "30")
    user = users.start(folder)
    pid = postmaster_pid(folder)
    user.kill()
    kill_and_wait(supervisor_of(folder))
    monkeypatch.setenv("KAGZI_EMBEDDED_LINGER_S", "0.2")
    with embedded.attach(folder) as server:
        assert answers(server.dsn)
        assert postmaster_pid(folder) == pid
    wait_until_nothing_runs(folder)


def test_user_killed_while_it_creates_the_database_leaves_no_broken_folder(
    empty_folder: Path, users: Users
) -> None:
    user = users.begin(empty_folder)
    wait_until(lambda: list(empty_folder.glob("pg*/PG_VERSION")), "initdb at work")
    user.kill()
    user.wait()
    with embedded.attach(empty_folder) as server:
        assert answers(server.dsn)
    assert len([path for path in empty_folder.glob("pg*") if ".new." not in path.name]) == 1


def test_lock_file_with_the_number_of_another_process_does_not_stop_the_start(
    folder: Path,
) -> None:
    with embedded.attach(folder) as server:
        dsn = server.dsn
        owner = Path(f"/proc/{postmaster_pid(folder)}").stat().st_uid if IS_ROOT else None
        lock_file = next(folder.glob("pg*")) / "postmaster.pid"
        lines = lock_file.read_text().splitlines(keepends=True)
    wait_until_nothing_runs(folder)
    stranger = subprocess.Popen(["sleep", "60"], user=owner)
    try:
        lock_file.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        with embedded.attach(folder):
            assert answers(dsn)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_processes_end_when_their_folder_is_deleted(folder: Path) -> None:
    with embedded.attach(folder):
        shutil.rmtree(folder)
        wait_until_nothing_runs(folder)
    with embedded.attach(folder) as server:
        assert answers(server.dsn)


# --- folders and permissions ----------------------------------------------------------------


def test_no_permission_of_an_existing_folder_changes(empty_folder: Path) -> None:
    empty_folder.mkdir(mode=0o711)
    programs = binaries.find_programs()
    before = modes(empty_folder, programs.folder / "postgres", programs.folder.parent / "lib")
    with embedded.attach(empty_folder):
        pass
    after = modes(*before)
    assert after == before
    wait_until_nothing_runs(empty_folder)


def test_socket_is_for_the_servers_user_alone_and_there_is_no_tcp(folder: Path) -> None:
    with embedded.attach(folder) as server:
        assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o700
        assert ask(server.dsn, "SHOW listen_addresses") == ""
        assert ask(server.dsn, "SHOW fsync") == "on"
        host = ask(server.dsn, "SHOW unix_socket_directories")
        assert host == str(folder / "run")


@pytest.mark.parametrize("name", ["x" * 90, "with space, comma and %41 ü"], ids=["long", "odd"])
def test_folder_whose_path_does_not_suit_a_socket_works(empty_folder: Path, name: str) -> None:
    data = empty_folder.parent / name / "data"
    data.parent.mkdir()
    with embedded.attach(data) as first, embedded.attach(data) as second:
        assert first.dsn == second.dsn
        assert answers(first.dsn)
        target = Path(os.readlink(data / "run"))
        assert stat.S_IMODE(target.stat().st_mode) == 0o700
    wait_until_nothing_runs(data)
    # As after a reboot that emptied /tmp.
    shutil.rmtree(target)
    with embedded.attach(data) as again:
        assert answers(again.dsn)
        made = os.readlink(data / "run")
    wait_until_nothing_runs(data)
    shutil.rmtree(made)


def test_folder_that_everybody_may_write_is_refused(empty_folder: Path) -> None:
    empty_folder.mkdir()
    empty_folder.chmod(0o777)
    with pytest.raises(EmbeddedServerFailed, match="KAGZI_DATA"):
        embedded.attach(empty_folder)
    assert list(empty_folder.iterdir()) == []


def test_path_that_is_no_folder_is_refused(empty_folder: Path) -> None:
    empty_folder.write_text("a file")
    with pytest.raises(EmbeddedServerFailed, match="KAGZI_DATA"):
        embedded.attach(empty_folder)


@needs_root
def test_folder_that_the_servers_user_cannot_reach_is_refused_and_left_closed(
    empty_folder: Path,
) -> None:
    empty_folder.parent.chmod(0o700)
    with pytest.raises(EmbeddedServerFailed, match="KAGZI_DATA"):
        embedded.attach(empty_folder)
    assert stat.S_IMODE(empty_folder.parent.stat().st_mode) == 0o700


@needs_root
def test_server_keeps_running_as_the_user_who_owns_its_data(folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    for path in folder.rglob("*"):
        os.lchown(path, nobody.pw_uid, nobody.pw_gid)
    with embedded.attach(folder) as server:
        assert answers(server.dsn)
        owners = {p.username() for p in processes_of(folder) if "postgres" in p.name()}
    assert owners == {"nobody"}


@needs_root
def test_programs_that_the_servers_user_cannot_reach_are_copied_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = binaries.find_programs()
    root, bin_in_root, parts = binaries._parts_to_copy(programs.folder)
    private = folder.parent / "private"
    private.mkdir(mode=0o700)
    for part in parts:
        shutil.copytree(root / part, private / "site" / part, symlinks=True)
    monkeypatch.setenv("KAGZI_PG_BIN", str(private / "site" / bin_in_root))
    with embedded.attach(folder) as server:
        assert answers(server.dsn)
    wait_until_nothing_runs(folder)
    (copy,) = folder.glob("postgres-*")
    made_at = copy.stat().st_ctime_ns
    with embedded.attach(folder) as server:
        assert answers(server.dsn)
    assert copy.stat().st_ctime_ns == made_at
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    wait_until_nothing_runs(folder)


@needs_root
def test_ordinary_user_can_use_it_too(empty_folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    site = Path(psycopg.__file__).parents[1]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = (
        "import pathlib, sys, psycopg; from kagzi.store import embedded\n"
        "with embedded.attach(pathlib.Path(sys.argv[1])) as server:\n"
        "    with psycopg.connect(server.dsn) as connection:\n"
        "        print(connection.execute('SELECT 42').fetchone())\n"
    )
    empty_folder.parent.chmod(0o777)
    said = []
    for interpreter in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with suppress(OSError):
            done = subprocess.run(
                [interpreter, "-c", program, str(empty_folder)],
                user=nobody.pw_uid,
                group=nobody.pw_gid,
                extra_groups=(),
                cwd="/",
                env={
                    "PYTHONPATH": f"{ROOT}:{site}",
                    "PATH": "/usr/bin:/bin",
                    "KAGZI_EMBEDDED_LINGER_S": "0.2",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                capture_output=True,
                text=True,
                check=False,
            )
            said.append(done.stderr)
            if done.stdout == "(42,)\n":
                break
            if "ModuleNotFoundError" not in done.stderr:
                pytest.fail(done.stderr)
    else:
        pytest.skip(f"no interpreter and packages that nobody can read: {said}")
    found = empty_folder.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (nobody.pw_uid, 0o700)
    wait_until_nothing_runs(empty_folder)


# --- programs and settings ------------------------------------------------------------------


def fake_programs(folder: Path, version_line: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (folder / name).write_text(f"#!/bin/sh\necho '{version_line}'\n")
        (folder / name).chmod(0o755)
    return folder


def test_missing_programs_are_an_error_that_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGZI_PG_BIN", str(tmp_path))
    with pytest.raises(PostgresNotFound) as raised:
        embedded.find_binaries()
    for way_out in ("kagzi[embedded]", "DATABASE_URL", "KAGZI_PG_BIN", str(tmp_path)):
        assert way_out in str(raised.value)


def test_wheel_comes_before_the_path_and_the_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAGZI_PG_BIN", raising=False)
    on_path = fake_programs(tmp_path / "bin", "postgres (PostgreSQL) 17.1")
    monkeypatch.setenv("PATH", str(on_path), prepend=os.pathsep)
    wheel = fake_programs(tmp_path / "wheel" / "bin", "postgres (PostgreSQL) 16.2")
    monkeypatch.setattr(binaries, "_wheel_folders", lambda: iter([wheel]))
    assert embedded.find_binaries() == wheel
    monkeypatch.setattr(binaries, "_wheel_folders", lambda: iter([]))
    assert embedded.find_binaries() == on_path


@pytest.mark.parametrize(
    ("version_line", "major"),
    [
        ("postgres (PostgreSQL) 14.0", 14),
        ("postgres (PostgreSQL) 18beta1", 18),
        ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", 15),
        ("postgres (PostgreSQL) 13.22", None),
        ("postgres (PostgreSQL) 9.6.24", None),
        ("no version at all", None),
    ],
)
def test_programs_older_than_14_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version_line: str, major: int | None
) -> None:
    monkeypatch.setenv("KAGZI_PG_BIN", str(fake_programs(tmp_path / "bin", version_line)))
    if major is None:
        with pytest.raises(PostgresNotFound):
            binaries.find_programs()
    else:
        assert binaries.find_programs().major == major


def test_folders_are_sorted_by_version_number() -> None:
    folders = [Path(f"/usr/lib/postgresql/{v}/bin") for v in ("9.6", "14", "18", "16")]
    names = [f.parent.name for f in sorted(folders, key=binaries._version_in_path, reverse=True)]
    assert names == ["18", "16", "14", "9.6"]


def test_data_of_another_version_is_opened_with_the_programs_that_made_it(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = binaries.find_programs()
    older = next((v for v in (17, 16, 15, 14) if v != newest.major and found(v)), None)
    if older is None:
        pytest.skip("only one version of Postgres here")
    monkeypatch.setenv("KAGZI_PG_BIN", str(binaries.find_programs(older).folder))
    with embedded.attach(empty_folder) as server:
        assert int(str(ask(server.dsn, "SHOW server_version_num"))) // 10000 == older
    wait_until_nothing_runs(empty_folder)
    monkeypatch.delenv("KAGZI_PG_BIN")
    with embedded.attach(empty_folder) as server:
        assert int(str(ask(server.dsn, "SHOW server_version_num"))) // 10000 == older


def found(major: int) -> bool:
    with suppress(PostgresNotFound):
        binaries.find_programs(major)
        return True
    return False


def test_data_without_fitting_programs_is_refused_instead_of_starting_empty(
    empty_folder: Path,
) -> None:
    (empty_folder / "pg99").mkdir(parents=True)
    (empty_folder / "pg99" / "PG_VERSION").write_text("99\n")
    with pytest.raises(PostgresNotFound, match="PostgreSQL 99"):
        embedded.attach(empty_folder)
    assert [path.name for path in empty_folder.glob("pg*")] == ["pg99"]


def test_server_that_cannot_start_is_an_error_with_the_end_of_its_log(folder: Path) -> None:
    with embedded.attach(folder):
        pass
    wait_until_nothing_runs(folder)
    (cluster,) = folder.glob("pg*")
    with (cluster / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedServerFailed, match="no_such_setting"):
        embedded.attach(folder)
    wait_until_nothing_runs(folder)


def test_settings_of_libpq_in_the_environment_do_not_disturb(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere.invalid",
        "PGDATABASE": "other",
        "PGUSER": "other",
        "PGDATA": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    with embedded.attach(folder) as server:
        assert ask(server.dsn, "SELECT current_user || current_database()") == "kagzikagzi"


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_linger_that_is_no_duration_is_refused(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("KAGZI_EMBEDDED_LINGER_S", value)
    with pytest.raises(InvalidInput, match="KAGZI_EMBEDDED_LINGER_S"):
        embedded.attach(empty_folder)


def test_data_folder_is_told_and_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGZI_DATA", "~/elsewhere")
    assert embedded.default_data_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("KAGZI_DATA")
    assert embedded.default_data_folder().name == "kagzi"
    assert embedded.default_data_folder().is_absolute()


def test_first_start_tells_its_progress(empty_folder: Path) -> None:
    lines: list[str] = []
    with embedded.attach(empty_folder, progress=lines.append):
        pass
    assert [line.split()[0] for line in lines] == ["creating", "starting"]
    assert all(str(empty_folder) in line for line in lines)
