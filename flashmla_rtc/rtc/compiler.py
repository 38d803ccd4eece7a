"""CUDA source to cubin with NVRTC, and the refusal of cubins that would run slowly in silence.

NVRTC gets every header from memory and compiles for an architecture named by the caller, so a
compile depends on nothing but its input: no GPU, no driver, no CUDA toolkit, no working directory.

ptxas reports three disasters as remarks in the log of a *successful* compile: registers spilled to
memory, a ``setmaxnreg`` that it ignored, and ``wgmma`` instructions that it serialised.  Each of
them costs a Hopper kernel most of its speed and none changes its results, so no test of results
would notice.  Here they are errors.
"""

from __future__ import annotations

import functools
import importlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_ARCH = "sm_90a"
OLDEST_NVRTC = (12, 9)

# -v makes ptxas report registers, shared memory and spills, which the checks below read. NVRTC's
# own cache would hand out a cubin without that report.
_PTXAS_VERBOSE = "--ptxas-options=-v"
_BASE_OPTIONS = ("-std=c++17", "--no-cache", _PTXAS_VERBOSE)

_INSTALL_HINT = "pip install 'flashmla_rtc[cu13]' (or 'flashmla_rtc[cu12]' for CUDA 12)"

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
"""A line that includes one of the headers that come from memory; its name is the group."""

_CONTEXT_LINES = 3
_MOST_EXCERPTS = 6


class CompilerMissing(RuntimeError):
    """cuda-bindings or the NVRTC library is not installed; the message says what to install."""


class CompileError(RuntimeError):
    """A kernel did not compile, or compiled into something that must not be run.

    The message holds the compiler's log and the numbered source lines that it points at.
    """


@dataclass(frozen=True)
class KernelSource:
    """One kernel to compile.

    name: unique name of the variant; the translation unit is called ``name.cu`` in messages.
    entry: the ``extern "C"`` symbol of the kernel.
    source: the text of the translation unit.
    headers: include name -> text.  ``#include "ptx/wgmma.cuh"`` finds ``headers["ptx/wgmma.cuh"]``,
        from every file alike: names are not relative to the file that includes.
    options: NVRTC options beyond the base ones, for example ``("-lineinfo",)``.
    """

    name: str
    entry: str
    source: str
    headers: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin that passed the checks, and what ptxas said about its entry.

    registers: per thread, at entry.  spill_bytes: stores plus loads, 0 in every kernel that
    ``compile_kernel`` returns.  smem_bytes: static shared memory per block.  stack_bytes: stack
    frame per thread; not 0 when an array is indexed by something unknown at compile time.
    compile_seconds: how long NVRTC took.  log: its log.
    """

    name: str
    entry: str
    cubin: bytes
    registers: int
    spill_bytes: int
    smem_bytes: int
    compile_seconds: float
    log: str
    stack_bytes: int = 0


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """The (major, minor) version of the NVRTC library that compiles.

    Raises CompilerMissing if cuda-bindings or NVRTC is absent.
    """
    nvrtc = _nvrtc()
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings changed the type of this error more than once
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompilerMissing(
            "Compiling the CUDA kernels needs the NVRTC library, which cuda-bindings could not "
            f"load ({reason}): {_INSTALL_HINT}."
        ) from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilerMissing(
            f"The NVRTC library was loaded but does not answer ({_status_name(status)}); "
            f"reinstall it: {_INSTALL_HINT}."
        )
    return int(major), int(minor)


def compile_options(source: KernelSource, arch: str = DEFAULT_ARCH) -> tuple[str, ...]:
    """Every option that ``source`` is compiled with, in order."""
    return (*_BASE_OPTIONS, f"--gpu-architecture={arch}", *source.options)


def ptx_options(source: KernelSource, arch: str) -> list[str]:
    """The options that make the PTX of the cubin for ``arch``, and no cubin."""
    virtual = arch.replace("sm_", "compute_")
    return [option for option in compile_options(source, virtual) if option != _PTXAS_VERBOSE]


def compile_kernel(
    source: KernelSource, arch: str = DEFAULT_ARCH, *, may_spill: bool = False
) -> CompiledKernel:
    """Compile ``source`` to a cubin for ``arch`` (a real architecture, such as ``sm_90a``).

    NVRTC releases the GIL and may run in several threads at once.

    Raises CompilerMissing without NVRTC, and CompileError if the source does not compile, spills
    registers, has a ``setmaxnreg`` ignored or a ``wgmma`` serialised, or does not define its entry.
    With ``may_spill`` it may spill: for kernels that carry more than they need, to be looked into.
    """
    version = nvrtc_version()
    _refuse_unknown_includes(source)
    begin = time.perf_counter()
    with _Program(source) as program:
        status = program.compile(compile_options(source, arch))
        seconds = time.perf_counter() - begin
        log = program.log()
        if status != "NVRTC_SUCCESS":
            raise CompileError(_compile_failure(source, arch, version, status, log))
        cubin = program.cubin()
    usage = _read_usage(source, log)
    _refuse_slow_code(source, arch, usage, log, may_spill)
    return CompiledKernel(
        name=source.name,
        entry=source.entry,
        cubin=cubin,
        registers=usage.registers,
        spill_bytes=usage.spill_bytes,
        smem_bytes=usage.smem_bytes,
        compile_seconds=seconds,
        log=log,
        stack_bytes=usage.stack_bytes,
    )


# --- NVRTC ---------------------------------------------------------------------------------------


def _nvrtc() -> Any:
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise CompilerMissing(
            "Compiling the CUDA kernels needs cuda-bindings, which could not be imported "
            f"({error}): {_INSTALL_HINT}."
        ) from error


def _status_name(status: Any) -> str:
    return str(getattr(status, "name", status))


class _Program:
    """An nvrtcProgram that is destroyed on the way out of a ``with`` block."""

    def __init__(self, source: KernelSource) -> None:
        self._nvrtc = _nvrtc()
        self._name = source.name
        (self._handle,) = self._call(
            "nvrtcCreateProgram",
            source.source.encode(),
            _unit_name(source).encode(),
            len(source.headers),
            [text.encode() for text in source.headers.values()],
            [name.encode() for name in source.headers],
        )

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._nvrtc.nvrtcDestroyProgram(self._handle)

    def _call(self, function: str, *args: Any) -> tuple[Any, ...]:
        status, *values = getattr(self._nvrtc, function)(*args)
        if status != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{function} failed for {self._name}: {_status_name(status)}.")
        return tuple(values)

    def compile(self, options: tuple[str, ...]) -> str:
        """Compile, and return the name of NVRTC's verdict."""
        encoded = [option.encode() for option in options]
        (status,) = self._nvrtc.nvrtcCompileProgram(self._handle, len(encoded), encoded)
        return _status_name(status)

    def log(self) -> str:
        return self._text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")

    def ptx(self) -> str:
        return self._text("nvrtcGetPTXSize", "nvrtcGetPTX")

    def cubin(self) -> bytes:
        return self._buffer("nvrtcGetCUBINSize", "nvrtcGetCUBIN")

    def _text(self, size_function: str, read_function: str) -> str:
        text = self._buffer(size_function, read_function).decode(errors="replace")
        return text.replace("\0", "").strip()

    def _buffer(self, size_function: str, read_function: str) -> bytes:
        (size,) = self._call(size_function, self._handle)
        if (
            size <= 1
        ):  # only a terminator; and Python shares its one-byte objects, so never write one
            return b""
        # cuda-bindings writes through the pointer of a bytes object, which nobody else holds yet.
        buffer = bytes(size)
        self._call(read_function, self._handle, buffer)
        return buffer


