"""The compiled core, its typed signature and its twins export the same names."""

import ast
import inspect
from pathlib import Path

import pytest

from kagzi import _core as core
from tests import reference

STUB = ast.parse((Path(reference.SOURCE).with_suffix(".pyi")).read_text())


def assigned_name(node):
    if isinstance(node, ast.AnnAssign):
        return node.target.id
    return node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else None


DECLARED = {name: node for node in STUB.body if (name := assigned_name(node))}
CLASSES = [name for name, node in DECLARED.items() if isinstance(node, ast.ClassDef)]


def public_names(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_core_exports_what_its_stub_declares():
    assert public_names(core) == set(DECLARED)


def test_every_name_has_a_twin():
    assert set(DECLARED) <= set(dir(reference))


@pytest.mark.parametrize("name", CLASSES)
def test_class_has_the_members_its_stub_declares(name):
    declared = {assigned_name(node) for node in DECLARED[name].body} - {None, "__init__"}
    members = {member for member in declared if not member.startswith("__")}
    assert members == public_names(getattr(core, name))
    assert declared <= set(dir(getattr(core, name)))


def test_constants_are_those_of_the_twins():
    constants = [name for name in DECLARED if name.isupper()]
    assert {name: getattr(core, name) for name in constants} == {
        name: getattr(reference, name) for name in constants
    }


def test_core_was_built_from_the_source_beside_it():
    assert core.SOURCE_HASH == reference.SOURCE_HASH, "run: python setup.py build_ext --inplace"


@pytest.mark.parametrize("name", CLASSES)
def test_class_cannot_be_derived_from(name):
    with pytest.raises(TypeError):
        type("Derived", (getattr(core, name),), {})


def test_functions_name_their_arguments_as_the_stub_does():
    for name, node in DECLARED.items():
        if isinstance(node, ast.FunctionDef):
            arguments = [argument.arg for argument in node.args.args]
            assert list(inspect.signature(getattr(reference, name)).parameters) == arguments
