"""A cubin becomes a kernel of one device: loaded once, its attributes set once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .compiler import CompiledKernel


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message names the call and the driver's reason."""


@functools.cache
def driver() -> Any:
    """The module ``cuda.bindings.driver``, initialised.

    Raises DriverError if the driver library can't be loaded or finds no device.
    """
    try:
        from cuda.bindings import driver as module
    except ImportError as error:
        raise DriverError(
            f"Launching kernels needs cuda-bindings, which could not be imported ({error}): "
            "pip install 'flashmla_rtc[cu13]' (or 'flashmla_rtc[cu12]' for CUDA 12)."
        ) from error
    try:
        status = module.cuInit(0)[0]
    except Exception as error:  # the bindings raise this when libcuda itself is absent
        raise DriverError(
            f"The CUDA driver could not be loaded ({str(error).splitlines()[0]}): there is no "
            "NVIDIA driver on this machine, or it is not visible here."
        ) from error
    if status != module.CUresult.CUDA_SUCCESS:
        raise DriverError(f"cuInit failed: {_reason(module, status)}.")
    return module


def call(name: str, *arguments: Any) -> Any:
    """Call the driver function ``name``; its results, one alone or a tuple.

    Raises DriverError with the driver's own words.
    """
    module = driver()
    status, *results = getattr(module, name)(*arguments)
    if status != module.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{name} failed: {_reason(module, status)}.")
    return results[0] if len(results) == 1 else tuple(results)


def _reason(module: Any, status: Any) -> str:
    code, text = module.cuGetErrorString(status)
    known = code == module.CUresult.CUDA_SUCCESS and text
    return f"{status.name}, {text.decode()}" if known else str(status)


@dataclass(frozen=True)
class DeviceFacts:
    """What a launch needs to know of a device.

    reserved_smem_bytes: of each block's shared memory, in front of what a kernel asks for.
    """

    index: int
    name: str
    num_sms: int
    capability: tuple[int, int]
    reserved_smem_bytes: int


@functools.cache
def device_facts(index: int) -> DeviceFacts:
    """Facts of CUDA device ``index``. Raises DriverError."""
    attribute = driver().CUdevice_attribute
    device = call("cuDeviceGet", index)

    def read(name: str) -> int:
        return int(
            call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
        )

    return DeviceFacts(
        index,
        # The bindings give the whole buffer: spaces follow the zero at the end of the name.
        call("cuDeviceGetName", 128, device).partition(b"\0")[0].decode(),
        read("MULTIPROCESSOR_COUNT"),
        (read("COMPUTE_CAPABILITY_MAJOR"), read("COMPUTE_CAPABILITY_MINOR")),
        read("RESERVED_SHARED_MEMORY_PER_BLOCK"),
    )


@functools.cache
def primary_context(index: int) -> Any:
    """The context that CuPy and torch use on device ``index``; kept for the life of the process."""
    return call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", index))


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make device ``index`` current for a while; free when it already is."""
    context = primary_context(index)
    if int(call("cuCtxGetCurrent")) == int(context):
        yield
        return
    call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


@contextmanager
def allowed_while_capturing() -> Iterator[None]:
    """Let this thread load modules and allocate memory for a while although it captures a graph.

    Neither becomes part of the graph.
    """
    relaxed = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


class LoadedKernel:
    """A kernel on one device. ``handle`` is its CUfunction."""

    def __init__(self, kernel: CompiledKernel, device: int, dynamic_smem_bytes: int) -> None:
        with on_device(device), allowed_while_capturing():
            self._module = call("cuModuleLoadData", kernel.cubin)
            self.handle = call("cuModuleGetFunction", self._module, kernel.entry.encode())
            if dynamic_smem_bytes:
                limit = driver().CUfunction_attribute
                call(
                    "cuFuncSetAttribute",
                    self.handle,
                    limit.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    dynamic_smem_bytes,
                )
        self.name = kernel.name
        self.device = device
        self.dynamic_smem_bytes = dynamic_smem_bytes

    def symbol(self, name: str) -> tuple[int, int]:
        """Address and bytes of a ``__device__`` variable of its module. Raises DriverError."""
        address, size = call("cuModuleGetGlobal", self._module, name.encode())
        return int(address), int(size)


class KernelTable:
    """Loaded kernels by (name, device), each loaded once even when threads race."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, int], LoadedKernel] = {}
        self._lock = threading.Lock()

    def get(self, name: str, device: int) -> LoadedKernel | None:
        """The kernel if it is loaded."""
        return self._kernels.get((name, device))

    def load(self, kernel: CompiledKernel, device: int, dynamic_smem_bytes: int) -> LoadedKernel:
        """Load ``kernel`` on ``device``, or return what is loaded already."""
        with self._lock:
            key = (kernel.name, device)
            if key not in self._kernels:
                self._kernels[key] = LoadedKernel(kernel, device, dynamic_smem_bytes)
            return self._kernels[key]
