"""A run, as its client sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

from kagzi.codec import codec_for
from kagzi.errors import UnknownWorkflow
from kagzi.model import RunDetails, RunStatus
from kagzi.registry import registry
from kagzi.store.operations import read_values
from kagzi.store.store import Store

T = TypeVar("T")

UNTYPED = codec_for(Any)


class HandleHome(Protocol):
    """What a handle needs of its client."""

    _store: Store

    async def describe(self, run: UUID) -> RunDetails: ...

    async def cancel(self, run: RunHandle[Any]) -> RunStatus: ...

    async def send(
        self,
        run: RunHandle[Any],
        topic: str,
        value: Any,
        *,
        id: str | None,  # noqa: A002 - the public option has this name
    ) -> bool: ...

    async def _wait(
        self, run_id: UUID, name: str, timeout: float | None, told: int | None = None
    ) -> bytes: ...

    def _looks(self, run_id: UUID) -> AsyncGenerator[bool, None]: ...


class RunHandle(Generic[T]):
    """A run, as its client sees it.

    Attributes:
        id: Its external id: the one it was started with, else the database's as text.
        run_id: The database's id.
        workflow: Full name of its workflow.
        is_new: Whether this start made it; False if the id was known.
    """

    def __init__(
        self,
        client: HandleHome,
        run_id: UUID,
        external_id: str,
        workflow: str,
        version: str,
        is_new: bool,
    ) -> None:
        self._client = client
        self.run_id = run_id
        self.id = external_id
        self.workflow = workflow
        self.version = version
        self.is_new = is_new
        self._told: int | None = None  # how much the client had been told when it started this

    async def result(self, timeout: float | None = None) -> T:
        """Wait for the run's end; its result, typed by the workflow's return annotation.

        Args:
            timeout: Seconds to wait; None for ever.

        Raises:
            RunFailed: It failed; also of the class of the `StepFailed` (or other error of kagzi)
                that the workflow let through.
            RunWasCancelled: It was cancelled.
            TimeoutError: It goes on, and the time is up.
        """
        output = await self._client._wait(self.run_id, self.id, timeout, self._told)
        try:
            returns = registry.workflow(self.workflow, self.version).returns
        except UnknownWorkflow:
            return UNTYPED.decode(output)  # type: ignore[no-any-return]
        return returns.decode(output)  # type: ignore[no-any-return]

    async def status(self) -> RunStatus:
        """Where the run stands now."""
        return (await self._client._store.read_status(self.run_id))[0]

    async def progress(self) -> tuple[int, int]:
        """Checkpoints so far: (completed, failed)."""
        return await self._client._store.count_steps(self.run_id)

    async def describe(self) -> RunDetails:
        """Status, steps, groups, failed attempts and timings."""
        return await self._client.describe(self.run_id)

    async def cancel(self) -> RunStatus:
        """See `Client.cancel`."""
        return await self._client.cancel(self)

    async def send(self, topic: str, value: Any = None, *, id: str | None = None) -> bool:  # noqa: A002
        """See `Client.send`."""
        return await self._client.send(self, topic, value, id=id)

    async def published(self) -> dict[str, Any]:
        """What the run has published so far: the latest value under each key."""
        rows = await read_values(self._client._store, self.run_id)
        return {key: UNTYPED.decode(value) for key, value, _ in rows}

    async def follow(self) -> AsyncIterator[tuple[str, Any]]:
        """(key, value) of what is and will be published, until the run ends.

        A value that is replaced before it is looked at is left out.
        """
        after = -1
        async for ended in self._client._looks(self.run_id):
            for key, value, number in await read_values(self._client._store, self.run_id, after):
                after = number
                yield key, UNTYPED.decode(value)
            if ended:
                return

    def __repr__(self) -> str:
        return f"<run {self.id!r} of {self.workflow}>"
