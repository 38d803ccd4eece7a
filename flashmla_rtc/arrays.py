"""One view of any array (pointer, shape, strides, dtype, device), and new arrays in its library.

torch tensors and CuPy arrays are read through their own attributes, so that the hot path makes no
DLPack round trip and never synchronises. NumPy arrays, JAX arrays and everything else that speaks
DLPack are taken too. Nothing here copies the caller's data.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Device(NamedTuple):
    """Where an array lives: ``("cpu", 0)`` or ``("cuda", index)``."""

    type: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a device

    def __str__(self) -> str:
        return f"{self.type}:{self.index}" if self.type != "cpu" else "cpu"


CPU = Device("cpu", 0)


@dataclass(slots=True)
class View:
    """What the package needs to know of one array.

    ``strides`` count elements; ``pointer`` is the address of element 0.
    """

    source: Any
    library: str
    native: Any
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device

    @property
    def ndim(self) -> int:
        return len(self.shape)


_TORCH_DTYPES: dict[Any, str] = {}
_TORCH_DEVICES: dict[Any, Device] = {}


def device_named(device: Any) -> Device:
    """The device that an index, a name such as "cuda:1" or an object with ``type`` means.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if device is None:
        return Device("cuda", 0)
    if isinstance(device, str):
        kind, _, index = device.partition(":")
        if kind in ("cuda", "cpu") and (index.isdecimal() or (not index and ":" not in device)):
            return Device(kind, int(index or 0))
    elif isinstance(getattr(device, "type", None), str):  # torch.device
        return Device(device.type, device.index or 0)
    elif hasattr(device, "id"):  # cupy.cuda.Device
        return Device("cuda", int(device.id))
    elif isinstance(device, (int, np.integer)) and not isinstance(device, bool) and device >= 0:
        return Device("cuda", int(device))
    expected = 'must be the index of a CUDA device, a name such as "cuda:1", or a torch.device'
    problem = f"device {expected}, but it is {device!r}."
    raise ValueError(problem) if isinstance(device, (int, str)) else TypeError(problem)


def view(array: Any, name: str) -> View:
    """The view of ``array``, an argument called ``name``.

    Takes torch tensors, CuPy, NumPy and JAX arrays, and any object with ``__dlpack__``.

    Raises:
        TypeError: ``array`` is none of these, or needs a package that is not installed.
    """
    root = type(array).__module__.partition(".")[0]
    if root == "torch" or _is_torch_subclass(array):
        return _view_torch(array, name)
    if root == "cupy" and hasattr(array, "data"):
        return _view_cupy(array, "cupy", array)
    if isinstance(array, np.ndarray):
        return _view_numpy(array, "numpy", array)
    if root in ("jaxlib", "jax") and hasattr(array, "__array_namespace__"):
        return _view_jax(array, name)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _view_dlpack(array, name)
    raise TypeError(
        f"{name} must be an array (torch, CuPy, NumPy, JAX, or any object with __dlpack__), "
        f"but it is {type(array).__name__}."
    )


def _is_torch_subclass(array: Any) -> bool:
    """Whether ``array`` is a torch tensor of a class defined outside torch. Does not import torch,
    and takes no offence at what tests may have put in its place.
    """
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return isinstance(tensor, type) and isinstance(array, tensor)


def _view_torch(array: Any, name: str) -> View:
    if not hasattr(array, "data_ptr"):
        raise TypeError(f"{name} must be a torch tensor, but it is {type(array).__name__}.")
    dtype = _TORCH_DTYPES.get(array.dtype)
    if dtype is None:
        dtype = _TORCH_DTYPES.setdefault(array.dtype, str(array.dtype).removeprefix("torch."))
    device = _TORCH_DEVICES.get(array.device)
    if device is None:
        device = _TORCH_DEVICES.setdefault(
            array.device, Device(array.device.type, array.device.index or 0)
        )
    try:
        address = array.data_ptr()
    except RuntimeError:  # sparse tensors, and others that have no elements in memory
        address = 0
    if address == 0 and (device.type == "meta" or array.numel() > 0):
        raise TypeError(f"{name} must be a dense tensor with elements in memory, but it has none.")
    if array.is_neg():
        raise TypeError(f"{name} is a lazily negated view: pass {name}.resolve_neg().")
    return View(array, "torch", array, address, tuple(array.shape), array.stride(), dtype, device)


