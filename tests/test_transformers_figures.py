"""The table in docs/transformers.md is that of the figures that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flashmla_rtc": "ours, plain",
    "flashmla_rtc graphs": "ours, graphs",
}


def line(row: dict[str, Any]) -> str:
    """A row of the JSON as the page has it."""
    captures = row["path"].endswith("graphs")
    cells = [
        row["batch"],
        row["context"],
        PATHS[row["path"]],
        f"{row['ms']:.2f}",
        f"{row['ours_is_faster_by']:.2f}",
        f"{row['second_step_ms']:.0f}" if captures else "",
        f"{row['cache_bytes'] / 2**20:.0f}",
        f"{row['workspace_bytes'] / 2**20:.1f}",
        "" if row["generate_ms"] is None else f"{row['generate_ms']:.2f}",
    ]
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


@pytest.mark.checkout
def test_the_table_is_that_of_the_figures() -> None:
    file = ROOT / "benchmarks" / "results" / "transformers-h200.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    table = page.partition("## Figures")[2].partition("| ---: |")[2].splitlines()[1:]
    assert table[: len(figures["rows"])] == [line(row) for row in figures["rows"]]
    assert f"One {figures['device']}" in page
    assert f"`{figures['command']}`" in page
    assert "/" not in figures["command"].replace("benchmarks/transformers_decode.py", "")
