"""What this machine has: CUDA devices, the driver, installed packages. Every question has an answer
anywhere.

The driver and NVML are asked through ctypes, so that a machine without CuPy, torch or cuda-bindings
can still be described.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

PACKAGES = (
    "numpy",
    "torch",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cupy",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "jax",
    "array-api-compat",
    "ml_dtypes",
)

_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One GPU as the driver shows it. ``memory`` in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int


@dataclass(frozen=True, slots=True)
class Cuda:
    """The driver and its devices. ``problem`` says why there are none."""

    devices: tuple[CudaDevice, ...] = ()
    cuda_version: tuple[int, int] | None = None
    driver_version: str | None = None
    problem: str | None = None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except Exception:  # a damaged installation raises all sorts
        return None


def package_versions() -> dict[str, str]:
    """Python and the installed ones of ``PACKAGES``."""
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in PACKAGES:
        version = package_version(name)
        if version is not None:
            versions[name] = version
    return versions


def _library(names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver, such as ``580.95.05``; None without one."""
    nvml = _library(("libnvidia-ml.so.1", "nvml.dll"))
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return None
    try:
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) != 0:
            return None
        return text.value.decode("ascii", "replace")
    finally:
        nvml.nvmlShutdown()


def query_cuda() -> Cuda:
    """Ask the driver. Initialises it in this process, which must therefore not be forked
    afterwards.
    """
    try:
        return _query_cuda()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Cuda(problem=f"The CUDA driver could not be asked ({reason}).")


def _query_cuda() -> Cuda:
    cuda = _library(("libcuda.so.1", "nvcuda.dll"))
    if cuda is None:
        return Cuda(problem="No NVIDIA driver is installed (libcuda.so.1 was not found).")
    version = driver_version()
    status = int(cuda.cuInit(0))
    if status != 0:
        reason = "it sees no GPU" if status == 100 else f"cuInit returned CUDA error {status}"
        return Cuda(
            driver_version=version, problem=f"The NVIDIA driver is installed, but {reason}."
        )
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    supported = (number.value // 1000, number.value % 1000 // 10)
    cuda.cuDeviceGetCount(ctypes.byref(number))
    devices = tuple(_device(cuda, index) for index in range(number.value))
    problem = None if devices else "The NVIDIA driver is installed, but it sees no GPU."
    return Cuda(devices, supported, version, problem)


def _device(cuda: Any, index: int) -> CudaDevice:
    handle = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        return value.value

    return CudaDevice(
        index,
        name.value.decode("utf-8", "replace"),
        (attribute(_MAJOR), attribute(_MINOR)),
        attribute(_MULTIPROCESSORS),
        memory.value,
    )


def nvrtc_version_text() -> str | None:
    """``"13.0"``, or None where the kernels cannot be compiled."""
    from flashmla_rtc.rtc.compiler import nvrtc_version

    try:
        major, minor = nvrtc_version()
    except Exception:
        return None
    return f"{major}.{minor}"
