"""Keys that a query may not see never reach it, even when they hold NaN or inf."""

from __future__ import annotations

import pytest
import torch
from problem import DEVICE, PAGE, Problem, assert_same_bits, check, make

LENGTHS = [1, 2, 31, 62, 63, 64, 65, 66, 100, 127, 128, 129, 190, 1000, 4097]
POISONS = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads_q", [5, 16, 128])
@pytest.mark.parametrize("poison", POISONS)
def test_what_lies_past_the_end_of_a_sequence_changes_no_bit(
    poison: float, heads_q: int, dtype: torch.dtype
) -> None:
    """Slots after the last key of a page, and whole pages that nobody owns."""
    clean = make(LENGTHS, heads_q=heads_q, dtype=dtype)
    poisoned = make(LENGTHS, heads_q=heads_q, dtype=dtype, poison=poison)
    assert not torch.isfinite(poisoned.k_cache).all()
    assert_same_bits(check(poisoned), clean.run())


@pytest.mark.parametrize("length", [*range(1, 2 * PAGE + 2)][::3])
def test_every_length_of_the_last_page(length: int) -> None:
    check(make([length] * 8, heads_q=32, causal=True, seq_len_q=2, poison=torch.nan))


def slot_of(problem: Problem, request: int, position: int) -> tuple[int, int]:
    """Page and row of the cache that hold a key."""
    return int(problem.block_table[request, position // PAGE]), position % PAGE


@pytest.mark.parametrize("length", [5, 64, 66, 700, 6000])
@pytest.mark.parametrize("heads_q", [5, 16, 128])
@pytest.mark.parametrize("poison", POISONS)
def test_a_key_hidden_by_the_causal_mask_spoils_only_the_rows_that_see_it(
    poison: float, heads_q: int, length: int
) -> None:
    """Key length - 2 of 4 queries' request: queries 0 and 1 don't see it, 2 and 3 do."""
    problem = make([length] * 3, heads_q=heads_q, seq_len_q=4, causal=True)
    clean_out, clean_lse = check(problem)
    spoiled = problem.but(k_cache=problem.k_cache.clone())
    spoiled.k_cache[slot_of(problem, 1, length - 2)] = poison
    out, lse = spoiled.run()
    assert torch.isnan(out[1, 2:]).all()
    assert torch.isnan(lse[1, :, 2:]).all()
    assert_same_bits((out[1, :2], lse[1, :, :2]), (clean_out[1, :2], clean_lse[1, :, :2]))
    assert_same_bits((out[::2], lse[::2]), (clean_out[::2], clean_lse[::2]))


@pytest.mark.parametrize("position", [0, 63, 64, 500, 999])
def test_a_nan_that_every_row_sees_spoils_its_request_alone(position: int) -> None:
    problem = make([1000] * 3)
    clean_out, clean_lse = problem.run()
    problem.k_cache[slot_of(problem, 1, position)] = torch.nan
    out, lse = problem.run()
    assert torch.isnan(out[1]).all()
    assert torch.isnan(lse[1]).all()
    assert_same_bits((out[::2], lse[::2]), (clean_out[::2], clean_lse[::2]))


def test_a_nan_in_one_query_row_spoils_that_row_alone() -> None:
    problem = make([1000] * 3, seq_len_q=2)
    clean_out, clean_lse = problem.run()
    problem.q[1, 1, 7, 300] = torch.nan
    out, lse = problem.run()
    assert torch.isnan(out[1, 1, 7]).all()
    assert torch.isnan(lse[1, 7, 1])
    others = torch.ones(3, 2, 16, dtype=torch.bool, device=DEVICE)
    others[1, 1, 7] = False
    result = (out[others], lse.transpose(1, 2)[others])
    assert_same_bits(result, (clean_out[others], clean_lse.transpose(1, 2)[others]))


@pytest.mark.parametrize("poison", POISONS)
def test_one_kv_head_does_not_reach_the_rows_of_another(poison: float) -> None:
    problem = make([300, 64], heads_q=16, heads_k=4)
    clean_out, clean_lse = problem.run()
    problem.k_cache[:, :, 2] = poison
    out, lse = problem.run()
    others = torch.arange(16, device=DEVICE) // 4 != 2
    result = (out[:, :, others], lse[:, others])
    assert_same_bits(result, (clean_out[:, :, others], clean_lse[:, others]))
