"""A split plan as a picture: the parts side by side, what each computes, and how full it is.

The SVG is written by hand, so that it needs no package. In a page it has no background and takes
the text's colour; as a file of its own it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import hashlib
import os
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .metadata import FlashMLASchedMeta
from .plan_reading import Piece, PlanFacts, ReadPlan

WIDTH = 860
LEFT, RIGHT, TOP = 58, 92, 88
COLUMNS_HEIGHT = 240
WIDEST_COLUMN = 40
MOST_ROWS = 16  # parts that are drawn as rows; more are columns
ROW, ROW_GAP = 24, 6
THINNEST = 0.75  # pixels; thinner pieces that follow one another are drawn as one
FONT, SMALL = 13, 11
CHARACTER = 0.6  # of a font's size: as wide as a character gets, on average

# Okabe and Ito's colours without black and yellow, and two of like lightness; the colour of text
# that is legible on each. None is close to white or black, so they do on either background.
_COLOURS = (
    ("#0072B2", "#fff"),
    ("#E69F00", "#000"),
    ("#009E73", "#000"),
    ("#CC79A7", "#000"),
    ("#56B4E9", "#000"),
    ("#D55E00", "#000"),
    ("#8A6BBE", "#fff"),
    ("#8C8C2E", "#000"),
)
_SEVERAL = "#8a8a8a"
_STYLE = (
    "svg:root{color:#1f2328;background:#fff}"
    "@media(prefers-color-scheme:dark){svg:root{color:#e6edf3;background:#0d1117}}"
)


def draw_plan(
    tile_scheduler_metadata: Any, num_splits: Any = None, cache_seqlens: Any = None
) -> PlanPicture:
    """Draw a split plan. Plan and lengths may come from any library, or be lists; from a GPU they
    are copied to the host, which waits for them.

    Args:
        tile_scheduler_metadata: int32 (num_sm_parts, 8) from ``get_mla_metadata`` or ``plan_for``,
            or a ``FlashMLASchedMeta``, whose first call tells the lengths: the array that it got,
            with what that holds now, which is not what was planned if it was written since.
        num_splits: int32 (requests + 1,); None takes the plan to be for all of ``cache_seqlens``.
        cache_seqlens: int32 (batch,), keys of each request: a request's last piece ends where the
            length says. None only with a ``FlashMLASchedMeta`` that a call has filled.

    Raises:
        TypeError, ValueError: an argument is no such thing, or not there.
    """
    if _is_plan_and_splits(tile_scheduler_metadata):
        raise TypeError(
            "tile_scheduler_metadata is a tuple of two, as get_mla_metadata and plan_for return "
            "it: pass its parts, as in draw_plan(*plan, cache_seqlens)."
        )
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        holder = tile_scheduler_metadata
        tile_scheduler_metadata = holder.tile_scheduler_metadata
        num_splits = holder.num_splits if num_splits is None else num_splits
        cache_seqlens = holder.planned_lengths if cache_seqlens is None else cache_seqlens
        if tile_scheduler_metadata is None:
            raise ValueError(
                "tile_scheduler_metadata is a FlashMLASchedMeta without a plan: the first "
                "flash_mla_with_kvcache makes it."
            )
    if cache_seqlens is None:
        raise ValueError(
            "cache_seqlens is missing: the plan does not hold the lengths of the requests."
        )
    return PlanPicture(ReadPlan(tile_scheduler_metadata, num_splits, cache_seqlens))


def _is_plan_and_splits(plan: Any) -> bool:
    """Whether it is a pair of things that are no rows of integers."""
    if not isinstance(plan, tuple) or len(plan) != 2:
        return False
    first = plan[0]
    return not isinstance(first, (list, tuple)) or any(isinstance(x, (list, tuple)) for x in first)


class PlanPicture:
    """A drawn plan. In a notebook it shows itself.

    facts: the plan in numbers. svg: the picture, an SVG document.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self.facts: PlanFacts = plan.facts()
        self.svg: str = _Drawing(plan, self.facts).svg()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the SVG to ``path``. Raises OSError, and ValueError if it does not end in .svg."""
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"path must end in .svg, but it is {os.fspath(path)!r}.")
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_html_(self) -> str:
        return f'<div style="max-width:{WIDTH}px">{self.svg}</div>'

    def __repr__(self) -> str:
        return f"<PlanPicture: {'; '.join(sentences(self.facts))}>"


def sentences(facts: PlanFacts) -> list[str]:
    """What is written above the picture."""
    cut = "no request is cut"
    if facts.requests_cut:
        verb = "is" if facts.requests_cut == 1 else "are"
        cut = f"{_count(facts.requests_cut, 'request')} {verb} cut into {facts.pieces:,} pieces"
    requests, blocks = _count(facts.requests, "request"), _count(facts.blocks, "block")
    loads = f"{facts.least:,} to {facts.most:,} blocks a part, mean {facts.mean:,.1f}"
    if facts.least == facts.most:
        loads = f"{_count(facts.most, 'block')} a part"
    balance = f": balance {facts.balance:.1f} %" if facts.most else ""
    return [
        f"{requests} with {blocks} of 64 keys on {_count(facts.parts, 'part')}",
        f"{facts.parts_used:,} in use, {loads}{balance}",
        cut,
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


class _Drawing:
    """Parts as rows from left to right if there are few, else as columns from the bottom up."""

    def __init__(self, plan: ReadPlan, facts: PlanFacts) -> None:
        self.plan, self.facts = plan, facts
        self.in_rows = facts.parts <= MOST_ROWS
        self.span = max(facts.most, 1)  # blocks from one end of the plot to the other
        if self.in_rows:
            self.pitch = float(ROW + ROW_GAP)
            self.plot = _Box(LEFT, TOP, WIDTH - LEFT - RIGHT, self.pitch * facts.parts)
        else:
            self.pitch = min((WIDTH - LEFT - RIGHT) / facts.parts, WIDEST_COLUMN)
            self.plot = _Box(LEFT, TOP, self.pitch * facts.parts, COLUMNS_HEIGHT)
        self.bottom = self.plot.y + self.plot.height
        self.height = round(self.bottom + (66 if self.in_rows else 82))
        self.lines: list[str] = []
        self.has_groups = False

    def svg(self) -> str:
        first, second, third = sentences(self.facts)
        self._text(8, 20, first, FONT, weight="600")
        self._text(8, 39, second, FONT)
        self._text(8, 57, third, FONT)
        self._scale()
        for pieces in self._by_part():
            self._part(pieces)
        self._mean()
        if self.in_rows:
            self._row_labels()
        else:
            self._column_labels()
        self._legend()
        body = "\n".join(self.lines)
        # Pictures of one page share their names of patterns: let each have its own.
        hatch = f"cut-{hashlib.sha256(body.encode()).hexdigest()[:10]}"
        pattern = (
            f'<pattern id="{hatch}" width="5" height="5" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)">'
            '<rect width="1.6" height="5" fill="#000" fill-opacity=".4"/></pattern>'
        )
        label = escape("; ".join(sentences(self.facts)), quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="100%" role="img" aria-label="{label}" '
            'font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif">\n'
            f"<style>{_STYLE}</style>\n<defs>{pattern}</defs>\n"
            f"{body.replace('url(#cut)', f'url(#{hatch})')}\n</svg>\n"
        )

    # -- the parts --------------------------------------------------------------------------------

    def _by_part(self) -> list[list[Piece]]:
        parts: list[list[Piece]] = [[] for _ in range(self.facts.parts)]
        for piece in self.plan.pieces:
            if piece.end > piece.begin:
                parts[piece.part].append(piece)
        return parts

    def _part(self, pieces: list[Piece]) -> None:
        """Its pieces one behind the other; whole requests too thin to be seen, in groups."""
        thinnest = THINNEST * self.span / self._along
        groups: list[list[Piece]] = []
        room = 0.0  # for thin ones in the last group
        for piece in pieces:
            blocks = piece.end - piece.begin
            is_thin = blocks < thinnest and not piece.cut
            if is_thin and room > 0:
                groups[-1].append(piece)
            else:
                groups.append([piece])
                room = thinnest if is_thin else 0.0
            room -= blocks
        at = 0
        for group in groups:
            blocks = sum(piece.end - piece.begin for piece in group)
            self._pieces(group, at, at + blocks)
            at += blocks

    def _pieces(self, group: list[Piece], begin: int, end: int) -> None:
        """One piece, or several as one, from ``begin`` to ``end`` of the part's blocks."""
        first = group[0]
        box = self._place(first.part, begin, end)
        if len(group) == 1:
            colour, ink = _COLOURS[first.request % len(_COLOURS)]
            name = f"request {first.request}, blocks {first.begin:,} to {first.end:,}"
            if first.cut:
                name += f" of {self.plan.blocks[first.request]:,}"
            what = f'data-request="{first.request}" data-begin="{first.begin}"'
        else:
            self.has_groups = True
            colour, ink = _SEVERAL, "#000"
            name = f"{len(group)} requests, {first.request} to {group[-1].request}"
            what = f'data-requests="{" ".join(str(piece.request) for piece in group)}"'
        title = f"<title>part {first.part}: {name}</title>"
        self.lines.append(
            f'<rect class="work" {_attributes(box)} fill="{colour}" data-part="{first.part}" '
            f'{what} data-blocks="{end - begin}">{title}</rect>'
        )
        if first.cut:
            # The title once more: the hatch lies above and takes the pointer.
            self.lines.append(f'<rect {_attributes(box)} fill="url(#cut)">{title}</rect>')
        text = str(first.request)
        fits = box.width >= _width(text, SMALL) + 4 and box.height >= SMALL + 3
        if len(group) == 1 and fits:
            x, y = box.x + box.width / 2, box.y + box.height / 2 + SMALL * 0.36
            halo = f' stroke="{colour}" stroke-width="4" paint-order="stroke"' if first.cut else ""
            self._text(x, y, text, SMALL, "middle", ink, extra=halo)

    @property
    def _along(self) -> float:
        """Pixels that the fullest part takes."""
        return self.plot.width if self.in_rows else self.plot.height

    def _place(self, part: int, begin: int, end: int) -> _Box:
        """The rectangle of a part's blocks; neighbours are a hair apart."""
        scale = self._along / self.span
        near, far = begin * scale, end * scale
        if far - near > 3:
            far -= 0.7
        if self.in_rows:
            return _Box(LEFT + near, TOP + part * self.pitch, far - near, ROW)
        gap = 0.8 if self.pitch >= 4 else 0.0
        return _Box(LEFT + part * self.pitch, self.bottom - far, self.pitch - gap, far - near)

    # -- scales, lines and words ------------------------------------------------------------------

    def _scale(self) -> None:
        """Blocks, along the parts: faint lines with numbers."""
        scale = self._along / self.span
        numbers = range(0, self.facts.most + 1, _step(self.span, 5))
        for number in numbers:
            if self.in_rows:
                x = LEFT + number * scale
                self._line(x, TOP - 4, x, self.bottom, 0.18)
                self._text(x, self.bottom + 14, f"{number:,}", SMALL, "middle")
            else:
                y = self.bottom - number * scale
                self._line(LEFT, y, LEFT + self.plot.width, y, 0.18)
                self._text(LEFT - 6, y + 4, f"{number:,}", SMALL, "end")
        if self.in_rows:
            self._text(8, self.bottom + 14, "blocks", SMALL)
        else:
            self._text(8, TOP - 13, "blocks", SMALL)

    def _mean(self) -> None:
        mean, scale = self.facts.mean, self._along / self.span
        if not self.facts.blocks:
            return
        if self.in_rows:
            x = LEFT + mean * scale
            self._line(x, TOP - 4, x, self.bottom, 1, "5 3")
        else:
            y, end = self.bottom - mean * scale, LEFT + self.plot.width + 6
            self._line(LEFT, y, end, y, 1, "5 3")
            self._text(end + 3, y + 4, f"mean {_short(mean)}", SMALL)

    def _row_labels(self) -> None:
        """Each part's number before its row, its load behind it; behind the line of the mean."""
        for part, load in enumerate(self.plan.loads()):
            y = TOP + part * self.pitch + ROW / 2 + 4
            self._text(LEFT - 8, y, f"part {part}", SMALL, "end")
            self._text(LEFT + self.plot.width + 8, y, f"{load:,}" if load else "idle", SMALL)

    def _column_labels(self) -> None:
        """Numbers of parts under the columns; under these where requests begin, as they fit."""
        self._text(LEFT - 6, self.bottom + 15, "part", SMALL, "end")
        widest = _width(str(self.facts.parts), SMALL) + 8
        for part in range(0, self.facts.parts, _step(self.facts.parts, 14)):
            x = LEFT + (part + 0.5) * self.pitch
            if x + widest / 2 <= LEFT + self.plot.width + RIGHT:
                self._text(x, self.bottom + 15, str(part), SMALL, "middle")
        self._text(LEFT - 6, self.bottom + 31, "request", SMALL, "end")
        free = 0.0
        for (part, end), request in self._columns_of_requests():
            x = LEFT + (part + end + 1) * self.pitch / 2
            half = _width(str(request), SMALL) / 2
            if x - half >= free:
                self._text(x, self.bottom + 31, str(request), SMALL, "middle")
                free = x + half + 6

    def _columns_of_requests(self) -> list[tuple[tuple[int, int], int]]:
        """The first and last part of each request, in the order of parts."""
        columns: dict[int, tuple[int, int]] = {}
        for piece in self.plan.pieces:
            if piece.end > piece.begin:
                first = columns.get(piece.request, (piece.part, 0))[0]
                columns[piece.request] = (first, piece.part)
        return sorted((place, request) for request, place in columns.items())

    def _legend(self) -> None:
        """What marks mean, of those that are there."""
        y, x = self.height - 18, float(LEFT)
        marks = [("", _COLOURS[0][0], "a request")]
        if self.facts.requests_cut:
            marks.append(("url(#cut)", _COLOURS[0][0], "a piece of a cut request"))
        if self.has_groups:
            marks.append(("", _SEVERAL, "several short requests"))
        for over, fill, text in marks:
            box = _attributes(_Box(x, y - 10, 18, 12))
            self.lines += [f'<rect {box} fill="{paint}"/>' for paint in (fill, over) if paint]
            self._text(x + 24, y, text, SMALL)
            x += 24 + _width(text, SMALL) + 20
        if self.facts.blocks:
            self._line(x, y - 4, x + 22, y - 4, 1, "5 3")
            self._text(x + 28, y, "mean blocks a part", SMALL)

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        anchor: str = "start",
        fill: str = "currentColor",
        weight: str = "400",
        extra: str = "",
    ) -> None:
        self.lines.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}" font-weight="{weight}" pointer-events="none"{extra}>'
            f"{escape(text)}</text>"
        )

    def _line(
        self, x1: float, y1: float, x2: float, y2: float, opacity: float, dashes: str = ""
    ) -> None:
        dashed = f' stroke-dasharray="{dashes}" stroke-width="1.5"' if dashes else ""
        self.lines.append(
            f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" '
            f'stroke="currentColor" stroke-opacity="{opacity}"{dashed}/>'
        )


def _attributes(box: _Box) -> str:
    return (
        f'x="{box.x:.2f}" y="{box.y:.2f}" width="{max(box.width, 0.2):.2f}" '
        f'height="{max(box.height, 0.2):.2f}"'
    )


def _width(text: str, size: int) -> float:
    return len(text) * size * CHARACTER


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"


def _step(span: int, most: int) -> int:
    """1, 2 or 5 times a power of ten, of which at most ``most`` fit into ``span``."""
    step = 1
    while True:
        for times in (1, 2, 5):
            if span <= step * times * most:
                return step * times
        step *= 10
