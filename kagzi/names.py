"""Names of modules as they are recorded: the same in whichever process a function or class is had.

A script is `__main__` in the process it was started in, `__mp_main__` in a pool process, and goes
by its file's name where it is imported: that last name is the one recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

MAIN = frozenset({"__main__", "__mp_main__"})


def recorded_module(module: str) -> str:
    """`module`; of a main script its file's name, and under `python -m` the module's own."""
    if module not in MAIN:
        return module
    main = sys.modules.get(module)
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name.removesuffix(".__main__"))
    path = getattr(main, "__file__", None)
    return Path(path).stem if path else "__main__"


def class_name(cls: type) -> str:
    """Qualified name of a class."""
    return f"{recorded_module(cls.__module__)}.{cls.__qualname__}"
