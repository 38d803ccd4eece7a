"""Writes README.md's table of figures from benchmarks/results/h100.json.

python benchmarks/readme_table.py          # rewrites the part of README.md between its marks
python benchmarks/readme_table.py --check  # exit status 1 if README.md says something else
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this clone's package, installed or not
os.environ["FLASHMLA_RTC_COMPILE"] = "lazy"

from flashmla_rtc import variants  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "h100.json"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

OLDER = """The kernels are still those that were measured. The Python around them has changed
since, so times of the host may differ.
"""

# (batch, queries, heads, keys) of the rows to show; a text of keys: ragged, with that mean.
SHOWN = [
    (1, 1, 16, 4096),
    (1, 1, 128, 4096),
    (1, 1, 16, 65536),
    (8, 1, 16, 8192),
    (8, 1, 128, 8192),
    (32, 1, 64, 4096),
    (64, 1, 128, 8192),
    (128, 1, 16, 8192),
    (128, 1, 64, 8192),
    (128, 1, 128, 8192),
    (128, 2, 128, 8192),
    (128, 1, 32, "~4096"),
    (128, 1, 128, "~4096"),
]


def cell(row: dict[str, Any], peer: str) -> str:
    time = row["peers"].get(peer)
    return "" if time is None else f"{time:.1f} ({time / row['us']:.2f}×)"


def table(results: dict[str, Any]) -> str:
    rows: dict[tuple[Any, ...], Any] = {
        (row["b"], row["s_q"], row["h_q"], "~" * row["varlen"] + str(row["seqlen"])): row
        for row in results["rows"]
    }
    lines = [
        "| requests | queries | heads | keys | µs | TFLOPS | GB/s | FlashMLA µs | FlashInfer µs |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for *sizes, keys in SHOWN:
        shape = (*sizes, str(keys))
        row = rows[shape]
        figures = f"{row['us']:.1f} | {row['TFLOPS']:.0f} | {row['GBps']:.0f}"
        peers = f"{cell(row, 'flash_mla')} | {cell(row, 'flashinfer')}"
        lines.append(f"| {' | '.join(map(str, shape))} | {figures} | {peers} |")
    return "\n".join(lines)


def means(results: dict[str, Any]) -> str:
    best = [min(row["peers"].values()) / row["us"] for row in results["rows"] if row["peers"]]
    product = 1.0
    for ratio in best:
        product *= ratio ** (1 / len(best))
    ahead = sum(ratio >= 1 for ratio in best)
    return (
        f"Over the {len(best)} shapes of the grid the time of the faster peer over ours is "
        f"{product:.2f} in the geometric mean, from {min(best):.2f} to {max(best):.2f}; "
        f"{ahead} shapes are at 1 or above."
    )


def section(results: dict[str, Any]) -> str:
    ceilings, host = results["ceilings"], results["host_us"]
    age = "" if results["digest"] == variants.sources_digest() else f"\n{OLDER}"
    return f"""{BEGIN}
One {results["device"]}, bf16, time of a call in a CUDA graph in a burst, caches rotated past the
L2, all measured in turn in one process; in brackets the peer's time over ours; ~: ragged
lengths with that mean. The same process
read {ceilings["read_TBps"]:.2f} TB/s and multiplied 8192³ matrices at
{ceilings["bf16_matmul_TFLOPS"]:.0f} TFLOPS.

{table(results)}

{means(results)}
A call takes the host {host["call"]:.0f} µs, {host["call_with_out"]:.0f} µs with `out=` and `lse=`;
FlashMLA's takes {host["peer_flash_mla"]:.0f} µs.

FlashMLA is the wheel `sgl-flash-mla` 1.0.0, FlashInfer is 0.5.3 with its fa3 backend. The figures
are those of [benchmarks/results/h100.json](benchmarks/results/h100.json), made by

```sh
{results["command"]}
```
{age}{END}"""


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    new = text[:begin] + section(json.loads(RESULTS.read_text(encoding="utf-8"))) + text[end:]
    if "--check" in arguments:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
