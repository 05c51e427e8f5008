"""Finds Python files and measures one by its syntax tree. Knows nothing of workflows."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

_ELSEWHERE = frozenset({"site-packages", "dist-packages", "__pycache__"})
MOST_NAME_BYTES = 200
_BRANCHES = (
    *(ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.BoolOp),
    *(ast.comprehension, ast.Assert, ast.match_case),
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to measure.

    Attributes:
        name: Dotted and unique; names the step that measures it.
        size_bytes, changed_ns: When they change, earlier results do not count any more.
    """

    name: str
    path: str
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Measures:
    """What is counted in a file. `branches` is one for each place where its flow may part."""

    name: str
    lines: int
    functions: int
    classes: int
    branches: int


def standard_library() -> str:
    return sysconfig.get_path("stdlib")


def find_sources(folder: str, full: bool) -> list[SourceFile]:
    """Every Python file below a folder, by name; not installed packages, nor odd file names.

    Args:
        full: Also the standard library's own test suite.
    """
    found = []
    names: dict[str, int] = {}
    skipped = _ELSEWHERE if full else _ELSEWHERE | {"test"}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - skipped)
        for file in files:
            path = Path(parent, file)
            if path.suffix == ".py" and path.is_file() and str(path).isprintable():
                about = path.stat()
                name = ".".join(path.relative_to(folder).with_suffix("").parts)
                name = name.replace("#", "_").encode()[-MOST_NAME_BYTES:].decode(errors="ignore")
                known = names[name] = names.get(name, 0) + 1
                if known > 1:  # a/b.py beside a.b.py
                    name += f"~{known}"
                found.append(SourceFile(name, str(path), about.st_size, about.st_mtime_ns))
    return sorted(found, key=lambda source: source.name)


def measure_source(source: SourceFile) -> Measures:
    """Parse a file and count.

    Raises:
        SyntaxError, ValueError: This Python cannot parse it.
    """
    code = Path(source.path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escape sequences in other people's code
        tree = ast.parse(code, source.path)
    functions = classes = branches = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
        elif isinstance(node, ast.ClassDef):
            classes += 1
        elif isinstance(node, _BRANCHES):
            branches += 1
    return Measures(source.name, code.count(b"\n"), functions, classes, branches)
