"""Lengths that are written while a call runs: its results are not defined then, but it ends."""

from __future__ import annotations

import pytest
from interpreter import python

LENGTHS_CHANGE = """
import torch
from problem import check, make

problem = make([4096] * 48, heads_q=HEADS)
plan = problem.plan()
before = problem.cache_seqlens.clone()
lengths = [torch.full((48,), n, dtype=torch.int32).pin_memory() for n in (0, 4096, 700, 3000)]
copies = torch.cuda.Stream()
result = problem.poisoned()
torch.cuda.synchronize()
for turn in range(400):
    problem.run(plan, *result)
    with torch.cuda.stream(copies):  # by the copy engine: kernels would wait for a free SM
        for i in range(10):
            problem.cache_seqlens.copy_(lengths[(turn + i) % 4], non_blocking=True)
torch.cuda.synchronize()
problem.cache_seqlens.copy_(before)
torch.cuda.synchronize()
check(problem, plan)
print("ended")
"""


@pytest.mark.parametrize("heads_q", [16, 64, 128, 320])
def test_lengths_may_change_while_calls_run(heads_q: int) -> None:
    """With several row blocks two roles look lengths up; they may find different ones."""
    assert python(LENGTHS_CHANGE.replace("HEADS", str(heads_q)), timeout=60) == "ended\n"
