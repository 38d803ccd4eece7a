"""Multi-head Latent Attention decode for NVIDIA Hopper: CUDA compiled at import by NVRTC.

    import flashmla_rtc as flash_mla

    rows = seq_len_q * heads_q // heads_k
    plan, num_splits = flash_mla.get_mla_metadata(cache_seqlens, rows, heads_k)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, plan, num_splits, causal=True
    )

Importing compiles the default kernels, or reads them from the cache on disk; it never touches the
CUDA driver, so a process may fork afterwards. ``FLASHMLA_RTC_COMPILE=lazy`` leaves compiling to the
first call.
"""

from __future__ import annotations

import contextlib as _contextlib
import importlib as _importlib
from typing import Any as _Any

from . import variants as _variants
from ._version import __version__
from .interface import flash_mla_with_kvcache, prepare
from .metadata import FlashMLASchedMeta, get_mla_metadata, num_sm_parts

__all__ = [
    "DecodeTime",
    "FlashMLASchedMeta",
    "KernelDifference",
    "KernelInspection",
    "PlanFacts",
    "PlanPicture",
    "SourceOverride",
    "__version__",
    "draw_plan",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "inspect_kernel",
    "kernel_names",
    "kernel_sources",
    "num_sm_parts",
    "override_sources",
    "plan_for",
    "prepare",
    "time_decode",
]

# What looks at plans and kernels is loaded when it is first asked for; decoding does without.
_LATER = {
    "DecodeTime": "bench.decode_time",
    "KernelDifference": "inspection",
    "KernelInspection": "inspection",
    "PlanFacts": "plan_reading",
    "PlanPicture": "plan_picture",
    "SourceOverride": "overrides",
    "draw_plan": "plan_picture",
    "inspect_kernel": "inspection",
    "kernel_names": "inspection",
    "kernel_sources": "overrides",
    "override_sources": "overrides",
    "plan_for": "plan_reading",
    "time_decode": "bench.decode_time",
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Nothing that is wrong with compiling may keep the package from being imported: a bad value of
# FLASHMLA_RTC_COMPILE, too, is told when a kernel is first asked for.
with _contextlib.suppress(ValueError):
    _variants.builder.start(variant.source() for variant in _variants.default_variants())
