"""Checks of a decode call's arrays; other input is for ``option_checks`` and ``plan_checks``.

The checks look at what the host knows (shapes, strides, dtypes, devices) and never wait for a
device; ``validate_contents``, a debug switch, is the one exception. They run at every call, so the
way of good input is straight-line code, and ``messages`` is entered by bad input only.

TypeError: a thing of the wrong kind (dtype, library, a bool for a number). ValueError: the right
kind with the wrong value (rank, shape, stride, device, head counts). NotImplementedError: a known
request that is not supported here yet. Every message names the argument, what came and what was
expected.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import geometry, messages
from .arrays import View
from .validation import validate_contents, validation_enabled

__all__ = [
    "DecodeShape",
    "check_decode",
    "check_kernel_limits",
    "validate_contents",
    "validation_enabled",
]

DTYPES = ("bfloat16", "float16", "float32", "float64")

KERNEL_DTYPES = ("bfloat16", "float16")

_Q_AXES = "(batch, seq_len_q, heads_q, head_dim)"
_K_AXES = "(num_blocks, page_block_size, heads_k, head_dim)"
_TABLE_AXES = "(batch, max_blocks)"
SEQLENS_AXES = "(batch,)"


class DecodeShape(NamedTuple):
    """The sizes of one decode call, as :func:`check_decode` found them.

    Hashable. (A tuple because one is made per call, and a frozen dataclass takes 1.5 µs to make.)
    """

    batch: int
    seq_len_q: int
    heads_q: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    num_blocks: int
    page_block_size: int
    max_blocks: int
    dtype: str  # of q and k_cache

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key head."""
        return self.heads_q // self.heads_k

    @property
    def rows_per_group(self) -> int:
        """Query rows that attend to the same keys: all queries of all heads of a group."""
        return self.seq_len_q * (self.heads_q // self.heads_k)


def check_decode(
    q: View,
    k_cache: View,
    block_table: View,
    cache_seqlens: View,
    head_dim_v: int,
    out: View | None = None,
    lse: View | None = None,
) -> DecodeShape:
    """Check the arrays of a decode call against each other.

    Batch 0, a cache without pages and a table without columns are legal. What the SM90 kernels
    alone cannot do is the business of :func:`check_kernel_limits`.

    Raises:
        TypeError: a wrong dtype, arrays of several libraries, an ``out`` or ``lse`` of a library
            whose arrays cannot be written, a ``head_dim_v`` that is no integer.
        ValueError: a wrong rank, shape, device or stride, head counts that do not divide, a
            read-only ``out`` or ``lse``.
        NotImplementedError: an fp8 ``k_cache``.
    """
    library = q.library
    if (
        k_cache.library != library
        or block_table.library != library
        or cache_seqlens.library != library
    ):
        raise messages.mixed_libraries(
            q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens
        )

    if len(q.shape) != 4:
        raise messages.wrong_rank("q", q, 4, _Q_AXES)
    if len(k_cache.shape) != 4:
        raise messages.wrong_rank("k_cache", k_cache, 4, _K_AXES)
    if len(block_table.shape) != 2:
        raise messages.wrong_rank("block_table", block_table, 2, _TABLE_AXES)
    if len(cache_seqlens.shape) != 1:
        raise messages.wrong_rank("cache_seqlens", cache_seqlens, 1, SEQLENS_AXES)

    dtype = q.dtype
    if dtype not in DTYPES:
        raise TypeError(f"q must have dtype {messages.any_of(DTYPES)}, but its dtype is {dtype}.")
    if k_cache.dtype != dtype:
        raise messages.cache_dtype(q, k_cache)
    if block_table.dtype != "int32":
        raise messages.not_int32("block_table", block_table)
    if cache_seqlens.dtype != "int32":
        raise messages.not_int32("cache_seqlens", cache_seqlens)

    device = q.device
    if k_cache.device != device or block_table.device != device or cache_seqlens.device != device:
        raise messages.wrong_device(
            device, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens
        )

    batch, seq_len_q, heads_q, head_dim = q.shape
    num_blocks, page_block_size, heads_k, key_dim = k_cache.shape
    if seq_len_q < 1 or heads_q < 1 or head_dim < 1:
        raise messages.empty_axis("q", q, _Q_AXES, "seq_len_q, heads_q and head_dim")
    if page_block_size < 1 or heads_k < 1:
        raise messages.empty_axis("k_cache", k_cache, _K_AXES, "page_block_size and heads_k")
    if key_dim != head_dim:
        raise ValueError(
            f"k_cache must have q's head_dim, but k_cache has {key_dim} (shape {k_cache.shape}) "
            f"and q has {head_dim} (shape {q.shape})."
        )
    if heads_q % heads_k:
        raise ValueError(
            f"q's heads_q must be a multiple of k_cache's heads_k, but heads_q is {heads_q} "
            f"and heads_k is {heads_k}."
        )
    table_batch, max_blocks = block_table.shape
    if table_batch != batch:
        raise messages.wrong_batch("block_table", block_table, _TABLE_AXES, q)
    if cache_seqlens.shape[0] != batch:
        raise messages.wrong_batch("cache_seqlens", cache_seqlens, SEQLENS_AXES, q)
    if type(head_dim_v) is not int:
        head_dim_v = messages.integer(head_dim_v, "head_dim_v")
    if not 1 <= head_dim_v <= head_dim:
        raise ValueError(
            f"head_dim_v must be between 1 and head_dim ({head_dim}), but it is {head_dim_v}."
        )

    # The stride of an axis with one element says nothing, nor do those of an array without any, so
    # they are not looked at.
    if q.strides[3] != 1 and head_dim > 1 and 0 not in q.shape:
        raise messages.wrong_stride("q", q)
    if k_cache.strides[3] != 1 and head_dim > 1 and 0 not in k_cache.shape:
        raise messages.wrong_stride("k_cache", k_cache)
    if block_table.strides[1] != 1 and max_blocks > 1 and batch > 0:
        raise messages.wrong_stride("block_table", block_table)
    if cache_seqlens.strides[0] != 1 and batch > 1:
        raise messages.wrong_stride("cache_seqlens", cache_seqlens)

    if out is not None:
        out_axes = "(batch, seq_len_q, heads_q, head_dim_v)"
        _check_result("out", out, q, (batch, seq_len_q, heads_q, head_dim_v), out_axes, dtype)
        if out.strides[3] != 1 and head_dim_v > 1 and batch > 0:
            raise messages.wrong_stride("out", out)
    if lse is not None:
        lse_axes = "(batch, heads_q, seq_len_q)"
        _check_result("lse", lse, q, (batch, heads_q, seq_len_q), lse_axes, "float32")

    return DecodeShape(
        batch,
        seq_len_q,
        heads_q,
        heads_k,
        head_dim,
        head_dim_v,
        num_blocks,
        page_block_size,
        max_blocks,
        dtype,
    )


def _check_result(
    name: str, result: View, q: View, shape: tuple[int, ...], axes: str, dtype: str
) -> None:
    """An array to write to: ``out`` or ``lse``."""
    if result.library != q.library:
        raise TypeError(
            f"{name} must be an array of q's library, but q is a {q.library} array and {name} is a "
            f"{result.library} array."
        )
    if result.library == "jax":
        raise TypeError(
            f"{name} is a JAX array, which is immutable and cannot be written to; leave {name} out "
            "and take the array that is returned."
        )
    if result.dtype != dtype:
        like = f"q's dtype {dtype}" if name == "out" else f"dtype {dtype}"
        raise TypeError(f"{name} must have {like}, but its dtype is {result.dtype}.")
    if result.shape != shape:
        raise ValueError(
            f"{name} must have shape {axes} = {shape}, but its shape is {result.shape}."
        )
    if result.device != q.device:
        raise messages.wrong_device(q.device, **{name: result})
    if (
        0 in result.strides
        and 0 not in shape
        and any(
            stride == 0 and extent > 1 for stride, extent in zip(result.strides, shape, strict=True)
        )
    ):
        raise ValueError(
            f"{name} must give each element its own place in memory, but an axis longer than 1 has "
            f"stride 0 (shape {shape}, strides {result.strides}), as from expand or broadcast_to."
        )
    native = result.native
    if isinstance(native, np.ndarray) and not native.flags.writeable:
        raise ValueError(f"{name} must be writable, but it is a read-only array.")


def check_kernel_limits(shape: DecodeShape, q: View, k_cache: View) -> None:
    """Check what only the SM90 kernels restrict.

    Raises:
        NotImplementedError: a geometry or dtype that no kernel is compiled for.
        ValueError: a k_cache whose layout the TMA unit cannot read.
    """
    if shape.dtype not in KERNEL_DTYPES:
        raise NotImplementedError(
            f"q and k_cache of dtype {shape.dtype} are not supported by the SM90 kernels, which "
            f"take {messages.any_of(KERNEL_DTYPES)}."
        )
    if shape.head_dim != geometry.HEAD_DIM:
        raise NotImplementedError(
            f"head_dim {shape.head_dim} (the last axis of q and k_cache) is not supported by the "
            f"SM90 kernels, which take head_dim {geometry.HEAD_DIM}."
        )
    if shape.head_dim_v != geometry.HEAD_DIM_V:
        raise NotImplementedError(
            f"head_dim_v {shape.head_dim_v} is not supported by the SM90 kernels, which take "
            f"head_dim_v {geometry.HEAD_DIM_V}."
        )
    if shape.page_block_size != geometry.PAGE_BLOCK_SIZE:
        raise NotImplementedError(
            f"page_block_size {shape.page_block_size} (axis 1 of k_cache) is not supported by the "
            f"SM90 kernels, which take pages of {geometry.PAGE_BLOCK_SIZE} keys."
        )
    if shape.num_blocks == 0:
        return
    if k_cache.pointer & 15:
        raise messages.unaligned("k_cache", k_cache)
    pages, _, heads, _ = k_cache.shape
    page_stride, key_stride, head_stride, _ = k_cache.strides
    # Both dtypes take two bytes, and TMA takes strides that are multiples of 16 bytes below 2^40.
    if (
        key_stride & 7
        or not 0 <= key_stride < 1 << 39
        or (pages > 1 and (page_stride & 7 or not 0 <= page_stride < 1 << 39))
        or (heads > 1 and (head_stride & 7 or not 0 <= head_stride < 1 << 39))
    ):
        raise messages.untiled_strides(k_cache)
