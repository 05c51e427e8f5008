"""What a command line names: a module, a workflow or function in it, and an input as JSON."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson

from kagzi.definition import Workflow
from kagzi.errors import CodecError, InvalidInput, KagziError, UnknownWorkflow
from kagzi.registry import registry


def load_module(name: str) -> ModuleType:
    """Import a module, also from the current folder.

    Raises:
        InvalidInput: It cannot be imported; names the module, the cause and its place.
    """
    if name.endswith(".py") or "/" in name or not name or name.startswith("."):
        stem = name.removesuffix(".py").strip("./").replace("/", ".") or "shop"
        raise InvalidInput(f"{name!r} is not a module's name: write it as in `import {stem}`")
    folder = os.getcwd()
    if folder not in sys.path:
        # First, as for a script; but in a checkout of kagzi last, for pool processes look there too
        # and would find a kagzi beside the one that is installed.
        first = not Path(folder, "kagzi", "__init__.py").exists()
        sys.path.insert(0 if first else len(sys.path), folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InvalidInput(_why_not(name, folder, error)) from error


def _why_not(name: str, folder: str, error: BaseException) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        return (
            f"there is no module {missing!r} in {folder} or on Python's path: go to the folder "
            "that holds it, or install it here"
        )
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}"
    text = " ".join(str(error).split())
    return f"module {name!r} cannot be imported: {type(error).__name__}: {text} ({place})"


def load_app(target: str) -> str:
    """Import `module` or `module:app`; the module's name.

    `app` is a workflow of the module, or a function without arguments that registers more and is
    called here, once.

    Raises:
        InvalidInput: No such module or app, or nothing was registered.
    """
    name, _, attribute = target.partition(":")
    module = load_module(name)
    if attribute:
        app = _attribute(module, name, attribute)
        if not isinstance(app, Workflow):
            if not callable(app):
                raise InvalidInput(
                    f"{target!r} is neither a workflow nor a function that registers some"
                )
            try:
                app()
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                raise InvalidInput(f"{target!r} could not be called: {text}") from error
    if not registry.names():
        raise InvalidInput(
            f"module {name!r} registers no workflow, so a worker would have nothing to do: "
            "decorate an async function with @kagzi.workflow"
        )
    return name


def load_workflow(target: str) -> tuple[str, Workflow[..., Any]]:
    """`module:workflow`, by the function's or the registered name; the module's name and it.

    Raises:
        InvalidInput: No such module, or the target is not written so.
        UnknownWorkflow: The module has no such workflow.
    """
    name, _, attribute = target.partition(":")
    if not attribute:
        raise InvalidInput(f"{target!r} names no workflow: write module:workflow, as in shop:order")
    module = load_module(name)
    found = getattr(module, attribute, None)
    if isinstance(found, Workflow):
        return name, found
    try:
        return name, registry.workflow(attribute)
    except UnknownWorkflow:
        known = [a for a, value in vars(module).items() if isinstance(value, Workflow)]
        raise UnknownWorkflow(
            f"module {name!r} has no workflow {attribute!r}; it has: {', '.join(known) or 'none'}"
        ) from None


def _attribute(module: ModuleType, name: str, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise InvalidInput(f"module {name!r} has no {attribute!r}")
    return found


def read_input(text: str) -> bytes:
    """The value of --input: itself, a file's content for `@FILE`, standard input for `-`.

    Raises:
        InvalidInput: The file cannot be read.
    """
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        try:
            return Path(text[1:]).read_bytes()
        except OSError as error:
            raise InvalidInput(f"--input {text!r} cannot be read: {error}") from error
    return text.encode()


def read_arguments(
    workflow: Workflow[..., Any], text: bytes
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments from JSON: an array of positional ones, or an object of keyword ones.

    A value that JSON has no type for (a datetime, a dataclass, a set) is given as kagzi stores it.

    Raises:
        InvalidInput: Not JSON, or neither array nor object, or the workflow takes other arguments.
        CodecError: An argument does not fit its annotation.
    """
    try:
        tree = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"--input is not JSON: {error}. {_WRITE}") from None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if type(tree) is list:
        args, kwargs, stored = tuple(tree), {}, text
    elif type(tree) is dict:
        args, kwargs, stored = (), tree, orjson.dumps({"a": [], "k": tree})
    else:
        raise InvalidInput(f"--input is {type(tree).__name__} as JSON. {_WRITE}")
    try:
        workflow.arguments.encode(args, kwargs)
    except CodecError:
        try:
            args, kwargs = workflow.arguments.decode(stored)
            workflow.arguments.encode(args, kwargs)
        except KagziError:
            pass
        else:
            return args, kwargs
        raise
    return args, kwargs


_WRITE = (
    "Write an array of positional arguments, as in '[1, \"a\"]', or an object of keyword "
    "arguments, as in '{\"n\": 1}'"
)
