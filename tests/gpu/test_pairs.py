"""Plans of pairs of requests, and parts that have a request from anywhere behind their others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import num_parts
from problem import DEVICE, Problem, assert_matches, assert_same_bits, check, make
from test_query_layouts import has_map

from flashmla_rtc import schedule, schedule_pairs, sm90

Plan = tuple[torch.Tensor, torch.Tensor | None]


def ragged(batch: int, longest: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, batch).tolist()


def parts_a_pair(problem: Problem) -> int:
    """1 or 2, or 0 where the plan cuts a line."""
    lengths = problem.cache_seqlens.cpu().numpy()
    model = schedule.cost_model(problem.rows_per_group, problem.heads_k)
    planner = schedule.Planner(lengths, num_parts(problem), model)
    groups = schedule_pairs.cheaper_pairs(planner, planner.best())
    return groups[0].parts if groups else 0


def paired_batch(parts: int, fewer: int, rows: int) -> int:
    """``fewer`` requests than fill this device with pairs of ``parts`` parts each."""
    return (3 - parts) * sm90.num_parts(DEVICE.index or 0, rows, 1) - fewer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "parts, fewer, heads_q, seq_len_q",
    [(1, 4, 128, 1), (1, 1, 128, 1), (1, 6, 128, 2), (2, 2, 64, 1), (2, 1, 16, 2)],
)
def test_pairs(parts: int, fewer: int, heads_q: int, seq_len_q: int, causal: bool) -> None:
    lengths = ragged(paired_batch(parts, fewer, heads_q * seq_len_q), 6000)
    problem = make(lengths, heads_q=heads_q, seq_len_q=seq_len_q, causal=causal, poison=torch.nan)
    assert parts_a_pair(problem) == parts
    plan = problem.plan()
    first = check(problem, plan)
    for _ in range(5):
        assert_same_bits(problem.run(plan), first)


@pytest.mark.parametrize("parts", [1, 2])
def test_pairs_with_queries_that_have_no_map(parts: int) -> None:
    """Threads that gather a tile find the request from anywhere, too."""
    problem = make(ragged(paired_batch(parts, 3, 24), 2000), heads_q=12, seq_len_q=2)
    assert parts_a_pair(problem) == parts
    heads_first = problem.but(q=problem.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert has_map(problem)
    assert not has_map(heads_first)
    plan = problem.plan()
    assert_same_bits(heads_first.run(plan), check(problem, plan))


@pytest.mark.parametrize(
    "parts, fewer, heads_q, live", [(1, 4, 128, 70), (2, 2, 64, 40), (2, 2, 64, 1)]
)
def test_pairs_of_more_requests_than_there_are(
    parts: int, fewer: int, heads_q: int, live: int
) -> None:
    """The longer of a pair may be gone, or the shorter."""
    whole = make(ragged(paired_batch(parts, fewer, heads_q), 6000), heads_q=heads_q)
    assert parts_a_pair(whole) == parts
    metadata, _ = whole.plan()
    shrunk = whole.but(
        q=whole.q[:live],
        block_table=whole.block_table[:live],
        cache_seqlens=whole.cache_seqlens[:live],
    )
    check(shrunk, (metadata, None))


@pytest.mark.parametrize("parts, heads_q", [(1, 128), (2, 64)])
def test_pairs_made_for_other_lengths(parts: int, heads_q: int) -> None:
    batch = paired_batch(parts, 2, heads_q)
    problem = make(ragged(batch, 6000, seed=0), heads_q=heads_q, poison=torch.nan)
    other = torch.tensor(ragged(batch, 6000), dtype=torch.int32, device=DEVICE)
    assert parts_a_pair(problem.but(cache_seqlens=other)) == parts
    check(problem, problem.plan(other))


def by_hand(problem: Problem, rows: list[list[int]]) -> Plan:
    idle = [[0, 0, -1, 0, 0, 0, 0, 0]] * (num_parts(problem) - len(rows))
    return torch.tensor(rows + idle, dtype=torch.int32, device=DEVICE), None


LENGTHS = [3000, 1100, 64, 2000]
LINE = [[0, 0, 0, 20, 0, 1, 2, 0], [0, 20, 0, 47, 1, 0, 0, 0], [1, 0, 2, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("heads_q", [16, 64, 128])
@pytest.mark.parametrize("part", [0, 1, 2, 3], ids=["head", "tail", "run", "nothing"])
def test_a_request_behind_any_others(part: int, heads_q: int) -> None:
    """Whatever a part has: a first piece, a last one, whole requests, or nothing."""
    problem = make(LENGTHS, heads_q=heads_q, poison=torch.nan)
    rows = [list(row) for row in LINE] + [[0, 0, -1, 0, 0, 0, 0, 0]]
    rows[part][7] = 3 + 1
    plan = by_hand(problem, rows)
    first = check(problem, plan)
    for _ in range(10):
        assert_same_bits(problem.run(plan), first)


@pytest.mark.parametrize("extra", [-1, 5, 2**31 - 1, -(2**31)])
def test_a_request_that_there_is_not_is_left_out(extra: int) -> None:
    problem = make(LENGTHS, poison=torch.nan)
    rows = [[*row[:7], extra] for row in LINE]
    out, lse = problem.poisoned()
    out[3], lse[3] = 7.0, 8.0
    problem.run(by_hand(problem, rows), out, lse)
    expected = problem.expected()
    assert_matches((out[:3], lse[:3]), (expected[0][:3], expected[1][:3]))
    assert torch.equal(out[3], torch.full_like(out[3], 7.0))
    assert torch.equal(lse[3], torch.full_like(lse[3], 8.0))