# --- What ptxas reports --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Usage:
    registers: int
    spill_bytes: int
    smem_bytes: int
    stack_bytes: int


def _read_usage(source: KernelSource, log: str) -> _Usage:
    """The figures of the entry from a log such as

    ptxas info    : Compiling entry function 'k' for 'sm_90a'
    ptxas info    : Function properties for k
    ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem

    Spills count in any function of the log, because whatever is not inlined is called by the entry.
    """
    sections = re.split(r"Compiling entry function '([^']+)'", log)
    entries = dict(zip(sections[1::2], sections[2::2], strict=True))
    section = entries.get(source.entry)
    if section is None:
        defined = ", ".join(sorted(entries)) or "no kernel at all"
        raise CompileError(
            f'The source of {source.name} defines no extern "C" __global__ function named '
            f"{source.entry}; it defines {defined}.\n\n{log}"
        )
    registers = re.search(r"Used (\d+) registers", section)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or not spills:
        raise CompileError(
            f"The compiler's log has no register and spill figures for {source.name}, so the "
            f"result can't be checked; an option may have silenced {_PTXAS_VERBOSE}.\n\n{log}"
        )
    smem = re.search(r"(\d+) bytes smem", section)
    stack = re.search(r"(\d+) bytes stack frame", section)
    return _Usage(
        registers=int(registers[1]),
        spill_bytes=sum(int(stores) + int(loads) for stores, loads in spills),
        smem_bytes=int(smem[1]) if smem else 0,
        stack_bytes=int(stack[1]) if stack else 0,
    )


def _refuse_slow_code(
    source: KernelSource, arch: str, usage: _Usage, log: str, may_spill: bool = False
) -> None:
    complaints = []
    if usage.spill_bytes and not may_spill:
        complaints.append(
            f"it spills registers ({usage.spill_bytes} bytes of spill stores and loads, at "
            f"{usage.registers} registers a thread)"
        )
    # Every code that ptxas uses for an ignored setmaxnreg (C7508 and its neighbours) and for
    # serialised wgmma (C7510 and its neighbours) shares this phrase; the codes differ by cause.
    complaints.extend(
        f"ptxas says: {line.partition(':')[2].strip().rstrip('.')}"
        for line in log.splitlines()
        if "Potential Performance Loss" in line or "(C7517)" in line
    )
    if complaints:
        raise CompileError(
            f"The kernel {source.name} compiled for {arch}, but it is refused because it would "
            f"run slowly: {'; '.join(complaints)}.\n\n{log}"
        )


