"""The command line: which benchmarks, where, and what becomes of the figures."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import click
import psycopg
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kagzi.bench import check
from kagzi.bench.against import CONTESTS, PEERS, Compared, compare
from kagzi.bench.catalogue import Suite
from kagzi.bench.measure import Figure, cores, surroundings
from kagzi.bench.page import page_of
from kagzi.bench.report import (
    as_json,
    comparison_of,
    cost_table_of,
    missed_of,
    print_regressions,
    print_surroundings,
    print_verdict,
    table_of,
)
from kagzi.bench.session import SCHEMA, Bench, own_schema
from kagzi.bench.suites import SUITES
from kagzi.errors import KagziError
from kagzi.store import embedded
from kagzi.store.connections import redact
from kagzi.store.migrate import migrate


@click.command(
    help="Measure kagzi beside the specification's thresholds.\n\n"
    "NAMES select benchmarks, by name or by how it begins; without any, all are run.\n\n"
    "`python -m kagzi.bench dashboard` shows benchmarks over commits; it has options of its own.",
    epilog="Exit code: 0 if every threshold is kept, 1 if one is missed or a count has grown, 2 if "
    "nothing could be measured.",
)
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write all figures to this file.",
)
@click.option(
    "--html",
    "html_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a page with charts to this file; it needs nothing else.",
)
@click.option(
    "--check",
    "check_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare the benchmark counts with those committed in this file; more is a failure.",
)
@click.option(
    "--write-counts",
    "counts_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the benchmark counts to this file, to be committed.",
)
@click.option(
    "--against",
    help="Compare with these libraries, by a comma: dbos, absurd. NAMES then select among what is "
    "compared; plain asyncio and the floor are always there.",
)
@click.option("--list", "only_list", is_flag=True, help="Name the benchmarks and stop.")
@click.option("--dsn", help="Database; default DATABASE_URL, else the embedded server.")
@click.option(
    "--processes", type=click.IntRange(1, 1024), help="Pool processes; default one per core."
)
@click.option("--slack", type=float, default=1.0, hidden=True, help="Factor on each threshold.")
def main(
    names: tuple[str, ...],
    quick: bool,
    json_file: Path | None,
    html_file: Path | None,
    check_file: Path | None,
    counts_file: Path | None,
    against: str | None,
    only_list: bool,
    dsn: str | None,
    processes: int | None,
    slack: float,
) -> None:
    # Groups of 100,000 steps are meant to keep a loop busy here.
    logging.getLogger("kagzi.worker").addFilter(lambda said: "event loop" not in str(said.msg))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    if only_list:
        for listed in SUITES.values() if against is None else CONTESTS:
            console.print(f"{listed.name:<24}{listed.title}", highlight=False)
        return
    peers = None if against is None else peers_of(against)
    chosen = select(names, SUITES.values()) if peers is None else []
    contests = select(names, CONTESTS) if peers is not None else []
    for file, option in (
        (json_file, "--json"),
        (html_file, "--html"),
        (counts_file, "--write-counts"),
    ):
        if file is not None and not os.access(file.absolute().parent, os.W_OK):
            raise click.BadParameter(f"no file can be made at {str(file)!r}", param_hint=option)
    committed = _committed(check_file)
    if (check_file or counts_file) and SUITES["counts"] not in chosen:
        raise click.UsageError("--check and --write-counts need the benchmark counts among NAMES")
    results: dict[str, list[Figure]] = {}
    compared: list[Compared] = []
    try:
        with ExitStack() as stack:
            dsn = dsn or os.environ.get("DATABASE_URL") or None
            if dsn is None:
                dsn = stack.enter_context(embedded.attach()).dsn
            stack.enter_context(own_schema(dsn))
            around = surroundings(dsn)
            print_surroundings(console, around)
            if peers is not None:
                around["peers"] = [PEERS[name].versions() for name in peers]
                migrate(dsn, SCHEMA)
                with advancing(", ".join(("kagzi", *peers))) as advance:
                    bench = Bench(dsn, processes or cores(), quick, advance)
                    compared = uvloop.run(compare(bench, peers, contests))
                console.print(comparison_of(compared))
            for suite in chosen:
                results[suite.name] = measure(suite, dsn, processes or cores(), quick, slack)
                console.print(table_of(suite.name, results[suite.name]))
                costs = cost_table_of(results[suite.name])
                if costs is not None:
                    console.print(costs)
    except KagziError as error:
        _give_up(str(error), 2)
    except psycopg.Error as error:
        _give_up(f"the database: {redact(str(error))}", 2)
    except KeyboardInterrupt:
        _give_up("interrupted; what was made in the database is removed", 130)
    print_verdict(console, results)
    if json_file is not None:
        json_file.write_bytes(as_json(around, results, quick, compared))
    if html_file is not None:
        html_file.write_text(page_of(around, results, quick, compared))
    if counts_file is not None:
        counts_file.write_bytes(check.written(check.counts_of(results["counts"])))
    more = []
    if committed is not None:
        more = check.regressions(check.counts_of(results["counts"]), *committed)
        print_regressions(console, more)
    if missed_of(results) or more:
        sys.exit(1)


def _committed(file: Path | None) -> tuple[float, check.Counts] | None:
    if file is None:
        return None
    try:
        return check.read(file)
    except check.UnreadableCounts as error:
        raise click.BadParameter(str(error), param_hint="--check") from None


def _give_up(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def peers_of(names: str) -> list[str]:
    """Peers by name. Raises `click.BadParameter` for those unknown or not installed."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in PEERS:
            raise click.BadParameter(f"{name!r} is none of: {', '.join(PEERS)}", param_hint="PEERS")
    missing = [PEERS[name] for name in chosen if PEERS[name].missing()]
    if missing:
        commands = "\n".join(f"  {sys.executable} -m {peer.install}" for peer in missing)
        raise click.UsageError(f"not installed here; nothing is installed by itself:\n{commands}")
    return chosen


class Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def by_default(self) -> bool: ...


N = TypeVar("N", bound=Named)


def select(names: tuple[str, ...], known: Iterable[N]) -> list[N]:
    """Those named, in their own order. Raises `click.BadParameter` for a name of none of them."""
    known = list(known)
    for name in names:
        if not any(one.name.startswith(name) for one in known):
            listed = ", ".join(one.name for one in known)
            raise click.BadParameter(f"{name!r} is none of: {listed}", param_hint="NAMES")
    if not names:
        return [one for one in known if one.by_default]
    return [one for one in known if any(one.name.startswith(name) for name in names)]


def measure(suite: Suite, dsn: str, processes: int, quick: bool, slack: float) -> list[Figure]:
    """Run one benchmark."""
    with advancing(suite.name) as advance:
        figures = uvloop.run(suite.measure(Bench(dsn, processes, quick, advance)))
    return [figure.slackened(slack) for figure in figures]


@contextmanager
def advancing(name: str) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a bar that shows rounds."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rounds]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,  # drawing takes time from what is measured
        disable=not console.is_terminal,
    )
    with progress:
        shown = progress.add_task(name, total=None, rounds="")

        def advance(done: int, rounds: int) -> None:
            progress.update(shown, completed=done, total=rounds, rounds=f"{done} of {rounds}")

        yield advance
