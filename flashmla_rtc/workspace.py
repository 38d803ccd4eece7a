"""Memory for pieces of cut requests, kept per device and stream and used again by every call on it.

It is zero at first, and what a call leaves there tells the next what is new
(``kernels/mla_decode_partial.cuh``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import arrays, geometry, torch_modes
from .arrays import View
from .rtc.kernel import allowed_while_capturing, call, driver, on_device


@dataclass(frozen=True, slots=True)
class Workspace:
    """Address and bytes of a workspace, and the array that it belongs to (None: to the process)."""

    address: int
    size: int
    owner: Any


@dataclass(frozen=True, slots=True)
class Layout:
    """How a call divides its workspace: ``size`` bytes, the strips from byte ``partials`` on.

    Calls of one ``kind`` give every byte the same meaning, whatever their plans, and can share one.
    """

    kind: tuple[int, bool]
    partials: int
    size: int


NOTHING = Workspace(0, 0, None)
"""For a plan of one part, which cuts nothing."""

_lock = threading.Lock()
_PER_THREAD = 2
_Key = tuple[str, int, int, int, tuple[int, bool], int]
# By library, device, stream, thread where that matters, kind, and capture (0: eager calls).
_kept: dict[_Key, Workspace] = {}
# What graphs of libraries without memory pools of their own for graphs use again.
_captured: list[Any] = []


def layout(num_sms: int, rows_per_group: int, dtype: str) -> Layout:
    """For calls with these rows: states of tiles, then their strips.

    A plan of p parts has 2 p tiles for each KV head and block of 64 rows, and p * heads_k *
    ceil(rows / 64) never exceeds the SMs when p > 1.
    """
    tiles = 2 * num_sms
    strips = min(-(-rows_per_group // 16) * 2, geometry.TILE_STRIPS)
    in_halves = geometry.kept_in_halves(dtype, rows_per_group)
    lines = geometry.STRIP_LINES // 2 if in_halves else geometry.STRIP_LINES
    strip_bytes = lines * geometry.LINE_BYTES + geometry.STRIP_WEIGHTS_BYTES
    states = tiles * geometry.TILE_STATE_BYTES
    return Layout((strips, in_halves), states, states + tiles * strips * strip_bytes)


def room(like: View, places: Layout, stream: int, capture: int) -> Workspace:
    """The workspace for a call on ``stream``.

    Eager calls on one stream (``capture`` 0) share one: they run one after the other. So do the
    calls that one stream captures. What torch captures lies in the graph's own pool, and the graph
    sets it to zero at every replay, since others may use the pool in between; what others share is
    kept for the life of the process. So is that of the graphs of ``torch.compile``: they run one
    after the other and let nobody keep memory of their pool.
    """
    library = "torch" if like.library == "torch" else "other"
    lasts = library == "other"
    if not lasts and torch_modes.records_graphs_on(stream, like.device.index):
        lasts, capture = True, 0
    # The per-thread default stream has one handle for as many streams as there are threads.
    thread = threading.get_ident() if stream == _PER_THREAD else 0
    key = (library, like.device.index, stream, thread, places.kind, capture)
    found = _kept.get(key)
    if found is None:
        make = _lasting if lasts else _from_torch
        made = make(like, places.size, stream)
        with _lock:
            found = _kept.setdefault(key, made)
            if library == "torch" and capture:  # this stream's earlier captures are over
                for old in [k for k in _kept if k[:4] == key[:4] and k[5] not in (0, capture)]:
                    del _kept[old]
    return found


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


def _from_torch(like: View, size: int, stream: int) -> Workspace:
    array = arrays.empty(like, (size,), "uint8")
    address = arrays.pointer(array)
    call("cuMemsetD8Async", address, 0, size, stream)
    return Workspace(address, size, array)


def _lasting(like: View, size: int, _: int) -> Workspace:
    """Memory that is never given back, outside of any pool and of a graph that is captured."""
    device = like.device.index
    with on_device(device), allowed_while_capturing(), _private_stream() as stream:
        address = int(call("cuMemAlloc", size))
        call("cuMemsetD8Async", address, 0, size, stream)
        call("cuStreamSynchronize", stream)
    return Workspace(address, size, None)


@contextmanager
def _private_stream() -> Iterator[Any]:
    """A stream that waits for no other: the caller's may be under capture."""
    stream = call("cuStreamCreate", int(driver().CUstream_flags.CU_STREAM_NON_BLOCKING))
    try:
        yield stream
    finally:
        call("cuStreamDestroy", stream)