# --- Errors with the lines they point at ---------------------------------------------------------


def _unit_name(source: KernelSource) -> str:
    return f"{source.name}.cu"


def _files(source: KernelSource) -> dict[str, str]:
    return {_unit_name(source): source.source, **source.headers}


def _refuse_unknown_includes(source: KernelSource) -> None:
    """NVRTC would look for a missing header in the working directory, which no cache key covers."""
    for file, text in _files(source).items():
        for found in INCLUDE.finditer(text):
            if found[1] not in source.headers:
                line = text.count("\n", 0, found.start()) + 1
                raise CompileError(
                    f"The kernel {source.name} includes {found[1]!r}, which is none of its "
                    f"headers ({', '.join(sorted(source.headers)) or 'it has none'}).\n\n"
                    + _excerpt(file, text, line)
                )


def _compile_failure(
    source: KernelSource, arch: str, version: tuple[int, int], status: str, log: str
) -> str:
    headline = (
        f"The kernel {source.name} did not compile for {arch} with NVRTC "
        f"{version[0]}.{version[1]} ({status})."
    )
    if version < OLDEST_NVRTC:
        headline += (
            f" This NVRTC is older than {OLDEST_NVRTC[0]}.{OLDEST_NVRTC[1]}, which the kernels are "
            f"written for: {_INSTALL_HINT}."
        )
    files = _files(source)
    excerpts: list[str] = []
    for file, line in _locations(log):
        if file in files and len(excerpts) < _MOST_EXCERPTS:
            excerpts.append(_excerpt(file, files[file], line))
    ptx_line = re.search(r"ptx input, line (\d+)", log)
    if ptx_line:
        excerpts.extend(_ptx_excerpts(source, arch, int(ptx_line[1])))
    return "\n\n".join([headline, log, *excerpts])


def _locations(log: str) -> Iterator[tuple[str, int]]:
    """(file, line) of each error in the log and of the template instantiations it came through,
    once each; those of the warnings if there is no error."""
    places: dict[str, list[tuple[str, int]]] = {"error": [], "warning": []}
    file, kind = "", "warning"
    for text in log.splitlines():
        if message := re.match(r"(\S.*?)\((\d+)\): (?:catastrophic )?(error|warning)", text):
            file, kind = message[1], message[3]
            places[kind].append((file, int(message[2])))
        elif origin := re.search(r"\bat line (\d+)(?: of (\S+))?$", text):
            places[kind].append((origin[2] or file, int(origin[1])))
    yield from dict.fromkeys(places["error"] or places["warning"])


def _excerpt(file: str, text: str, line: int) -> str:
    """A few numbered lines of ``text`` around ``line`` (1-based), which is marked."""
    lines = text.splitlines()
    first = max(1, line - _CONTEXT_LINES)
    last = min(len(lines), line + _CONTEXT_LINES)
    width = len(str(last))
    shown = [f"{file}:{line}"]
    for number in range(first, last + 1):
        mark = ">" if number == line else " "
        shown.append(f"{mark} {number:{width}} | {lines[number - 1]}".rstrip())
    return "\n".join(shown)


def _ptx_excerpts(source: KernelSource, arch: str, line: int) -> Iterator[str]:
    """ptxas errors come from inline assembly and point into the PTX.  Shows that line of the PTX
    and the source line it was generated from, at the price of one more compile."""
    options = ptx_options(source, arch)
    has_locations = bool({"-lineinfo", "--generate-line-info"} & set(options))
    if not has_locations:
        options.append("-lineinfo")
    with _Program(source) as program:
        if program.compile(tuple(options)) != "NVRTC_SUCCESS":
            return
        annotated = program.ptx()
    # Without the .loc lines that -lineinfo added, the numbers are those ptxas counted.
    ptx: list[str] = []
    location: tuple[str, int] | None = None
    origin: tuple[str, int] | None = None
    for text in annotated.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            location = found[1], int(found[2])
            if not has_locations:
                continue
        ptx.append(text)
        if len(ptx) == line:
            origin = location
    yield _excerpt("PTX", "\n".join(ptx), line)
    if origin is None:
        return
    path = re.search(rf'^\s*\.file\s+{origin[0]} "([^"]+)"', annotated, re.MULTILINE)
    for file, text in _files(source).items():
        if path and (path[1] == file or path[1].endswith("/" + file)):
            yield _excerpt(file, text, origin[1])
            return
