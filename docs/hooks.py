"""What MkDocs asks of us: pages for files outside docs/, and links that work there and on GitHub.

README.md becomes the home page. Other files go under ``source/``, where they keep their path in the
repository: Markdown as it is, source text as one block of code on a page, notebooks as pages with
their outputs, the rest as files. A link that leads out of docs/ is turned to where its target is on
the site; a target that is not listed here stays as it was, and a strict build fails at it. TeX in
any text becomes MathML, which browsers draw without a script.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/*.json",
    "examples/*.ipynb",
    "examples/*.md",
    "examples/*.py",
    "flashmla_rtc/variants.py",
    "kernels/**/*.cuh",
)
LANGUAGES = {".cuh": "cuda", ".py": "python"}
PAGES = {*LANGUAGES, ".ipynb"}

# What is shown of an output that comes in several formats, the best first.
_FORMATS = ["image/svg+xml", "image/png", "text/html", "text/markdown", "text/plain"]

# What arithmatex makes of $…$ in a text and $$…$$ in lines of their own.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# Where the spaces of MathML are not those of TeX: behind the name of a function, and around a slash
# and infinity, which the converter takes for operators.
_NAME = re.compile(r"(<mi>[a-z]{2,}</mi>)(?=<mi>)")
_ORDINARY = re.compile("<mo>(&#x0002F;|&#x0221E;)</mo>")
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")


def _outside() -> list[str]:
    """The files outside docs/ that the site has, by their paths in the repository."""
    found = {path for pattern in OUTSIDE for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def _on_site(path: str) -> str | None:
    """Where the site has a file or folder of the repository; None for one that it does not have."""
    if path == "README.md":
        return "index.md"
    if path.startswith(f"{DOCS}/"):
        return posixpath.relpath(path, DOCS)
    if path in _outside():
        return f"source/{path}.md" if Path(path).suffix in PAGES else f"source/{path}"
    inside = [name for name in _outside() if name.startswith(f"{path}/")]
    return f"source/{path}/README.md" if inside else None


def _in_repository(page: str) -> str:
    """What a page of the site was made from: the reverse of :func:`_on_site`."""
    if page == "index.md":
        return "README.md"
    if not page.startswith("source/"):
        return f"{DOCS}/{page}"
    path = page.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def _listing(folder: str) -> str:
    """A page for a folder that has none."""
    names = [name for name in _outside() if name.startswith(f"{folder}/")]
    links = [f"- [`{name}`]({posixpath.relpath(name, folder)})" for name in names]
    return "\n".join([f"# {folder}", "", *links, ""])


def _notebook(path: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    exporter = MarkdownExporter(config=Config(NbConvertBase={"display_data_priority": _FORMATS}))
    name = Path(path).stem
    resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
    text, resources = exporter.from_filename(str(ROOT / path), resources)
    return text, resources["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside docs/."""
    made: dict[str, str | bytes] = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    }
    folders = set()
    for path in _outside():
        text = (ROOT / path).read_text(encoding="utf-8")
        suffix = Path(path).suffix
        if suffix in LANGUAGES:
            language = LANGUAGES[suffix]
            text = f"---\nhide: [toc]\n---\n\n# `{path}`\n\n````{language}\n{text}````\n"
        elif suffix == ".ipynb":
            text, pictures = _notebook(path)
            made.update({f"source/{posixpath.dirname(path)}/{n}": p for n, p in pictures.items()})
        made[str(_on_site(path))] = text
        folders.add(posixpath.dirname(path))
    for folder in folders - {""}:
        made.setdefault(str(_on_site(folder)), _listing(folder))
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if Path(_in_repository(here)).suffix in LANGUAGES:
        return markdown  # source text: what looks like a link in it is none
    folder = posixpath.dirname(_in_repository(here))

    def turned(link: re.Match[str]) -> str:
        place = _on_site(posixpath.normpath(posixpath.join(folder, link[1])))
        return link[1] if place is None else posixpath.relpath(place, posixpath.dirname(here))

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put MathML in place of TeX."""

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        mathml = convert(unescape(formula["tex"]), display=display)
        mathml = _NAME.sub(r'\1<mspace width="0.167em" />', _ORDINARY.sub(r"<mi>\1</mi>", mathml))
        return f'<{formula["tag"]} class="formula">{mathml}</{formula["tag"]}>'

    return _FORMULA.sub(drawn, html)
