"""Memory for partial results, kept per device and stream and used again by every call on it."""

from __future__ import annotations

import threading
from typing import Any

from . import arrays, geometry
from .arrays import View
from .rtc.kernel import allowed_while_capturing

_lock = threading.Lock()
_kept: dict[tuple[str, int, int], tuple[Any, Any]] = {}
# Captured graphs outside torch: their memory must outlive them, and nothing says when they end.
_captured: list[tuple[Any, Any]] = []


def pieces(num_sms: int) -> int:
    """Rows of partial results that any call on a device with ``num_sms`` SMs can need.

    A plan of p parts has 2 p slots of ``heads_k * rows`` rows, and p * heads_k * ceil(rows / 64)
    never exceeds the SMs when p > 1.
    """
    return 2 * num_sms * geometry.BLOCK_ROWS


def partials(like: View, num_sms: int, stream: int, capturing: bool) -> tuple[int, int, Any]:
    """Addresses of ``partial_out`` and ``partial_lse`` for a call on ``stream``, and their owner.

    Eager calls on one stream share one workspace: they run one after the other. While a torch
    stream is captured, memory comes from the graph's own pool. A captured graph of any other
    library gets memory that is kept for the life of the process, since the graph may be replayed at
    any time, beside anything.
    """
    library = "torch" if like.library == "torch" else "cupy"
    key = (library, like.device.index, stream)
    kept = None if capturing else _kept.get(key)
    if kept is None:
        if library == "torch":
            kept = _allocate(like, pieces(num_sms))
        else:
            with allowed_while_capturing():
                kept = _allocate(like, pieces(num_sms))
        if not capturing:
            with _lock:
                kept = _kept.setdefault(key, kept)
        elif library != "torch":
            _captured.append(kept)
    out, lse = kept
    if library == "torch":
        return out.data_ptr(), lse.data_ptr(), kept
    return out.data.ptr, lse.data.ptr, kept


def _allocate(like: View, rows: int) -> tuple[Any, Any]:
    return (
        arrays.empty(like, (rows, geometry.HEAD_DIM_V), "float32"),
        arrays.empty(like, (rows,), "float32"),
    )
