"""The command line: each command reads its options, calls the client, and prints.

Pool processes import this module again as `__mp_main__`, so what only prints (rich) is imported
where it is used.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop

import kagzi
from kagzi.command import operations
from kagzi.command.check import check
from kagzi.command.plain import details_data, summary_data
from kagzi.command.queues import queue, queues
from kagzi.command.retention import delete
from kagzi.command.schedules import schedule, schedules, unschedule
from kagzi.command.serve import drive, serve
from kagzi.command.targets import load_app, load_workflow, read_arguments, read_input
from kagzi.command.terminal import (
    EXIT_CODES,
    RUN_FAILED,
    Commands,
    Settings,
    emit,
    open_client,
    own_options,
    place_of,
    say,
)
from kagzi.command.versions import versions
from kagzi.command.workers import workers
from kagzi.errors import InvalidInput, PostgresNotFound
from kagzi.model import RunStatus
from kagzi.store import embedded, migrate
from kagzi.store.binaries import find_programs

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
processes_option = click.option(
    "--processes",
    type=click.IntRange(0, 1024),
    help="Pool processes. Default: one per processor; 0: bodies run in the worker's own.",
)


@click.group(
    cls=Commands,
    params=own_options(),
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(
    kagzi.__version__,
    message=f"kagzi %(version)s (embedded data: {embedded.default_data_folder()})",
)
def main() -> None:
    """Durable workflows on PostgreSQL whose steps run in parallel."""


# --- commands -------------------------------------------------------------------------------

for command in (
    check,
    versions,
    schedule,
    schedules,
    unschedule,
    delete,
    workers,
    queues,
    queue,
    *operations.COMMANDS,
):
    main.add_command(command)


@main.command()
@click.argument("modules", metavar="MODULE[:APP]...", nargs=-1, required=True)
@processes_option
@click.option("--concurrency", type=int, default=1000, show_default=True, help="Most runs held.")
@click.option("--lease-s", type=float, default=30.0, show_default=True, help="Length of its lease.")
@click.option(
    "--heartbeat-s", type=float, default=10.0, show_default=True, help="Between renewals of it."
)
@click.option(
    "--poll-s", type=float, default=1.0, show_default=True, help="Between looks for due runs."
)
@click.option(
    "--max-crashes",
    type=int,
    default=5,
    show_default=True,
    help="End a run as failed that so many workers in a row did not survive.",
)
@click.option(
    "--retain-days",
    type=click.FloatRange(min=0, min_open=True),
    metavar="DAYS",
    help="Delete runs that ended so long ago. Default: keep them for ever.",
)
@click.option(
    "--drain-s",
    type=float,
    default=20.0,
    show_default=True,
    help="After SIGTERM or Ctrl-C, wait so long for runs that are held; give the others back.",
)
@click.option(
    "--health-port",
    type=click.IntRange(0, 65535),
    help="Tell over HTTP at /healthz of this port how the worker is: 200 or 503, and JSON.",
)
@click.option(
    "--health-host", default="127.0.0.1", show_default=True, help="Address to tell it on."
)
@click.option(
    "--queue",
    "queues",
    metavar="NAME",
    multiple=True,
    help="Serve this queue, and no other that is not named so. Default: all.",
)
@click.option("-q", "--quiet", is_flag=True, help="Log warnings only.")
@click.pass_obj
def worker(
    settings: Settings,
    /,
    modules: tuple[str, ...],
    queues: tuple[str, ...],
    retain_days: float | None,
    drain_s: float,
    quiet: bool,
    **options: Any,
) -> None:
    """Drive the runs of these modules' workflows until stopped.

    APP is a workflow of the module, or a function without arguments that registers more.

    The first SIGTERM or SIGINT drains, the second stops at once, the third kills. A worker that
    has lost its lease stops its runs and begins anew.
    """
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if not 0 <= drain_s < math.inf:
        raise InvalidInput(f"--drain-s must be seconds from 0 upwards, got {drain_s!r}")
    retain_s = None if retain_days is None else retain_days * 86_400
    names = tuple(load_app(target) for target in modules)

    async def work() -> None:
        async with open_client(settings, may_migrate=True) as client:
            logging.getLogger("kagzi.worker").info("runs are in %s", place_of(settings))
            served = queues or None
            await serve(client, drain_s, modules=names, retain_s=retain_s, queues=served, **options)

    uvloop.run(work())


@main.command()
@click.argument("target", metavar="MODULE:WORKFLOW")
@click.option(
    "--input",
    "text",
    metavar="JSON",
    default="[]",
    help="Array: positional arguments; object: keyword arguments; - : from standard input; "
    "@FILE: from a file. Default: no arguments.",
)
@click.option("--id", "run_id", metavar="ID", help="Names the run: the same id is the same run.")
@processes_option
@click.pass_obj
def run(
    settings: Settings, target: str, text: str, run_id: str | None, processes: int | None
) -> None:
    """Start a run, drive it here, and print its result as JSON."""
    from kagzi.command.show import StepCounter

    module, workflow = load_workflow(target)
    args, kwargs = read_arguments(workflow, read_input(text))

    async def start_and_wait() -> Any:
        async with open_client(settings, may_migrate=True) as client:
            with StepCounter() as counter:
                return await drive(
                    client,
                    workflow,
                    args,
                    kwargs,
                    run_id=run_id,
                    report=counter.show,
                    processes=processes,
                    modules=(module,),
                )

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    result = uvloop.run(start_and_wait())
    emit(orjson.loads(workflow.returns.encode(result)))


@main.command()
@click.option("--status", type=click.Choice([status.value for status in RunStatus]))
@click.option("--workflow", metavar="NAME", help="Its full name, or the last part of it.")
@click.option("--queue", metavar="NAME")
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True)
@json_option
@click.pass_obj
def runs(
    settings: Settings,
    status: str | None,
    workflow: str | None,
    queue: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List runs, the newest first."""

    async def look() -> Any:
        async with open_client(settings, may_migrate=False) as client:
            return await client.runs(status=status, workflow=workflow, queue=queue, limit=limit)

    found = uvloop.run(look())
    if as_json:
        emit([summary_data(summary) for summary in found])
    else:
        from kagzi.command.show import print_runs

        print_runs(found)


