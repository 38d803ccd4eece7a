"""``kernels``: compile the default kernels (or take them from the cache) and say what each one
uses. No GPU needed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    document = describe()
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print_table(document)
    return 0


def describe() -> dict[str, Any]:
    """``{"digest", "kernels": [{"name", "registers", "spill_bytes", "smem_bytes",
    "compile_seconds"}]}``.

    ``smem_bytes`` is static and dynamic shared memory together; ``compile_seconds`` is how long it
    took when it was compiled, also where the cache has it.

    Raises:
        CompilerMissing, CompileError: NVRTC is absent, or refuses a kernel.
    """
    from flashmla_rtc import variants

    chosen = variants.default_variants()
    compiled = variants.builder.obtain_many([variant.source() for variant in chosen])
    return {
        "digest": variants.sources_digest(),
        "kernels": [
            {
                "name": variant.name,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "smem_bytes": kernel.smem_bytes + variant.dynamic_smem_bytes,
                "compile_seconds": round(kernel.compile_seconds, 3),
            }
            for variant, kernel in zip(chosen, compiled, strict=True)
        ],
    }


def print_table(document: dict[str, Any]) -> None:
    rows = [("kernel", "registers", "spill bytes", "shared memory", "compiled in")]
    rows += [
        (
            kernel["name"],
            str(kernel["registers"]),
            str(kernel["spill_bytes"]),
            f"{kernel['smem_bytes']:,}",
            f"{kernel['compile_seconds']:.1f} s",
        )
        for kernel in document["kernels"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
    print(f"digest {document['digest']}")
