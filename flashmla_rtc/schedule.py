"""The split plan: how a batch is cut into parts, one for each SM or group of SMs.

The GPU's planner is ``kernels/mla_schedule.cuh``; its header tells the model and the search.
``plan_numpy`` is the same integer arithmetic in NumPy: it plans for the CPU, and the tests hold the
two to equality. What a row of the plan means is told in ``kernels/mla_plan.cuh``.
"""

from __future__ import annotations

import functools

import numpy as np

from . import geometry, schedule_pairs
from .geometry import COST_UNIT, CostModel


def num_sm_parts(num_sms: int, rows_per_group: int, heads_k: int) -> int:
    """How many parts a plan has on a device with ``num_sms`` SMs.

    A part keeps one SM busy for each block of 64 query rows of each KV head. The batch does not
    matter.
    """
    row_blocks = -(-rows_per_group // geometry.BLOCK_ROWS)
    return min(max(num_sms // (row_blocks * heads_k), 1), geometry.MAX_PARTS)


def planned_blocks(cache_seqlens: np.ndarray) -> np.ndarray:
    """Blocks of 64 keys that the planner counts for each request; int64 (batch,)."""
    lengths = np.maximum(cache_seqlens.astype(np.int64), 0)
    cap = geometry.MAX_PLANNED_BLOCKS // max(len(lengths), 1)
    return np.minimum(-(-lengths // geometry.BLOCK_KEYS), cap)


# Measured on an H100, in microseconds (docs/performance.md): a block of keys when every SM streams,
# with one row block and with two or more; what surrounds a piece of `fill` rows of 64; the merge,
# and what each piece adds to it, with one row block and with more.
_BLOCK_US = (3.3, 1.9)
_SEGMENT_US = (3.0, 3.0)  # constant, and for a full tile
_PIECE_US = (1.0, 4.5)
_MERGE_US = 4.0
_MERGE_LONGEST_US = (0.02, 0.1)
_POOLED = (6, 0)  # with one row block memory is the limit


@functools.cache
def cost_model(rows_per_group: int, heads_k: int) -> CostModel:
    """What the planner weighs for these head counts."""
    unit = _BLOCK_US[rows_per_group > geometry.BLOCK_ROWS] / COST_UNIT
    fill = min(rows_per_group / geometry.BLOCK_ROWS, 1.0)
    return CostModel(
        segment=round((_SEGMENT_US[0] + fill * _SEGMENT_US[1]) / unit),
        piece=round((_PIECE_US[0] + fill * _PIECE_US[1]) / unit),
        merge=round(_MERGE_US / unit),
        merge_longest=round(16 * _MERGE_LONGEST_US[rows_per_group > geometry.BLOCK_ROWS] / unit),
        pooled=_POOLED[rows_per_group > geometry.BLOCK_ROWS],
    )


class Planner:
    """Plans that cut a line, and what all plans are measured by."""

    def __init__(self, cache_seqlens: np.ndarray, num_parts: int, model: CostModel) -> None:
        self.blocks = planned_blocks(cache_seqlens)
        self.batch = len(self.blocks)
        self.model = model
        self.prefix = np.zeros(self.batch + 1, np.int64)
        np.cumsum(model.segment + COST_UNIT * self.blocks, out=self.prefix[1:])
        self.total = int(self.prefix[-1])
        self.total_blocks = int(self.blocks.sum())
        self.useful_parts = min(max(self.total_blocks, 1), num_parts)

    def position(self, request: np.ndarray, block: np.ndarray) -> np.ndarray:
        inside = np.where(block > 0, self.model.segment + COST_UNIT * block, 0)
        return self.prefix[request] + inside

    def line(self, request_cost: int) -> np.ndarray:
        """Where each request begins, if one costs ``request_cost`` and its blocks; (batch + 1,)."""
        return self.prefix - np.arange(self.batch + 1) * (self.model.segment - request_cost)

    def cuts(self, parts: int, slack: int, request_cost: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts + 1 cuts as (request, block) pairs: each stands before that block."""
        line = self.line(request_cost)
        x = request_cost + (line[-1] - request_cost) * np.arange(parts + 1, dtype=np.int64) // parts
        request = np.searchsorted(line[:-1], x, side="right") - 1
        inside = x - line[request] - request_cost
        block = np.where(inside > 0, inside // COST_UNIT, 0)
        blocks = self.blocks[request]
        to_end = COST_UNIT * (blocks - block) <= slack
        to_begin = COST_UNIT * block <= slack
        request = np.where(to_end & ~to_begin, request + 1, request)
        block = np.where(to_begin | to_end, 0, block)
        request[0], block[0] = 0, 0
        request[-1], block[-1] = self.batch, 0
        return request, block

    def part_costs(self, parts: int, slack: int, request_cost: int) -> np.ndarray:
        request, block = self.cuts(parts, slack, request_cost)
        position = self.position(request, block)
        inside = block > 0
        cost = position[1:] - position[:-1]
        cost = cost + np.where(inside[:-1], self.model.segment + self.model.piece, 0)
        new_piece = inside[1:] & (~inside[:-1] | (request[:-1] < request[1:]))
        return cost + np.where(new_piece, self.model.piece, 0)

    def cost(self, parts: int, slack: int, request_cost: int) -> int:
        """The finish time that the model gives a candidate."""
        request, block = self.cuts(parts, slack, request_cost)
        line = self.line(request_cost)
        first = line[request] * parts // max(int(line[-1]) - request_cost, 1) + 1
        most_pieces = int(np.where(block > 0, np.arange(parts + 1) - first + 2, 0).max())
        return int(self.part_costs(parts, slack, request_cost).max()) + self.merge(most_pieces)

    def merge(self, most_pieces: int) -> int:
        """What merging costs; ``most_pieces`` of a request, 0 if none is cut."""
        model = self.model
        return model.merge + model.merge_longest * most_pieces // 16 if most_pieces else 0

    def total_cost(self, parts: int, slack: int, request_cost: int) -> int:
        return int(self.part_costs(parts, slack, request_cost).sum())

    def candidate(self, index: int) -> tuple[int, int, int]:
        choice = index % 16
        if choice == 0:
            requests_a_part = -(-self.batch // self.useful_parts)
            parts = -(-self.batch // requests_a_part)
        elif choice == 1:
            blocks_a_part = -(-self.total_blocks // self.useful_parts)
            parts = max(-(-self.total_blocks // max(blocks_a_part, 1)), 1)
        elif choice == 15 and self.batch <= self.useful_parts:
            parts = self.useful_parts // self.batch * self.batch
        else:
            parts = max(self.useful_parts * (18 - choice) // 16, 1)
        eighths = (1 << (index // 16)) >> 1
        request_cost = 0 if choice in (1, 15) else self.model.segment
        return parts, self.total // parts // 8 * eighths, request_cost

    def best(self) -> tuple[int, int, int]:
        if self.useful_parts == 1:  # all of them cut nothing
            return self.candidate(0)
        candidates = [self.candidate(i) for i in range(geometry.SCHEDULE_CANDIDATES)]
        return min(candidates, key=lambda candidate: self.cost(*candidate))

    def pooled(self, cost: int, total: int) -> int:
        """A finish time, less what SMs that are done before leave to the others."""
        return cost - max(cost - total // self.useful_parts, 0) // 16 * self.model.pooled


def plan_numpy(
    cache_seqlens: np.ndarray, num_parts: int, model: CostModel
) -> tuple[np.ndarray, np.ndarray]:
    """The plan that the GPU makes, on the CPU.

    Args:
        cache_seqlens: int32 (batch,), keys of each request.
        num_parts: rows of the plan, from :func:`num_sm_parts`.
        model: what the planner weighs, from :func:`cost_model`.

    Returns:
        ``tile_scheduler_metadata`` int32 (num_parts, 8) and ``num_splits`` int32 (batch + 1,), the
        pieces of all requests before each.
    """
    batch = len(cache_seqlens)
    plan = np.tile(np.array(schedule_pairs.IDLE, np.int32), (num_parts, 1))
    num_splits = np.zeros(batch + 1, np.int32)
    if batch == 0:
        return plan, num_splits

    planner = Planner(np.asarray(cache_seqlens), num_parts, model)
    line = planner.best()
    groups = schedule_pairs.cheaper_pairs(planner, line)
    if groups:
        rows = [row for group in groups for row in schedule_pairs.rows(planner, group)]
        plan[: len(rows)] = rows
        pieces = np.ones(batch, np.int32)
        pieces[[group.longer for group in groups if group.cut]] = 2
        num_splits[1:] = np.cumsum(pieces)
        return plan, num_splits
    request, block = planner.cuts(*line)
    inside = block > 0
    cuts_in = np.bincount(request[inside], minlength=batch)  # cuts inside each request
    num_splits[1:] = np.cumsum(1 + cuts_in)
    nearest = np.minimum(request, batch - 1)
    rank = np.cumsum(inside) - (np.cumsum(cuts_in) - cuts_in)[nearest]
    for part in range(len(request) - 1):
        i, a = int(request[part]), int(block[part])
        j, b = int(request[part + 1]), int(block[part + 1])
        if (i, a) == (j, b):
            continue
        begins_here = i < j or a == 0
        plan[part] = (
            i,
            a,
            j if b else j - 1,
            b if b else planner.blocks[j - 1],
            rank[part] if a else 0,
            b > 0,
            cuts_in[j] + 1 if b and begins_here else 0,
            0,
        )
    return plan, num_splits
