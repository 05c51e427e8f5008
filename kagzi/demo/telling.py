"""What both demonstrations share: lines, a progress bar, and waiting for a run behind it."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from kagzi.command.show import clean, make_console
from kagzi.demo.sources import SourceFile, find_sources, standard_library
from kagzi.errors import InvalidInput
from kagzi.handle import RunHandle

T = TypeVar("T")

MODULE = "kagzi.demo.steps"
POLL_S = 0.05


class Teller:
    """Prints lines for people, and a bar on a terminal's standard error.

    Args:
        quiet: Print nothing; the caller will print data.
    """

    def __init__(self, quiet: bool) -> None:
        self.console = make_console()
        self.console.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=(errors := make_console(stderr=True)),
            transient=True,
            disable=not errors.is_terminal,
        )

    def title(self, text: str) -> None:
        self.console.print(Text(clean(text), style="bold"))

    def fact(self, name: str, text: str, style: str = "") -> None:
        """A line of two columns."""
        line = Table.grid(Column(width=16), Column(overflow="fold"))
        line.add_row(Text(f"  {name}", style="dim"), Text(clean(text, 1_000), style=style))
        self.console.print(line)

    def verdict(self, holds: bool, text: str) -> None:
        """Whether what was promised held."""
        shown = f"{'kept' if holds else 'BROKEN'}: {text}"
        self.fact("promise", shown, "bold green" if holds else "bold red")


class Bar:
    """Shows how many checkpoints a run has, as long as the block lasts."""

    def __init__(self, teller: Teller, handle: RunHandle[Any], total: int, text: str) -> None:
        self._progress = teller.progress
        self._handle = handle
        self._task = self._progress.add_task(text, total=total)
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Bar:
        self._progress.start()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        self._progress.remove_task(self._task)
        self._progress.stop()

    async def _watch(self) -> None:
        while True:
            completed, failed = await self._handle.progress()
            self._progress.update(self._task, completed=completed + failed)
            await asyncio.sleep(POLL_S)


def choose_sources(folder: str | None, full: bool) -> tuple[str, list[SourceFile]]:
    """The folder to analyse, and its files.

    Raises:
        InvalidInput: It has none.
    """
    chosen = folder or standard_library()
    sources = find_sources(chosen, full)
    if not sources:
        raise InvalidInput(f"there is no Python file below {chosen}: give another --folder")
    return chosen, sources
