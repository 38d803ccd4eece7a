"""The kernels that the package compiles: which source, with which constants, for which entry."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import edits, geometry
from .rtc import Builder, CubinCache, KernelSource, compile_kernel
from .rtc.params import ParamStruct

SOURCES_VARIABLE = "FLASHMLA_RTC_KERNELS"

builder = Builder()
"""Compiles the package's kernels, each once a process."""

_PACKAGE = Path(__file__).resolve().parent

# What launches kernels and so belongs to what a measurement or a GPU test run has seen.
_LAUNCHING_PYTHON = (
    "arrays.py",
    "backends.py",
    "checks.py",
    "edits.py",
    "geometry.py",
    "integrations/torch.py",
    "integrations/torch_constants.py",
    "interface.py",
    "maps.py",
    "metadata.py",
    "option_checks.py",
    "overrides.py",
    "plan_checks.py",
    "recorded.py",
    "schedule.py",
    "schedule_pairs.py",
    "sm90.py",
    "torch_modes.py",
    "torch_shortcuts.py",
    "variants.py",
    "workspace.py",
    "rtc/compiler.py",
    "rtc/kernel.py",
    "rtc/launch.py",
    "rtc/params.py",
    "rtc/tensor_map.py",
)

# A wait inside a kernel that takes more polls than this is a bug and ends the kernel; 0 waits for
# ever.
TRAP_AFTER_SPINS = 0

_SHORT = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Variant:
    """One kernel of the package.

    name: unique. file: its source in the kernels folder. entry: its ``extern "C"`` symbol.
    params: the struct it takes. threads: of a thread block.
    dynamic_smem_bytes: shared memory asked for at launch.
    cluster: neighbours along a grid's first dimension that form a cluster, where it divides that.
    element: "Bf16", "Fp16" or None. constants: (type, name, value) known at compile time.
    """

    name: str
    file: str
    entry: str
    params: ParamStruct
    threads: int
    dynamic_smem_bytes: int = 0
    cluster: int = 1
    element: str | None = None
    constants: tuple[tuple[str, str, int], ...] = field(default=())

    def but(self, name: str, **constants: int) -> Variant:
        """The same kernel with other values of some of its constants, called ``name``.

        Raises KeyError for a constant that it does not have.
        """
        unknown = constants.keys() - {constant for _, constant, _ in self.constants}
        if unknown:
            raise KeyError(f"{self.name} has no constant named {', '.join(sorted(unknown))}.")
        replaced = tuple(
            (kind, constant, constants.get(constant, value))
            for kind, constant, value in self.constants
        )
        return replace(self, name=name, constants=replaced)

    def source(self, sources: Sources | None = None) -> KernelSource:
        """The translation unit: one named block of constants, the parameter struct, the kernel.

        Of the sources in use, unless others are given.
        """
        element = [f"using Element = {self.element};"] if self.element else []
        constants = [f"constexpr {kind} {name} = {value};" for kind, name, value in self.constants]
        text = "\n".join(
            [
                '#include "ptx/tma.cuh"',
                '#include "ptx/types.cuh"',
                "namespace config {",
                *element,
                *constants,
                "}  // namespace config",
                self.params.cpp(),
                f'#include "{self.file}"',
                "",
            ]
        )
        return KernelSource(self.name, self.entry, text, headers(sources))


@dataclass(frozen=True, eq=False)
class Sources:
    """What kernels are compiled from instead of the package's own sources (``overrides.py``).

    headers: all of them, by name. stand_ins: variants in place of those of the name that they are
    kept under. may_spill: whether a kernel may spill registers.

    Two are the same only if they are one: what was loaded from one is kept under it.
    """

    headers: Mapping[str, str]
    stand_ins: Mapping[str, Variant] = field(default_factory=dict)
    may_spill: bool = False


in_use: Sources | None = None
"""What kernels are compiled from now; None: the package's own sources."""


def decode_name(dtype: str, rows_per_group: int, plain: bool) -> str:
    """The decode kernel for calls of this dtype and these rows.

    plain: a tensor map describes q (``maps.py``), and every row of out begins at a multiple of 16
        bytes, as is usual. The kernels for other calls are compiled when they are needed.
    """
    few = dtype == "bfloat16" and not geometry.kept_in_halves(dtype, rows_per_group)
    name = f"mla_decode_{_SHORT[dtype]}"
    return name + "_few_rows" * few + "_any_layout" * (not plain)


