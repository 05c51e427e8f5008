"""How often the search for cycles runs while workers are open."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from kagzi.worker.garbage import YOUNG, search_as_before, search_less


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_search_is_as_before_when_the_last_worker_has_closed() -> None:
    search_less()
    search_less()
    assert gc.get_threshold() == (YOUNG, 10, 10)
    search_as_before()
    assert gc.get_threshold() == (YOUNG, 10, 10)
    search_as_before()
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("chosen", [0, 5_000])
def test_threshold_that_the_program_chose_is_kept(chosen: int) -> None:
    gc.set_threshold(chosen, 10, 10)
    search_less()
    assert gc.get_threshold() == (chosen, 10, 10)
    search_as_before()
    assert gc.get_threshold() == (chosen, 10, 10)


def test_threshold_that_was_set_meanwhile_stays() -> None:
    search_less()
    gc.set_threshold(9_000, 10, 10)
    search_as_before()
    assert gc.get_threshold() == (9_000, 10, 10)


def test_search_that_is_switched_off_stays_as_it_is() -> None:
    gc.disable()
    try:
        search_less()
        assert gc.get_threshold() == (700, 10, 10)
        search_as_before()
        assert gc.get_threshold() == (700, 10, 10)
    finally:
        gc.enable()
