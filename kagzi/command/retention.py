"""`kagzi delete`: removes finished runs."""

from __future__ import annotations

import click
import uvloop

from kagzi.command.terminal import Command, Settings, emit, open_client


@click.command(cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def delete(settings: Settings, /, runs: tuple[str, ...], as_json: bool) -> None:
    """Delete finished runs with all that belongs to them.

    Stops at the first that is unknown or not finished; those before it are gone. To delete old runs
    regularly: `kagzi worker --retain-days`.
    """
    deleted: list[str] = []

    async def remove() -> None:
        async with open_client(settings, may_migrate=False) as client:
            for run in runs:
                await client.delete(run)
                deleted.append(run)
                if not as_json:
                    click.echo(f"run {run!r} is deleted")

    uvloop.run(remove())
    if as_json:
        emit({"deleted": deleted})
