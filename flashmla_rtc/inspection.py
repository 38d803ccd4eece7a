"""What a compiled kernel is: source, PTX, SASS, and what it needs of an SM."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import occupancy, variants
from .edits import included_in
from .rtc import ptx, sass
from .rtc.compiler import KernelSource


def kernel_names() -> list[str]:
    """The names of all kernels: those compiled at import, then those compiled when needed."""
    return [variant.name for variant in variants.all_variants()]


def inspect_kernel(name: str, device: Any = None) -> KernelInspection:
    """Look into a kernel of the sources in use, compiled now if it is not yet. Needs no GPU.

    Args:
        name: one of :func:`kernel_names`.
        device: whose driver to ask how many thread blocks an SM holds, as in ``prepare``; None is
            device 0. Without a Hopper GPU there it is computed, and said so.

    Raises:
        TypeError, ValueError: there is no such kernel, or no such device.
        CompileError, CompilerMissing: it can't be compiled.
        DriverError: the GPU can't load it.
    """
    variant = variants.named(name)
    sources = variants.in_use
    unit = variant.source(sources)
    kernel = variants.builder_of(sources).obtain(unit)
    found = occupancy.occupancy(
        name,
        device,
        kernel.registers,
        variant.threads,
        kernel.smem_bytes,
        variant.dynamic_smem_bytes,
    )
    return KernelInspection(
        name=name,
        entry=kernel.entry,
        digest=variants.sources_digest(),
        registers=kernel.registers,
        spill_bytes=kernel.spill_bytes,
        stack_bytes=kernel.stack_bytes,
        static_smem_bytes=kernel.smem_bytes,
        dynamic_smem_bytes=variant.dynamic_smem_bytes,
        threads=variant.threads,
        blocks_per_sm=found.blocks,
        occupancy_found=found.found,
        compile_seconds=kernel.compile_seconds,
        unit=unit.source,
        headers=dict(unit.headers),
        log=kernel.log,
        cubin=kernel.cubin,
        _source=unit,
    )


@dataclass(frozen=True, eq=False, repr=False)
class KernelInspection:
    """A kernel, as it was compiled when it was inspected. In a notebook it shows itself.

    digest: of all sources that were in use. registers: per thread, at entry; the warps of the
    decode kernel share them out anew (``setmaxnreg``). spill_bytes, stack_bytes: per thread.
    static_smem_bytes, dynamic_smem_bytes, threads: per thread block. blocks_per_sm: thread blocks
    that an SM holds at once, and occupancy_found: how that is known. compile_seconds: as it was
    compiled, also where the cache had it. unit, headers: the translation unit, and the headers by
    name. log: the compiler's. cubin: the ELF file.
    """

    name: str
    entry: str
    digest: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    threads: int
    blocks_per_sm: int
    occupancy_found: str
    compile_seconds: float
    unit: str
    headers: Mapping[str, str]
    log: str
    cubin: bytes
    _source: KernelSource

    @property
    def cubin_bytes(self) -> int:
        """Size of the cubin."""
        return len(self.cubin)

    @functools.cached_property
    def source(self) -> str:
        """The whole translation unit, each header in the place where it is first included."""
        return _expanded(self.unit, self.headers, set())

    @functools.cached_property
    def ptx(self) -> str:
        """The PTX; compiled at first use. Raises CompileError, CompilerMissing."""
        return ptx.ptx_of(self._source)

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, as nvdisasm prints it.

        Raises DisassemblerMissing, a RuntimeError that says what to install.
        """
        return sass.disassemble(self.cubin)

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each SASS instruction stands in the code. Raises DisassemblerMissing."""
        return sass.count_opcodes(self.sass)

    def figures(self) -> dict[str, Any]:
        """Its figures by the names of the attributes."""
        names = (
            "name",
            "registers",
            "spill_bytes",
            "stack_bytes",
            "static_smem_bytes",
            "dynamic_smem_bytes",
            "threads",
            "blocks_per_sm",
            "occupancy_found",
            "cubin_bytes",
            "compile_seconds",
        )
        return {name: getattr(self, name) for name in names}

    def facts(self) -> dict[str, str]:
        """Its figures as a reader finds them named, as text."""
        return {
            "registers a thread, at entry": f"{self.registers}",
            "spilled bytes": f"{self.spill_bytes}",
            "stack bytes a thread": f"{self.stack_bytes}",
            "static shared memory": f"{self.static_smem_bytes:,} bytes",
            "dynamic shared memory": f"{self.dynamic_smem_bytes:,} bytes",
            "threads a thread block": f"{self.threads}",
            "thread blocks an SM": f"{self.blocks_per_sm} ({self.occupancy_found})",
            "cubin": f"{self.cubin_bytes:,} bytes",
            "compiled in": f"{self.compile_seconds:.1f} s",
        }

    def diff(self, after: KernelInspection) -> KernelDifference:
        """What is different in ``after``, for example the same kernel of edited sources."""
        return KernelDifference(self, after)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.facts())
        lines = [f"  {name:<{width}}  {value}" for name, value in self.facts().items()]
        return "\n".join([self.name, *lines])

    def _repr_html_(self) -> str:
        from .inspection_html import inspection_html

        return inspection_html(self)


@dataclass(frozen=True, eq=False, repr=False)
class KernelDifference:
    """Two inspections side by side; ``before.diff(after)`` makes it. It shows itself."""

    before: KernelInspection
    after: KernelInspection

    def facts(self) -> dict[str, tuple[str, str]]:
        """The figures that differ, before and after. Compile time is none."""
        before, after = self.before.facts(), self.after.facts()
        names = [name for name in before if name != "compiled in"]
        found = {name: (before[name], after[name]) for name in names if before[name] != after[name]}
        if self.before.name != self.after.name:
            found = {"kernel": (self.before.name, self.after.name), **found}
        return found

    def opcodes(self) -> dict[str, tuple[int, int]]:
        """SASS instructions whose number differs, before and after, the largest change first.

        Raises DisassemblerMissing.
        """
        before, after = self.before.opcodes, self.after.opcodes
        changed = [name for name in before | after if before[name] != after[name]]
        changed.sort(key=lambda name: (-abs(after[name] - before[name]), name))
        return {name: (before[name], after[name]) for name in changed}

    def source(self) -> str:
        """The lines of the sources that differ, as a unified diff; empty if none does."""
        files = sorted(self.before.headers.keys() | self.after.headers.keys())
        pairs = [("translation unit", self.before.unit, self.after.unit)]
        pairs += [(f, self.before.headers.get(f, ""), self.after.headers.get(f, "")) for f in files]
        lines: list[str] = []
        for file, old, new in pairs:
            lines += difflib.unified_diff(
                old.splitlines(), new.splitlines(), file, file, n=2, lineterm=""
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        lines = [f"{name}: {old} -> {new}" for name, (old, new) in self.facts().items()]
        try:
            totals = self.before.opcodes.total(), self.after.opcodes.total()
            lines.append(f"SASS instructions: {totals[0]:,} -> {totals[1]:,}")
            lines += [f"  {name}: {old} -> {new}" for name, (old, new) in self.opcodes().items()]
        except sass.DisassemblerMissing as error:
            lines.append(str(error))
        return "\n".join([*lines, self.source()]).strip()

    def _repr_html_(self) -> str:
        from .inspection_html import difference_html

        return difference_html(self)


def _expanded(text: str, headers: Mapping[str, str], seen: set[str]) -> str:
    """``text`` with each header where it is first included, as ``#pragma once`` has it."""
    lines = []
    for line in text.splitlines():
        included = included_in(line)
        if not included:
            if not re.match(r"\s*#\s*pragma\s+once\b", line):
                lines.append(line)
            continue
        name = included[0]
        if name not in seen:
            seen.add(name)
            inner = _expanded(headers[name], headers, seen)
            lines += [f"// ==== {name}", inner, f"// ==== end of {name}"]
    return "\n".join(lines)
