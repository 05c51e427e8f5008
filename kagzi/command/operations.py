"""`kagzi cancel`, `pause`, `resume`, `fork`, `send`: what people do to runs that are under way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click
import orjson
import uvloop

from kagzi.command.terminal import Command, Settings, emit, open_client
from kagzi.errors import InvalidInput
from kagzi.model import RunStatus

Options = Callable[..., Any]


def _many(what: str) -> Callable[[Options], Options]:
    """Options by which a command takes runs by name, or all that match."""

    def add(command: Options) -> Options:
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print JSON."),
            click.option(
                "--before",
                metavar="TIME",
                help="Those created before this moment (ISO 8601; without a zone: UTC).",
            ),
            click.option("--workflow", metavar="NAME", help="Its full name, or the last part."),
            click.option(
                "--status", multiple=True, type=click.Choice([status.value for status in RunStatus])
            ),
            click.option("--all", "everything", is_flag=True, help=f"{what} all that match."),
            click.argument("runs", metavar="[RUN]...", nargs=-1),
        ):
            command = option(command)
        return command

    return add


@click.command(cls=Command)
@_many("Cancel")
@click.pass_obj
def cancel(settings: Settings, /, **options: Any) -> None:
    """End runs, and the children that they started. Running steps are told."""
    _change(settings, "cancel", "Cancelled", **options)


@click.command(cls=Command)
@_many("Pause")
@click.pass_obj
def pause(settings: Settings, /, **options: Any) -> None:
    """Stop runs where they are, until `kagzi resume`."""
    _change(settings, "pause", "Paused", **options)


@click.command(cls=Command)
@_many("Resume")
@click.pass_obj
def resume(settings: Settings, /, **options: Any) -> None:
    """Let paused runs go on."""
    _change(settings, "resume", "Resumed", **options)


def _change(
    settings: Settings,
    what: str,
    done: str,
    runs: tuple[str, ...],
    everything: bool,
    status: tuple[str, ...],
    workflow: str | None,
    before: str | None,
    as_json: bool,
) -> None:
    filtered = bool(status or workflow or before)
    if bool(runs) == everything or (runs and filtered):
        raise InvalidInput(
            f"name the runs (kagzi {what} RUN...), or say --all, with --workflow, --status or "
            "--before if only some are meant"
        )
    moment = None if before is None else _moment(before)

    async def act() -> tuple[int, dict[str, RunStatus]]:
        async with open_client(settings, may_migrate=False) as client:
            if everything:
                many = getattr(client, f"{what}_many")
                return await many(status=status or None, workflow=workflow, before=moment), {}
            one = getattr(client, what)
            named = {run: await one(run) for run in runs}
            return len(named), named

    count, named = uvloop.run(act())
    if as_json:
        emit({"count": count, "runs": {run: now.value for run, now in named.items()}})
        return
    for run, now in named.items():
        heard = "; its worker hears of it" if now is RunStatus.RUNNING and what != "resume" else ""
        click.echo(f"run {run!r} is {now.value}{heard}")
    if everything:
        click.echo(f"{done} {count} run(s)")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            f"--before {text!r} is no time; write e.g. 2026-11-23T12:00:00+01:00"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN")
@click.option("--from", "from_step", metavar="STEP", help="Step or group that is made anew first.")
@click.option("--id", "new_id", metavar="ID", help="Of the new run. Default: a new one.")
@click.option("--version", metavar="VERSION", help="Of its workflow. Default: the old run's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def fork(
    settings: Settings,
    run_id: str,
    from_step: str | None,
    new_id: str | None,
    version: str | None,
    as_json: bool,
) -> None:
    """Start a new run with the results of RUN up to a step."""

    async def act() -> tuple[str, str, int]:
        async with open_client(settings, may_migrate=False) as client:
            handle = await client.fork(run_id, from_step=from_step, id=new_id, version=version)
            kept, failed = await handle.progress()
            return handle.id, str(handle.run_id), kept + failed

    new, database_id, kept = uvloop.run(act())
    if as_json:
        emit({"id": new, "run_id": database_id, "kept": kept})
    else:
        click.echo(f"run {new!r} keeps {kept} step(s) of {run_id!r}; a worker goes on with it")


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN")
@click.argument("topic")
@click.argument("value", metavar="[JSON]", default="null")
@click.option("--id", "event_id", metavar="ID", help="The same id to the same run is sent once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def send(
    settings: Settings, run_id: str, topic: str, value: str, event_id: str | None, as_json: bool
) -> None:
    """Send an event to RUN, for its `ctx.wait_event(TOPIC)`."""
    try:
        content = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"{value!r} is no JSON ({error}); a text is written '\"so\"'") from None

    async def act() -> bool:
        async with open_client(settings, may_migrate=False) as client:
            return await client.send(run_id, topic, content, id=event_id)

    sent = uvloop.run(act())
    if as_json:
        emit({"sent": sent})
    else:
        click.echo("sent" if sent else f"an event {event_id!r} was sent before; nothing is changed")


COMMANDS = (cancel, pause, resume, fork, send)
