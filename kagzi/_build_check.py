"""Tells when the compiled core is not the one that its source would make.

Imported first of all, by `kagzi/__init__`: a checkout in which `_core.pyx` was edited, or that was
never built, says so with the command to run.
"""

from __future__ import annotations

import importlib
from hashlib import blake2b
from pathlib import Path

from kagzi.errors import StaleExtension

_REBUILD = "Build it again: pip install -e '.[dev]' (in the checkout)"


def check() -> None:
    """Compare the compiled core with the source beside it, if there is one.

    Raises:
        StaleExtension: Edited since it was compiled, or not compiled at all.
    """
    try:
        core = importlib.import_module("kagzi._core")
    except ModuleNotFoundError as error:
        if error.name != "kagzi._core":
            raise
        raise StaleExtension(f"The compiled core of kagzi is missing. {_REBUILD}.") from None
    source = Path(core.__file__ or "").parent / "_core.pyx"
    compiled_from: str = core.SOURCE_HASH
    if source.is_file() and digest(source) != compiled_from:
        raise StaleExtension(f"{source} was edited after it was compiled. {_REBUILD}.")


def digest(source: Path) -> str:
    return blake2b(source.read_bytes(), digest_size=16).hexdigest()