@main.command()
@click.argument("run_id", metavar="RUN")
@click.option("--all", "everything", is_flag=True, help="Every step, however many there are.")
@json_option
@click.pass_obj
def show(settings: Settings, run_id: str, everything: bool, as_json: bool) -> None:
    """Show a run: steps, groups with their speed-up, failed attempts, timings.

    RUN is the id that it was started with, or the database's (run_id in `kagzi runs --json`).
    """

    async def look() -> Any:
        async with open_client(settings, may_migrate=False) as client:
            return await client.describe(run_id)

    details = uvloop.run(look())
    if as_json:
        emit(details_data(details))
    else:
        from kagzi.command.show import print_run

        print_run(details, everything)


@main.command()
@click.argument("run_id", metavar="RUN")
@click.option(
    "--step", "steps", metavar="ID", multiple=True, help="A failed step to run again as well."
)
@json_option
@click.pass_obj
def retry(settings: Settings, run_id: str, steps: tuple[str, ...], as_json: bool) -> None:
    """Let a failed run go on: failed steps run again, committed ones do not."""

    async def go_on() -> Any:
        async with open_client(settings, may_migrate=False) as client:
            handle = await client.retry(run_id, steps=list(steps))
            return handle, *await handle.progress()

    handle, kept, _ = uvloop.run(go_on())
    if as_json:
        emit({"id": handle.id, "run_id": str(handle.run_id), "status": "pending", "kept": kept})
    else:
        click.echo(
            f"run {handle.id!r} is pending again and keeps {kept} completed step(s); a worker "
            f"that serves {handle.workflow} goes on with it"
        )


