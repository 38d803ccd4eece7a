"""Requests cut into pieces by hand, few to very many, and merged."""

from __future__ import annotations

import random

import pytest
import torch
from plans import from_cuts, num_parts
from problem import assert_matches, assert_same_bits, check, make

from flashmla_rtc import overrides, schedule, variants


def test_a_plan_from_cuts_equals_the_planner_s() -> None:
    """So that the plans written by hand here have the format that the planner writes."""
    problem = make([5000, 100, 0, 7000, 64, 1])
    lengths = problem.cache_seqlens.cpu().numpy()
    parts = num_parts(problem)
    model = schedule.cost_model(problem.rows_per_group, problem.heads_k)
    planner = schedule.Planner(lengths, parts, model)
    request, block = planner.cuts(*planner.best())
    cuts = list(zip(request.tolist(), block.tolist(), strict=True))
    by_hand = from_cuts(problem, cuts[1:-1])
    for mine, made in zip(by_hand, schedule.plan_numpy(lengths, parts, model), strict=True):
        assert mine.tolist() == made.tolist()


@pytest.mark.parametrize("pieces", [2, 3, 8, 31, 32, 33, 34, 63, 64, 65, 66, 67, 70])
def test_one_request_cut_into_pieces(pieces: int) -> None:
    problem = make([pieces * 128 - 30], heads_q=32, poison=torch.nan)
    check(problem, from_cuts(problem, [(0, 2 * i) for i in range(1, pieces)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_request_cut_over_all_parts(dtype: torch.dtype) -> None:
    problem = make([1])
    parts = num_parts(problem)
    problem = make([parts * 64 - 1], heads_q=64, dtype=dtype)
    assert num_parts(problem) == parts > 66
    check(problem, from_cuts(problem, [(0, i) for i in range(1, parts)]))


def test_every_request_cut_in_its_own_way() -> None:
    rng = random.Random(5)
    lengths = [rng.randint(1, 3000) for _ in range(20)]
    problem = make(lengths, seq_len_q=3, causal=True, poison=torch.nan)
    cuts = []
    for request, length in enumerate(lengths):
        blocks = -(-length // 64)
        count = min(rng.randint(0, 5), blocks - 1)
        inside = rng.sample(range(1, blocks), count)
        cuts += [(request, block) for block in sorted(inside)]
        if request + 1 < len(lengths) and rng.random() < 0.5:
            cuts.append((request + 1, 0))
    assert len(cuts) < num_parts(problem)
    check(problem, from_cuts(problem, cuts))


def test_pieces_that_lie_past_the_end_weigh_nothing() -> None:
    """Cuts for 100 blocks where the request has 3: most pieces are empty."""
    problem = make([190], seq_len_q=2, causal=True, poison=torch.nan)
    check(problem, from_cuts(problem, [(0, i) for i in range(1, 100)]))


def test_an_empty_request_that_was_cut_is_empty() -> None:
    problem = make([0, 640], poison=torch.nan)
    out, lse = check(problem, from_cuts(problem, [(0, 3), (0, 5), (1, 4)]))
    assert out[0].count_nonzero() == 0
    assert torch.isposinf(lse[0]).all()


def test_pieces_whose_pages_are_out_of_range_weigh_nothing() -> None:
    problem = make([640], poison=torch.nan)
    problem.block_table[0, 2:4] = -1
    problem.block_table[0, 6:10] = 2147480000
    check(problem, from_cuts(problem, [(0, 2), (0, 4), (0, 6)]))


def test_rows_of_which_a_piece_sees_no_key() -> None:
    """100 causal queries: the last pieces hold keys for the last queries only."""
    problem = make([300], heads_q=4, seq_len_q=100, causal=True, poison=torch.nan)
    check(problem, from_cuts(problem, [(0, 1), (0, 2), (0, 3), (0, 4)]))


def test_pieces_of_very_different_weight() -> None:
    """Scores that differ by hundreds between pieces, first and last heaviest in turn."""
    for heavy in (0, 9):
        problem = make([640], spread=0.1, softmax_scale=1.0)
        problem.q[..., 575] = 1.0
        problem.k_cache[..., 575] = -300.0
        problem.k_cache[problem.block_table[0, heavy].long(), :, :, 575] = 300.0
        plan = from_cuts(problem, [(0, block) for block in range(1, 10)])
        assert_matches(problem.run(plan), problem.expected(), 2.47e-3, 3e-3)


def test_a_cut_changes_only_the_last_bits() -> None:
    """Each side of the comparison may be off by its own rounding, 2.6e-4 at most."""
    problem = make([6400] * 2, dtype=torch.float16)
    whole = problem.run(from_cuts(problem, [(1, 0)]))
    cut = problem.run(from_cuts(problem, [(0, 50), (1, 0), (1, 30)]))
    assert (whole[0].float() - cut[0].float()).norm() <= 2**0.5 * 2.6e-4 * whole[0].float().norm()
    assert (whole[1] - cut[1]).abs().max().item() <= 5e-6


def test_a_request_that_is_not_cut_is_the_same_alone_and_in_company() -> None:
    problem = make([1000, 4000, 500])
    one = problem.run(from_cuts(problem, [(1, 0), (2, 0)]))
    other = problem.run(from_cuts(problem, [(1, 0), (1, 20), (2, 0)]))
    assert_same_bits((one[0][::2], one[1][::2]), (other[0][::2], other[1][::2]))


def test_values_of_very_different_size() -> None:
    """Pieces in fp16 carry a power of two for each row: neither tiny nor huge values suffer."""
    for size in (1e-30, 1.0, 1e30):
        problem = make([1000, 700], heads_q=64, seed=7)
        problem.k_cache[..., :512] *= size
        problem.q[..., :512] = 0  # scores come from the last 64 columns
        plan = from_cuts(problem, [(0, 4), (0, 9), (1, 0), (1, 2), (1, 5)])
        out, lse = problem.run(plan)
        expected = problem.expected()
        scaled = (out.double() / size, lse), (expected[0].double() / size, expected[1])
        assert_matches(*scaled, 2.3e-3, 5e-6)


def test_a_value_far_larger_than_the_others_of_its_row() -> None:
    problem = make([1000], heads_q=64)
    problem.k_cache[..., 17] = 20000.0
    problem.q[..., :512] = 0  # scores come from the last 64 columns
    result = problem.run(from_cuts(problem, [(0, 4), (0, 9)]))
    expected = problem.expected()
    rest = [i for i in range(512) if i != 17]
    assert_matches((result[0][..., 17:18], result[1]), (expected[0][..., 17:18], expected[1]), 4e-3)
    error = (result[0][..., rest].double() - expected[0][..., rest].double()).norm()
    assert error <= 4e-3 * expected[0][..., rest].double().norm()


@pytest.mark.parametrize("heads_q", [16, 64])
def test_a_value_that_is_not_finite_spoils_its_column_alone(heads_q: int) -> None:
    """A key of weight 0 whose column 17 is -inf: 0 * -inf is NaN there, and nowhere else."""
    problem = make([1000], heads_q=heads_q)
    problem.q[..., 17] = 1.0
    page = problem.block_table[0, 5].long()
    problem.k_cache[page, 3, 0, 17] = -torch.inf
    out, lse = problem.run(from_cuts(problem, [(0, 4), (0, 9)]))
    expected, expected_lse = problem.expected()
    assert torch.isnan(out[..., 17]).all()
    rest = [i for i in range(512) if i != 17]
    assert_matches((out[..., rest], lse), (expected[..., rest], expected_lse))


@pytest.mark.parametrize("heads_q", [16, 64, 128])
def test_helpers_without_patience(heads_q: int) -> None:
    """Whoever does not find all pieces at the first look leaves its task to the last to depart."""
    for dtype in (torch.bfloat16, torch.float16):
        name = variants.decode_name(str(dtype).removeprefix("torch."), heads_q, plain=True)
        hasty = variants.by_name(name).but(f"{name}_hasty", MERGE_PATIENCE=0)
        with overrides.standing_in(hasty, name, torch.cuda.current_device()):
            for pieces in (2, 5, 9, 10, 33, 66):
                problem = make([pieces * 64, 130], heads_q=heads_q, dtype=dtype, seed=pieces)
                parts = num_parts(problem)
                cuts = [(0, i) for i in range(1, min(pieces, parts - 2))]
                plan = from_cuts(problem, [*cuts, (1, 0), (1, 1)])
                for _ in range(3):
                    check(problem, plan)
            torch.cuda.synchronize()
        check(problem, plan)  # and leaves the workspace as others expect it
