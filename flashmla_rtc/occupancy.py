"""How many thread blocks of a kernel an SM holds: asked of the driver, or from Hopper's limits."""

from __future__ import annotations

from typing import NamedTuple

from . import arrays, backends, sm90
from .arrays import Device
from .rtc.kernel import call, device_facts, on_device

# CUDA C++ Programming Guide, "Compute Capabilities", 9.0.
REGISTERS = 65_536  # of an SM, given to warps in units of 256
REGISTER_UNIT = 256
WARPS = 64
BLOCKS = 32
SHARED_BYTES = 228 * 1024  # in units of 128, with a kilobyte of each block for the driver
SHARED_UNIT = 128
RESERVED_BYTES = 1024


class Occupancy(NamedTuple):
    """blocks: thread blocks that an SM holds. found: by whom or from what, for a reader."""

    blocks: int
    found: str


def computed(registers: int, threads: int, shared_bytes: int) -> int:
    """Thread blocks an SM of compute capability 9.0 holds.

    registers: a thread. shared_bytes: static and dynamic together.
    """
    warps = -(-threads // 32)
    registers_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-(shared_bytes + RESERVED_BYTES) // SHARED_UNIT) * SHARED_UNIT
    return min(
        BLOCKS,
        WARPS // warps,
        REGISTERS // (registers_a_warp * warps) if registers else BLOCKS,
        SHARED_BYTES // shared,
    )


def occupancy(
    name: str, device: object, registers: int, threads: int, static: int, dynamic: int
) -> Occupancy:
    """Of the kernel called ``name``, of the sources in use, on ``device`` where that is a Hopper
    GPU; elsewhere what Hopper's limits give.

    static, dynamic: bytes of shared memory.

    Raises TypeError or ValueError if ``device`` is none, DriverError if it can't load the kernel.
    """
    where = arrays.device_named(device)
    reason = backends.why_not(where)
    if reason is not None:
        blocks = computed(registers, threads, static + dynamic)
        return Occupancy(blocks, "computed from the limits of compute capability 9.0")
    return _asked(name, where, threads, dynamic)


def _asked(name: str, where: Device, threads: int, dynamic: int) -> Occupancy:
    with on_device(where.index):
        handle = sm90.launcher(name, where.index).kernel.handle
        blocks = call("cuOccupancyMaxActiveBlocksPerMultiprocessor", handle, threads, dynamic)
    return Occupancy(int(blocks), f"by the driver for {device_facts(where.index).name}")
