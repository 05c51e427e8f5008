"""`kagzi check`: which recorded runs today's code would break, and where."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import click
import uvloop

from kagzi.command.targets import load_app
from kagzi.command.terminal import RUN_FAILED, Command, Settings, emit, open_client
from kagzi.findings import BrokenRun, CheckReport

SHOWN = 50


@click.command(cls=Command)
@click.argument("modules", metavar="MODULE[:APP]...", nargs=-1, required=True)
@click.option(
    "--status",
    metavar="S,S...",
    help="Only runs that stand so: pending, running, sleeping, paused, completed, failed, "
    "cancelled. Default: all.",
)
@click.option("--workflow", metavar="NAME", help="Its full name, or the last part of it.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the newest. Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def check(
    settings: Settings,
    modules: tuple[str, ...],
    status: str | None,
    workflow: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Replay recorded runs against the code of these modules; tell which would break, and where.

    Nothing is changed and no step runs. A run that has not ended may go on behind what is recorded
    of it; one that has ended must end the same way. Ends with 1 if any run would break.
    """
    for target in modules:
        load_app(target)
    statuses = None if status is None else [one.strip() for one in status.split(",")]
    bar = _Bar(not as_json and sys.stderr.isatty())

    async def look() -> CheckReport:
        async with open_client(settings, may_migrate=False) as client:
            try:
                return await client.check(
                    status=statuses, workflow=workflow, limit=limit, progress=bar.show
                )
            finally:
                bar.clear()

    report = uvloop.run(look())
    if as_json:
        emit(_data(report))
    else:
        _print(report)
    if not report.is_success:
        raise click.exceptions.Exit(RUN_FAILED)


class _Bar:
    """How far it is, on a terminal."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def show(self, checked: int, total: int) -> None:
        if self._on:
            click.echo(f"\rchecked {checked:,} of {total:,} runs", nl=False, err=True)

    def clear(self) -> None:
        if self._on:
            click.echo("\r\x1b[K", nl=False, err=True)


def _data(report: CheckReport) -> dict[str, Any]:
    names = [field.name for field in fields(BrokenRun)]
    return {
        "checked": report.checked,
        "same": report.same,
        "goes_on": report.goes_on,
        "without_code": report.without_code,
        "broken": [{name: getattr(run, name) for name in names} for run in report.broken],
    }


def _print(report: CheckReport) -> None:
    from kagzi.command.show import Column, Columns, clean, clip, make_console, styled

    console = make_console()
    if report.broken:
        table = Columns(
            console,
            None,
            Column("run"),
            Column("workflow", spare=True),
            Column("version", spare=True),
            Column("status", whole=True),
            Column("what would break", least=40),
        )
        for run in report.broken[:SHOWN]:
            table.add(
                clip(run.id, 40),
                clip(run.workflow, 30),
                clean(run.version),
                styled(run.status),
                clean(run.message),
            )
        console.print(table.table)
        if len(report.broken) > SHOWN:
            console.print(f"… and {len(report.broken) - SHOWN:,} more; --json has all of them")
    told = [
        f"{report.checked:,} runs checked: {report.same:,} end the same way",
        f"{report.goes_on:,} go on",
        f"{len(report.broken):,} would break",
    ]
    if report.without_code:
        told.append(f"{report.without_code:,} had ended and have no code here")
    console.print(", ".join(told))
