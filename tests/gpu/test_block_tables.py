"""What a block table may hold: garbage past the used entries, pages out of range, shared pages."""

from __future__ import annotations

import pytest
import torch
from problem import DEVICE, PAGE, Problem, assert_same_bits, check, make

LENGTHS = [1000, 64, 0, 65, 700, 3000]
BEYOND = [2147480000, -1, -2147483648, 2147483647]


def used(problem: Problem) -> torch.Tensor:
    """Which entries of the table hold keys."""
    columns = torch.arange(problem.block_table.shape[1], device=DEVICE)
    return columns < ((problem.cache_seqlens + PAGE - 1) // PAGE)[:, None]


@pytest.mark.parametrize("entry", BEYOND)
def test_entries_past_the_used_ones_are_never_followed(entry: int) -> None:
    problem = make(LENGTHS, room=70, causal=True, seq_len_q=2)
    clean = check(problem)
    problem.block_table[~used(problem)] = entry
    assert_same_bits(problem.run(), clean)


@pytest.mark.parametrize("heads_q", [16, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("entry", [*BEYOND, "num_blocks"])
def test_a_used_page_out_of_range_has_no_keys(entry: int | str, causal: bool, heads_q: int) -> None:
    problem = make(LENGTHS, heads_q=heads_q, causal=causal, seq_len_q=3)
    value = problem.k_cache.shape[0] if entry == "num_blocks" else entry
    for request, column in ((0, 0), (0, 5), (0, 15), (3, 0), (4, 10), (5, 20), (5, 21), (5, 22)):
        problem.block_table[request, column] = value
    clean = make(LENGTHS, heads_q=heads_q, causal=causal, seq_len_q=3).expected()
    assert not torch.equal(problem.expected()[1], clean[1])  # the pages that are gone do matter
    check(problem)


def test_a_request_whose_pages_are_all_out_of_range_is_empty() -> None:
    problem = make(LENGTHS, poison=torch.nan)
    problem.block_table[0] = -1
    problem.block_table[3] = 2147480000
    out, lse = check(problem)
    assert out[[0, 3]].count_nonzero() == 0
    assert torch.isposinf(lse[[0, 3]]).all()


def test_one_page_out_of_range_between_valid_ones_equals_the_request_without_it() -> None:
    problem = make([640] * 4)
    problem.block_table[:, 4] = -1
    shorter = torch.cat([problem.block_table[:, :4], problem.block_table[:, 5:]], dim=1)
    without = problem.but(block_table=shorter, cache_seqlens=problem.cache_seqlens - PAGE)
    out, lse = check(problem)
    other_out, other_lse = without.run()
    assert torch.allclose(out.float(), other_out.float(), atol=2e-4)
    assert torch.allclose(lse, other_lse, atol=1e-5, rtol=0)


def test_requests_share_pages() -> None:
    """A common prefix, and the same request twice."""
    problem = make([3000, 2500, 3000, 640])
    problem.block_table[1, :30] = problem.block_table[0, :30]
    problem.block_table[2, :47] = problem.block_table[0, :47]
    problem.q[2] = problem.q[0]
    out, _ = check(problem)
    assert torch.allclose(out[2].float(), out[0].float(), atol=2e-4)


def test_a_page_used_twice_by_one_request_counts_twice() -> None:
    problem = make([640])
    problem.block_table[0, 1:10] = problem.block_table[0, 0]
    check(problem)
