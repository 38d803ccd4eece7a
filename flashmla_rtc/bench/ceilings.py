"""What the device itself can do, measured in the same process."""

from __future__ import annotations

from .timing import Timer, Timing

READ_BYTES = 2 << 30
MATRIX = 8192


def measure_ceilings(
    timer: Timer, device: str = "cuda", held_seconds: float | None = None
) -> dict[str, float]:
    """``read_TBps`` and ``bf16_matmul_TFLOPS``, both in a burst.

    With ``held_seconds``, also the matrix product held (``bf16_matmul_held_TFLOPS``): it is the
    one that the power limit slows.
    """
    read = _read(timer, device)
    product = _product(timer, device, held_seconds)
    operations = 2.0 * MATRIX**3
    ceilings = {
        "read_TBps": READ_BYTES / read.burst / 1e12,
        "bf16_matmul_TFLOPS": operations / product.burst / 1e12,
    }
    if product.held is not None:
        ceilings["bf16_matmul_held_TFLOPS"] = operations / product.held / 1e12
    return ceilings


def _read(timer: Timer, device: str) -> Timing:
    """The largest of half a billion integers: 2 GiB read, nothing written."""
    import torch

    integers = torch.empty(READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    recording = timer.record([lambda: torch.amax(integers)], 7e-4)
    return timer.measure({"read": recording}, None)["read"]


def _product(timer: Timer, device: str, held_seconds: float | None) -> Timing:
    """cuBLAS on 8192 × 8192 random matrices."""
    import torch

    left, right, product = (
        torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    recording = timer.record([lambda: torch.matmul(left, right, out=product)], 1.5e-3)
    return timer.measure({"product": recording}, held_seconds)["product"]
