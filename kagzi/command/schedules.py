"""Commands for schedules: `kagzi schedule`, `schedules`, `unschedule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import uvloop

from kagzi.command.targets import load_workflow, read_arguments, read_input
from kagzi.command.terminal import Command, Settings, emit, open_client
from kagzi.model import DEFAULT_QUEUE, CatchUp, Overlap, Schedule

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(cls=Command)
@click.argument("target", metavar="MODULE:WORKFLOW")
@click.argument("cron", metavar="CRON")
@click.option("--id", "schedule_id", metavar="ID", required=True, help="Names the schedule.")
@click.option(
    "--input",
    "text",
    metavar="JSON",
    default="[]",
    help="Arguments of the runs, as for `kagzi run`. Default: none.",
)
@click.option(
    "--timezone",
    default="UTC",
    show_default=True,
    metavar="ZONE",
    help="Whose clock, as in Europe/Berlin.",
)
@click.option(
    "--catch-up",
    type=click.Choice([policy.value for policy in CatchUp]),
    default=CatchUp.LAST.value,
    show_default=True,
    help="Which ticks run that no worker came to in time.",
)
@click.option(
    "--overlap",
    type=click.Choice([policy.value for policy in Overlap]),
    default=Overlap.ALLOW.value,
    show_default=True,
    help="What a tick does when an earlier run is not finished.",
)
@click.option("--queue", default=DEFAULT_QUEUE, show_default=True, help="Of the runs.")
@click.option("--key", help="Of the runs, for the queue's limit per key.")
@click.option("--priority", type=int, default=0, show_default=True, help="Of the runs.")
@json_option
@click.pass_obj
def schedule(
    settings: Settings,
    /,
    target: str,
    cron: str,
    schedule_id: str,
    text: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Start runs of a workflow by the clock; a known ID is changed.

    CRON is minute, hour, day of month, month and day of week, as in '30 2 * * MON-FRI'; six fields
    begin with seconds; or @hourly, @daily, @weekly, @monthly, @yearly.
    """
    _, workflow = load_workflow(target)
    args, kwargs = read_arguments(workflow, read_input(text))

    async def record() -> Schedule:
        async with open_client(settings, may_migrate=True) as client:
            return await client.schedule(workflow, cron, *args, id=schedule_id, **options, **kwargs)

    made = uvloop.run(record())
    if as_json:
        emit(_data(made))
    else:
        state = "is paused" if made.paused else f"ticks next at {made.next_at:%Y-%m-%d %H:%M:%S %Z}"
        click.echo(f"schedule {made.id!r} of {made.workflow} {state}")


@click.command(cls=Command)
@click.option("--pause", metavar="ID", help="Let this one tick no more.")
@click.option("--resume", metavar="ID", help="Let this one tick again, from now on.")
@json_option
@click.pass_obj
def schedules(settings: Settings, pause: str | None, resume: str | None, as_json: bool) -> None:
    """List schedules, with their next ticks."""

    async def look() -> list[Schedule]:
        async with open_client(settings, may_migrate=False) as client:
            if pause is not None:
                await client.pause_schedule(pause)
            if resume is not None:
                await client.resume_schedule(resume)
            return await client.schedules()

    found = uvloop.run(look())
    if as_json:
        emit([_data(one) for one in found])
    else:
        _print(found)


@click.command(cls=Command)
@click.argument("schedule_id", metavar="ID")
@json_option
@click.pass_obj
def unschedule(settings: Settings, schedule_id: str, as_json: bool) -> None:
    """Remove a schedule. Runs that it has started go on."""

    async def remove() -> None:
        async with open_client(settings, may_migrate=False) as client:
            await client.unschedule(schedule_id)

    uvloop.run(remove())
    if as_json:
        emit({"id": schedule_id, "removed": True})
    else:
        click.echo(f"schedule {schedule_id!r} is removed")


def _data(one: Schedule) -> dict[str, Any]:
    return {**asdict(one), "last_run_id": one.last_run_id}


def _print(found: Sequence[Schedule]) -> None:
    from kagzi.command.show import Column, Columns, clean, clip, make_console, moment

    console = make_console()
    if not found:
        console.print("no schedules")
        return
    listed = Columns(
        console,
        None,
        Column("schedule"),
        Column("workflow", whole=True),
        Column("cron", whole=True),
        Column("zone", whole=True, spare=True),
        Column("next tick", whole=True),
        Column("runs", right=True),
        Column("skipped", right=True, spare=True),
        Column("last run", spare=True),
    )
    for one in found:
        next_tick = "never" if one.next_at is None else moment(one.next_at)
        listed.add(
            clean(one.id),
            clip(one.workflow, 30),
            clean(one.cron),
            clean(one.timezone),
            "paused" if one.paused else next_tick,
            f"{one.runs:,}",
            f"{one.skipped:,}",
            clean(one.last_run_id or ""),
        )
    console.print(listed.table)
