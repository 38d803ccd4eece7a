"""``doctor``: what this machine has, which backend each device gets, what works, and what to
install.

Every question is asked on its own, so that whatever is missing or broken is one line of the answer
and not its end.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flashmla_rtc._version import __version__
from flashmla_rtc.arrays import Device

from . import machine
from .demo import cpu_library, gpu_library
from .machine import Cuda, CudaDevice
from .sample import Library, compare, decoder, make_batch

HOPPER = (9, 0)
VARIABLES = (
    "FLASHMLA_RTC_CACHE_DIR",
    "FLASHMLA_RTC_COMPILE",
    "FLASHMLA_RTC_KERNELS",
    "FLASHMLA_RTC_VALIDATE",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-try", action="store_true", help="look only: decode nothing and compile nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    report = examine(try_devices=not arguments.no_try)
    print("\n".join(report.lines))
    return 0 if report.works else 1


@dataclass(slots=True)
class Report:
    """Lines to print, what to do about them, and whether any backend computes."""

    lines: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    works: bool = True

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"  {name:<14}  {text}")

    def advise(self, sentence: str) -> None:
        if sentence not in self.advice:
            self.advice.append(sentence)

    def ask(self, name: str, question: Callable[[], str]) -> None:
        """Say the answer, or the error that came instead of one."""
        try:
            self.say(name, question())
        except Exception as error:
            self.say(name, f"asking failed ({one_line(error)})")


def one_line(error: BaseException) -> str:
    """The first line of an error; a compiler's log may follow it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def examine(try_devices: bool = True) -> Report:
    """The whole answer."""
    report = Report()
    cuda = machine.query_cuda()
    report.lines.append(f"flashmla_rtc {__version__}")
    _software(report, cuda)
    report.lines += ["", "Compiled kernels"]
    report.ask("cache", lambda: _cache(report))
    if try_devices:
        report.ask("kernels", lambda: _kernels(report))
    report.ask("sources", lambda: _sources(report))
    for variable in VARIABLES:
        if variable in os.environ:
            report.say("environment", f"{variable}={os.environ[variable]}")
    report.lines += ["", "What runs where"]
    _devices(report, cuda, try_devices)
    report.lines += ["", "What to do"]
    report.lines += [f"  - {line}" for line in report.advice] or ["  nothing: all is in place"]
    return report


def _software(report: Report, cuda: Cuda) -> None:
    report.ask(
        "Python",
        lambda: f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    )
    report.say("NumPy", np.__version__)
    report.ask("torch", _torch)
    report.ask("CuPy", lambda: _cupy(report, cuda))
    for name, package in (("JAX", "jax"), ("ml_dtypes", "ml_dtypes")):
        report.say(name, machine.package_version(package) or "not installed")
    compat = machine.package_version("array-api-compat")
    report.say("array API", f"array-api-compat {compat}" if compat else "not installed")
    if compat is None and (_installed("torch") or _cupy_package()):
        report.advise(
            "pip install array-api-compat: the reference backend needs it for torch and CuPy."
        )
    bindings = machine.package_version("cuda-bindings")
    report.say("cuda-bindings", bindings or "not installed")
    report.ask("NVRTC", lambda: _nvrtc(report, cuda))
    report.say("driver", _driver(cuda))


def _installed(package: str) -> bool:
    return machine.package_version(package) is not None


def _torch() -> str:
    if not _installed("torch"):
        return "not installed"
    import torch

    if torch.version.cuda is None:
        return f"{torch.__version__}, built without CUDA"
    usable = "it sees a GPU" if torch.cuda.is_available() else "it sees no usable GPU"
    return f"{torch.__version__}, built for CUDA {torch.version.cuda}; {usable}"


def _cupy_package() -> str | None:
    for package in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        version = machine.package_version(package)
        if version:
            return f"{package} {version}"
    return None


def _cupy(report: Report, cuda: Cuda) -> str:
    package = _cupy_package()
    if package is None:
        return "not installed"
    import cupy

    if cuda.devices and not _installed("ml_dtypes"):
        report.advise("pip install ml_dtypes: CuPy has bfloat16 only with it.")
    built = cupy.cuda.runtime.runtimeGetVersion()
    return f"{package}, CUDA runtime {built // 1000}.{built % 1000 // 10}"


def _extra(cuda: Cuda) -> str:
    """The extra that fits the driver: a driver of CUDA 12 does not load cubins of NVRTC 13."""
    if cuda.cuda_version is not None and cuda.cuda_version[0] < 13:
        return "cu12"
    return "cu13"


def _nvrtc(report: Report, cuda: Cuda) -> str:
    from flashmla_rtc.rtc.compiler import CompilerMissing, nvrtc_version

    try:
        major, minor = nvrtc_version()
    except CompilerMissing as error:
        if cuda.devices:
            report.advise(f"pip install 'flashmla_rtc[{_extra(cuda)}]': it brings NVRTC and CuPy.")
        return f"not usable. {error}"
    if cuda.cuda_version is not None and major > cuda.cuda_version[0]:
        report.advise(
            f"NVRTC {major}.{minor} is newer than the driver (CUDA {_dotted(cuda.cuda_version)}): "
            f"pip install 'flashmla_rtc[{_extra(cuda)}]', or update the driver."
        )
    return f"{major}.{minor}"


