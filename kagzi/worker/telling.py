"""Says what is wrong once, and again now and then, while something is tried again and again."""

from __future__ import annotations

import logging

AGAIN_AFTER = 60


class Telling:
    """A warning that may come at each try.

    Args:
        logger: Where to.
        text: With one `%s` for the reason.
    """

    def __init__(self, logger: logging.Logger, text: str) -> None:
        self._logger = logger
        self._text = text
        self._reason = ""
        self._count = 0

    def tell(self, reason: object) -> None:
        """It failed, for this reason; said if it is a new one, or at every so many tries."""
        if str(reason) != self._reason:
            self._reason, self._count = str(reason), 0
        if self._count % AGAIN_AFTER == 0:
            self._logger.warning(self._text, reason)
        self._count += 1

    def clear(self) -> None:
        """It worked: the next failure is said at once."""
        self._reason = ""
