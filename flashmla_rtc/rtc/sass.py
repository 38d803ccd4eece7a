"""The machine code of a cubin, by NVIDIA's disassembler where there is one.

``cuobjdump`` is not looked for: it disassembles by calling nvdisasm.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

TOOL = "nvdisasm"
INSTALL = f"pip install nvidia-cuda-{TOOL}"
# Address, perhaps a predicate, mnemonic.
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE
)


class DisassemblerMissing(RuntimeError):
    """There is no nvdisasm; the message says what to install."""


def find_disassembler() -> str | None:
    """nvdisasm: on PATH, in CUDA_HOME or CUDA_PATH, from NVIDIA's Python packages, or the one that
    an installed triton has; None if there is none.
    """
    for folder in (None, *_folders()):
        found = shutil.which(TOOL, path=None if folder is None else str(folder))
        if found:
            return found
    return None


def _folders() -> list[Path]:
    """Where it may lie besides PATH."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home, "bin") for home in homes if home]
    for package, place in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        # Of the package itself nothing is imported.
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            folders += sorted(Path(root).glob(place), reverse=True)  # the newest CUDA first
    return folders


def disassemble(cubin: bytes) -> str:
    """The SASS of ``cubin``.

    Raises:
        DisassemblerMissing: there is no nvdisasm.
        RuntimeError: it does not take this cubin; the message has its own words.
    """
    tool = find_disassembler()
    if tool is None:
        raise DisassemblerMissing(
            f"Showing SASS needs NVIDIA's disassembler {TOOL}, which is neither on PATH nor in "
            f"CUDA_HOME nor in an installed package: {INSTALL}."
        )
    with tempfile.TemporaryDirectory(prefix="flashmla_rtc") as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        result = subprocess.run(
            [tool, "-c", str(file)], capture_output=True, text=True, errors="replace", check=False
        )
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()
        raise RuntimeError(f"{tool} failed with exit status {result.returncode}: {said}")
    return result.stdout


def count_opcodes(sass: str) -> Counter[str]:
    """How often each instruction stands in ``sass``, without modifiers: ``HGMMA``, ``LDS``."""
    return Counter(_INSTRUCTION.findall(sass))
