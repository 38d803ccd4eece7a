"""The code in Markdown pages, and a program that runs a page's Python as its reader would.

    python pages.py PAGE WORD ...

Blocks run in order and share a namespace. Two comments, each on the line before a block, speak to
whoever runs them:

- ``<!-- needs: gpu cupy -->``: the Python that follows wants a Hopper GPU and CuPy. It runs where
  both are among the WORDs. What needs no more than NumPy has no such comment.
- ``<!-- prints -->``: the text that follows is what the Python before it prints, to the letter.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GPU = "gpu"
MODULES = {
    "cupy": "cupy",
    "jax": "jax",
    "nvrtc": "cuda.bindings.nvrtc",
    "torch": "torch",
    "transformers": "transformers",
}

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>```+)(?P<language>[\w+-]*)\s*$")
_COMMENT = re.compile(r"\s*<!-- (?P<kind>needs:|prints)(?P<words>[\w ]*) -->\s*$")


@dataclass(frozen=True)
class Block:
    """``line``: of its first line of code. ``prints``: what it has to print, None if unsaid."""

    page: Path
    line: int
    language: str
    code: str
    needs: frozenset[str] = frozenset()
    prints: str | None = None

    def __str__(self) -> str:
        return f"{os.path.relpath(self.page, ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page that readers are sent to."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    return sorted(page for page in found if page.name != "CHANGELOG.md")


def blocks(page: Path) -> list[Block]:
    """The code blocks of ``page`` in order.

    Raises:
        ValueError: a comment that belongs to no block, or a block that does not end.
    """
    found: list[Block] = []
    for block, kind in _fenced(page):
        if kind != "prints":
            found.append(block)
        elif found and found[-1].language == "python" and block.language == "text":
            found[-1] = replace(found[-1], prints=block.code)
        else:
            raise ValueError(f"{block}: what is printed must be text and follow Python.")
    return found


def _fenced(page: Path) -> Iterator[tuple[Block, str]]:
    """Each block, with the kind of the comment before it."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        comment = _COMMENT.match(lines[number])
        number += comment is not None
        opening = _FENCE.match(lines[number]) if number < len(lines) else None
        if opening is None:
            if comment is not None:
                raise ValueError(f"{page}:{number}: no block follows {comment[0].strip()!r}.")
            number += 1
            continue
        first = number + 1
        closing = opening["indent"] + opening["fence"]
        try:
            last = lines.index(closing, first)
        except ValueError:
            raise ValueError(f"{page}:{first}: the block does not end.") from None
        indent = len(opening["indent"])
        code = "".join(f"{line[indent:]}\n" for line in lines[first:last])
        kind, words = (comment["kind"], comment["words"].split()) if comment else ("", [])
        yield Block(page, first + 1, opening["language"], code, frozenset(words)), kind
        number = last + 1


def installed() -> set[str]:
    """The words that hold on this machine, without looking for a GPU."""

    def is_there(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ModuleNotFoundError:  # not even the package that it is in
            return False

    return {word for word, module in MODULES.items() if is_there(module)}


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def run(page: Path, available: set[str]) -> None:
    """Run the page's Python, but for the blocks that need more than is ``available``.

    Raises what a block raises, and AssertionError for one that prints something else.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        if not block.needs <= available:
            continue
        printed = io.StringIO()
        # Empty lines in front, so that a traceback shows the lines of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block.prints is not None and printed.getvalue() != block.prints:
            raise AssertionError(f"{block} printed\n{printed.getvalue()}and not\n{block.prints}")


def run_apart(page: Path, available: set[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """:func:`run` in a process of its own, with the package that is imported here."""
    package = find_spec("flashmla_rtc")
    assert package is not None
    assert package.origin is not None
    paths = [str(Path(package.origin).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, __file__, str(page), *sorted(available)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), set(sys.argv[2:]))
