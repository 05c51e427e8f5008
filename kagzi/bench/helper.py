"""Child processes that do work on demand: one line of JSON in, one out.

What must start fresh (memory), be apart (another worker, a peer with its own threads) or count for
itself (processor time) runs there.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import orjson

from kagzi.errors import KagziError
from kagzi.store.connections import redact

PATIENCE_S = 900.0
LINE_BYTES = 1 << 24

Task = Callable[..., Awaitable[Any]]


class HelperFailed(KagziError):
    """A child process of the benchmarks could not do what it was told."""


class Helper:
    """A child process, as its parent sees it; an async context manager.

    Args:
        module: Whose `main` calls `serve`.
        settings: Given to it in the environment, where no list of processes shows them.

    Attributes:
        tasks: What it can be told to do.
    """

    def __init__(self, module: str, **settings: Any) -> None:
        self._module = module
        self._settings = settings
        self.tasks: frozenset[str] = frozenset()
        self._process: asyncio.subprocess.Process = None  # type: ignore[assignment]

    async def __aenter__(self) -> Helper:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "KAGZI_BENCH": orjson.dumps(self._settings).decode()},
            limit=LINE_BYTES,
        )
        try:
            self.tasks = frozenset(await self._answer())
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def do(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """What the task gives.

        Raises:
            HelperFailed: It failed there, or the process ended.
        """
        assert self._process.stdin is not None, "it was opened with a pipe"
        with suppress(ConnectionError):  # then there is no answer either
            self._process.stdin.write(orjson.dumps([task, args, kwargs]) + b"\n")
            await self._process.stdin.drain()
        return await self._answer()

    async def _answer(self) -> Any:
        assert self._process.stdout is not None, "it was opened with a pipe"
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_S)
        except TimeoutError:
            raise HelperFailed(f"{self._module} does not answer") from None
        if not line:
            code = await self._process.wait()
            raise HelperFailed(f"{self._module} ended with exit code {code}")
        answer = orjson.loads(line)
        if "error" in answer:
            raise HelperFailed(f"{self._module}: {answer['error']}")
        return answer["value"]

    async def _end(self) -> None:
        process = self._process
        assert process.stdin is not None, "it was opened with a pipe"
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 15)
        except TimeoutError:
            process.kill()
            await process.wait()


def settings() -> dict[str, Any]:
    """What the parent gave, for the child."""
    return dict(orjson.loads(os.environ["KAGZI_BENCH"]))


async def serve(tasks: Mapping[str, Task]) -> None:
    """Say what can be done, then do what the parent's lines ask for, until there are no more."""
    lines = asyncio.StreamReader(limit=LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    _answer({"value": list(tasks)})
    while line := await lines.readline():
        name, args, kwargs = orjson.loads(line)
        try:
            value = await tasks[name](*args, **kwargs)
        except Exception as error:
            _answer({"error": redact(f"{type(error).__name__}: {error}")})
        else:
            _answer({"value": value})


def keep_answers_apart() -> None:
    """What libraries print must not stand between answers: standard output becomes the error's."""
    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)


_answers = 1


def _answer(answer: dict[str, Any]) -> None:
    os.write(_answers, orjson.dumps(answer) + b"\n")
