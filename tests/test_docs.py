"""The Python in the pages runs, and their links lead somewhere.

Python that needs a GPU runs in ``tests/gpu/test_pages.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest

PAGES = pages.pages()
WITH_PYTHON = [page for page in PAGES if pages.python_blocks(page)]
LANGUAGES = {"python", "bash", "sh", "text"}
STAND_INS = {"TODO", "TBD", "FIXME", "XXX"}


def name(page: Path) -> str:
    return page.relative_to(pages.ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_pages_python_runs(page: Path, tmp_path: Path) -> None:
    available = pages.installed()
    result = pages.run_apart(page, available, tmp_path)
    assert result.returncode == 0, result.stderr
    needs = [block.needs for block in pages.python_blocks(page) if pages.GPU not in block.needs]
    if missing := sorted(set().union(*needs) - available):
        pytest.skip(f"all but what needs {', '.join(missing)}, which is not installed, ran")


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    def says(text: str) -> str:
        page.write_text(text)
        result = pages.run_apart(page, {"torch"}, tmp_path)
        return result.stderr if result.returncode else "fine"

    assert says("```python\na = 1\n```\n\n```python\nprint(a)\n```\n") == "fine"
    assert says("<!-- needs: gpu torch -->\n```python\nfail\n```\n") == "fine"
    assert "line 3" in says("<!-- needs: torch -->\n```python\nfail\n```\n")
    assert says("```python\nprint(7)\n```\nprints\n\n<!-- prints -->\n```text\n7\n```\n") == "fine"
    assert "printed\n7\n" in says("```python\nprint(7)\n```\n<!-- prints -->\n```text\n8\n```\n")
    assert "no block follows" in says("<!-- needs: torch -->\n\n```python\n7\n```\n")
    assert "does not end" in says("```python\n7\n")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that no Python escapes under another name, and no word is one that nobody has."""
    for block in pages.blocks(page):
        assert block.language in LANGUAGES, f"{block} is {block.language!r}"
        assert block.needs <= {pages.GPU, *pages.MODULES}, f"{block} needs {set(block.needs)}"
        assert block.language == "python" or not block.needs, f"{block} is not Python"


@pytest.mark.checkout
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http", "#", "mailto:"))]
    missing = [target for target in local if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing


def placeholders(text: str) -> list[str]:
    """Cells of tables that wait for their contents: TODO and the like, and words in capitals in
    columns that are aligned to the right, where figures belong.
    """
    found: list[str] = []
    figures: list[bool] | None = None  # of each column of the table; None outside of tables
    in_code = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        if in_code or not line.lstrip().startswith("|"):
            figures = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if figures is None or all(re.fullmatch(":?-+:?", cell) for cell in cells):
            figures = [re.fullmatch("-+:", cell) is not None for cell in cells]
            cells = []
        for place, cell in enumerate(cells):
            holds_figures = place < len(figures) and figures[place]
            if cell in STAND_INS or (holds_figures and re.fullmatch("[A-Z]{2,}", cell)):
                found.append(cell)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_cell_of_a_table_is_a_placeholder(page: Path) -> None:
    assert placeholders(page.read_text(encoding="utf-8")) == []


def test_placeholders_are_told_from_contents() -> None:
    table = "| GPU | US |\n| --- | ---: |\n| FP8 | 12 |\n| CUDA | OUT |\n| TBD | 1.5 |\n| MHA | |\n"
    assert placeholders(table) == ["OUT", "TBD"]
    assert placeholders(f"```text\n{table}```\n") == []
    assert placeholders("| `a\\|b` | c |\n| --- | ---: |\n| TODO\\|x | RED |\n\n| A | XX |\n") == [
        "RED"
    ]
