"""Decoding steps that torch compiles, exports and differentiates, on the CPU."""

from __future__ import annotations

from typing import Any

import torch

import flashmla_rtc

HEAD_DIM_V = 32


def make(batch: int = 3, seed: int = 0, dtype: Any = None) -> tuple[Any, ...]:
    """q, k_cache, block_table, cache_seqlens and head_dim_v of a random call on the CPU."""
    random = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float32
    q = torch.randn(batch, 2, 4, 40, generator=random).to(dtype)
    k_cache = torch.randn(24, 16, 1, 40, generator=random).to(dtype)
    table = torch.randint(0, 24, (batch, 8), generator=random, dtype=torch.int32)
    lengths = torch.randint(0, 8 * 16 + 1, (batch,), generator=random, dtype=torch.int32)
    return q, k_cache, table, lengths, HEAD_DIM_V


def rows(q: Any, k_cache: Any) -> int:
    return q.shape[1] * q.shape[2] // k_cache.shape[2]


def with_arrays(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    plan, splits = flashmla_rtc.get_mla_metadata(lengths, rows(q, k_cache), k_cache.shape[2])
    first = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, plan, splits, causal=True
    )
    second = flashmla_rtc.flash_mla_with_kvcache(
        q * 2, k_cache, table, lengths, width, plan, splits, softmax_scale=1, causal=True
    )
    return first[0] + second[0], first[1], second[1]


def with_an_object(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    plan, _ = flashmla_rtc.get_mla_metadata()
    first = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, plan)
    second = flashmla_rtc.flash_mla_with_kvcache(q * 2, k_cache, table, lengths, width, plan)
    return first[0] + second[0], first[1], second[1]


def without_a_plan(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out, lse = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, None)
    return out * 2, lse


def into_out(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out = torch.full((*q.shape[:3], width), torch.nan, dtype=q.dtype)
    given, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, None, out=out
    )
    return out, given, lse


def into_both(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out = torch.full((*q.shape[:3], width), torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, None, out=out, lse=lse, causal=True
    )
    return out, lse


STEPS = (with_arrays, with_an_object, without_a_plan, into_out, into_both)


def assert_same(result: Any, expected: Any) -> None:
    """Up to the order in which the CPU's matrix products sum, which may go by addresses."""
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
