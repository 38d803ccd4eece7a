"""Checks of a decode call's numbers and flags, and of what it asks for that is not there."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from . import messages

__all__ = ["check_flag", "check_scale", "reject_unsupported"]

# The kernels' running maximum starts at -1e30, and its product with the scale is a float32.
_LARGEST_SCALE = 1e8


def check_scale(softmax_scale: Any, head_dim: int) -> float:
    """The factor on the scores: ``softmax_scale``, or ``head_dim ** -0.5`` when it is None.

    Raises:
        TypeError: not a real number. A bool is refused: it is ``causal``, one position too early.
        ValueError: negative, NaN, or not finite in float32.
    """
    if softmax_scale is None:
        return float(head_dim**-0.5)
    if type(softmax_scale) is not float:
        if isinstance(softmax_scale, (bool, np.bool_)):
            raise TypeError(
                f"softmax_scale must be a real number or None, but it is {softmax_scale} (a bool). "
                f"If it was meant for causal, write causal={softmax_scale}: softmax_scale comes "
                "before causal in the order of arguments."
            )
        if not isinstance(softmax_scale, numbers.Real):
            raise TypeError(
                "softmax_scale must be a real number (Python or NumPy) or None, but it is "
                f"{messages.kind(softmax_scale)}."
            )
    try:
        scale = float(softmax_scale)
    except OverflowError:
        scale = float("inf")
    if not 0.0 <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"softmax_scale must be finite, at least 0 and at most 1e8, but it is {scale!r}."
        )
    return scale


def check_flag(value: Any, name: str) -> bool:
    """A flag such as ``causal``, as a bool.

    Raises:
        TypeError: neither bool nor numpy.bool_.
    """
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, but it is {messages.kind(value)}.")


def reject_unsupported(
    *,
    is_fp8_kvcache: Any,
    indices: Any,
    attn_sink: Any,
    extra_k_cache: Any,
    extra_indices_in_kvcache: Any,
    topk_length: Any,
    extra_topk_length: Any,
) -> None:
    """Refuse what the signature of FlashMLA has and this package does not support yet.

    Raises:
        NotImplementedError: an argument that asks for it, by its name.
        TypeError: ``is_fp8_kvcache`` is not a bool.
    """
    if is_fp8_kvcache is not False and check_flag(is_fp8_kvcache, "is_fp8_kvcache"):
        raise NotImplementedError(
            "is_fp8_kvcache=True is not supported yet: the fp8 KV cache has no kernel here. Pass a "
            "bfloat16 or float16 k_cache and is_fp8_kvcache=False."
        )
    if indices is not None:
        raise messages.unsupported("indices", "sparse attention")
    if attn_sink is not None:
        raise messages.unsupported("attn_sink", "attention with a sink")
    if extra_k_cache is not None:
        raise messages.unsupported("extra_k_cache", "attention to a second cache")
    if extra_indices_in_kvcache is not None:
        raise messages.unsupported("extra_indices_in_kvcache", "attention to a second cache")
    if topk_length is not None:
        raise messages.unsupported("topk_length", "sparse attention")
    if extra_topk_length is not None:
        raise messages.unsupported("extra_topk_length", "attention to a second cache")
