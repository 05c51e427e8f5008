"""Names code that blocks the event loop, with its stack, while it does so."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback

logger = logging.getLogger("kagzi.worker")

BLOCKED_S = 1.0


class LoopWatch:
    """A thread that asks the loop for a sign of life and says where it hangs when none comes.

    Args:
        loop: Runs in the thread that makes this.
        blocked_s: Silence that is worth a warning.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, blocked_s: float = BLOCKED_S) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._blocked_s = blocked_s
        self._answered = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kagzi-loop-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._blocked_s):
            self._answered.clear()
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # the loop is closed
                return
            if self._answered.wait(self._blocked_s) or self._stop.is_set():
                continue
            frame = sys._current_frames().get(self._loop_thread)
            stack = "".join(traceback.format_stack(frame)[-12:]) if frame is not None else ""
            logger.warning(
                "the event loop of this worker has been blocked for %.1f s; workflow code must not "
                "block: put the work into a step. It is here:\n%s",
                self._blocked_s,
                stack,
            )
            del frame
            while not self._answered.wait(self._blocked_s) and not self._stop.is_set():
                pass
