"""The PTX of a kernel, for readers: what NVRTC makes of the source before ptxas makes a cubin."""

from __future__ import annotations

from .compiler import DEFAULT_ARCH, CompileError, KernelSource, _Program, ptx_options


def ptx_of(source: KernelSource, arch: str = DEFAULT_ARCH) -> str:
    """The PTX that the cubin of ``source`` for ``arch`` is assembled from.

    Raises CompilerMissing without NVRTC, CompileError if the source does not compile.
    """
    with _Program(source) as program:
        status = program.compile(tuple(ptx_options(source, arch)))
        if status != "NVRTC_SUCCESS":
            log = program.log()
            raise CompileError(f"{source.name} did not compile to PTX ({status}).\n\n{log}")
        return program.ptx()
