"""One decode call in arrays of other libraries, and its results compared bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from problem import HEAD_DIM_V, Problem, make

import flashmla_rtc

LENGTHS = [1000, 0, 64, 5000, 65]
CYCLES = 100_000_000  # about 60 ms


def problem(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Problem:
    return make(LENGTHS, seq_len_q=2, dtype=dtype, causal=True, seed=seed)


def tensors(call: Problem) -> tuple[torch.Tensor, ...]:
    return call.q, call.k_cache, call.block_table, call.cache_seqlens


def decode(arrays: tuple[Any, ...], **changes: Any) -> tuple[Any, Any]:
    """Plan and decode with arrays of any library."""
    plan = flashmla_rtc.get_mla_metadata(arrays[3], 2 * 16, 1)
    result: tuple[Any, Any] = flashmla_rtc.flash_mla_with_kvcache(
        *arrays, HEAD_DIM_V, *plan, causal=True, **changes
    )
    return result


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def assert_torch_bits(result: tuple[np.ndarray, np.ndarray], expected: Any) -> None:
    """Results brought to NumPy are those that torch tensors got, bit by bit."""
    for array, tensor in zip(result, expected, strict=True):
        integer = torch.int16 if tensor.element_size() == 2 else torch.int32
        true = tensor.contiguous().view(integer).cpu().numpy()
        assert np.array_equal(bits(np.ascontiguousarray(array)), bits(true))


def raw(array: Any) -> Any:
    """The bits of a CuPy array, for copies that need not know its dtype."""
    return array.view(f"uint{8 * array.itemsize}")


def to_cupy(cupy: Any, call: Problem) -> tuple[Any, ...]:
    """Copies, so that CuPy owns them."""
    torch.cuda.synchronize()
    copies = tuple(cupy.from_dlpack(tensor).copy() for tensor in tensors(call))
    cupy.cuda.Device().synchronize()
    return copies


class Boxed:
    """An array that only speaks DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def to_jax(jax: Any, call: Problem) -> tuple[Any, ...]:
    """JAX arrays with memory of their own."""
    torch.cuda.synchronize()
    copies = []
    for tensor in tensors(call):
        if tensor.dtype is torch.bfloat16:
            host = tensor.view(torch.int16).cpu().numpy().view(jax.numpy.bfloat16)
        else:
            host = tensor.cpu().numpy()
        copies.append(jax.numpy.asarray(host))
    return tuple(copies)
