"""`python -m kagzi.bench dashboard`: built from what asv measured, and drawn without a network."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from kagzi.bench.offline import NotVendored, Source, make_offline, source_of

CHECKOUT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BENCHMARK = """
def track_something():
    return 42


track_something.unit = "statements"
"""
WATCH = """<!doctype html>
<iframe id=f width=1000 height=700 src="index.html#bench_one.track_something"></iframe>
<p id=seen></p><script>
setInterval(() => {
  const inside = document.getElementById("f").contentDocument;
  const canvas = inside && inside.querySelector("#main-graph canvas.flot-base");
  if (!canvas || !canvas.width) return;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let coloured = 0;
  for (let at = 0; at < pixels.length; at += 4) {
    const [red, green, blue, alpha] = pixels.slice(at, at + 4);
    if (alpha > 200 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) coloured++;
  }
  document.getElementById("seen").textContent = "coloured pixels: " + coloured;
}, 100);
</script>
"""


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def run_dashboard(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kagzi.bench", "dashboard", *arguments],
        cwd=folder,
        env={**os.environ, "HOME": str(folder.parent)},  # asv notes the machine there
        capture_output=True,
        text=True,
        timeout=400,
    )


@contextmanager
def served(folder: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kagzi.bench", "dashboard"],
        cwd=folder,
        env={**os.environ, "HOME": str(folder.parent), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                return
        pytest.fail("it never said where")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our configuration of asv over one small benchmark, measured at two commits."""
    for program in ("git", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    pytest.importorskip("asv")
    folder = tmp_path_factory.mktemp("dashboard") / "project"
    (folder / "benchmarks").mkdir(parents=True)
    shutil.copy(CHECKOUT / "asv.conf.json", folder)
    (folder / "benchmarks" / "__init__.py").write_text("")
    (folder / "benchmarks" / "bench_one.py").write_text(BENCHMARK)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    for message in ("one", "two"):
        git(folder, "commit", "-q", "--allow-empty", "-m", message)
        done = run_dashboard(folder, "--here", "--quick", "--no-serve")
        if "npm gave no" in done.stderr:
            pytest.skip(f"npm cannot fetch packages here: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_dashboard_draws_a_graph_in_a_browser_without_a_network(built: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with served(built) as address:
        (built / ".asv" / "html" / "watch.html").write_text(WATCH)
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={built.parent / 'browser'}",
            *("--dump-dom", f"{address}watch.html"),
        ]
        seen = subprocess.run([browser, *arguments], capture_output=True, text=True, timeout=90)
    found = re.search(r"coloured pixels: (\d+)", seen.stdout)
    assert found is not None, seen.stdout[-2000:] + seen.stderr[-2000:]
    assert int(found[1]) > 100


def test_dashboard_is_served_and_ends_by_an_interrupt(built: Path) -> None:
    with served(built) as address, urlopen(f"{address}index.json") as answer:
        assert b"track_something" in answer.read()
    page = (built / ".asv" / "html" / "index.html").read_text()
    assert not re.search(r'(src|href)="https?://(?!github)', page)


INTERRUPTED = """
import os, signal, sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from kagzi.bench.dashboard import serve

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

def once(server):
    ThreadingHTTPServer.service_actions = lambda server: None
    Dying()

ThreadingHTTPServer.service_actions = once
serve(Path(sys.argv[1]), 0)
"""


def test_interrupt_within_a_finalizer_ends_the_server(tmp_path: Path) -> None:
    """An exception would be lost there."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Ctrl-C ends it" in done.stdout
    assert done.stderr == ""


def test_dashboard_outside_a_checkout_says_what_is_missing(tmp_path: Path) -> None:
    done = run_dashboard(tmp_path, "--no-serve")
    assert done.returncode == 2
    assert "asv.conf.json" in done.stderr


@pytest.mark.parametrize(
    ("url", "source"),
    [
        (
            "https://code.jquery.com/jquery-3.3.1.min.js",
            Source("jquery", "3.3.1", "dist/jquery.min.js"),
        ),
        (
            "https://cdnjs.cloudflare.com/ajax/libs/flot/0.8.3/jquery.flot.time.min.js",
            Source("flot", "0.8.3", "jquery.flot.time.js"),
        ),
        (
            "https://cdn.jsdelivr.net/npm/bootstrap@3.1.1/dist/css/bootstrap.min.css",
            Source("bootstrap", "3.1.1", "dist/css/bootstrap.min.css"),
        ),
    ],
)
def test_scripts_of_a_content_network_are_found_in_packages(url: str, source: Source) -> None:
    assert source_of(url) == source


def test_script_of_an_unknown_place_is_refused_by_its_name() -> None:
    with pytest.raises(NotVendored, match=r"other\.example/x\.js"):
        source_of("https://other.example/x.js")


def test_pages_load_what_packages_hold(tmp_path: Path) -> None:
    kept, pages = tmp_path / "kept", tmp_path / "pages"
    kept.mkdir()
    pages.mkdir()
    files = {"dist/css/b.css": b"css", "dist/fonts/f.woff": b"font", "other.js": b"no"}
    with tarfile.open(kept / "bootstrap-3.1.1.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    url = "https://cdn.jsdelivr.net/npm/bootstrap@3.1.1/dist/css/b.css"
    link = f'<link rel="stylesheet" href="{url}" integrity="x">'
    (pages / "index.html").write_text(f'<html>{link}<script src="ours.js"></script></html>')
    make_offline(pages, kept)
    assert (pages / "index.html").read_text() == (
        '<html><link rel="stylesheet" href="vendor/bootstrap/dist/css/b.css">'
        '<script src="ours.js"></script></html>'
    )
    placed = {str(file.relative_to(pages)) for file in (pages / "vendor").rglob("*.*")}
    assert placed == {"vendor/bootstrap/dist/css/b.css", "vendor/bootstrap/dist/fonts/f.woff"}
    assert (pages / "vendor/bootstrap/dist/css/b.css").read_bytes() == b"css"


def test_package_that_lacks_the_file_is_an_error_that_names_both(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "jquery-1.0.tgz", "w:gz"):
        pass
    page = tmp_path / "index.html"
    page.write_text('<script src="https://code.jquery.com/jquery-1.0.min.js"></script>')
    with pytest.raises(NotVendored, match=r"jquery-1\.0\.tgz holds no dist/jquery\.min\.js"):
        make_offline(tmp_path, tmp_path)
