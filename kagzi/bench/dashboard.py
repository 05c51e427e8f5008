"""`python -m kagzi.bench dashboard`: asv's pages over commits, made to work offline, and served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import util
from pathlib import Path
from typing import Any

import click

import kagzi
from kagzi.bench.offline import NotVendored, make_offline

CONFIGURATION = "asv.conf.json"
KEPT = Path(".asv/vendor")
PAGES = Path(".asv/html")


@click.command(
    name="python -m kagzi.bench dashboard",
    help="Build the dashboard of benchmarks over commits, and serve it on this machine.\n\n"
    "It shows what asv has measured so far. Where that is nothing, this checkout is measured.",
)
@click.option(
    "--run",
    "commits",
    metavar="COMMITS",
    help="Measure these commits first, as `asv run` takes them, each built in an environment of "
    "its own: NEW, ALL, v0.1..main, HEAD^!",
)
@click.option(
    "--here", is_flag=True, help="Measure this checkout as its HEAD, with this interpreter."
)
@click.option("--bench", "pattern", help="Only benchmarks whose name has this pattern.")
@click.option("--quick", is_flag=True, help="One sample of each.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--no-serve", is_flag=True, help="Build the pages and stop.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help=f"Where {CONFIGURATION} is; default here.",
)
def dashboard(
    commits: str | None,
    here: bool,
    pattern: str | None,
    quick: bool,
    port: int,
    no_serve: bool,
    folder: Path,
) -> None:
    if not (folder / CONFIGURATION).exists():
        raise click.UsageError(f"no {CONFIGURATION} in {str(folder.absolute())!r}: use --folder")
    if util.find_spec("asv") is None:
        raise click.UsageError(f"asv is not installed: {sys.executable} -m pip install asv")
    chosen = [*(["--bench", pattern] if pattern else []), *(["--quick"] if quick else [])]
    _asv(folder, "machine", "--yes", quiet=True)
    if commits is not None:
        _asv(folder, "run", "--show-stderr", *chosen, commits)
    if here or (commits is None and not any((folder / ".asv/results").glob("*/*-*.json"))):
        head = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(head, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.UsageError(f"{str(folder.absolute())!r} is no git checkout")
        as_head = ["--set-commit-hash", done.stdout.strip()]
        _asv(folder, "run", "-E", f"existing:{sys.executable}", *as_head, *chosen, ours=True)
    _asv(folder, "publish", "--no-pull")
    try:
        make_offline(folder / PAGES, folder / KEPT)
    except NotVendored as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(f"The pages are in {(folder / PAGES).absolute()}")
    if not no_serve:
        serve(folder / PAGES, port)


def _asv(folder: Path, *arguments: str, quiet: bool = False, ours: bool = False) -> None:
    """Run asv, its output where ours goes. Ends the program where it fails.

    Args:
        ours: Measure the kagzi that runs now, which asv would not find: it drops PYTHONPATH.
    """
    path = {"ASV_PYTHONPATH": str(Path(kagzi.__file__).parents[1])} if ours else {}
    done = subprocess.run(
        [sys.executable, "-m", "asv", *arguments],
        cwd=folder,
        env={**os.environ, **path},
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    # 2: some of the benchmarks failed; what was measured is kept and shown.
    if done.returncode not in (0, 2):
        click.echo(f"Error: asv {arguments[0]} ended with code {done.returncode}", err=True)
        sys.exit(2)


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


def serve(pages: Path, port: int) -> None:
    """Serve a folder on the loopback interface until interrupted."""
    handler = partial(_Handler, directory=str(pages))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise click.UsageError(f"port {port}: {error.strerror}") from None

    def end(*_: object) -> None:
        """Raises nothing, so it is not lost in a moment in which an exception would be."""
        threading.Thread(target=server.shutdown).start()

    before = signal.signal(signal.SIGINT, end)
    try:
        with server:
            port = server.server_address[1]
            click.echo(f"Dashboard at http://127.0.0.1:{port}/ (Ctrl-C ends it)")
            server.serve_forever()
            click.echo("")
    finally:
        signal.signal(signal.SIGINT, before)
