"""Where bodies wait before they begin, while results that others made are not taken yet."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 16


class Turns:
    """Lets bodies begin, unless they are held back; then a few at a time, in order.

    Attributes:
        held: They are held back. Who finds that so is to `wait`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._called = False
        self.held = False

    def hold(self, held: bool) -> None:
        self.held = held
        if not held and not self._called:
            self._go_on()

    async def wait(self) -> None:
        """Wait for a turn. What it does in that turn may well hold back the next."""
        while self.held:
            turn = self._loop.create_future()
            self._waiting.append(turn)
            await turn

    def _go_on(self) -> None:
        self._called = False
        if self.held:
            return
        for _ in range(min(AT_ONCE, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        if self._waiting:
            self._called = True
            self._loop.call_soon(self._go_on)  # behind those that were let in
