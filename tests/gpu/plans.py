"""Split plans written by hand, in the format that ``kernels/mla_plan.cuh`` tells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from problem import DEVICE, Problem

from flashmla_rtc import arrays, sm90


def num_parts(problem: Problem) -> int:
    """How many rows a plan for this call has."""
    device = arrays.view(problem.q, "q").device.index
    return sm90.num_parts(device, problem.rows_per_group, problem.heads_k)


def from_cuts(
    problem: Problem, cuts: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A plan that cuts before block b of request r for each (r, b), in rising order.

    The ends of the batch are added. ``tile_scheduler_metadata`` and ``num_splits``.
    """
    lengths = [max(length, 0) for length in problem.cache_seqlens.tolist()]
    parts = num_parts(problem)
    ends = [(0, 0), *cuts, (len(lengths), 0)]
    assert ends == sorted(ends)
    assert len(ends) - 1 <= parts
    inside = [0] * len(lengths)  # cuts inside each request
    for request, block in cuts:
        inside[request] += block > 0
    rows = [[0, 0, -1, 0, 0, 0, 0, 0] for _ in range(parts)]
    for part, ((i, a), (j, b)) in enumerate(pairwise(ends)):
        if (i, a) == (j, b):
            continue
        last = j if b else j - 1
        end_block = b or -(-lengths[last] // 64)
        begin_split = sum(1 for cut in ends[: part + 1] if cut[0] == i and cut[1] > 0)
        merges = inside[j] + 1 if b and (i < j or a == 0) else 0
        rows[part] = [i, a, last, end_block, begin_split if a else 0, int(b > 0), merges, 0]
    splits = [0]
    for cuts_inside in inside:
        splits.append(splits[-1] + 1 + cuts_inside)
    return (
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        torch.tensor(splits, dtype=torch.int32, device=DEVICE),
    )