@main.command(name="migrate")
@click.option("--print", "only_print", is_flag=True, help="Show the SQL instead of running it.")
@click.option(
    "--after",
    type=click.IntRange(0),
    help="With --print: the newest migration that the database has. Default: ask it, if a DSN is "
    "known; else 0.",
)
@json_option
@click.pass_obj
def migrate_schema(settings: Settings, only_print: bool, after: int | None, as_json: bool) -> None:
    """Bring the schema up to date, or show the SQL that would."""
    if only_print:
        after = _newest_applied(settings) if after is None else after
        click.echo(migrate.script(settings.schema, after), nl=False)
        return
    dsn = settings.known_dsn
    server = None if dsn is not None else embedded.attach(progress=say)
    try:
        applied = migrate.migrate(dsn or (server.dsn if server else ""), settings.schema)
    finally:
        if server is not None:
            server.close()
    names = [f"{migration.version:04}_{migration.name}" for migration in applied]
    if as_json:
        emit({"schema": settings.schema, "applied": names, "place": place_of(settings)})
        return
    for name in names:
        click.echo(f"applied {name}")
    count = len(migrate.migrations())
    click.echo(f"schema {settings.schema!r} is up to date ({count} migration(s))")
    click.echo(place_of(settings))


def _newest_applied(settings: Settings) -> int:
    if settings.known_dsn is None:
        return 0
    missing = migrate.missing(settings.known_dsn, settings.schema)
    return len(migrate.migrations()) - len(missing)


@main.command()
@json_option
@click.pass_obj
def where(settings: Settings, as_json: bool) -> None:
    """Tell where runs are kept, and which Postgres programs an embedded server would use."""
    folder = embedded.default_data_folder()
    programs: str | None
    try:
        programs = str(find_programs().folder)
    except PostgresNotFound:
        programs = None
    data = {
        "store": place_of(settings),
        "schema": settings.schema,
        "embedded_data": str(folder),
        "embedded_data_exists": folder.exists(),
        "embedded_programs": programs,
    }
    if as_json:
        emit(data)
        return
    missing = "none found: pip install 'kagzi[embedded]'"
    click.echo(f"runs are kept in  {data['store']}, schema {settings.schema!r}")
    click.echo(f"embedded data     {folder}{'' if folder.exists() else ' (not made yet)'}")
    click.echo(f"its programs      {programs or missing}")


@main.command()
@click.option("--crash", is_flag=True, help="Kill the worker half-way; a second one finishes.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Analyse this folder instead of the standard library.",
)
@click.option("--full", is_flag=True, help="Include the standard library's own tests.")
@processes_option
@click.option("--pause-ms", type=click.FloatRange(0, 10_000), default=0.0, hidden=True)
@json_option
@click.pass_obj
def demo(
    settings: Settings,
    crash: bool,
    folder: Path | None,
    full: bool,
    processes: int | None,
    pause_ms: float,
    as_json: bool,
) -> None:
    """Analyse this machine's Python standard library, and show what kagzi does meanwhile."""
    from kagzi.demo import show_crash, show_tour

    logging.basicConfig(level=logging.ERROR)
    common: dict[str, Any] = {
        "place": place_of(settings),
        "folder": str(folder) if folder is not None else None,
        "full": full,
        "processes": processes,
        "quiet": as_json,
    }

    async def present() -> dict[str, Any]:
        async with open_client(settings, may_migrate=True) as client:
            if not crash:
                return await show_tour(client, **common)
            environment, schema = _environment(settings), settings.schema
            return await show_crash(
                client, environment=environment, schema=schema, pause_s=pause_ms / 1e3, **common
            )

    told = uvloop.run(present())
    if as_json:
        emit(told)
    if not told["holds"]:
        raise click.exceptions.Exit(RUN_FAILED)


def _environment(settings: Settings) -> dict[str, str]:
    """For another process: a DSN goes through the environment, where `ps` does not show it."""
    return {**os.environ, **({"DATABASE_URL": settings.dsn} if settings.dsn else {})}
