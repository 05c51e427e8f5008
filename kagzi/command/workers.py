"""`kagzi workers`: who is there, and how they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
import uvloop

from kagzi.command.terminal import Command, Settings, emit, open_client
from kagzi.model import WorkerSummary


@click.command(cls=Command)
@click.option("--all", "everyone", is_flag=True, help="Also those that have ended (kept a day).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def workers(settings: Settings, everyone: bool, as_json: bool) -> None:
    """List workers: runs they hold, and when they were last heard of."""

    async def look() -> Any:
        async with open_client(settings, may_migrate=False) as client:
            return await client.workers(everyone=everyone)

    found: list[WorkerSummary] = uvloop.run(look())
    if as_json:
        emit([{**asdict(worker), "is_expired": worker.is_expired} for worker in found])
    else:
        _print(found)


def _print(found: list[WorkerSummary]) -> None:
    from rich.text import Text

    from kagzi.command.show import Column, Columns, clean, make_console, moment, seconds, styled

    console = make_console()
    if not found:
        console.print("no workers")
        return
    listed = Columns(
        console,
        None,
        Column("worker", whole=True),
        Column("process"),
        Column("status", whole=True),
        Column("runs", right=True),
        Column("started", whole=True, spare=True),
        Column("heard of", right=True),
        Column("last event", spare=True, least=20),
    )
    for worker in found:
        status = "lease ran out" if worker.is_expired else worker.status
        age_s = worker.heartbeat_age_s
        event = ": ".join(part for part in (worker.event, worker.event_detail) if part)
        listed.add(
            Text(str(worker.id)),
            Text(f"{clean(worker.host, 40)}/{worker.pid}"),
            styled(status),
            Text(f"{worker.runs}/{worker.concurrency or '?'}"),
            moment(worker.started_at),
            Text("" if age_s is None else f"{seconds(age_s)} ago"),
            Text(clean(event, 100)),
        )
    console.print(listed.table)
