"""What a benchmark writes: one JSON document that grows row by row, and a table for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import Shape, geometric_mean
from .timing import Timing

Row = dict[str, Any]


def make_row(
    shape: Shape,
    own: Timing,
    peers: Mapping[str, Timing],
    ceilings: Mapping[str, float],
    difference: Mapping[str, float],
) -> Row:
    """One row: times in microseconds, ``TFLOPS`` and ``GBps`` of the burst, and each peer's times
    beside.

    ``limit_us`` is the floor that the measured ceilings set; ``difference`` is ‖peer − ours‖ /
    ‖ours‖ of the output.
    """
    row: Row = {
        "b": shape.batch,
        "s_q": shape.seq_len_q,
        "h_q": shape.heads_q,
        "seqlen": shape.seqlen,
        "varlen": shape.varlen,
        "dtype": shape.dtype,
        "us": _us(own.burst),
        "TFLOPS": round(shape.flops / own.burst / 1e12, 2),
        "GBps": round(shape.bytes / own.burst / 1e9, 1),
        "peers": {name: _us(timing.burst) for name, timing in peers.items()},
    }
    if own.held is not None:
        row["held_us"] = _us(own.held)
        row["held_TFLOPS"] = round(shape.flops / own.held / 1e12, 2)
        row["held_GBps"] = round(shape.bytes / own.held / 1e9, 1)
        row["peers_held"] = {n: _us(t.held) for n, t in peers.items() if t.held is not None}
    if "read_TBps" in ceilings and "bf16_matmul_TFLOPS" in ceilings:
        floor = shape.limit_seconds(ceilings["read_TBps"], ceilings["bf16_matmul_TFLOPS"])
        row["limit_us"] = _us(floor)
    if difference:
        row["difference"] = {name: float(f"{value:.3g}") for name, value in difference.items()}
    return row


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


@dataclass(slots=True)
class Report:
    """The document, and where it goes (None: nowhere). ``save`` is called after every row.

    ``facts`` are the keys that describe the machine and the software: device, digest, driver,
    versions, command …
    """

    facts: dict[str, Any]
    path: Path | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    host_us: dict[str, float] = field(default_factory=dict)
    complete: bool = False

    def document(self) -> dict[str, Any]:
        return {
            **self.facts,
            "complete": self.complete,
            "ceilings": {name: round(value, 4) for name, value in self.ceilings.items()},
            "host_us": {name: round(value, 2) for name, value in self.host_us.items()},
            "rows": self.rows,
        }

    def save(self) -> None:
        """Replace the file in one step, so that a run killed at any moment leaves a whole document.

        Raises:
            OSError: the file's folder cannot be written.
        """
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(_readable_json(self.document()), encoding="utf-8")
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _readable_json(document: Mapping[str, Any]) -> str:
    """Indented JSON with one line for each row, so that committed results diff well."""
    head = {key: value for key, value in document.items() if key != "rows"}
    text = json.dumps(head, indent=2, ensure_ascii=False)
    rows = [f"    {json.dumps(row, ensure_ascii=False)}" for row in document["rows"]]
    listed = "[\n" + ",\n".join(rows) + "\n  ]" if rows else "[]"
    return f'{text[:-2]},\n  "rows": {listed}\n}}\n'


class Table:
    """Lines for people: a header, one line for each row, a summary."""

    def __init__(self, peers: Sequence[str], held: bool) -> None:
        self._peers = list(peers)
        self._held = held

    def header(self) -> str:
        cells = [f"{'b':>4} {'s_q':>3} {'heads':>5} {'keys':>6}"]
        for title in ["burst", "held"] if self._held else ["burst"]:
            cells.append(f"{title + ' µs':>9} {'TFLOPS':>6} {'GB/s':>5} {'limit':>5}")
            cells += [f"{_short(peer):>16}" for peer in self._peers]
        return "  ".join(cells)

    def line(self, row: Row) -> str:
        keys = f"{'~' if row['varlen'] else ''}{row['seqlen']}"
        cells = [f"{row['b']:>4} {row['s_q']:>3} {row['h_q']:>5} {keys:>6}"]
        cells += self._times(row, "us", "TFLOPS", "GBps", "peers")
        if self._held:
            cells += self._times(row, "held_us", "held_TFLOPS", "held_GBps", "peers_held")
        return "  ".join(cells)

    def _times(self, row: Row, us: str, tflops: str, gbps: str, peers: str) -> Iterable[str]:
        share = f"{row['limit_us'] / row[us]:>5.0%}" if "limit_us" in row else "    –"
        yield f"{row[us]:>9.1f} {row[tflops]:>6.0f} {row[gbps]:>5.0f} {share}"
        for peer in self._peers:
            time = row[peers].get(peer)
            yield f"{time:>9.1f} {time / row[us]:>5.2f}×" if time else f"{'–':>16}"

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """How many times as long each peer takes, as the geometric mean over the shapes that it
        ran.
        """
        lines = []
        for peer in self._peers:
            parts = []
            for title, us, peers in (("burst", "us", "peers"), ("held", "held_us", "peers_held")):
                ratios = [row[peers][peer] / row[us] for row in rows if peer in row.get(peers, {})]
                if ratios:
                    parts.append(
                        f"{title} {geometric_mean(ratios):.2f}× "
                        f"(from {min(ratios):.2f}× to {max(ratios):.2f}×)"
                    )
            if parts:
                count = sum(peer in row["peers"] for row in rows)
                noun = "shape" if count == 1 else "shapes"
                lines.append(
                    f"Time of {peer} over ours, geometric mean of {count} {noun}: "
                    + ", ".join(parts)
                )
        return lines


def _short(name: str) -> str:
    return f"{name} µs"
