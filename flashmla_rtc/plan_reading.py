"""What a split plan means, on the host: which part computes which blocks of which request.

The rules are those of ``kernels/mla_plan.cuh``, for plans of the GPU and of the CPU alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import arrays, geometry, messages, plan_checks, schedule

H100_SMS = 132


class Piece(NamedTuple):
    """Blocks [begin, end) of 64 keys of a request, computed by a part. ``cut``: others have the
    rest.
    """

    part: int
    request: int
    begin: int
    end: int
    cut: bool


@dataclass(frozen=True)
class PlanFacts:
    """A plan in numbers.

    parts: rows of the plan; parts_used: those with any block. requests, blocks: of 64 keys, all.
    least, mean, most: blocks a part, over all parts. balance: mean over most, in per cent: the
    share of the parts' time that is used if every block takes as long and pieces cost nothing.
    requests_cut: those that more than one part computes, and pieces: what they are cut into.
    """

    parts: int
    parts_used: int
    requests: int
    blocks: int
    least: int
    mean: float
    most: int
    balance: float
    requests_cut: int
    pieces: int


def plan_for(
    cache_seqlens: Any,
    num_q_tokens_per_head_k: int,
    num_heads_k: int = 1,
    *,
    num_sms: int = H100_SMS,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The plan that ``get_mla_metadata`` makes on a Hopper GPU with ``num_sms`` SMs, made here.

    For looking at plans without that GPU. Lengths on a GPU are copied to the host.

    Args:
        cache_seqlens: int32 (batch,), keys of each request, or a list or tuple of integers.
        num_q_tokens_per_head_k: query rows of one KV head: seq_len_q * heads_q // heads_k.
        num_heads_k: KV heads.
        num_sms: 132 on an H100 or H200 SXM, 114 on an H100 PCIe, 78 on an H20. A plan has 256
            parts (``geometry.MAX_PARTS``) at most, however many SMs there are.

    Returns:
        ``tile_scheduler_metadata`` int32 (num_sm_parts, 8) and ``num_splits`` int32 (batch + 1,),
        NumPy arrays.

    Raises:
        TypeError, ValueError: see the message.
    """
    given = np.ascontiguousarray(_int32(cache_seqlens, "cache_seqlens", 1))
    plan_checks.check_planning(
        arrays.view(given, "cache_seqlens"), num_q_tokens_per_head_k, num_heads_k
    )
    num_sms = messages.integer(num_sms, "num_sms")
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, but it is {num_sms}.")
    rows, heads = int(num_q_tokens_per_head_k), int(num_heads_k)
    parts = schedule.num_sm_parts(num_sms, rows, heads)
    return schedule.plan_numpy(given, parts, schedule.cost_model(rows, heads))


class ReadPlan:
    """A plan on the host, with the lengths that it is read for.

    plan: int32 (parts, 8). lengths: int32 (requests,). blocks: of each request. pieces: all pieces,
    also those without a block, in the order of parts and of work in each.
    """

    def __init__(self, plan: Any, num_splits: Any, cache_seqlens: Any) -> None:
        self.plan = _int32(plan, "tile_scheduler_metadata", 2)
        if self.plan.shape[0] < 1 or self.plan.shape[1] != geometry.PLAN_COLUMNS:
            raise ValueError(
                f"tile_scheduler_metadata must have shape (num_sm_parts, {geometry.PLAN_COLUMNS}), "
                f"but its shape is {self.plan.shape}."
            )
        self.lengths = _int32(cache_seqlens, "cache_seqlens", 1)
        planned = len(self.lengths)
        if num_splits is not None:
            planned = len(_int32(num_splits, "num_splits", 1)) - 1
            if not 0 <= planned <= len(self.lengths):
                raise ValueError(
                    "num_splits must have between 1 and batch + 1 = "
                    f"{len(self.lengths) + 1} elements, but it has {planned + 1}."
                )
        # A plan may be for fewer requests than there are: the others are padding.
        self.lengths = self.lengths[:planned]
        lengths = np.maximum(self.lengths.astype(np.int64), 0)
        self.blocks = (-(-lengths // geometry.BLOCK_KEYS)).tolist()
        self.pieces = [
            piece for part, row in enumerate(self.plan.tolist()) for piece in self._of(part, row)
        ]

    def _of(self, part: int, row: list[int]) -> list[Piece]:
        """The work of one part: ``struct Part`` of mla_plan.cuh."""
        parts, batch = len(self.plan), len(self.blocks)
        first, last = min(max(row[0], 0), batch), min(max(row[2], -1), batch - 1)
        begins = row[1] if parts > 1 else 0
        end_is_cut = bool(row[5]) and parts > 1 and row[2] < batch
        extra = row[7] - 1 if 0 < row[7] <= batch else -1
        found = []
        for request in range(first, last + 1):
            blocks = self.blocks[request]
            begin = min(max(begins, 0), blocks) if request == first else 0
            cut = end_is_cut and request == last
            end = max(min(max(row[3], 0), blocks) if cut else blocks, begin)
            found.append(Piece(part, request, begin, end, begin > 0 or cut))
        if extra >= 0:
            found.append(Piece(part, extra, 0, self.blocks[extra], False))
        return found

    def loads(self) -> list[int]:
        """Blocks of each part."""
        loads = [0] * len(self.plan)
        for piece in self.pieces:
            loads[piece.part] += piece.end - piece.begin
        return loads

    def facts(self) -> PlanFacts:
        loads = self.loads()
        most, total = max(loads), sum(loads)
        cut = [piece.request for piece in self.pieces if piece.cut]
        return PlanFacts(
            parts=len(loads),
            parts_used=sum(load > 0 for load in loads),
            requests=len(self.blocks),
            blocks=sum(self.blocks),
            least=min(loads),
            mean=total / len(loads),
            most=most,
            balance=100 * total / (len(loads) * most) if most else 100.0,
            requests_cut=len(set(cut)),
            pieces=len(cut),
        )


def _int32(values: Any, name: str, rank: int) -> np.ndarray:
    """An int32 array of any library, or a list or tuple of integers, on the host."""
    if isinstance(values, (list, tuple)):
        try:
            host = np.array(_integers(values, name), dtype=np.int32)
        except (ValueError, OverflowError) as error:
            raise TypeError(f"{name} must hold int32 numbers: {error}.") from None
    else:
        view = arrays.view(values, name)
        if view.dtype != "int32":
            raise messages.not_int32(name, view)
        host = np.asarray(arrays.to_numpy(view))
    if host.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, but its shape is {host.shape}.")
    return host


def _integers(values: Any, name: str) -> Any:
    """``values`` with an int in place of every number, since NumPy would round and take bools."""
    if isinstance(values, (list, tuple)):
        return [_integers(value, f"{name}[{place}]") for place, value in enumerate(values)]
    return messages.integer(values, name)
