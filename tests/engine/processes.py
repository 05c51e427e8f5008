"""A `kagzi` command in a process of its own, and the gates at which its steps wait."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


class Process:
    """One command, as an async context manager that ends it in any case.

    Attributes:
        output, errors: What it said, whole once it has ended.
    """

    def __init__(self, dsn: str, *arguments: str, folder: Path = ROOT) -> None:
        self._dsn = dsn
        self._arguments = arguments
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.output = ""
        self.errors = ""

    async def __aenter__(self) -> Process:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kagzi", *self._arguments),
            cwd=self._folder,
            env={**os.environ, "DATABASE_URL": self._dsn, "PYTHONPATH": path},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "entered"
        return self._process

    async def says(self, text: str) -> None:
        """Wait for a line on standard error that holds `text`."""
        assert self.process.stderr is not None, "a pipe"
        async with asyncio.timeout(DEADLINE_S):
            while True:
                line = (await self.process.stderr.readline()).decode()
                assert line, f"it ended without saying {text!r}: {self.errors}"
                self.errors += line
                if text in line:
                    return

    async def ended(self) -> int:
        """Its exit code; negative: minus the signal that ended it."""
        async with asyncio.timeout(DEADLINE_S):
            output, errors = await self.process.communicate()
        self.output += output.decode()
        self.errors += errors.decode()
        assert self.process.returncode is not None, "it has ended"
        return self.process.returncode

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


class Gate:
    """Two named pipes: a step says through one that it has begun, and waits for the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("begun", "go"):
            os.mkfifo(folder / name)

    async def begun(self) -> None:
        """Wait until a step has come to the gate."""
        pipe = self.folder / "begun"
        try:
            async with asyncio.timeout(DEADLINE_S):
                assert await asyncio.to_thread(pipe.read_text) == "begun"
        except TimeoutError:
            os.close(os.open(pipe, os.O_RDWR))  # lets the thread go that waits for a writer
            raise

    async def let_go(self, word: str) -> None:
        await asyncio.to_thread((self.folder / "go").write_text, word)
