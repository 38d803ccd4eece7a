"""Requests without keys: out 0, lse +inf, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from problem import DEVICE, assert_matches, assert_same_bits, check, make


def assert_empty(result: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = result
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, torch.inf))


@pytest.mark.parametrize("causal", [False, True])
def test_a_request_of_length_0_among_others(causal: bool) -> None:
    lengths = [0, 200, 0, 0, 64, 1, 5000, 0]
    problem = make(lengths, seq_len_q=2, causal=causal, poison=torch.nan)
    out, lse = check(problem)
    empty = problem.cache_seqlens == 0
    assert_empty((out[empty], lse[empty]))


@pytest.mark.parametrize("batch", [1, 2, 131, 132, 133, 1000])
def test_all_requests_are_empty(batch: int) -> None:
    assert_empty(make([0] * batch, poison=torch.nan).run())


def test_one_long_request_between_empty_ones() -> None:
    assert_matches((problem := make([0] * 70 + [30000] + [0] * 70)).run(), problem.expected())


def test_causal_rows_before_the_first_key_are_empty() -> None:
    problem = make([1, 2, 3, 5], seq_len_q=4, causal=True, poison=torch.nan)
    out, lse = check(problem)
    assert_empty((out[0, :3], lse[0, :, :3]))  # one key: the last query alone sees it
    assert torch.isfinite(lse[0, :, 3]).all()
    assert_empty((out[2, :1], lse[2, :, :1]))
    assert torch.isfinite(lse[3]).all()


@pytest.mark.parametrize("heads_q", [16, 128])
def test_causal_with_more_queries_than_keys(heads_q: int) -> None:
    check(make([0, 1, 20, 63, 64, 65, 90, 99], heads_q=heads_q, seq_len_q=100, causal=True))


def test_negative_lengths_are_empty() -> None:
    problem = make([100, 200, 300], poison=torch.nan)
    lengths = torch.tensor([-1, 200, -(2**31)], dtype=torch.int32, device=DEVICE)
    out, lse = check(problem.but(cache_seqlens=lengths))
    assert_empty((out[::2], lse[::2]))


def test_a_table_without_columns_leaves_every_request_empty() -> None:
    problem = make([100, 200])
    assert_empty(problem.but(block_table=problem.block_table[:, :0].contiguous()).run())


def test_a_cache_without_pages_leaves_every_request_empty() -> None:
    problem = make([100, 200])
    assert_empty(problem.but(k_cache=problem.k_cache[:0]).run())


def test_an_empty_batch_gives_empty_results() -> None:
    problem = make([])
    out, lse = problem.run()
    assert out.shape == (0, 1, 16, 512)
    assert lse.shape == (0, 16, 1)


def test_an_empty_request_changes_no_bit_of_its_neighbour() -> None:
    """With whole requests on every part, so that the plan cuts the neighbour the same way."""
    problem = make([50] * 300)
    out, lse = problem.run()
    lengths = problem.cache_seqlens.clone()
    lengths[::2] = 0
    some_out, some_lse = problem.but(cache_seqlens=lengths).run(problem.plan())
    assert_same_bits((out[1::2], lse[1::2]), (some_out[1::2], some_lse[1::2]))
    assert_empty((some_out[::2], some_lse[::2]))
