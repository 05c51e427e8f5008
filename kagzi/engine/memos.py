"""Answers steps from what earlier runs have left, all of one moment by one look."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kagzi._core import Step
from kagzi.background import begin_apart, cancel_all
from kagzi.engine.answers import Answers, memo_key
from kagzi.store.store import Store

logger = logging.getLogger("kagzi.worker")


class Memos:
    """Of one worker.

    Args:
        answers: Takes in the steps that have a memo.
        submit: Lets the others begin.

    Attributes:
        waiting: Steps that are to be looked up.
    """

    def __init__(
        self, store: Store, answers: Answers, submit: Callable[[list[Step]], None]
    ) -> None:
        self._store = store
        self._answers = answers
        self._submit = submit
        self._task: asyncio.Task[None] | None = None
        self.waiting: list[Step] = []

    def look_up(self, steps: list[Step]) -> None:
        self.waiting += steps
        self._answers.uses_memos = True
        if self._task is None:
            self._task = begin_apart(self._look())

    async def close(self) -> None:
        if self._task is not None:
            await cancel_all([self._task])

    async def _look(self) -> None:
        try:
            while self.waiting:
                await asyncio.sleep(0)  # all of this turn of the loop in one SELECT
                steps, self.waiting = self.waiting, []
                keys = [memo_key(step) for step in steps]
                try:
                    found = await self._store.find_memos(keys)
                except Exception as error:
                    logger.warning("memos are left aside: %s", error)
                    found = {}
                left = []
                for step, key in zip(steps, keys, strict=True):
                    if key in found:
                        self._answers.answered_by_memo(step, found[key])
                    elif not step.group.closed:
                        left.append(step)
                self._submit(left)
        finally:
            self._task = None
