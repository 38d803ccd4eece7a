"""The kernels that the package compiles: which source, with which constants, for which entry."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import geometry
from .rtc import Builder, KernelSource
from .rtc.params import ParamStruct

builder = Builder()
"""Compiles the package's kernels, each once a process."""

_PACKAGE = Path(__file__).resolve().parent

# What launches kernels and so belongs to what a measurement or a GPU test run has seen.
_LAUNCHING_PYTHON = (
    "arrays.py",
    "backends.py",
    "checks.py",
    "geometry.py",
    "integrations/torch.py",
    "interface.py",
    "maps.py",
    "metadata.py",
    "option_checks.py",
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

    def source(self) -> KernelSource:
        """The translation unit: one named block of constants, the parameter struct, the kernel."""
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
        return KernelSource(self.name, self.entry, text, _headers())


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
    folder = kernels_dir()
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.cuh"))
    }


def sources_digest() -> str:
    """SHA-256 over the CUDA source and the Python that launches it, in hex."""
    digest = hashlib.sha256()
    files = [(f"kernels/{name}", text) for name, text in _headers().items()]
    files += [(name, (_PACKAGE / name).read_text(encoding="utf-8")) for name in _LAUNCHING_PYTHON]
    for name, text in files:
        for part in (name, text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def kernels_digest() -> str:
    """SHA-256 over what is compiled: the CUDA source, its constants and parameters, in hex.

    Figures of a kernel stay those of the kernel while this stays the same, whatever changes in the
    Python around.
    """
    digest = hashlib.sha256()
    units = {variant.name: variant.source().source for variant in all_variants()}
    for name, text in sorted({**units, **_headers()}.items()):
        for part in (name, text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
