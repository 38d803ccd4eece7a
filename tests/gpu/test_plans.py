"""Plans and calls: reused, stale, for fewer requests, held by an object, or nonsense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problem import DEVICE, HEAD_DIM_V, Problem, assert_matches, assert_same_bits, check, make

import flashmla_rtc

LENGTHS = [3000, 0, 64, 1, 900, 5000, 65, 2]


def with_lengths(problem: Problem, lengths: list[int]) -> Problem:
    return problem.but(cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE))


def test_one_plan_serves_every_layer() -> None:
    first = make(LENGTHS)
    plan = first.plan()
    before = [array.clone() for array in plan]
    for layer in range(4):
        check(make(LENGTHS, seed=layer), plan)
    assert torch.equal(plan[0], before[0])
    assert torch.equal(plan[1], before[1])


def test_planning_in_the_call_gives_the_same_bits() -> None:
    problem = make(LENGTHS)
    assert_same_bits(problem.run((None, None)), problem.run())


def test_num_splits_may_be_left_out() -> None:
    problem = make(LENGTHS)
    metadata, _ = problem.plan()
    assert_same_bits(problem.run((metadata, None)), problem.run())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "planned_for",
    [
        [1] * 8,
        [0] * 8,
        [8000] * 8,
        [2**31 - 1] * 8,
        [-5] * 8,
        [0, 0, 0, 0, 0, 0, 0, 9000],
        [9000, 0, 0, 0, 0, 0, 0, 0],
        LENGTHS[::-1],
    ],
    ids=["shorter", "empty", "longer", "endless", "negative", "last", "first", "reversed"],
)
def test_a_plan_made_for_other_lengths_stays_correct(planned_for: list[int], causal: bool) -> None:
    problem = make(LENGTHS, seq_len_q=2, causal=causal, poison=torch.nan)
    check(problem, with_lengths(problem, planned_for).plan())


def test_lengths_that_grow_by_one_a_step_keep_their_plan() -> None:
    problem = make([length + 70 for length in LENGTHS], causal=True)
    plan = with_lengths(problem, LENGTHS).plan()
    for step in range(0, 70, 6):
        check(with_lengths(problem, [length + step for length in LENGTHS]), plan)


@pytest.mark.parametrize("planned", [1, 3, 7])
def test_a_plan_for_fewer_requests_leaves_the_others_alone(planned: int) -> None:
    problem = make(LENGTHS)
    plan = problem.plan(problem.cache_seqlens[:planned])
    assert plan[1].shape == (planned + 1,)
    out, lse = problem.poisoned()
    out[planned:], lse[planned:] = 7.0, 8.0
    problem.run(plan, out, lse)
    expected = problem.expected()
    assert_matches((out[:planned], lse[:planned]), (expected[0][:planned], expected[1][:planned]))
    assert torch.equal(out[planned:], torch.full_like(out[planned:], 7.0))
    assert torch.equal(lse[planned:], torch.full_like(lse[planned:], 8.0))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_plan_for_more_requests_is_right_for_those_there_are(batch: int) -> None:
    """As when a captured plan is larger than the live batch; num_splits need not be given."""
    whole = make(LENGTHS)
    metadata, _ = whole.plan()
    fewer = whole.but(
        q=whole.q[:batch],
        block_table=whole.block_table[:batch],
        cache_seqlens=whole.cache_seqlens[:batch],
    )
    assert_matches(fewer.run((metadata, None)), fewer.expected())


def test_padded_rows_cost_no_key_and_no_fault() -> None:
    """As in captured batches: length 0 and a table of -1."""
    problem = make([700, 64, 3000, 0, 0, 0, 0, 0], poison=torch.nan)
    problem.block_table[3:] = -1
    out, lse = check(problem)
    assert out[3:].count_nonzero() == 0
    assert torch.isposinf(lse[3:]).all()


def nonsense() -> dict[str, Any]:
    random = torch.Generator().manual_seed(3)

    def numbers(low: int, high: int) -> Any:
        return lambda shape: torch.randint(low, high, shape, generator=random)

    plans: dict[str, Any] = {
        "zeros": torch.zeros,
        "ones": torch.ones,
        "minus-one": lambda shape: -torch.ones(shape),
        "largest": lambda shape: torch.full(shape, 2**31 - 1, dtype=torch.int64),
        "smallest": lambda shape: torch.full(shape, -(2**31), dtype=torch.int64),
    }
    for trial in range(4):
        plans[f"any-{trial}"] = numbers(-(2**31), 2**31 - 1)
        plans[f"plausible-{trial}"] = numbers(0, 12)
        plans[f"counts-{trial}"] = numbers(-2, 300)

    def far_beyond(shape: Any) -> torch.Tensor:
        """Every part begins where no request has keys, and ends with a request that exists."""
        row = torch.tensor([0, 2**31 - 1, 5, 2**31 - 1, 1, 0, 0, 0], dtype=torch.int64)
        return row.expand(shape)

    plans["far-beyond"] = far_beyond
    return plans


@pytest.mark.parametrize("heads_q, seq_len_q", [(16, 1), (128, 5), (128, 67)])
@pytest.mark.parametrize("kind", list(nonsense()))
def test_a_nonsense_plan_faults_nowhere(kind: str, heads_q: int, seq_len_q: int) -> None:
    """Results are unspecified, but nothing outside is touched and the next call is right.

    128 heads times 67 queries have one part and therefore no workspace.
    """
    problem = make([300, 0, 64, 1, 1500, 700], heads_q=heads_q, seq_len_q=seq_len_q)
    metadata, num_splits = problem.plan()
    rubbish = nonsense()[kind](tuple(metadata.shape)).to(torch.int32).to(DEVICE)
    inputs = [t.clone() for t in (problem.q, problem.block_table, problem.cache_seqlens, rubbish)]
    problem.run((rubbish, num_splits))
    torch.cuda.synchronize()
    now = (problem.q, problem.block_table, problem.cache_seqlens, rubbish)
    assert all(torch.equal(a, b) for a, b in zip(inputs, now, strict=True))
    check(problem, (metadata, num_splits))


def call(problem: Problem, plan: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = flashmla_rtc.flash_mla_with_kvcache(
        problem.q,
        problem.k_cache,
        problem.block_table,
        problem.cache_seqlens,
        HEAD_DIM_V,
        plan,
        causal=problem.causal,
        **changes,
    )
    return result


def test_a_plan_object_is_filled_once_and_reused() -> None:
    plan, num_splits = flashmla_rtc.get_mla_metadata()
    assert num_splits is None
    assert plan.tile_scheduler_metadata is None
    problem = make(LENGTHS)
    assert_matches(call(problem, plan), problem.expected())
    filled = plan.tile_scheduler_metadata
    expected = problem.plan()
    assert torch.equal(filled, expected[0])
    assert torch.equal(plan.num_splits, expected[1])
    other = make(LENGTHS, seed=1)
    assert_matches(call(other, plan), other.expected())
    assert plan.tile_scheduler_metadata is filled


def test_a_plan_object_takes_a_plan_by_assignment() -> None:
    problem = make(LENGTHS)
    plan, _ = flashmla_rtc.get_mla_metadata()
    plan.tile_scheduler_metadata, plan.num_splits = problem.plan()
    given = plan.tile_scheduler_metadata
    assert_same_bits(call(problem, plan), problem.run())
    assert plan.tile_scheduler_metadata is given


@pytest.mark.parametrize(
    "other, word",
    [
        ({"lengths": LENGTHS[:4]}, "batch 8 then, 4 now"),
        ({"heads_q": 32}, "heads_q 16 then, 32 now"),
        ({"heads_k": 2}, "heads_k 1 then, 2 now"),
        ({"seq_len_q": 2}, "seq_len_q 1 then, 2 now"),
    ],
)
def test_a_plan_object_refuses_another_configuration(other: dict[str, Any], word: str) -> None:
    plan, _ = flashmla_rtc.get_mla_metadata()
    problem = make(LENGTHS)
    call(problem, plan)
    filled = plan.tile_scheduler_metadata
    with pytest.raises(ValueError, match=word):
        call(make(**{"lengths": LENGTHS, **other}), plan)
    assert plan.tile_scheduler_metadata is filled
    assert_matches(call(problem, plan), problem.expected())


def test_repeated_calls_give_the_same_bits() -> None:
    problem = make(LENGTHS, heads_q=128, seq_len_q=2, causal=True)
    plan = problem.plan()
    first = check(problem, plan)
    for _ in range(30):
        assert_same_bits(problem.run(plan), first)
