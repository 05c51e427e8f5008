"""The search for reference cycles, while a worker is open: less often.

Python looks through all young objects whenever there are 700 more of them (2,000 since 3.13). What
is held of some thousand runs looks like that all the time, and hardly any of it is a cycle: with
2,000 runs of one step the search was a third of the worker's own time.
"""

from __future__ import annotations

import gc

YOUNG = 20_000
_MOST_BY_DEFAULT = 2_000

_before: tuple[int, int, int] | None = None
_workers = 0


def search_less() -> None:
    """For as long as until `search_as_before` was called as often. A program that chose its own
    threshold, or none, keeps it.
    """
    global _before, _workers
    _workers += 1
    thresholds = gc.get_threshold()
    if _workers == 1 and gc.isenabled() and 0 < thresholds[0] <= _MOST_BY_DEFAULT:
        _before = thresholds
        gc.set_threshold(YOUNG, *thresholds[1:])


def search_as_before() -> None:
    global _before, _workers
    _workers -= 1
    if _workers == 0 and _before is not None:
        before, _before = _before, None
        if gc.get_threshold() == (YOUNG, *before[1:]):  # nobody else has set it meanwhile
            gc.set_threshold(*before)
