"""What a failed check says: functions that build the exception and are called by bad input only."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from .arrays import Device, View


def any_of(names: Iterable[str]) -> str:
    """("a", "b", "c") -> "a, b or c"."""
    *front, last = names
    return f"{', '.join(front)} or {last}" if front else last


def kind(value: Any) -> str:
    """``value`` for a message: its type, and itself where that is short."""
    shown = repr(value)
    name = type(value).__name__
    return f"{shown} ({name})" if len(shown) <= 40 and "\n" not in shown else f"of type {name}"


def integer(value: Any, name: str) -> int:
    """``value`` as int, for what is not one already. A bool is no integer here.

    Raises:
        TypeError: it has no exact integer value.
    """
    if type(value).__name__ not in ("bool", "bool_") and getattr(value, "ndim", 0) == 0:
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, but it is {kind(value)}.")


def mixed_libraries(q: View, **others: View) -> TypeError:
    name, other = next((n, v) for n, v in others.items() if v.library != q.library)
    return TypeError(
        f"{name} must be an array of q's library, but q is a {q.library} array and {name} is a "
        f"{other.library} array; convert one of them, for example with from_dlpack."
    )


def wrong_device(device: Device, **arrays: View) -> ValueError:
    name, array = next((n, a) for n, a in arrays.items() if a.device != device)
    return ValueError(f"{name} must be on q's device {device}, but it is on {array.device}.")


def wrong_rank(name: str, array: View, rank: int, axes: str) -> ValueError:
    plural = "dimension" if rank == 1 else "dimensions"
    return ValueError(
        f"{name} must have {rank} {plural} {axes}, but it has {len(array.shape)} (shape "
        f"{array.shape})."
    )


def empty_axis(name: str, array: View, axes: str, at_least_one: str) -> ValueError:
    return ValueError(
        f"{name} {axes} must have {at_least_one} of at least 1, but its shape is {array.shape}."
    )


def wrong_batch(name: str, array: View, axes: str, q: View) -> ValueError:
    return ValueError(
        f"{name} {axes} must have q's batch of {q.shape[0]}, but its shape is {array.shape}."
    )


def wrong_stride(name: str, array: View, *, whole: bool = False) -> ValueError:
    need = "be contiguous" if whole else "be contiguous along its last axis (stride 1)"
    return ValueError(
        f"{name} must {need}, but its strides are {array.strides} elements for shape {array.shape}."
    )


def not_int32(name: str, array: View) -> TypeError:
    convert = "to(torch.int32)" if array.library == "torch" else 'astype("int32")'
    return TypeError(
        f"{name} must have dtype int32, but its dtype is {array.dtype}. Convert it: "
        f"{name}.{convert}."
    )


def cache_dtype(q: View, k_cache: View) -> TypeError | NotImplementedError:
    if k_cache.dtype == "uint8" or k_cache.dtype.startswith("float8"):
        return NotImplementedError(
            f"k_cache of dtype {k_cache.dtype} is an fp8 KV cache, which is not supported yet; "
            f"k_cache must have q's dtype {q.dtype}."
        )
    return TypeError(f"k_cache must have q's dtype {q.dtype}, but its dtype is {k_cache.dtype}.")


def unaligned(name: str, array: View) -> ValueError:
    return ValueError(
        f"{name} must start at a multiple of 16 bytes, but it starts at address "
        f"{array.pointer:#x}; a slice that starts elsewhere has to be copied first."
    )


def untiled_strides(k_cache: View) -> ValueError:
    return ValueError(
        "k_cache must have strides that are non-negative multiples of 8 elements (16 bytes) and "
        "below 2^40 bytes on every axis but the last, to be read by TMA, but its strides are "
        f"{k_cache.strides} elements for shape {k_cache.shape}."
    )


def unsupported(name: str, feature: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} is not supported yet: {feature} has no kernel here; leave {name} at None."
    )
