"""Tensor maps: what the copy engine (TMA) must know of an array, encoded once for each array."""

from __future__ import annotations

import ctypes
import functools

from .kernel import call, driver

BYTES = 128
_DTYPES = {"bfloat16": "BFLOAT16", "float16": "FLOAT16"}


@functools.lru_cache(maxsize=1024)
def tiled_map(
    pointer: int,
    dtype: str,
    extents: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
) -> bytes:
    """The 128 bytes of a tensor map with 128-byte swizzle; outside the extents it reads zeros.

    Args:
        pointer: address of element 0, a multiple of 16.
        dtype: "bfloat16" or "float16".
        extents: elements along each dimension, innermost first.
        strides_bytes: bytes from one index to the next in dimensions 1.., each a multiple of 16
            below 2**40.
        box: elements copied at once along each dimension.

    Raises:
        DriverError: the driver refuses the description.
    """
    cuda = driver()
    rank = len(extents)
    encoded = call(
        "cuTensorMapEncodeTiled",
        getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[dtype]}"),
        rank,
        pointer,
        [cuda.cuuint64_t(extent) for extent in extents],
        [cuda.cuuint64_t(stride) for stride in strides_bytes],
        [cuda.cuuint32_t(extent) for extent in box],
        [cuda.cuuint32_t(1)] * rank,
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(encoded.getPtr(), BYTES)
