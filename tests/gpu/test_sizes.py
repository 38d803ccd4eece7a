"""Batches, heads, queries and caches from the smallest to the largest."""

from __future__ import annotations

import random

import pytest
import torch
from problem import DEVICE, HEAD_DIM, PAGE, Problem, check, make


@pytest.mark.parametrize("batch", [1, 2, 3, 64, 131, 132, 133, 263, 264, 265, 1024])
def test_batch_sizes(batch: int) -> None:
    rng = random.Random(batch)
    check(make([rng.randint(0, 400) for _ in range(batch)], heads_q=64, seed=batch))


def test_4096_requests() -> None:
    rng = random.Random(0)
    check(make([rng.randint(0, 130) for _ in range(4096)], poison=torch.nan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads_q", [1, 3, 5, 12, 20, 63, 64, 65, 96, 126, 127, 128])
def test_head_counts(heads_q: int, dtype: torch.dtype) -> None:
    lengths = [1, 65, 640, 900] * max(2, 32 // heads_q)
    check(make(lengths, heads_q=heads_q, dtype=dtype, poison=torch.nan))


@pytest.mark.parametrize(
    "heads_q, heads_k", [(128, 8), (128, 2), (96, 3), (20, 5), (8, 8), (256, 4)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_several_kv_heads(heads_q: int, heads_k: int, causal: bool) -> None:
    lengths = [1, 65, 640, 0, 900, 64, 63, 2000]
    check(make(lengths, heads_q=heads_q, heads_k=heads_k, seq_len_q=3, causal=causal))


@pytest.mark.parametrize("heads_q, heads_k, seq_len_q", [(128, 1, 67), (128, 8, 70), (512, 1, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_more_row_blocks_than_sms(heads_q: int, heads_k: int, seq_len_q: int, causal: bool) -> None:
    """One part for each: nothing can be cut, and no workspace is there."""
    problem = make([300, 0, 65, 700], heads_q=heads_q, heads_k=heads_k, seq_len_q=seq_len_q)
    problem.causal = causal
    assert problem.plan()[0].shape[0] == 1
    check(problem)


@pytest.mark.parametrize("heads_q", [1, 5, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_200_queries(heads_q: int, causal: bool) -> None:
    check(make([150, 200, 201, 1000], heads_q=heads_q, seq_len_q=200, causal=causal))


@pytest.mark.parametrize("seq_len_q", range(1, 9))
def test_queries_that_straddle_row_blocks(seq_len_q: int) -> None:
    """20 heads: blocks of 64 rows begin in the middle of a query."""
    check(make([9, 64, 129, 777], heads_q=20, seq_len_q=seq_len_q, causal=True, poison=torch.nan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_cache_above_two_to_the_31_elements(dtype: torch.dtype) -> None:
    first_beyond = -(-(2**31) // (PAGE * HEAD_DIM))  # all of this page lies past element 2^31
    num_blocks = first_beyond + 40
    k_cache = torch.empty(num_blocks, PAGE, 1, HEAD_DIM, dtype=dtype, device=DEVICE)
    assert k_cache.numel() > 2**31
    small = make([2000, 2000, 64, 1], dtype=dtype, spare_blocks=0)
    pages = small.k_cache.shape[0]
    # Odd requests and pages near the end, the others near the start.
    places = [num_blocks - 1 - i if i % 2 else i for i in range(pages)]
    k_cache[torch.tensor(places, device=DEVICE)] = small.k_cache
    where = torch.tensor([*places, -1], dtype=torch.int32, device=DEVICE)
    table = where[small.block_table.long().clamp(-1, pages)]
    problem = Problem(small.q, k_cache, table, small.cache_seqlens)
    assert int(table.max()) >= first_beyond
    check(problem)
    out, lse = problem.run()
    small_out, small_lse = small.run()
    assert torch.equal(out, small_out)
    assert torch.equal(lse, small_lse)