def _decode(dtype: str, rows_per_group: int, plain: bool) -> Variant:
    return Variant(
        decode_name(dtype, rows_per_group, plain),
        "mla_decode.cuh",
        "mla_decode",
        geometry.DECODE_PARAMS,
        geometry.DECODE_THREADS,
        geometry.DECODE_SHARED_BYTES,
        geometry.DECODE_CLUSTER,
        {"bfloat16": "Bf16", "float16": "Fp16"}[dtype],
        (
            ("bool", "KEPT_IN_HALVES", int(geometry.kept_in_halves(dtype, rows_per_group))),
            ("bool", "PLAIN", int(plain)),
            ("int", "HEAD_DIM", geometry.HEAD_DIM),
            ("int", "HEAD_DIM_V", geometry.HEAD_DIM_V),
            ("int", "BLOCK_ROWS", geometry.BLOCK_ROWS),
            ("int", "BLOCK_KEYS", geometry.BLOCK_KEYS),
            ("int", "FEW_ROWS", geometry.FEW_ROWS),
            ("int", "SHARED_BYTES", geometry.DECODE_SHARED_BYTES),
            ("u32", "SHARED_BASE", geometry.SHARED_BASE),
            ("u32", "TRAP_AFTER_SPINS", TRAP_AFTER_SPINS),
            ("u32", "MERGE_PATIENCE", geometry.MERGE_PATIENCE),
            ("int", "TILE_STATE_BYTES", geometry.TILE_STATE_BYTES),
            ("int", "MAX_PARTS", geometry.MAX_PARTS),
            ("int", "TRACE_EVENTS", 0),
        ),
    )


def _schedule() -> Variant:
    return Variant(
        "mla_schedule",
        "mla_schedule.cuh",
        "mla_schedule",
        geometry.SCHEDULE_PARAMS,
        geometry.SCHEDULE_THREADS,
        constants=(
            ("int", "BLOCK_KEYS", geometry.BLOCK_KEYS),
            ("int", "COST_UNIT", geometry.COST_UNIT),
            ("int", "MAX_PLANNED_BLOCKS", geometry.MAX_PLANNED_BLOCKS),
            ("int", "MAX_PARTS", geometry.MAX_PARTS),
            ("int", "SCHEDULE_THREADS", geometry.SCHEDULE_THREADS),
            ("int", "SCHEDULE_CANDIDATES", geometry.SCHEDULE_CANDIDATES),
        ),
    )


@functools.cache
def default_variants() -> tuple[Variant, ...]:
    """The kernels compiled at import, the slowest to compile first."""
    return (*_decodes(plain=True), _schedule())


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    """The default variants, and those that are compiled when they are needed."""
    return (*default_variants(), *_decodes(plain=False))


def _decodes(plain: bool) -> tuple[Variant, ...]:
    return (
        _decode("bfloat16", geometry.BLOCK_ROWS, plain),
        _decode("float16", geometry.BLOCK_ROWS, plain),
        _decode("bfloat16", 1, plain),
    )


@functools.cache
def by_name(name: str) -> Variant:
    """The variant called ``name``. Raises KeyError."""
    return {variant.name: variant for variant in all_variants()}[name]


def named(name: object) -> Variant:
    """The variant that a caller means by ``name``. Raises ValueError."""
    for variant in all_variants():
        if variant.name == name:
            return variant
    names = ", ".join(variant.name for variant in all_variants())
    raise ValueError(f"There is no kernel called {name!r}; there are {names}.")


def builder_of(sources: Sources | None) -> Builder:
    """What compiles kernels of these sources."""
    return _lenient_builder() if sources is not None and sources.may_spill else builder


@functools.cache
def _lenient_builder() -> Builder:
    """For kernels that may spill, which must not be found by those who would refuse them."""
    place = builder.cache.directory
    cache = CubinCache(None if place is None else place / "may_spill")
    return Builder(cache, compiler=functools.partial(compile_kernel, may_spill=True))


@functools.cache
def kernels_dir() -> Path:
    """Where the CUDA source is: inside the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / "mla_decode.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"The CUDA source is missing: neither {_PACKAGE / 'kernels'} nor "
        f"{_PACKAGE.parent / 'kernels'} holds mla_decode.cuh. Reinstall flashmla_rtc."
    )


@functools.cache
def _headers() -> dict[str, str]:
    """The package's headers; where FLASHMLA_RTC_KERNELS names a folder, with those that it holds
    in place of their namesakes. Raises ValueError for a folder that replaces nothing.
    """
    own = edits.read_folder(kernels_dir())
    folder = os.environ.get(SOURCES_VARIABLE)
    return edits.replaced(own, folder, SOURCES_VARIABLE) if folder else own


def headers(sources: Sources | None = None) -> Mapping[str, str]:
    """The headers of these sources, or of those in use, by name."""
    sources = sources or in_use
    return _headers() if sources is None else sources.headers


def sources_digest() -> str:
    """SHA-256 over the CUDA source in use and the Python that launches it, in hex."""
    digest = hashlib.sha256()
    files = [(f"kernels/{name}", text) for name, text in headers().items()]
    files += [(name, (_PACKAGE / name).read_text(encoding="utf-8")) for name in _LAUNCHING_PYTHON]
    for name, text in files:
        for part in (name, text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def kernels_digest() -> str:
    """SHA-256 over what is compiled: the CUDA source in use, its constants and parameters, in hex.

    Figures of a kernel stay those of the kernel while this stays the same, whatever changes in the
    Python around.
    """
    digest = hashlib.sha256()
    units = {variant.name: variant.source().source for variant in all_variants()}
    for name, text in sorted({**units, **headers()}.items()):
        for part in (name, text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
