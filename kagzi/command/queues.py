"""Commands for queues: `kagzi queues`, `kagzi queue`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import uvloop

from kagzi.command.terminal import Command, Settings, emit, open_client
from kagzi.errors import InvalidInput
from kagzi.model import QueueSummary

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(cls=Command)
@json_option
@click.pass_obj
def queues(settings: Settings, as_json: bool) -> None:
    """List queues with their limits, and what waits, sleeps and runs in each."""

    async def look() -> list[QueueSummary]:
        async with open_client(settings, may_migrate=False) as client:
            return await client.queues()

    found = uvloop.run(look())
    if as_json:
        emit([asdict(one) for one in found])
    else:
        _print(found)


@click.command(cls=Command)
@click.argument("name", metavar="NAME")
@click.option("--concurrency", metavar="N|none", help="Most runs held at once, over all workers.")
@click.option("--per-key", metavar="N|none", help="The same, of runs with one key.")
@click.option(
    "--rate", metavar="N/S|none", help="Most first starts in any S seconds, as in 10/1 or 100/60."
)
@click.option("--pause", is_flag=True, help="Let no run of it begin or go on.")
@click.option("--resume", is_flag=True, help="Let them again.")
@json_option
@click.pass_obj
def queue(
    settings: Settings,
    name: str,
    concurrency: str | None,
    per_key: str | None,
    rate: str | None,
    pause: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Set limits of a queue, or pause it. What is not named stays."""
    changes: dict[str, Any] = {}
    if concurrency is not None:
        changes["concurrency"] = _count("--concurrency", concurrency)
    if per_key is not None:
        changes["concurrency_per_key"] = _count("--per-key", per_key)
    if rate is not None:
        changes["rate"] = _rate(rate)
    if pause and resume:
        raise InvalidInput("--pause and --resume exclude each other")
    if pause or resume:
        changes["paused"] = pause
    if not changes:
        raise InvalidInput("nothing to set: name a limit, --pause or --resume")

    async def change() -> QueueSummary:
        async with open_client(settings, may_migrate=True) as client:
            return await client.set_queue(name, **changes)

    made = uvloop.run(change())
    if as_json:
        emit(asdict(made))
    else:
        _print([made])


def _count(option: str, text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise InvalidInput(f"{option} must be a whole number or none, got {text!r}")
    return int(text)


def _rate(text: str) -> tuple[int, float] | None:
    if text == "none":
        return None
    starts, _, seconds = text.partition("/")
    try:
        return int(starts), float(seconds)
    except ValueError:
        raise InvalidInput(
            f"--rate must be starts/seconds, as 10/1, or none, got {text!r}"
        ) from None


def _print(found: Sequence[QueueSummary]) -> None:
    from kagzi.command.show import Column, Columns, clean, make_console

    console = make_console()
    if not found:
        console.print("no queues")
        return
    listed = Columns(
        console,
        None,
        Column("queue"),
        Column("waiting", right=True),
        Column("sleeping", right=True),
        Column("running", right=True),
        Column("concurrency", right=True),
        Column("per key", right=True),
        Column("rate", right=True),
        Column("", whole=True),
    )
    for one in found:
        listed.add(
            clean(one.name),
            f"{one.waiting:,}",
            f"{one.sleeping:,}",
            f"{one.running:,}",
            _limit(one.concurrency),
            _limit(one.concurrency_per_key),
            "" if one.rate is None else f"{one.rate[0]:,} in {one.rate[1]:g} s",
            "paused" if one.paused else "",
        )
    console.print(listed.table)


def _limit(limit: int | None) -> str:
    return "" if limit is None else f"{limit:,}"
