"""What lies between a Context and whoever carries out its wishes: requests, outcomes, futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar
from uuid import UUID

from kagzi.definition import CallOptions, Definition
from kagzi.elsewhere import Elsewhere, Shelf
from kagzi.errors import OutsideRun, StepFailed
from kagzi.model import ErrorStrategy, GroupKind, StepInfo
from kagzi.scope import Scope

T = TypeVar("T")


class InfoSource(Protocol):
    """A running body; what it can tell of its step is made when it is asked for."""

    @property
    def info(self) -> StepInfo: ...


current: ContextVar[InfoSource] = ContextVar("kagzi_current_step")


def current_step() -> StepInfo:
    """Of the step whose body calls this, in its task or thread.

    Raises:
        OutsideRun: No step runs here.
    """
    try:
        return current.get().info
    except LookupError:
        raise OutsideRun("current_step() was called outside a step's body") from None


@dataclass(slots=True)
class StepRequest:
    """One step, named and encoded."""

    id: str
    definition: Definition
    input: bytes
    choices: CallOptions | None = None
    explicit: bool = False


@dataclass(slots=True)
class GroupRequest:
    """A group, named and encoded. The lists run in the order of the calls."""

    path: str
    kind: GroupKind
    strategy: ErrorStrategy
    ids: list[str]
    definitions: list[Definition]
    inputs: list[bytes]
    choices: list[CallOptions | None] | None = None  # None: no call has options of its own
    limit: int | None = None
    priority: int = 0
    timeout_s: float | None = None
    in_order_of_completion: bool = False
    gate: Any = None  # permits shared with other groups, instead of `limit` ones of its own
    spills: bool = False  # its outcome may tell of large results that they are `Elsewhere`


@dataclass(slots=True)
class GroupOutcome:
    """What became of a group: bytes per call, failures by index, the winner of a race.

    The list of values is its receiver's own, so that none need be kept longer than it is used.
    `shelf` is what large ones among them count against, until they are used.
    """

    values: list[Any] = field(default_factory=list)
    failures: dict[int, StepFailed] = field(default_factory=dict)
    winner: int | None = None
    shelf: Shelf | None = None


class StepFuture(asyncio.Future[T]):
    """Awaitable of one caller. Awaiting twice is allowed; cancelling it touches no other caller.

    Attributes:
        id: Step id, or path of the group.
    """

    def __init__(self, id: str, loop: asyncio.AbstractEventLoop) -> None:  # noqa: A002
        super().__init__(loop=loop)
        self.id = id
        self.awaited = False

    def __await__(self) -> Generator[Any, None, T]:
        self.awaited = True
        return super().__await__()

    __iter__ = __await__

    if not TYPE_CHECKING:

        def __aiter__(self) -> NoReturn:
            raise TypeError(
                f"{self.id!r} gives all its results together: await it. One by one come those of "
                "ctx.map over a generator, and those of ctx.as_completed"
            )

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        # asyncio.gather and asyncio.wait listen here instead of awaiting.
        self.awaited = True
        super().add_done_callback(*args, **kwargs)

    def settle(self, value: T) -> None:
        if not self.done():
            self.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.done():
            self.set_exception(error)
            # Whether anyone looks is the workflow's choice; it is logged as a failed step anyway.
            self._log_traceback = False


class Host(Protocol):
    """Who carries out what a Context asks for."""

    run_id: UUID
    loop: asyncio.AbstractEventLoop

    def scope(self) -> Scope:
        """Of the current task. Raises `OutsideRun` where the run does not reach."""

    def start_step(
        self, scope: Scope, request: StepRequest, settle: Callable[[bytes], Any]
    ) -> StepFuture[Any]:
        """Begin a step; the future gets `settle(output)` or a `StepFailed`."""

    def start_group(
        self, scope: Scope, request: GroupRequest, settle: Callable[[GroupOutcome], Any]
    ) -> StepFuture[Any]:
        """Begin a group; the future gets `settle(outcome)` or what that raises."""

    def stream_group(
        self, scope: Scope, request: GroupRequest
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Begin a group when first asked; (index, output bytes or StepFailed) as they complete."""

    def sleep(
        self, scope: Scope, step_id: str, seconds: float | None, until: datetime | None
    ) -> Any:
        """A future that resolves when the time, kept in the store, has come."""

    def make_gate(self, limit: int) -> Any:
        """Permits that groups can share; in the coordinator only."""

    def streamed(self, path: str) -> int | None:
        """How many steps a part of a map has whose results are recorded and were not loaded."""

    async def recall_stream(self, path: str, ids: list[str]) -> list[bytes | Elsewhere]:
        """Their results, in the order of the ids."""

    async def fetch(self, ids: list[str]) -> list[bytes]:
        """Results that are `Elsewhere`, in the order of the ids."""

    @property
    def scheduled_at(self) -> datetime | None:
        """The tick that the run is for; in the coordinator only."""

    def wait_event(
        self,
        scope: Scope,
        path: str,
        topic: str,
        seconds: float | None,
        settle: Callable[[bytes], Any],
    ) -> StepFuture[Any]:
        """A future of `settle(value)` of the next event of a topic, or of an EventTimeout."""

    async def publish(self, key: str, value: bytes) -> None:
        """Let clients see a value; in the coordinator only."""

    def store_now(self) -> datetime:
        """The store's time; in the coordinator only."""

    def timeout(self, scope: Scope, path: str, seconds: float) -> Any:
        """An async context manager that ends the waits inside it when its time is up."""

    def patched(self, scope: Scope, patch: str) -> bool:
        """Whether the run takes the code of this patch; in workflow code only."""
