"""How many thread blocks an SM holds: computed from Hopper's limits, or asked of the driver."""

from __future__ import annotations

import contextlib

import pytest

from flashmla_rtc import occupancy
from flashmla_rtc.inspection import inspect_kernel
from flashmla_rtc.rtc import CompilerMissing, nvrtc_version

SCHEDULE = "mla_schedule"

try:
    nvrtc_version()
except CompilerMissing as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [
        (128, 512, 232_448, 1),  # the decode kernel: all of an SM's registers and shared memory
        (57, 1024, 40_620, 1),  # registers come in eights: 64 · 1024 are all
        (32, 1024, 0, 2),  # warps
        (16, 32, 0, 32),  # thread blocks
        (255, 128, 0, 2),  # 4 warps of 8,192 registers
        (24, 128, 57_344, 4),  # shared memory, of which the driver takes a kilobyte a block
        (24, 128, 57_345, 3),
        (24, 100, 0, 16),  # warps that are not full count whole
    ],
)
def test_occupancy_from_hoppers_limits(
    registers: int, threads: int, shared: int, blocks: int
) -> None:
    assert occupancy.computed(registers, threads, shared) == blocks


def test_without_a_gpu_occupancy_is_computed_and_said_so() -> None:
    kernel = inspect_kernel(SCHEDULE, device="cpu")
    assert kernel.blocks_per_sm == 1
    assert kernel.occupancy_found == "computed from the limits of compute capability 9.0"


def test_on_a_gpu_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def call(name: str, *arguments: object) -> int:
        asked.append((name, *arguments))
        return 7

    class Facts:
        name = "a Hopper GPU"

    class Loaded:
        class kernel:
            handle = "handle"

    monkeypatch.setattr(occupancy.backends, "why_not", lambda where: None)
    monkeypatch.setattr(occupancy, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(occupancy.sm90, "launcher", lambda name, device: Loaded)
    monkeypatch.setattr(occupancy, "call", call)
    monkeypatch.setattr(occupancy, "device_facts", lambda index: Facts)
    kernel = inspect_kernel(SCHEDULE, device=1)
    assert kernel.blocks_per_sm == 7
    assert kernel.occupancy_found == "by the driver for a Hopper GPU"
    assert asked == [("cuOccupancyMaxActiveBlocksPerMultiprocessor", "handle", 1024, 0)]
