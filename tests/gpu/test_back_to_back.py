"""Small calls one behind the other, whose inputs are written just before.

A kernel looks at its plan, at lengths, page numbers and keys before the kernel ahead of it has
ended. What it sees then may be old, and must not be heard of in any result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problem import DEVICE, Problem, assert_matches, assert_same_bits, make

import flashmla_rtc

LONGEST, TURNS = 1500, 96
Result = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """A call whose table, lengths and cache are written anew, and what it gives with each content.

    lengths: two batches. plans: one for each of them, right for both.
    """

    def __init__(self, lengths: list[list[int]], heads_q: int, seed: int) -> None:
        batch = len(lengths[0])
        one, two = (make([LONGEST] * batch, heads_q=heads_q, seed=seed + i) for i in range(2))
        first, second = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in lengths)
        # Each but for one thing like the one before.
        self.contents = [
            (one.block_table, first, one.k_cache),
            (two.block_table, first, one.k_cache),
            (two.block_table, second, one.k_cache),
            (two.block_table, second, two.k_cache),
        ]
        self.call: Problem = one.but(
            block_table=one.block_table.clone(),
            cache_seqlens=first.clone(),
            k_cache=one.k_cache.clone(),
        )
        self.plans = [self.call.plan(n) for n in (first, second)]
        self.expected = [[self.alone(i, plan) for plan in self.plans] for i in range(4)]

    def fill(self, content: int, last: int) -> None:
        """By kernels, not by copies, and in an order that ends with another array each time."""
        call = self.call
        arrays = (call.block_table, call.cache_seqlens, call.k_cache)
        pairs = list(zip(self.contents[content], arrays, strict=True))
        for source, array in pairs[last % 3 :] + pairs[: last % 3]:
            torch.mul(source, 1, out=array)

    def alone(self, content: int, plan: Any) -> Result:
        """What the call gives with nothing before it and nothing behind it."""
        self.fill(content, 0)
        torch.cuda.synchronize()
        result = self.call.run(plan)
        torch.cuda.synchronize()
        assert_matches(result, self.call.expected())
        return result


class Sequence:
    """Two layers of different batches in turn. ``plans_anew``: a kernel that plans is in front of
    every call, and writes where other plans were."""

    def __init__(self, heads_q: int, plans_anew: bool) -> None:
        self.layers = [
            Layer([[LONGEST], [70]], heads_q, 1),
            Layer([[LONGEST, 64, 700], [3, LONGEST, 0]], heads_q, 3),
        ]
        self.plans_anew = plans_anew
        self.results = [self.layer(turn).call.poisoned() for turn in range(TURNS)]

    def layer(self, turn: int) -> Layer:
        return self.layers[turn // 2 % 2]  # the same twice, then the other

    def content(self, turn: int) -> int:
        return turn // 4 % 4

    def plan(self, turn: int) -> int:
        """Which batch of lengths the plan is for."""
        return self.content(turn) // 2 if self.plans_anew else turn // 3 % 2

    def run(self) -> None:
        for turn, result in enumerate(self.results):
            layer = self.layer(turn)
            if turn % 2 == 0:
                layer.fill(self.content(turn), turn // 2)
            planned = layer.plans[self.plan(turn)]
            layer.call.run(layer.call.plan() if self.plans_anew else planned, *result)

    def check(self, run: Callable[[], None]) -> None:
        for out, lse in self.results:
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        for turn, result in enumerate(self.results):
            expected = self.layer(turn).expected[self.content(turn)][self.plan(turn)]
            assert_same_bits(result, expected)


@pytest.mark.parametrize("plans_anew", [False, True], ids=["plans given", "plans anew"])
@pytest.mark.parametrize("heads_q", [16, 128])
def test_eager_calls(heads_q: int, plans_anew: bool) -> None:
    sequence = Sequence(heads_q, plans_anew)
    for _ in range(5):
        sequence.check(sequence.run)


@pytest.mark.parametrize("plans_anew", [False, True], ids=["plans given", "plans anew"])
@pytest.mark.parametrize("heads_q", [16, 128])
def test_calls_in_a_graph(heads_q: int, plans_anew: bool) -> None:
    flashmla_rtc.prepare()
    sequence = Sequence(heads_q, plans_anew)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sequence.run()
    for _ in range(5):
        sequence.check(graph.replay)
