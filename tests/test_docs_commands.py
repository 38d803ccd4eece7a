"""The commands in the pages exist: programs, arguments of our own, extras, scripts."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pages
import pytest

from flashmla_rtc import __main__ as program

SHELL = [
    block
    for page in pages.pages()
    for block in pages.blocks(page)
    if block.language in ("bash", "sh")
]

# Programs that are not ours, which a page may tell its readers to run.
OTHERS = {"bash", "compute-sanitizer", "export", "git", "mkdocs", "pip", "pre-commit", "source"}
MODULES = {"build", "mkdocs", "mypy", "pytest", "ruff", "venv"}


def commands(code: str) -> list[list[str]]:
    """The words of each command, without the variables that are set for it."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            command = shlex.split(part)
            while command and re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                found.append(command)
    return found


def module_of(command: list[str]) -> tuple[str, list[str]]:
    """What a Python command runs, and with which arguments."""
    if command[1] == "-m":
        return command[2], command[3:]
    return command[1], command[2:]


def parses(arguments: list[str]) -> bool:
    """Whether our command line takes these arguments."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            program.parser().parse_args(arguments)
        except SystemExit as stop:
            return stop.code == 0
    return True


def problem(command: list[str], extras: set[str]) -> str | None:
    known = Path(command[0]).name
    if known in ("python", "python3"):
        if command[1].startswith("-c"):
            compile(command[2], "-c", "exec")
            return None
        ran, arguments = module_of(command)
        if ran == "flashmla_rtc":
            return None if parses(arguments) else "our command line does not take it"
        if ran.endswith(".py"):
            return None if (pages.ROOT / ran).is_file() else f"there is no {ran}"
        if ran != "pip":
            return None if ran in MODULES else f"who is {ran}?"
    elif known not in OTHERS:
        return f"who is {known}?"
    asked = re.findall(r"(?:flashmla_rtc|\.(?:\S*\.whl)?)\[([\w,-]+)\]", " ".join(command))
    unknown = {extra for list_ in asked for extra in list_.split(",")} - extras
    return f"there is no extra {', '.join(sorted(unknown))}" if unknown else None


@pytest.fixture(scope="module")
def extras() -> set[str]:
    text = (pages.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block: pages.Block, extras: set[str]) -> None:
    assert commands(block.code)
    problems = {shlex.join(words): problem(words, extras) for words in commands(block.code)}
    assert not {command: said for command, said in problems.items() if said}


def test_commands_that_do_not_exist_are_found(extras: set[str]) -> None:
    def said(text: str) -> list[str | None]:
        return [problem(words, extras) for words in commands(text)]

    assert said("A=1 python -m flashmla_rtc demo && python -m flashmla_rtc plot a b c # now") == [
        None,
        "our command line does not take it",
    ]
    assert said("python -m flashmla_rtc bench \\\n  --grid slow")[0] is not None
    assert said("python examples/none.py") == ["there is no examples/none.py"]
    assert said("pip install 'flashmla_rtc[cu13,cu11]' -e '.[tests]'") == [
        "there is no extra cu11, tests"
    ]
    assert said("nvcc kernel.cu") == ["who is nvcc?"]