def _view_cupy(array: Any, library: str, source: Any) -> View:
    size = array.itemsize
    return View(
        source,
        library,
        array,
        array.data.ptr,
        array.shape,
        tuple([stride // size for stride in array.strides]),
        str(array.dtype),
        Device("cuda", array.data.device_id if array.data.device_id >= 0 else 0),
    )


def _view_numpy(array: np.ndarray, library: str, source: Any) -> View:
    size = array.itemsize
    return View(
        source,
        library,
        array,
        array.ctypes.data,
        array.shape,
        tuple([stride // size for stride in array.strides]),
        str(array.dtype),
        CPU,
    )


def _view_jax(array: Any, name: str) -> View:
    from jax.core import Tracer

    if isinstance(array, Tracer):
        raise TypeError(
            f"{name} is a JAX tracer, which has a shape and no numbers: a kernel that is launched "
            "from Python can't be part of jax.jit, jax.grad or jax.vmap. Call it outside of them, "
            "on arrays; what comes before and after it may be jitted."
        )
    if array.is_deleted():
        raise ValueError(f"{name} is a JAX array that was deleted or donated.")
    devices = array.devices()
    if len(devices) != 1:
        raise TypeError(
            f"{name} must be a JAX array on one device, but it is on {len(devices)} devices."
        )
    if next(iter(devices)).platform in ("gpu", "cuda"):
        return _view_cupy(_cupy_from_dlpack(array, name), "jax", array)
    strides: list[int] = []
    step = 1
    for extent in reversed(array.shape):
        strides.insert(0, step)
        step *= extent
    return View(array, "jax", array, 0, array.shape, tuple(strides), str(array.dtype), CPU)


def _view_dlpack(array: Any, name: str) -> View:
    kind = int(array.__dlpack_device__()[0])
    if kind == 2:
        return _view_cupy(_cupy_from_dlpack(array, name), "dlpack", array)
    if kind in (1, 3):
        try:
            return _view_numpy(np.from_dlpack(array), "dlpack", array)
        except (TypeError, BufferError, RuntimeError) as error:
            hint = (
                " NumPy takes no bfloat16 over DLPack: pass a torch tensor, a JAX array, or a "
                "NumPy array whose dtype is the bfloat16 of the package ml_dtypes."
            )
            raise _not_taken(array, name, error, hint) from error
    raise TypeError(f"{name} lives on DLPack device type {kind}; CPU and CUDA arrays are taken.")


def _cupy_from_dlpack(array: Any, name: str) -> Any:
    try:
        import cupy
    except ImportError:
        raise TypeError(
            f"{name} is a {type(array).__name__} on a GPU, which reaches the kernels through CuPy, "
            "and CuPy is not installed: pip install 'flashmla_rtc[cu13]' (or [cu12] for CUDA 12)."
        ) from None
    try:
        with cupy.cuda.Device(int(array.__dlpack_device__()[1])):
            return cupy.from_dlpack(array)
    except (TypeError, BufferError, RuntimeError) as error:
        hint = " CuPy needs the package ml_dtypes and NumPy >= 2.1.2 for bfloat16."
        raise _not_taken(array, name, error, hint) from error


def _not_taken(array: Any, name: str, error: Exception, about_bfloat16: str) -> TypeError:
    said = f"{getattr(array, 'dtype', '')} {error}".lower()
    hint = about_bfloat16 if "bfloat16" in said or "unsupported dtype" in said else ""
    return TypeError(f"{name} could not be taken over DLPack: {str(error).rstrip('.')}.{hint}")


def empty(like: View, shape: tuple[int, ...], dtype: str) -> Any:
    """A new C-contiguous array on ``like``'s device, of its native kind, uninitialised."""
    if like.library == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.source.device)
    if like.device.type == "cuda":
        import cupy

        with cupy.cuda.Device(like.device.index):
            return cupy.empty(shape, dtype=_numpy_dtype(dtype))
    return np.empty(shape, dtype=_numpy_dtype(dtype))


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError(
                "bfloat16 arrays outside torch need the package ml_dtypes: pip install ml_dtypes."
            ) from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def from_native(like: View, native: Any) -> Any:
    """``native``, which :func:`empty` or array code made for ``like``, in the caller's library."""
    if like.library == "jax" and like.device.type == "cuda":
        import jax

        return jax.dlpack.from_dlpack(native)
    if like.library == "dlpack":
        namespace = getattr(like.source, "__array_namespace__", None)
        if namespace is not None and hasattr(namespace(), "from_dlpack"):
            return namespace().from_dlpack(native)
    return native


# Arrays in use by work on a stream that their library does not know of, and the event at its end,
# by device and stream.
_in_flight: dict[tuple[int, int], deque[tuple[Any, tuple[View, ...]]]] = {}
_in_flight_lock = threading.Lock()


def keep_until_done(stream: int, *views: View) -> None:
    """Keep arrays of JAX and others alive until ``stream`` has done what was launched on it.

    torch and CuPy reuse memory in the order of the caller's stream, so their arrays may be dropped
    as soon as a call returns. JAX orders its memory by streams of its own.
    """
    if views[0].library not in ("jax", "dlpack"):
        return
    import cupy

    index = views[0].device.index
    with cupy.cuda.Device(index), _in_flight_lock:
        event = cupy.cuda.Event(block=False, disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, stream)
        waiting = _in_flight.setdefault((index, stream), deque())
        while waiting and waiting[0][0].done:
            waiting.popleft()
        waiting.append((event, views))


def wait_and_let_go() -> None:
    """Wait until what :func:`keep_until_done` keeps is used no more, and keep it no more."""
    with _in_flight_lock:
        for waiting in _in_flight.values():
            while waiting:
                waiting[0][0].synchronize()
                waiting.popleft()


def current_stream(like: View) -> int:
    """The handle of the current stream of ``like``'s device, as ``like``'s library has it."""
    index = like.device.index
    if like.library == "torch":
        import torch

        return torch._C._cuda_getCurrentRawStream(index)
    import cupy

    with cupy.cuda.Device(index):
        return cupy.cuda.get_current_stream().ptr


def pointer(array: Any) -> int:
    """The address of element 0 of an array that :func:`empty` made on a GPU."""
    return array.data_ptr() if hasattr(array, "data_ptr") else array.data.ptr


def to_numpy(like: View) -> np.ndarray:
    """The contents of an integer array as a NumPy array; waits for its device."""
    native = like.native
    if like.library == "torch":
        return native.detach().cpu().numpy()  # type: ignore[no-any-return]
    if like.device.type == "cuda":
        return native.get()  # type: ignore[no-any-return]
    return np.asarray(native)


def from_numpy(like: View, values: np.ndarray) -> Any:
    """``values`` as an array of ``like``'s library on ``like``'s device."""
    if like.library == "torch":
        import torch

        return torch.from_numpy(values).to(like.source.device)
    if like.library == "jax":
        import jax.numpy

        return jax.numpy.asarray(values)
    if like.device.type == "cuda":
        import cupy

        with cupy.cuda.Device(like.device.index):
            return from_native(like, cupy.asarray(values))
    return from_native(like, values)
