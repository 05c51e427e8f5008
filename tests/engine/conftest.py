"""Tests of the engine run in the loop that `kagzi.run` and the command line use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    # Known to pytest-asyncio from 1.5 on; before that the plain loop serves.
    return {"uvloop": uvloop.new_event_loop}