def _driver(cuda: Cuda) -> str:
    known = []
    if cuda.driver_version:
        known.append(cuda.driver_version)
    if cuda.cuda_version:
        known.append(f"up to CUDA {_dotted(cuda.cuda_version)}")
    if cuda.problem:
        known.append(cuda.problem)
    return ", ".join(known)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _cache(report: Report) -> str:
    from flashmla_rtc import variants

    state = variants.builder.cache.state()
    if state.problem:
        report.advise(
            f"{state.problem} Set FLASHMLA_RTC_CACHE_DIR to a writable folder; until then every "
            "process compiles the kernels anew."
        )
    place = "nowhere" if state.path is None else str(state.path)
    access = "writable" if state.writable else "not writable"
    return f"{place}: {state.entries} kernels, {state.bytes / 1e6:.1f} MB, {access}"


def _sources(report: Report) -> str:
    """Where the CUDA source comes from, and what ``FLASHMLA_RTC_KERNELS`` changes of it."""
    from flashmla_rtc import edits, variants

    place = variants.kernels_dir()
    own, used = edits.read_folder(place), variants.headers()
    changed = sorted(name for name, text in used.items() if own.get(name) != text)
    digest = f"digest {variants.sources_digest()[:12]}"
    if not os.environ.get(variants.SOURCES_VARIABLE):
        return f"{place}, {digest}"
    if not changed:
        return f"{place}, {digest}; {variants.SOURCES_VARIABLE} is set and changes nothing"
    report.advise(
        f"The kernels are compiled from edited sources ({variants.SOURCES_VARIABLE}): unset it for "
        "those that were tested."
    )
    return f"EDITED by {variants.SOURCES_VARIABLE}, {digest}: {', '.join(changed)}"


def _kernels(report: Report) -> str:
    from flashmla_rtc.rtc.compiler import CompileError, CompilerMissing

    from .kernels import describe

    try:
        kernels = describe()["kernels"]
    except CompilerMissing:
        return "not compiled: NVRTC is missing"
    except CompileError as error:
        report.advise("The kernels do not compile: python -m flashmla_rtc kernels shows the log.")
        return f"they do not compile. {str(error).splitlines()[0]}"
    return f"{len(kernels)} compiled for sm_90a: {', '.join(kernel['name'] for kernel in kernels)}"


def _devices(report: Report, cuda: Cuda, try_devices: bool) -> None:
    """One line for the CPU and for each GPU: its backend, and whether a small decode there is
    right.
    """
    report.ask("cpu", lambda: _cpu(report, try_devices))
    for device in cuda.devices:
        report.ask(f"cuda:{device.index}", partial(_gpu, report, device, cuda, try_devices))
    if not cuda.devices:
        report.advise(
            "The kernels run on NVIDIA Hopper GPUs (H100, H200, GH200). There is no GPU here, so "
            "everything runs on the CPU backend, which is for trying and testing."
        )


def _cpu(report: Report, try_devices: bool) -> str:
    library = cpu_library()
    if not try_devices:
        return "reference backend"
    works, verdict = attempt(library)
    report.works = works
    return f"reference backend: {verdict}"


def _gpu(report: Report, device: CudaDevice, cuda: Cuda, try_devices: bool) -> str:
    from flashmla_rtc import backends

    title = (
        f"{device.name}, compute capability {_dotted(device.capability)}, "
        f"{device.multiprocessors} SMs, {device.memory / 2**30:.0f} GiB: "
    )
    place = Device("cuda", device.index)
    reason = backends.why_not(place)
    if reason is None:
        title += "the kernels"
    else:
        title += f"reference backend ({reason.rstrip('.')})"
        if device.capability != HOPPER:
            report.advise(
                f"{device.name} is not a Hopper GPU: the reference backend takes arrays on it."
            )
    library = gpu_library(place)
    if library is None:
        report.advise(
            f"No array library reaches {place}: install torch with CUDA, or "
            f"pip install 'flashmla_rtc[{_extra(cuda)}]' for CuPy."
        )
        return f"{title}; not tried, since neither torch nor CuPy reaches it"
    if not try_devices:
        return title
    works, verdict = attempt(library)
    if not works:
        report.advise(
            f"A decode on {place} went wrong: python -m flashmla_rtc --traceback demo "
            f"--device {place} shows where."
        )
    return f"{title}; {verdict}"


def attempt(library: Library) -> tuple[bool, str]:
    """Decode a small ragged batch and compare it with float64: whether it was right, and a phrase
    on how it went.
    """
    try:
        batch = make_batch(library, np.array([1, 70, 200], dtype=np.int32), 2, 16)
        with warnings.catch_warnings():  # that a GPU has no kernels is said on its own line
            warnings.simplefilter("ignore")
            errors = compare(batch, *decoder(batch)())
    except Exception as error:
        return False, f"a small decode with {library.title} failed ({one_line(error)})"
    verdict = "works" if errors.small else "is WRONG"
    return errors.small, (
        f"{verdict} ({library.dtype} of {library.title}, error {errors.out:.1e} against float64)"
    )
