"""Plans of pairs of requests: ``kernels/mla_schedule_pairs.cuh`` in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .geometry import COST_UNIT

if TYPE_CHECKING:
    from .schedule import Planner

IDLE = (0, 0, -1, 0, 0, 0, 0, 0)
"""The row of a part that has nothing to do."""


class Group(NamedTuple):
    """A request, or two, with ``parts`` parts of their own, one or two.

    shorter: -1 if there is none. cut: the block before which the longer one is cut, or 0.
    cost, total: of the dearer part, and of both.
    """

    parts: int
    longer: int
    shorter: int
    cut: int
    cost: int
    total: int


def cheaper_pairs(planner: Planner, line: tuple[int, int, int]) -> list[Group]:
    """The groups of the cheaper plan of pairs if that is cheaper than ``line``, else none."""
    found: list[Group] = []
    cheapest = planner.pooled(planner.cost(*line), planner.total_cost(*line))
    for parts in (1, 2):
        groups = grouped(planner, parts)
        if not groups:
            continue
        merge = planner.merge(2 if any(group.cut for group in groups) else 0)
        dearest = max(group.cost for group in groups)
        cost = planner.pooled(dearest + merge, sum(group.total for group in groups))
        if cost < cheapest:
            cheapest, found = cost, groups
    return found


def grouped(planner: Planner, parts: int) -> list[Group]:
    """All requests in groups of ``parts`` parts and at most two requests, the longest with the
    shortest; none if that can't be.
    """
    count = planner.useful_parts // parts
    if not count < planner.batch <= 2 * count:
        return []
    alone = 2 * count - planner.batch
    by_length = np.argsort(-planner.blocks, kind="stable").tolist()
    rest = by_length[alone:]
    requests = [(request, -1) for request in by_length[:alone]]
    requests += zip(rest[: len(rest) // 2], rest[::-1], strict=False)
    dearest = max(_group(planner, parts, *request).cost for request in requests)
    return [_group(planner, parts, *request, enough=dearest) for request in requests]


def _group(planner: Planner, parts: int, longer: int, shorter: int, enough: int = 0) -> Group:
    """``longer`` is not cut if it costs no more than ``enough`` whole."""
    model, blocks = planner.model, int(planner.blocks[longer])
    whole = model.segment + COST_UNIT * blocks
    other = model.segment + COST_UNIT * int(planner.blocks[shorter]) if shorter >= 0 else 0
    total = whole + other
    if parts == 1:
        return Group(1, longer, shorter, 0, total, total)
    cut = (total - model.segment) // (2 * COST_UNIT)  # so that both parts take as long
    if whole > enough and 0 < cut < blocks:
        piece = model.segment + model.piece
        cost = max(piece + COST_UNIT * cut, piece + COST_UNIT * (blocks - cut) + other)
        if cost < whole:
            return Group(2, longer, shorter, cut, cost, total + piece + model.piece)
    return Group(2, longer, shorter, 0, whole, total)


def rows(planner: Planner, group: Group) -> list[tuple[int, ...]]:
    """The rows of a group's parts."""
    longer, shorter, blocks = group.longer, group.shorter, int(planner.blocks[group.longer])
    if group.parts == 1:
        return [(longer, 0, longer, blocks, 0, 0, 0, shorter + 1)]
    if group.cut:
        return [
            (longer, 0, longer, group.cut, 0, 1, 2, 0),
            (longer, group.cut, longer, blocks, 1, 0, 0, shorter + 1),
        ]
    first = (longer, 0, longer, blocks, 0, 0, 0, 0)
    if shorter < 0:
        return [first, IDLE]
    return [first, (shorter, 0, shorter, int(planner.blocks[shorter]), 0, 0, 0, 0)]
