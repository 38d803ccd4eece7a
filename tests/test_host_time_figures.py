"""The table of the host's times on the page of performance is that of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "host-h200.json"
ROWS = {
    "plain": "plain",
    "plain, with `out=` and `lse=`": "plain, out= and lse=",
    "operator (`torch.ops.flashmla_rtc.mla_decode`)": "operator",
    "operator into `out` and `lse`": "operator into out and lse",
    "`torch.compile`": "torch.compile",
    '`torch.compile(mode="reduce-overhead")`': "torch.compile, reduce-overhead",
    "replay of a CUDA graph": "CUDA graph",
}


def shown(time: float | None) -> str:
    if time is None:
        return ""
    return f"{time:.1f}" if time < 100 else f"{time:.0f}"


def test_the_page_shows_the_results() -> None:
    times = json.loads(RESULTS.read_text(encoding="utf-8"))["host_us"]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = page.partition("## Host time by way of call")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (.+?) \| (.*?) \| (.*?) ?\|$", section, re.MULTILINE)[1:]
    rows = [row for row in table if not row[0].startswith("---")]
    assert [row[0] for row in rows] == list(ROWS)
    for name, call, step in rows:
        way = ROWS[name]
        assert call == shown(times["call"][way]), name
        assert step.strip() == shown(times["step"].get(way)), name
