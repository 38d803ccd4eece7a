"""Where q's rows lie in memory, with NaN around them: each tile gets its rows and no others."""

from __future__ import annotations

import pytest
import torch
from plans import from_cuts
from problem import HEAD_DIM, HEAD_DIM_V, PAGE, Problem, assert_same_bits, check, make

from flashmla_rtc import maps
from flashmla_rtc.checks import DecodeShape

LENGTHS = [130, 64, 0, 65, 1, 300]
# Several requests a part, and cut ones: blocks 1 and 2 of 5 begin a part.
CUTS = [[(3, 0)], [(0, 1), (5, 2)]]


def within(q: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in a larger tensor of NaN; of the first query or request only if one is
    there for all."""
    batch, queries, heads, width = q.shape

    def nan(*shape: int) -> torch.Tensor:
        return q.new_full(shape, torch.nan)

    if layout == "contiguous":
        part = nan(batch + 2, queries, heads, width)[1:-1]
    elif layout == "wider rows":
        part = nan(batch, queries, heads, width + 72)[..., 64 : 64 + width]
    elif layout == "among heads":
        part = nan(batch, queries, heads + 3, width)[:, :, 2 : 2 + heads]
    elif layout == "among queries":
        part = nan(batch, queries + 3, heads, width)[:, 2 : 2 + queries]
    elif layout == "heads first":
        part = nan(batch, heads, queries, width).transpose(1, 2)
    elif layout == "heads first, among others":
        part = nan(batch, heads + 1, queries + 2, width)[:, 1:, 1:-1].transpose(1, 2)
    elif layout == "queries first":
        part = nan(queries, batch + 1, heads, width)[:, 1:].transpose(0, 1)
    elif layout == "requests innermost":
        part = nan(queries, heads, batch + 1, width)[:, :, 1:].permute(2, 0, 1, 3)
    elif layout == "one query for all":
        part = nan(batch, 3, heads, width)[:, 1:2]
        return part.copy_(q[:, :1]).expand(-1, queries, -1, -1)
    elif layout == "one request for all":
        part = nan(3, queries, heads, width)[1:2]
        return part.copy_(q[:1]).expand(batch, -1, -1, -1)
    else:
        raise ValueError(layout)
    return part.copy_(q)


def has_map(call: Problem) -> bool:
    batch, queries, heads, _ = call.q.shape
    dtype = str(call.q.dtype).removeprefix("torch.")
    cache = (call.k_cache.shape[0], PAGE, call.block_table.shape[1])
    shape = DecodeShape(batch, queries, heads, call.heads_k, HEAD_DIM, HEAD_DIM_V, *cache, dtype)
    return maps.query_map(shape, call.q.stride()) is not None


def check_layout(call: Problem, layout: str, is_mapped: bool) -> None:
    strided = call.but(q=within(call.q, layout))
    assert has_map(strided) == is_mapped
    call = call.but(q=strided.q.contiguous())
    for plan in (call.plan(), *(from_cuts(call, cuts) for cuts in CUTS)):
        assert_same_bits(strided.run(plan), check(call, plan))


@pytest.mark.parametrize(
    "heads_q, heads_k, queries, layout, is_mapped",
    [
        (16, 1, 1, "contiguous", True),
        (5, 1, 1, "among heads", True),
        (128, 1, 1, "wider rows", True),
        (126, 1, 1, "among queries", True),
        (16, 2, 1, "requests innermost", True),
        (10, 2, 1, "among heads", True),
        # Several queries, at equal distances from head to head: all rows are one dimension.
        (16, 1, 3, "contiguous", True),
        (5, 1, 3, "contiguous", True),
        (126, 1, 2, "among queries", True),
        (24, 1, 3, "wider rows", True),
        # Boxes of whole queries, or of a part of one.
        (16, 1, 3, "among heads", True),
        (8, 1, 3, "heads first", True),
        (32, 1, 3, "among heads", True),
        (128, 1, 2, "among heads", True),
        (128, 1, 2, "queries first", True),
        (128, 1, 2, "heads first, among others", True),
        (1, 1, 20, "among heads", True),
        (16, 2, 3, "contiguous", True),
        (16, 2, 3, "wider rows", True),
        (128, 2, 2, "among heads", True),
        # No box has the rows of a tile.
        (10, 2, 3, "contiguous", False),
        (24, 1, 3, "among heads", False),
        (96, 1, 2, "among heads", False),
        (12, 1, 2, "heads first", False),
        (16, 1, 3, "one query for all", False),
        (128, 1, 2, "one query for all", False),
        (16, 1, 3, "one request for all", False),
        (128, 1, 1, "one request for all", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_layouts_of_q(
    heads_q: int, heads_k: int, queries: int, layout: str, is_mapped: bool, dtype: torch.dtype
) -> None:
    sizes = {"heads_q": heads_q, "heads_k": heads_k, "seq_len_q": queries}
    check_layout(make(LENGTHS, **sizes, causal=True, dtype=dtype), layout, is_mapped)


ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_any_number_of_heads(rows: int, dtype: torch.dtype) -> None:
    check_layout(make(LENGTHS, heads_q=rows, dtype=dtype), "among heads", True)


@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_queries(rows: int) -> None:
    check_layout(make(LENGTHS, heads_q=1, seq_len_q=rows, causal=True), "among heads", True)


@pytest.mark.parametrize("heads_q", [16, 80])
def test_a_layout_after_another_at_one_address(heads_q: int) -> None:
    """Calls are launched from notes: each with the map of its own look and address."""
    call = make(LENGTHS, heads_q=heads_q, seq_len_q=2, causal=True)
    plan = call.plan()
    batch, queries, heads, width = call.q.shape
    memory = call.q.new_empty(2 * batch * queries * heads * width)
    looks = [
        (queries * heads * width, heads * width, width),
        (queries * heads * width, width, queries * width),
        (2 * queries * heads * width, 2 * heads * width, width),
    ]
    expected = check(call, plan)
    for turn in range(12):
        start = turn % 4 * heads * width // 2 if turn % 3 < 2 else 0  # the third look needs all
        strided = memory.fill_(torch.nan).as_strided(call.q.shape, (*looks[turn % 3], 1), start)
        strided.copy_(call.q)
        assert_same_bits(call.but(q=strided).run(plan), expected)
