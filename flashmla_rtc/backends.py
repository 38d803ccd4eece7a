"""Which backend computes where: the SM90 kernels on Hopper, plain array code everywhere else."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Literal

from .arrays import Device
from .rtc import CompilerMissing, nvrtc_version
from .rtc.kernel import DriverError, device_facts

Backend = Literal["sm90", "reference"]

INSTALL = "pip install 'flashmla_rtc[cu13]' (or 'flashmla_rtc[cu12]' for CUDA 12)"


@functools.cache
def why_not(device: Device) -> str | None:
    """Why the kernels can't run on ``device``, as a sentence; None where they can."""
    if device.type == "cpu":
        return "The array is on the CPU, and the kernels need a Hopper GPU (H100, H200, H800, H20)."
    if device.type != "cuda":
        return f"The array is on {device}, and the kernels need an NVIDIA Hopper GPU."
    try:
        facts = device_facts(device.index)
    except DriverError as error:
        return str(error)
    if facts.capability != (9, 0):
        major, minor = facts.capability
        return (
            f"{device} is an {facts.name} of compute capability {major}.{minor}, and the kernels "
            "are made for Hopper (9.0)."
        )
    try:
        nvrtc_version()
    except CompilerMissing as error:
        return str(error)
    return None


def choose(device: Device) -> Backend:
    """The backend for arrays on ``device``. A GPU that does not get the kernels is told so once, in
    a RuntimeWarning.
    """
    reason = why_not(device)
    if reason is None:
        return "sm90"
    if device.type != "cpu":
        _warn_once(device, reason)
    return "reference"


@functools.cache
def _warn_once(device: Device, reason: str) -> None:
    warnings.warn(
        f"flashmla_rtc computes on {device} with its reference backend, which is correct but slow. "
        f"{reason}",
        RuntimeWarning,
        stacklevel=_frames_to_the_caller(),
    )


def _frames_to_the_caller() -> int:
    """``stacklevel`` of the code outside the package that made this call."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("flashmla_rtc."):
        level, frame = level + 1, frame.f_back
    return level
