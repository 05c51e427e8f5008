"""What the commands share: options, where runs are kept, how errors end, how data is printed."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import click
import orjson
import psycopg

from kagzi.client import Client, connect
from kagzi.command.serve import Stopped
from kagzi.errors import (
    CodecError,
    EmbeddedServerFailed,
    InvalidInput,
    KagziError,
    MissingMainGuard,
    RunConflict,
    RunEnded,
    RunFailed,
    RunWasCancelled,
    StoreError,
    UnknownRun,
    UnknownSchedule,
    UnknownStep,
    UnknownWorkflow,
)
from kagzi.store import embedded
from kagzi.store.connections import Connector, redact
from kagzi.store.migrate import DEFAULT_SCHEMA

RUN_FAILED, USAGE, STORE, NOT_FOUND, INTERNAL = 1, 2, 3, 4, 70

EXIT_CODES = """\
\b
Exit codes:
  0    done
  1    the run failed or was cancelled (demo: a promise did not hold; check: a run would break)
  2    bad usage or input
  3    the store is unavailable, refuses, or has another schema
  4    no such run, step, workflow or schedule
  70   something else went wrong, e.g. the pool did not start
  128+n  ended by signal n (130: Ctrl-C, 143: SIGTERM)
"""


@dataclass
class Settings:
    """The options of `kagzi` itself."""

    dsn: str | None = None
    schema: str = DEFAULT_SCHEMA
    debug: bool = False

    @property
    def known_dsn(self) -> str | None:
        return self.dsn or os.environ.get("DATABASE_URL") or None


# --- errors ---------------------------------------------------------------------------------


def exit_code(error: BaseException) -> int:
    """What a script learns of an error."""
    by_class: tuple[tuple[Any, int], ...] = (
        # First, for a failed run is also of the class of what failed it.
        ((RunFailed, RunWasCancelled), RUN_FAILED),
        ((UnknownRun, UnknownSchedule, UnknownStep, UnknownWorkflow), NOT_FOUND),
        ((StoreError, psycopg.Error), STORE),
        ((InvalidInput, CodecError, RunConflict, RunEnded, MissingMainGuard), USAGE),
    )
    return next((code for cls, code in by_class if isinstance(error, cls)), INTERNAL)


def explain(error: BaseException) -> str:
    """An error on one line, with what to do next."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, RunFailed):
        run = error.run_id
        text = (
            f"run {run!r} failed: {text}. `kagzi show {run}` tells more; "
            f"`kagzi retry {run}` lets it go on"
        )
    elif isinstance(error, psycopg.Error):
        text = f"PostgreSQL refused: {text}. `kagzi migrate` may help; --debug shows where"
    if isinstance(error, EmbeddedServerFailed):
        return text  # ends with the lines of the server's log
    return " ".join(text.split())


class Commands(click.Group):
    """Ends every error of kagzi as one line on standard error, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        settings = ctx.ensure_object(Settings)
        try:
            return super().invoke(ctx)
        except (KagziError, psycopg.Error) as error:
            code = exit_code(error)
            if settings.debug:
                say(redact("".join(traceback.format_exception(error))))
            say(f"kagzi: {explain(error)}")
        except Stopped as stopped:
            code = 128 + stopped.number
            say(
                f"kagzi: {stopped}; run {stopped.run_id!r} was given back and goes on where a "
                f"worker serves it, or by the same command with --id {stopped.run_id}"
            )
        except KeyboardInterrupt:
            code = 130
            say("kagzi: interrupted")
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # a fault of kagzi's own: 1 would mean that a run failed
            code = INTERNAL
            say(redact("".join(traceback.format_exception(error))))
        ctx.exit(code)


def say(line: str) -> None:
    click.echo(line, err=True)


# --- options --------------------------------------------------------------------------------


def _set(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    if value and option.name is not None:
        setattr(ctx.ensure_object(Settings), option.name, value)


def own_options(hidden: bool = False) -> list[click.Parameter]:
    return [
        click.Option(
            ["--dsn"],
            metavar="DSN",
            help="Where PostgreSQL is. Default: DATABASE_URL, else an embedded server. A password "
            "is better kept in the environment than on a command line.",
            expose_value=False,
            callback=_set,
            hidden=hidden,
        ),
        click.Option(
            ["--schema"],
            metavar="NAME",
            help=f"Of kagzi's tables. Default: {DEFAULT_SCHEMA}.",
            expose_value=False,
            callback=_set,
            hidden=hidden,
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            help="Show tracebacks.",
            expose_value=False,
            callback=_set,
            hidden=hidden,
        ),
    ]


class Command(click.Command):
    """Takes the options of `kagzi` itself behind its own name, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += own_options(hidden=True)


Commands.command_class = Command


# --- what every command needs ---------------------------------------------------------------


@asynccontextmanager
async def open_client(settings: Settings, *, may_migrate: bool) -> AsyncIterator[Client]:
    """A client; with an embedded server, whose start is told.

    Args:
        may_migrate: Bring the schema of a server that the user named up to date; else only check.
    """
    dsn = settings.known_dsn
    if dsn is not None:
        async with connect(dsn, schema=settings.schema, migrate=may_migrate) as client:
            yield client
        return
    server = await asyncio.to_thread(embedded.attach, progress=say)
    try:
        # Its own schema may be made by a look; another one was meant to be there.
        make = may_migrate or settings.schema == DEFAULT_SCHEMA
        async with connect(server.dsn, schema=settings.schema, migrate=make) as client:
            yield client
    finally:
        await asyncio.to_thread(server.close)


def emit(data: Any) -> None:
    """One JSON document on standard output, indented for people."""
    indent = orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0
    click.echo(orjson.dumps(data, option=indent))


def place_of(settings: Settings) -> str:
    """Where the runs are kept, without a password."""
    dsn = settings.known_dsn
    if dsn is None:
        return f"embedded PostgreSQL, data in {embedded.default_data_folder()}"
    connector = Connector(dsn, settings.schema)
    return f"PostgreSQL at {connector.host}, database {connector.database!r}"
