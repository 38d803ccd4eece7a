"""The time of one decode shape, with the kernels in use: what ``bench`` measures, for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Pool, own_calls
from .report import make_row
from .shapes import Shape
from .timing import GraphTimer, Timer, Timing

# To guess how many calls fill a graph: TB/s, TFLOPS, and seconds that any launch takes.
_READ, _MATMUL, _LAUNCH = 3.0, 700.0, 8e-6


@dataclass(frozen=True)
class DecodeTime:
    """What a shape took. ``row``: as in the documents of ``bench --json``, without peers.

    seconds: of a call, in a burst at full clock. held_seconds: back to back until the clock has
    settled at the power limit, or None.
    """

    shape: Shape
    device: str
    seconds: float
    held_seconds: float | None
    row: dict[str, Any]

    @property
    def tflops(self) -> float:
        """10^12 floating-point operations a second, in a burst; a causal mask is not subtracted."""
        return self.shape.flops / self.seconds / 1e12

    @property
    def gbps(self) -> float:
        """10^9 bytes of keys, queries and output a second, in a burst, each counted once."""
        return self.shape.bytes / self.seconds / 1e9

    def __str__(self) -> str:
        held = f", held {self.held_seconds * 1e6:.1f}" if self.held_seconds else ""
        return (
            f"{self.shape.label} on {self.device}: {self.seconds * 1e6:.1f}{held} µs, "
            f"{self.tflops:.0f} TFLOPS, {self.gbps:.0f} GB/s"
        )


def time_decode(
    batch: int,
    keys: int,
    heads_q: int = 128,
    seq_len_q: int = 1,
    *,
    ragged: bool = False,
    dtype: str = "bfloat16",
    held: float | None = None,
) -> DecodeTime:
    """Time a decode call on torch's current CUDA device, with the kernels that are in use.

    Calls are captured in a CUDA graph over copies of the inputs that exceed the L2 cache, planned
    once outside; the time is the median of bursts (docs/performance.md). It takes a second or so.

    Args:
        batch: requests. keys: of each, or in the mean if ``ragged``. heads_q: query heads over one
            KV head. seq_len_q: queries of each request.
        ragged: lengths drawn from a normal distribution, the same at every call.
        dtype: "bfloat16" or "float16".
        held: seconds to keep the GPU busy for the held time too.

    Raises:
        ValueError: a number below 1, another dtype.
        RuntimeError: there is no torch or no Hopper GPU, and so no kernel to time.
    """
    numbers = {"batch": batch, "keys": keys, "heads_q": heads_q, "seq_len_q": seq_len_q}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but it is {value}.")
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f'dtype must be "bfloat16" or "float16", but it is {dtype!r}.')
    shape = Shape(batch, seq_len_q, heads_q, keys, ragged, dtype)
    device = _hopper()
    timer: Timer = GraphTimer()
    calls = own_calls(Pool([shape], dtype=dtype).problem(shape))
    recording = timer.record(calls, shape.limit_seconds(_READ, _MATMUL) + _LAUNCH)
    taken: Timing = timer.measure({"own": recording}, held)["own"]
    row = make_row(shape, taken, {}, {}, {})
    return DecodeTime(shape, device, taken.burst, taken.held, row)


def _hopper() -> str:
    """The name of torch's current device, where that runs the kernels."""
    from flashmla_rtc import backends
    from flashmla_rtc.arrays import Device

    try:
        import torch
    except ImportError as error:
        raise RuntimeError(
            f"Timing needs torch with CUDA and a Hopper GPU, and torch can't be imported ({error})."
        ) from None
    if not torch.cuda.is_available():
        raise RuntimeError("Timing needs a Hopper GPU, and torch sees no CUDA device.")
    reason = backends.why_not(Device("cuda", torch.cuda.current_device()))
    if reason is not None:
        raise RuntimeError(f"Timing needs a Hopper GPU and its kernels. {reason}")
    return str(torch.cuda.get_device_name())
