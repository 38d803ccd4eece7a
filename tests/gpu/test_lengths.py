"""Lengths that the table can't hold, and lengths of every size."""

from __future__ import annotations

import pytest
import torch
from problem import DEVICE, assert_same_bits, check, make


@pytest.mark.parametrize("beyond", [1, 64, 2**30, 2**31 - 1 - 8 * 64])
def test_a_length_beyond_the_table_is_clamped(beyond: int) -> None:
    full = make([512, 512, 100], room=0)
    assert full.block_table.shape == (3, 8)
    lengths = full.cache_seqlens.clone()
    lengths[0] += beyond
    longer = full.but(cache_seqlens=lengths)
    assert_same_bits(check(longer, full.plan()), full.run())
    check(longer)  # planned for the lengths as they came


def test_every_length_is_beyond_the_table() -> None:
    problem = make([512] * 5, room=0, seq_len_q=3, causal=True)
    lengths = torch.full((5,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    assert_same_bits(problem.but(cache_seqlens=lengths).run(problem.plan()), problem.run())
    check(problem.but(cache_seqlens=lengths))


@pytest.mark.parametrize("heads_q", [16, 128])
def test_131072_tokens_in_one_request(heads_q: int) -> None:
    check(make([131072], heads_q=heads_q, poison=torch.nan))


def test_131072_tokens_beside_short_requests() -> None:
    check(make([3, 131072, 0, 70], seq_len_q=2, causal=True))


@pytest.mark.parametrize("seq_len_q", [1, 2, 3])
def test_ragged_lengths_around_the_page_size(seq_len_q: int) -> None:
    lengths = [n + 64 * k for k in (0, 1, 5) for n in (0, 1, 2, 31, 32, 33, 62, 63)]
    check(make(lengths, seq_len_q=seq_len_q, causal=True, poison=torch.nan))
