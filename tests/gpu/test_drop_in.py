"""Programs written for FlashMLA run with the import changed and nothing else."""

from __future__ import annotations

import oracle
import pytest
import torch
from problem import DEVICE, OUT_BOUND, PAGE, relative_error

import flashmla_rtc as flash_mla

B, S_Q, H_KV, D, DV = 9, 2, 1, 576, 512


def step(h_q: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What FlashMLA's own test makes: lengths around a mean, pages in order."""
    torch.manual_seed(0)
    cache_seqlens = torch.full((B,), 1100, dtype=torch.int32)
    cache_seqlens += torch.randint(-900, 900, (B,), dtype=torch.int32)
    max_seqlen_pad = (int(cache_seqlens.max()) + 255) // 256 * 256
    q = torch.randn(B, S_Q, h_q, D).div(10).to(DEVICE, dtype)
    block_table = torch.arange(B * max_seqlen_pad // PAGE, dtype=torch.int32).view(B, -1)
    blocked_k = torch.randn(block_table.numel(), PAGE, H_KV, D).div(10).to(dtype)
    for i, length in enumerate(cache_seqlens.tolist()):
        blocked_k.view(B, max_seqlen_pad, H_KV, D)[i, length:] = float("nan")
    return q, blocked_k.to(DEVICE), block_table.to(DEVICE), cache_seqlens.to(DEVICE)


def close(
    out: torch.Tensor, lse: torch.Tensor, arrays: tuple[torch.Tensor, ...], causal: bool
) -> None:
    true_out, true_lse = oracle.attention(*arrays, causal=causal)
    assert relative_error(out, true_out) <= OUT_BOUND[out.dtype]
    assert lse.shape == true_lse.shape
    assert (lse - true_lse).abs().max().item() <= 5e-6


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_first_release(h_q: int, dtype: torch.dtype) -> None:
    q, blocked_k, block_table, cache_seqlens = arrays = step(h_q, dtype)
    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens, S_Q * h_q // H_KV, H_KV
    )
    for _ in range(3):
        o_i, lse_i = flash_mla.flash_mla_with_kvcache(
            q,
            blocked_k,
            block_table,
            cache_seqlens,
            DV,
            tile_scheduler_metadata,
            num_splits,
            causal=True,
        )
        close(o_i, lse_i, arrays, causal=True)


def test_the_first_release_with_its_names() -> None:
    h_q = 16
    q, blocked_k, block_table, cache_seqlens = arrays = step(h_q, torch.bfloat16)
    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens=cache_seqlens, num_heads_per_head_k=S_Q * h_q // H_KV, num_heads_k=H_KV
    )
    assert num_splits.shape == (B + 1,)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q=q,
        k_cache=blocked_k,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        head_dim_v=DV,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
        softmax_scale=D**-0.5,
        causal=False,
    )
    close(out, lse, arrays, causal=False)


def test_the_generation_between() -> None:
    h_q = 64
    q, blocked_k, block_table, cache_seqlens = arrays = step(h_q, torch.bfloat16)
    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens, S_Q * h_q // H_KV, H_KV, h_q, False, None
    )
    named = flash_mla.get_mla_metadata(
        cache_seqlens=cache_seqlens,
        num_q_tokens_per_head_k=S_Q * h_q // H_KV,
        num_heads_k=H_KV,
        num_heads_q=h_q,
        is_fp8_kvcache=False,
        topk=None,
    )
    assert torch.equal(named[0], tile_scheduler_metadata)
    assert torch.equal(named[1], num_splits)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q,
        blocked_k,
        block_table,
        cache_seqlens,
        DV,
        tile_scheduler_metadata,
        num_splits,
        causal=True,
        is_fp8_kvcache=False,
        indices=None,
    )
    close(out, lse, arrays, causal=True)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_newest_release(h_q: int, dtype: torch.dtype) -> None:
    q, blocked_k, block_table, cache_seqlens = arrays = step(h_q, dtype)
    for _step in range(2):
        tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata()
        for _layer in range(3):
            out, lse = flash_mla.flash_mla_with_kvcache(
                q,
                blocked_k,
                block_table,
                cache_seqlens,
                DV,
                tile_scheduler_metadata,
                num_splits,
                None,
                True,
                False,
                None,
                attn_sink=None,
                extra_k_cache=None,
                extra_indices_in_kvcache=None,
                topk_length=None,
                extra_topk_length=None,
            )
            close(out, lse, arrays, causal=True)
        cache_seqlens -= 1
        blocked_k.nan_to_num_(0.01)
    assert isinstance(tile_scheduler_metadata, flash_mla.FlashMLASchedMeta)
    assert tile_scheduler_metadata.num_splits.shape == (B + 1,)
