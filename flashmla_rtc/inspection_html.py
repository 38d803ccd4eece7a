"""Kernels and their differences as tables for a notebook, texts folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from .rtc.compiler import CompilerMissing
from .rtc.sass import DisassemblerMissing

if TYPE_CHECKING:
    from .inspection import KernelDifference, KernelInspection

_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_NUMBER = "padding:2px 10px 2px 0;text-align:right;font-variant-numeric:tabular-nums"
_TEXT = (
    "max-height:28em;overflow:auto;margin:4px 0;padding:6px;font-size:12px;line-height:1.35;"
    "border:1px solid rgba(128,128,128,.4);white-space:pre"
)
_MOST_CHARACTERS = 64_000  # of PTX and SASS; notebooks keep what they show
_MOST_OPCODES = 12


def inspection_html(kernel: KernelInspection) -> str:
    """The figures, then source, PTX and SASS folded."""
    rows = [(escape(name), escape(value)) for name, value in kernel.facts().items()]
    return "".join(
        [
            f"<div><strong>{escape(kernel.name)}</strong> ",
            f"<small>sources {kernel.digest[:12]}</small>",
            _table(rows, [_CELL, _CELL]),
            _folded("source", lambda: kernel.source, most=len(kernel.source)),
            _folded("PTX", lambda: kernel.ptx),
            _folded("SASS", lambda: kernel.sass, lambda: _most_frequent(kernel)),
            "</div>",
        ]
    )


def difference_html(difference: KernelDifference) -> str:
    """What differs: figures, numbers of instructions, lines of source."""
    before, after = difference.before, difference.after
    rows = [("", "before", "after")]
    rows += [(escape(n), escape(old), escape(new)) for n, (old, new) in difference.facts().items()]
    try:
        totals = before.opcodes.total(), after.opcodes.total()
        rows.append(("SASS instructions", f"{totals[0]:,}", f"{totals[1]:,}"))
        rows += [
            (f"<code>{escape(name)}</code>", f"{old:,}", f"{new:,} ({new - old:+,})")
            for name, (old, new) in difference.opcodes().items()
        ]
        note = ""
    except DisassemblerMissing as error:
        note = f"<p>{escape(str(error))}</p>"
    changed = difference.source()
    return "".join(
        [
            f"<div><strong>{escape(after.name)}</strong> ",
            f"<small>sources {before.digest[:12]} → {after.digest[:12]}</small>",
            _table(rows, [_CELL, _NUMBER, _NUMBER]),
            note,
            f'<pre style="{_TEXT}">{escape(changed)}</pre>' if changed else "",
            "</div>",
        ]
    )


def _table(rows: Iterable[Sequence[str]], styles: Sequence[str]) -> str:
    lines = []
    for row in rows:
        cells = (f'<td style="{s}">{c}</td>' for c, s in zip(row, styles, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table style="border-collapse:collapse">{"".join(lines)}</table>'


def _folded(
    title: str,
    text: Callable[[], str],
    note: Callable[[], str] = str,
    most: int = _MOST_CHARACTERS,
) -> str:
    """``text`` behind its title; where it can't be had, the sentence that says why."""
    try:
        whole = text()
        extra = note()
    except (DisassemblerMissing, CompilerMissing) as error:
        return f"<p>{escape(str(error))}</p>"
    lines = whole.count("\n") + 1
    shown = whole[:most]
    if len(shown) < len(whole):
        shown += f"\n… {len(whole) - len(shown):,} more characters; the object has them all."
    return (
        f"<details><summary>{title}: {lines:,} lines{extra}</summary>"
        f'<pre style="{_TEXT}">{escape(shown)}</pre></details>'
    )


def _most_frequent(kernel: KernelInspection) -> str:
    frequent = kernel.opcodes.most_common(_MOST_OPCODES)
    counts = ", ".join(f"{escape(name)} {count:,}" for name, count in frequent)
    return f", {kernel.opcodes.total():,} instructions ({counts} …)"
