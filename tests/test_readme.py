"""What README.md and docs/ say is so: programs run, commands and names exist."""

import ast
import re
from pathlib import Path

import click
import pytest

import kagzi
from kagzi import errors
from kagzi.cli import main
from kagzi.model import TRANSITIONS, RunStatus
from tests.scripts import ROOT, run_script

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

SET_UP = (
    "python3 -m venv .venv && .venv/bin/pip install -q '.[embedded]' && .venv/bin/kagzi demo\n",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest\n",
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(found[1], found[2]) for found in FENCE.finditer(README)]
PYTHON = [text for language, text in BLOCKS if language == "python"]
PROGRAMS = [text for text in PYTHON if "__main__" in text]


def printed_after(program: str) -> str:
    """The block of plain text that follows a program: what it prints."""
    place = BLOCKS.index(("python", program))
    language, text = BLOCKS[place + 1]
    assert language == "text", "a program is followed by what it prints"
    return text


def test_readme_begins_with_the_two_set_up_commands() -> None:
    assert [text for language, text in BLOCKS if language == "sh"][:2] == list(SET_UP)
    assert SET_UP[1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_readme_program_prints_what_the_readme_says(number: int, dsn: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAMS[number])
    for _ in range(2):
        printed = run_script(script, dsn=dsn, cwd=tmp_path)
        assert printed == printed_after(PROGRAMS[number])


def test_first_workflow_takes_about_twenty_lines() -> None:
    assert len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_readme_python_is_python(number: int) -> None:
    compile(PYTHON[number], "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


def test_contexts_methods_in_the_readme_exist() -> None:
    used = set(re.findall(r"\bctx\.(\w+)", README))
    assert used
    assert {name for name in used if not hasattr(kagzi.Context, name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text()
    shell = "".join(found[2] for found in FENCE.finditer(text) if found[1] == "sh")
    lines = re.findall(r"^kagzi .*$", shell, re.MULTILINE)
    lines += re.findall(r"`(kagzi [^`]+)`", FENCE.sub("", text))
    for line in lines:
        words = line.partition("#")[0].replace("[", " ").replace("]", " ").split()[1:]
        words = [word for word in words if word != "--debug"]
        command = main.commands.get(words[0])
        assert command is not None or words[0].isupper(), line
        known = {option for p in getattr(command, "params", ()) for option in p.opts}
        known |= {option for parameter in main.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_readme_names_every_command() -> None:
    for name, command in main.commands.items():
        assert isinstance(command, click.Command)
        assert command.hidden or f"`kagzi {name}" in README, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_documentation_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:examples|docs)/[\w.]*)`", README):
        assert (ROOT / name).exists(), name


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, kagzi.KagziError):
            is_root = cls in (kagzi.KagziError, kagzi.StoreError)
            assert is_root or re.search(rf"^###.*`{name}`", text, re.MULTILINE), name


def test_state_diagram_has_the_transitions_that_happen() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    arrows = re.findall(r"^ +(\w+) --> (\w+): (.+)$", text, re.MULTILINE)
    assert len(arrows) >= 7
    for before, after, _label in arrows:
        assert RunStatus(after) in TRANSITIONS[RunStatus(before)]
    assert not re.search(r"^ +\w+ --> \w+ *$", text, re.MULTILINE), "every arrow has a label"


def test_layers_name_modules_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| Layer") : text.index("## The way")]
    package = Path(kagzi.__file__).parent
    modules = {path.stem for path in package.rglob("[a-z]*.py")} | {"_core", "sql"}
    modules |= {path.name for path in package.glob("[a-z]*/") if (path / "__init__.py").exists()}
    named = {name.rstrip("/") for name in re.findall(r"`(\w+/?)`", table)}
    assert {"worker", "store", "_core"} <= named
    assert named - modules == set()
