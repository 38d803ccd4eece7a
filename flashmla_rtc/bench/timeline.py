"""What each thread block of one decode call did when, from clocks inside the kernel.

``record`` compiles a variant of the decode kernel that keeps a log
(``kernels/mla_decode_trace.cuh``) and runs it once. Keeping it takes time, so the picture shows
where time goes, and ``bench`` says how much it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from .problem import Pool, own_calls
from .shapes import Shape

EVENTS = 128  # a role; later ones are not kept
ROLES = ("left", "right", "loader", "left merging", "right merging", "scorer")
KINDS = (
    "none",
    "start",
    "q",
    "scores",
    "p",
    "output",
    "sums",
    "written",
    "fetched",
    "free",
    "issued",
)
_CYCLE_BITS, _KIND_BITS = 26, 6


def decode_log(log: npt.NDArray[np.uint64]) -> list[dict[str, Any]]:
    """The events of every thread block that left any, in microseconds since the first of all.

    Returns one ``{"block", "roles": {role: [[kind, microseconds], ...]}}`` each. Events that carry
    cycles only are placed between those of their role that carry the device's time as well, or
    behind the last of these at the rate that the block's longest role knows.
    """
    events = log.reshape(-1, len(ROLES), EVENTS)
    kinds = (events & ((1 << _KIND_BITS) - 1)).astype(np.int64)
    cycles = ((events >> _KIND_BITS) & ((1 << _CYCLE_BITS) - 1)).astype(np.int64)
    nanoseconds = (events >> 32).astype(np.int64)
    used = kinds[:, :, 0] > 0
    if not used.any():
        return []
    first = int(nanoseconds[used][:, 0].min())
    blocks = []
    for block in np.flatnonzero(used.any(axis=1)).tolist():
        counts = (kinds[block] > 0).sum(axis=1).tolist()
        clocks = [
            (nanoseconds[block, number, :count], _elapsed(cycles[block, number, :count]))
            for number, count in enumerate(counts)
        ]
        rate = max((_span(*clock) for clock in clocks), key=lambda span: span[0])[1]
        roles = {}
        for number, role in enumerate(ROLES):
            count = counts[number]
            if count:
                times = _times(*clocks[number], rate)
                names = [KINDS[kind] for kind in kinds[block, number, :count].tolist()]
                roles[role] = [
                    [name, round((time - first) / 1e3, 3)]
                    for name, time in zip(names, times.tolist(), strict=True)
                ]
        blocks.append({"block": block, "roles": roles})
    return blocks


def _elapsed(cycles: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Cycles since the first event, of counters that wrap."""
    return np.concatenate([[0], np.cumsum(np.diff(cycles) % (1 << _CYCLE_BITS))])


def _span(nanoseconds: npt.NDArray[np.int64], elapsed: npt.NDArray[np.int64]) -> tuple[int, float]:
    """Cycles between the first and the last event with the device's time, and ns a cycle there."""
    known = np.flatnonzero(nanoseconds)
    span = int(elapsed[known[-1]] - elapsed[known[0]]) if len(known) else 0
    if span <= 0:
        return 0, 1 / 1.7
    return span, float(nanoseconds[known[-1]] - nanoseconds[known[0]]) / span


def _times(
    nanoseconds: npt.NDArray[np.int64], elapsed: npt.NDArray[np.int64], rate: float
) -> npt.NDArray[np.float64]:
    """Nanoseconds of all events: as read, or from the cycle counter between and after those."""
    known = np.flatnonzero(nanoseconds)
    times = np.interp(elapsed, elapsed[known], nanoseconds[known].astype(np.float64))
    last = known[-1]
    times[last:] = nanoseconds[last] + (elapsed[last:] - elapsed[last]) * rate
    return times


def record(shape: Shape) -> dict[str, Any]:
    """Run ``shape`` once on torch's current CUDA device with a kernel that keeps a log.

    Returns ``{"device", "digest", "shape", "blocks"}``, the blocks from :func:`decode_log`.

    Raises:
        CompileError, CompilerMissing, DriverError: the kernel can't be compiled or loaded.
    """
    import torch

    from flashmla_rtc import overrides, variants
    from flashmla_rtc.rtc.kernel import call, device_facts

    index = torch.cuda.current_device()
    name = variants.decode_name(shape.dtype, shape.seq_len_q * shape.heads_q, plain=True)
    traced = variants.by_name(name).but(f"{name}_traced", TRACE_EVENTS=EVENTS)
    calls = own_calls(Pool([shape], dtype=shape.dtype).problem(shape))
    with overrides.standing_in(traced, name, index) as kernel:
        for warm_up in calls[:3]:
            warm_up()
        torch.cuda.synchronize()
        address, size = kernel.symbol("trace_log")
        call("cuMemsetD8", address, 0, size)
        calls[-1]()
        torch.cuda.synchronize()
        log = np.zeros(size // 8, np.uint64)
        call("cuMemcpyDtoH", log.ctypes.data, address, size)
    return {
        "device": device_facts(index).name,
        "digest": variants.sources_digest(),
        "shape": dataclasses.asdict(shape),
        "blocks": decode_log(log),
    }
