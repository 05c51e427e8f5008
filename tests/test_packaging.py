"""What is built and shipped: one wheel and one source archive, made from a copy of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from kagzi.store.migrate import migrations

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("kagzi", "migrations", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")
NOT_COPIED = shutil.ignore_patterns("*.c", "*.so", "__pycache__")

TEST_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest"
)
DEMO_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -q '.[embedded]' && .venv/bin/kagzi demo"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that neither finds what the other left behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=NOT_COPIED)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    run("pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "out", ".", cwd=checkout)
    (built,) = (checkout / "out").glob("*.whl")
    return built


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The wheel unpacked, as an installation has it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def run(module: str, *arguments: str, cwd: Path) -> None:
    words = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# An editable installation also answers for modules that the unpacked wheel lacks.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "


def run_installed(site: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE + program],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_carries_what_is_needed_at_run_time_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "kagzi").rglob("*"):
        if path.suffix in {".py", ".pyi", ".pyx", ".sql"} or path.name == "py.typed":
            assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "migrations").glob("*.sql"):
        assert f"kagzi/migrations/{path.name}" in names
    assert any(name.startswith("kagzi/_core.") and name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kagzi"}
    assert not [name for name in names if name.endswith((".c", ".pyc"))]


def test_every_folder_of_the_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "kagzi").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == packages | {"kagzi.migrations"}


def test_installed_wheel_finds_its_migrations(installed: Path) -> None:
    done = run_installed(
        installed,
        "from kagzi.store import migrate as m; print(m.__file__); "
        "print([(x.version, x.checksum) for x in m.migrations()])",
    )
    told = done.stdout.splitlines()
    assert told[0].startswith(str(installed)), done.stderr
    assert told[1] == str([(x.version, x.checksum) for x in migrations()])


def test_source_archive_can_be_built_from_and_carries_no_generated_code(checkout: Path) -> None:
    run("build", "--sdist", "--no-isolation", "--outdir", "dist", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "kagzi/_core.pyx", "kagzi/_core.pyi"} <= names
    assert {f"migrations/{path.name}" for path in (ROOT / "migrations").glob("*.sql")} <= names
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]


# --- the compiled core ----------------------------------------------------------------------

CHECK = "from kagzi import _build_check; _build_check.check(); print('fresh')"


def test_core_built_from_its_source_is_accepted(installed: Path) -> None:
    assert run_installed(installed, CHECK).stdout == "fresh\n"


def test_edited_source_is_told_with_the_command_that_builds_it(installed: Path) -> None:
    with (installed / "kagzi" / "_core.pyx").open("a") as source:
        source.write("# edited\n")
    done = run_installed(installed, CHECK)
    assert "StaleExtension" in done.stderr
    assert "pip install -e '.[dev]'" in done.stderr


def test_missing_core_is_told_with_the_command_that_builds_it(installed: Path) -> None:
    for library in (installed / "kagzi").glob("_core.*.so"):
        library.unlink()
    done = run_installed(installed, CHECK)
    assert "StaleExtension" in done.stderr
    assert "pip install -e '.[dev]'" in done.stderr


def test_core_without_its_source_is_accepted(installed: Path) -> None:
    (installed / "kagzi" / "_core.pyx").unlink()
    assert run_installed(installed, CHECK).stdout == "fresh\n"


# --- commands -------------------------------------------------------------------------------


def test_readme_and_ci_use_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert TEST_COMMAND in readme
    assert DEMO_COMMAND in readme
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()
    assert TEST_COMMAND in (ROOT / ".github" / "workflows" / "test.yml").read_text()
