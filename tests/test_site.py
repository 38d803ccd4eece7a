"""The documentation as a site: what its readers get is whole, and comes from nowhere else."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

for module in ("latex2mathml", "material", "mkdocs", "mkdocstrings_handlers.python", "nbconvert"):
    pytest.importorskip(module, reason="needs the extra docs")

pytestmark = pytest.mark.checkout
ROOT = Path(__file__).resolve().parents[1]
TEX = re.compile(r"\$\$|\$[^\s$][^$]*\$|\\[A-Za-z]{2,}")
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*stylesheet)[^>]*\shref=["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages by their paths on the site."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.html"))
    }
    assert {"index.html", "tutorial/index.html", "reference/index.html"} <= set(pages)
    return pages


@pytest.fixture(scope="module")
def hooks() -> Any:
    place = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


class Prose(HTMLParser):
    """The text of a page outside of code, scripts and style sheets."""

    NOT_READ = ("code", "pre", "script", "style")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = 0
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside += tag in self.NOT_READ

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in self.NOT_READ

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text += data


def raw_tex(page: str) -> list[str]:
    return TEX.findall(Prose(page).text)


def test_no_page_shows_tex(site: dict[str, str]) -> None:
    found = {path: raw_tex(page) for path, page in site.items()}
    assert not {path: tex for path, tex in found.items() if tex}


def test_raw_tex_is_known() -> None:
    assert raw_tex("<p>$$s_j$$ costs</p>") == ["$$", "$$"]
    assert raw_tex("<p>so <em>$q_j$</em> is</p>") == ["$q_j$"]
    assert raw_tex("<p>e\\text{lse}</p>") == ["\\text"]
    assert raw_tex("<p><code>$$a$$ \\text</code> for $ 5</p><pre>\\frac $b$</pre>") == []


def test_formulas_of_notebooks_are_drawn(site: dict[str, str]) -> None:
    name = "source/examples/how_mla_decode_works.ipynb"
    notebook = (ROOT / name.removeprefix("source/")).read_text(encoding="utf-8")
    page = site[f"{name}/index.html"]
    displayed = re.findall(r'<div class="formula"><math [^>]*display="block">', page)
    assert len(displayed) == notebook.count("$$") / 2 == 4
    # One in the middle of a sentence, at the beginning of a line, leaves the paragraph whole.
    assert re.search(r'vector\s<span class="formula"><math [^>]*display="inline">', page)
    assert "<p></span>" not in page


def test_money_and_names_of_shells_are_no_formulas(site: dict[str, str]) -> None:
    drawn = {path for path, page in site.items() if 'class="formula"' in page}
    assert drawn == {"source/examples/how_mla_decode_works.ipynb/index.html"}


def test_spaces_are_those_of_tex(hooks: Any) -> None:
    def drawn(tex: str) -> str:
        found = f'<span class="arithmatex">\\({tex}\\)</span>'
        return str(hooks.on_page_content(found, page=None, config=None, files=None))

    assert '<mi>log</mi><mspace width="0.167em" /><mi>' in drawn(r"\log\ell")
    assert "<mi>a</mi><mi>&#x0002F;</mi><mi>b</mi>" in drawn("a/b")
    assert "<mo>&#x02212;</mo><mi>&#x0221E;</mi>" in drawn(r"-\infty")
    assert "<mo>&#x0003C;</mo>" in drawn("a&lt;b")


def test_nothing_is_fetched_from_elsewhere(site: dict[str, str]) -> None:
    assert not {path for path, page in site.items() if ELSEWHERE.search(page)}
    assert ELSEWHERE.search('<script async src="https://a.b/c.js">')
    assert ELSEWHERE.search('<link rel="stylesheet" href="//a.b/c.css">')


def test_pictures_among_the_text_are_whole(site: dict[str, str]) -> None:
    """Markdown that takes the elements around an SVG for a paragraph closes it before its end."""
    cut = re.compile(r"<svg[^>]*></p>")
    assert not {path for path, page in site.items() if cut.search(page)}
    assert "requests with" in site["source/examples/roofline_and_schedule.ipynb/index.html"]
    assert cut.search('<p><code>plan</code><svg viewBox="0 0 1 1"></p>')
