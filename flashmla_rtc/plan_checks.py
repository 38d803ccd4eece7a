"""Checks of plans that a caller brings, and of what a plan is to be made from."""

from __future__ import annotations

from typing import Any

from . import geometry, messages
from .arrays import Device, View
from .checks import SEQLENS_AXES, DecodeShape

__all__ = ["check_counts", "check_metadata", "check_planning"]


def check_metadata(
    metadata: View,
    num_splits: View | None,
    shape: DecodeShape,
    num_sm_parts: int,
    device: Device,
) -> None:
    """Check a plan that the caller made with ``get_mla_metadata`` against the call that uses it.

    A plan for fewer requests than the batch is legal (the rest is padding); the length of
    ``num_splits``, requests + 1, tells for how many.

    Raises:
        TypeError: a dtype other than int32.
        ValueError: a shape that belongs to another device or other head counts; a device, stride
            or alignment.
    """
    if metadata.dtype != "int32":
        raise messages.not_int32("tile_scheduler_metadata", metadata)
    plan = (num_sm_parts, geometry.PLAN_COLUMNS)
    if metadata.shape != plan:
        raise ValueError(
            f"tile_scheduler_metadata must have shape {plan} on {device} with these head counts, "
            f"but its shape is {metadata.shape}. Make it with "
            f"get_mla_metadata(cache_seqlens, {shape.rows_per_group}, {shape.heads_k})."
        )
    if metadata.device != device:
        raise messages.wrong_device(device, tile_scheduler_metadata=metadata)
    if metadata.strides != (geometry.PLAN_COLUMNS, 1) and not (
        num_sm_parts == 1 and metadata.strides[1] == 1
    ):
        raise messages.wrong_stride("tile_scheduler_metadata", metadata, whole=True)
    if metadata.pointer & 15 and device.type == "cuda":  # the kernels read it 16 bytes at a time
        raise messages.unaligned("tile_scheduler_metadata", metadata)
    if num_splits is None:
        return
    if num_splits.dtype != "int32":
        raise messages.not_int32("num_splits", num_splits)
    if len(num_splits.shape) != 1:
        raise messages.wrong_rank("num_splits", num_splits, 1, "(requests + 1,)")
    length = num_splits.shape[0]
    if not 1 <= length <= shape.batch + 1:
        raise ValueError(
            f"num_splits must have between 1 and batch + 1 = {shape.batch + 1} elements, one more "
            f"than the requests that were planned, but it has {length}."
        )
    if num_splits.device != device:
        raise messages.wrong_device(device, num_splits=num_splits)
    if num_splits.strides[0] != 1 and length > 1:
        raise messages.wrong_stride("num_splits", num_splits)


def check_planning(
    cache_seqlens: View,
    num_q_tokens_per_head_k: Any,
    num_heads_k: Any,
    num_heads_q: Any = None,
) -> None:
    """Check the arguments of ``get_mla_metadata``.

    Raises:
        TypeError: cache_seqlens not int32, a count that is no integer.
        ValueError: cache_seqlens not one contiguous axis, a count below 1, head counts that do not
            divide.
    """
    if len(cache_seqlens.shape) != 1:
        raise messages.wrong_rank("cache_seqlens", cache_seqlens, 1, SEQLENS_AXES)
    if cache_seqlens.dtype != "int32":
        raise messages.not_int32("cache_seqlens", cache_seqlens)
    if cache_seqlens.strides[0] != 1 and cache_seqlens.shape[0] > 1:
        raise messages.wrong_stride("cache_seqlens", cache_seqlens)
    check_counts(num_q_tokens_per_head_k, num_heads_k, num_heads_q)


def check_counts(num_q_tokens_per_head_k: Any, num_heads_k: Any, num_heads_q: Any = None) -> None:
    """Check the head counts of a plan.

    Raises:
        TypeError, ValueError: one of them is no integer, or below 1, or they do not divide.
    """
    _check_count(num_q_tokens_per_head_k, "num_q_tokens_per_head_k")
    _check_count(num_heads_k, "num_heads_k")
    if num_heads_q is not None:
        _check_count(num_heads_q, "num_heads_q")
        if num_heads_q % num_heads_k:
            raise ValueError(
                f"num_heads_q must be a multiple of num_heads_k, but num_heads_q is {num_heads_q} "
                f"and num_heads_k is {num_heads_k}."
            )
        if num_q_tokens_per_head_k % (num_heads_q // num_heads_k):
            raise ValueError(
                "num_q_tokens_per_head_k must be a multiple of the query heads a KV head, "
                f"{num_heads_q // num_heads_k}, but it is {num_q_tokens_per_head_k}."
            )


def _check_count(value: Any, name: str) -> None:
    if type(value) is not int:
        value = messages.integer(value, name)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but it is {value}.")
