"""Run-time compilation of CUDA kernels: source to cubin, cubins on disk, cubin to a launch.

Nothing in this folder knows what the kernels compute.  ``compiler``, ``cache`` and ``build`` call
NVRTC only and never the driver, so they work without a GPU and before a fork; ``kernel`` and
``launch`` are the half that talks to the driver.
"""

from __future__ import annotations

from .build import Builder
from .cache import CubinCache
from .compiler import (
    CompiledKernel,
    CompileError,
    CompilerMissing,
    KernelSource,
    compile_kernel,
    nvrtc_version,
)

__all__ = [
    "Builder",
    "CompileError",
    "CompiledKernel",
    "CompilerMissing",
    "CubinCache",
    "KernelSource",
    "compile_kernel",
    "nvrtc_version",
]
