"""`kagzi versions`: what there is of each workflow, and which version new runs get."""

from __future__ import annotations

from typing import Any

import click
import uvloop

from kagzi.command.targets import load_app
from kagzi.command.terminal import Command, Settings, emit, open_client
from kagzi.errors import InvalidInput
from kagzi.model import VersionRecord


@click.command(cls=Command)
@click.argument("workflow", required=False)
@click.option("--default", "default", metavar="VERSION", help="New runs get this version.")
@click.option("--no-default", is_flag=True, help="The code of whoever starts a run decides again.")
@click.option(
    "-m",
    "--module",
    "modules",
    metavar="MODULE[:APP]",
    multiple=True,
    help="Import it first, so that its versions are known.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def versions(
    settings: Settings,
    workflow: str | None,
    default: str | None,
    no_default: bool,
    modules: tuple[str, ...],
    as_json: bool,
) -> None:
    """List the versions of WORKFLOW, or of all, with their unfinished runs; set a default.

    WORKFLOW is its full name, or the last part of it. A version without unfinished runs that no
    start names any more can go from the code.
    """
    if default is not None and no_default:
        raise InvalidInput("--default and --no-default exclude each other")
    if (default is not None or no_default) and workflow is None:
        raise InvalidInput("name the workflow whose default is meant: kagzi versions WORKFLOW ...")
    for target in modules:
        load_app(target)

    async def look() -> list[VersionRecord]:
        async with open_client(settings, may_migrate=False) as client:
            if workflow is not None and (default is not None or no_default):
                await client.set_default_version(workflow, default)
            return await client.versions(workflow)

    found = uvloop.run(look())
    if as_json:
        emit([_data(record, known=bool(modules)) for record in found])
    else:
        _print(found, known=bool(modules))


def _data(record: VersionRecord, known: bool) -> dict[str, Any]:
    return {
        "workflow": record.workflow,
        "version": record.version,
        "is_default": record.is_default,
        "is_registered": record.is_registered if known else None,
        "unfinished": record.unfinished,
        "finished": record.finished,
        "latest_start": record.latest_start,
    }


def _print(found: list[VersionRecord], known: bool) -> None:
    from kagzi.command.show import Column, Columns, clip, make_console, moment

    console = make_console()
    if not found:
        console.print("no runs, and no version is a default")
        return
    columns = [
        Column("workflow"),
        Column("version", whole=True),
        Column("default"),
        Column("unfinished", right=True),
        Column("finished", right=True),
        Column("latest start", spare=True, whole=True),
    ]
    if known:
        columns.append(Column("code", whole=True))
    table = Columns(console, None, *columns)
    for record in found:
        latest = "" if record.latest_start is None else moment(record.latest_start)
        cells = [
            clip(record.workflow, 60),
            record.version,
            "yes" if record.is_default else "",
            f"{record.unfinished:,}",
            f"{record.finished:,}",
            latest,
        ]
        if known:
            cells.append("here" if record.is_registered else "missing")
        table.add(*cells)
    console.print(table.table)
