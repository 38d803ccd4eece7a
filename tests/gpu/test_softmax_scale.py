"""softmax_scale from 0 to very peaked, and scores as wide as a model's."""

from __future__ import annotations

import math

import pytest
import torch
from problem import HEAD_DIM, assert_matches, assert_same_bits, make

LENGTHS = [1, 40, 64, 65, 300, 1000, 2500, 2500]

# Where scores spread over powers of two, mantissas of probabilities are spread like 1/x
# and rounding one to bfloat16 costs 1.66e-3 on average, as rounding the output does: together
# 1.66e-3 * sqrt(2) = 2.35e-3. Few keys carry a row when scores are wide, so the mean over a call
# varies; 5 % are allowed for that.
WIDE_BOUND = {torch.bfloat16: 2.47e-3, torch.float16: 3.1e-4}

# The tensor cores may cut off the last bit in each of the 36 steps of a score.
SCORE_ERROR = 36 * 2.0**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scale_times", [1.0, 3.0])
@pytest.mark.parametrize("heads_q", [16, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_a_model(
    dtype: torch.dtype, scale_times: float, heads_q: int, causal: bool
) -> None:
    """q and k of variance 1: scores of standard deviation 1, or 3."""
    problem = make(
        LENGTHS,
        heads_q=heads_q,
        seq_len_q=4,
        dtype=dtype,
        causal=causal,
        softmax_scale=scale_times * HEAD_DIM**-0.5,
        spread=1.0,
        poison=torch.nan,
    )
    largest = 6 * scale_times
    lse_bound = SCORE_ERROR * largest + 2e-6
    assert_matches(problem.run(), problem.expected(), WIDE_BOUND[dtype], lse_bound)


@pytest.mark.parametrize("seq_len_q", [1, 4])
@pytest.mark.parametrize("scale", [0, 0.0, 1e-45, 1e-30, 1e-8])
def test_a_scale_of_next_to_nothing_averages_the_values(scale: float, seq_len_q: int) -> None:
    problem = make(LENGTHS, softmax_scale=scale, seq_len_q=seq_len_q, causal=True, poison=torch.nan)
    out, lse = problem.run()
    assert_matches((out, lse), problem.expected())
    last = lse[:, :, -1].double()
    expected = torch.tensor([math.log(n) for n in LENGTHS], device=last.device)[:, None]
    assert (last - expected).abs().max().item() <= 5e-6


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_a_large_scale_picks_the_best_key(scale: float) -> None:
    """Scores of standard deviation 0.24 * scale: mostly one key carries a row.

    What the score lacks in precision, the probability lacks too: it is added to the bound.
    """
    problem = make(LENGTHS * 4, heads_q=64, softmax_scale=scale)
    largest = 0.24 * 6 * scale
    bound = WIDE_BOUND[torch.bfloat16] + SCORE_ERROR * largest
    assert_matches(problem.run(), problem.expected(), bound, SCORE_ERROR * largest + 2e-5)


def test_the_default_scale_is_that_of_the_head_dimension() -> None:
    problem = make(LENGTHS, spread=1.0)
    assert_same_bits(problem.run(), problem.but(softmax_scale=HEAD_DIM**-0.5).run())


@pytest.mark.parametrize("position", [0, 20, 63, 64, 150, 999])
def test_one_key_far_above_the_others(position: int) -> None:
    """The maximum jumps at any place of a pair of blocks; what was summed before vanishes."""
    problem = make([1000] * 4, heads_q=64, spread=1.0)
    page, slot = problem.block_table[:, position // 64].long(), position % 64
    problem.k_cache[page, slot, 0] = 4 * problem.q[:, 0, 5]
    out, lse = problem.run()
    expected = problem.expected()
    assert_matches((out, lse), expected, WIDE_BOUND[torch.bfloat16], SCORE_ERROR * 120 + 1e-5)
    assert torch.allclose(out[:, 0, 5], problem.k_cache[page, slot, 0, :512], rtol=0.01)


@pytest.mark.parametrize("step", [0.02, -0.02])
def test_scores_that_rise_or_fall_with_the_position(step: float) -> None:
    """Rising scores move the maximum at every block; falling ones never."""
    problem = make([3000] * 4, heads_q=64, spread=0.1, softmax_scale=1.0)
    problem.q[..., 575] = 1.0
    problem.k_cache[..., 575] = 0.0
    for request in range(4):
        position = torch.arange(47 * 64, device=problem.q.device)
        pages = problem.block_table[request, :47].long()
        values = (position * step).to(problem.q.dtype).view(47, 64, 1)
        problem.k_cache[pages, :, :, 575] = values
    largest = 3000 * abs(step)
    lse_bound = SCORE_ERROR * largest + 2e-5
    assert_matches(problem.run(), problem.expected(), WIDE_BOUND[torch.bfloat16], lse_bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads_q", [16, 64, 128])
def test_a_row_whose_maximum_jumps_changes_no_bit_of_its_neighbours(
    heads_q: int, dtype: torch.dtype
) -> None:
    """One key of block 7 has a score 6 powers of two above the others, which a row's reference
    bears. To head 5 of a second call it is 20 above them, which it does not bear.
    """
    calm = make([1000] * 4, heads_q=heads_q, dtype=dtype, softmax_scale=math.log(2))
    calm.k_cache[..., 575] = 0.0
    calm.k_cache[calm.block_table[:, 7].long(), 0, 0, 575] = 1.0
    calm.q[..., 575] = 6.0
    jumps = calm.but(q=calm.q.clone())
    jumps.q[:, :, 5, 575] = 20.0
    out, lse = jumps.run()
    calm_out, calm_lse = calm.run()
    assert_matches((out, lse), jumps.expected(), WIDE_BOUND[dtype], SCORE_ERROR * 40 + 1e-5)
    others = torch.arange(heads_q, device=out.device) != 5
    assert_same_bits(
        (out[:, :, others], lse[:, others]), (calm_out[:, :, others], calm_lse[:, others])
    )
