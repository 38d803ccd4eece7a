"""``kernels``: compile the default kernels (or take them from the cache) and say what each one
uses; or look into one: its figures, source, PTX, SASS. No GPU needed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="look into this kernel instead of listing all")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for what, meaning in (
        ("source", "its translation unit, headers in place"),
        ("ptx", "its PTX"),
        ("sass", "its machine code; needs nvdisasm"),
    ):
        shown.add_argument(f"--{what}", action="store_true", help=f"print {meaning}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        return show(arguments)
    for what in ("source", "ptx", "sass"):
        if getattr(arguments, what):
            raise CommandError(f"--{what} shows one kernel: kernels NAME --{what}.", 2)
    document = describe()
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print_table(document)
    return 0


def show(arguments: argparse.Namespace) -> int:
    """One kernel."""
    from flashmla_rtc import variants
    from flashmla_rtc.inspection import inspect_kernel
    from flashmla_rtc.rtc.sass import DisassemblerMissing

    try:
        variants.named(arguments.name)
    except ValueError as error:
        raise CommandError(str(error), 2) from None
    kernel = inspect_kernel(arguments.name)
    try:
        if arguments.json:
            print(json.dumps({"digest": kernel.digest, **kernel.figures()}, indent=2))
        elif arguments.source:
            print(kernel.source)
        elif arguments.ptx:
            print(kernel.ptx)
        elif arguments.sass:
            print(kernel.sass)
        else:
            print(kernel)
    except DisassemblerMissing as error:
        raise CommandError(str(error)) from None
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
