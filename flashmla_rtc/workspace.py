"""Memory for partial results, kept per device and stream and used again by every call on it."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

from . import arrays, geometry
from .arrays import View
from .rtc.kernel import allowed_while_capturing, call

_lock = threading.Lock()
# By library, device, stream and capture (0: eager calls).
_kept: dict[tuple[str, int, int, int], tuple[Any, Any]] = {}
# Plans that a graph of a library without memory pools of its own for graphs uses again.
_captured: list[tuple[Any, ...]] = []


def pieces(num_sms: int) -> int:
    """Rows of partial results that any call on a device with ``num_sms`` SMs can need.

    A plan of p parts has 2 p slots of ``heads_k * rows`` rows, and p * heads_k * ceil(rows / 64)
    never exceeds the SMs when p > 1.
    """
    return 2 * num_sms * geometry.BLOCK_ROWS


def partials(like: View, num_sms: int, stream: int, capture: int) -> tuple[int, int, Any]:
    """Addresses of ``partial_out`` and ``partial_lse`` for a call on ``stream``, and their owner.

    Eager calls on one stream (``capture`` 0) share one workspace: they run one after the other.
    While a torch stream is captured, memory comes from the graph's own pool. The calls of a
    captured graph of any other library share a workspace that is kept for the life of the process,
    since the graph may be replayed at any time, beside anything.
    """
    library = "torch" if like.library == "torch" else "cupy"
    if library == "torch" and capture:
        out, lse = kept = _allocate(like, pieces(num_sms))
        return out.data_ptr(), lse.data_ptr(), kept
    key = (library, like.device.index, stream, capture)
    found = _kept.get(key)
    if found is None:
        with allowed_while_capturing() if capture else nullcontext():
            made = _allocate(like, pieces(num_sms))
        with _lock:
            found = _kept.setdefault(key, made)
    out, lse = found
    return arrays.pointer(out), arrays.pointer(lse), found


def keep_while_captured(like: View, stream: int, *made: Any) -> None:
    """Keep arrays made inside a call alive if a graph that is being captured will use them again.

    torch's graphs own the memory that is allocated while they are captured; those of others do not.
    """
    if like.library != "torch" and capture_of(stream):
        _captured.append(made)


def capture_of(stream: int) -> int:
    """The number of the capture that records ``stream`` into a CUDA graph; 0 if there is none.

    Call it with the stream's device current.
    """
    if stream in (0, 1):  # the legacy default stream can't be captured
        return 0
    if call("cuStreamIsCapturing", stream) == 0:
        return 0
    return int(call("cuStreamGetCaptureInfo", stream)[1])


def _allocate(like: View, rows: int) -> tuple[Any, Any]:
    return (
        arrays.empty(like, (rows, geometry.HEAD_DIM_V), "float32"),
        arrays.empty(like, (rows,), "float32"),
    )
