"""The numbers that the kernels are compiled for and the structs that they take, declared once."""

from __future__ import annotations

from dataclasses import dataclass

from .rtc.params import ParamStruct

BLOCK_ROWS = 64
"""Query rows a thread block works on; a row is a (query, head) pair of one KV head."""

BLOCK_KEYS = 64
"""Keys a block of the plan holds: one page of the cache."""

BOX_COLUMNS = 64
"""Columns of a box of shared memory that the copy engine fills: 128 bytes a row."""

HEAD_DIM = 576
HEAD_DIM_V = 512
PAGE_BLOCK_SIZE = 64

COST_UNIT = 16
"""The planner counts in 1/16 of the time that one part needs for one block of keys."""

MAX_PLANNED_BLOCKS = 1 << 26
"""Cap on the blocks of a whole batch that the planner's 32-bit sums count."""

MAX_PARTS = 256
"""Most parts of a plan; no Hopper GPU has more SMs."""

MERGE_PATIENCE = 10_000
"""Looks, of about a microsecond, after which a thread block no longer waits for others' pieces."""

SCHEDULE_THREADS = 1024
SCHEDULE_CANDIDATES = 64
DECODE_THREADS = 512
DECODE_CLUSTER = 2
"""Neighbouring row blocks launched as one cluster, where their number is a multiple of it."""

PLAN_COLUMNS = 8

TILE_STRIPS = 8
"""Strips of 16 rows and 256 columns in a tile of partial results."""

TILE_STATE_BYTES = 32
"""What is kept of a tile from call to call: MergeState of ``mla_decode_merge.cuh``."""

LINE_BYTES = 512
STRIP_LINES = 32
STRIP_WEIGHTS_BYTES = 256
"""A strip as ``mla_decode_partial.cuh`` keeps it: lines, half as many if in fp16, and weights."""


FEW_ROWS = 32
"""Up to so many rows a query tile comes in boxes of fewer than 64, and bf16 calls keep pieces in
float32."""


def kept_in_halves(dtype: str, rows_per_group: int) -> bool:
    """Whether pieces of cut requests are kept in fp16: of bf16 calls with more than a few rows."""
    return dtype == "bfloat16" and rows_per_group > FEW_ROWS


SHARED_BASE = 1024
"""Where a block's dynamic shared memory begins: behind what the driver reserves on Hopper."""

DECODE_SHARED_BYTES = 232_448
"""sizeof(Shared) in mla_decode_block.cuh, which asserts it."""


@dataclass(frozen=True)
class CostModel:
    """What the planner weighs, in 1/16 of the time of one block of keys (see ``mla_schedule.cuh``).

    segment: every piece of a request: load the query tile, fill the pipeline, write an output.
    piece: a piece of a cut request, on top: its output goes to the workspace.
    merge: any cut at all: pieces are waited for and merged.
    merge_longest: the same, for each piece of the most divided request, in 1/16 of the unit.
    pooled: sixteenths of the difference of the dearest part and the mean that are not lost, since
        SMs that are done leave bandwidth to the others. Counts only where plans of pairs are
        compared with the line.
    """

    segment: int = 32
    piece: int = 16
    merge: int = 24
    merge_longest: int = 16
    pooled: int = 0


DECODE_PARAMS = ParamStruct(
    "MlaDecodeParams",
    (
        # k_cache as (column of a run, row of a page, run of 64 columns, KV head, page number), in
        # boxes of two runs and of one
        ("TensorMap", "k_map"),
        ("TensorMap", "k_tail_map"),
        # q as (head_dim, head, query, KV head, request), or zeros: see maps.py
        ("TensorMap", "q_map"),
        ("const u16*", "k"),  # [num_blocks, page_block_size, heads_k, head_dim]
        ("const u16*", "q"),  # [batch, seq_len_q, heads_q, head_dim]
        ("u16*", "out"),  # [batch, seq_len_q, heads_q, head_dim_v]
        ("float*", "lse"),  # [batch, heads_q, seq_len_q], natural logarithm
        ("const int*", "block_table"),  # [batch, max_blocks]
        ("const int*", "cache_seqlens"),  # [batch]
        ("const int*", "plan"),  # [parts, 8]
        ("void*", "partials"),  # [heads_k, row block, 2 * parts, strip], of mla_decode_partial.cuh
        ("void*", "merge_states"),  # [heads_k, row block, 2 * parts], of mla_decode_merge.cuh
        ("i64", "k_stride_page"),  # strides count elements
        ("i64", "k_stride_row"),
        ("i64", "k_stride_head"),
        ("i64", "q_stride_batch"),
        ("i64", "q_stride_seq"),
        ("i64", "q_stride_head"),
        ("i64", "out_stride_batch"),
        ("i64", "out_stride_seq"),
        ("i64", "out_stride_head"),
        ("i64", "lse_stride_batch"),
        ("i64", "lse_stride_head"),
        ("i64", "lse_stride_seq"),
        ("i64", "block_table_stride"),
        ("int", "batch"),
        ("int", "seq_len_q"),
        ("int", "heads_k"),
        ("int", "heads_per_group"),  # query heads a KV head
        ("int", "rows_per_group"),  # seq_len_q * heads_per_group
        ("int", "num_blocks"),  # pages in the cache
        ("int", "max_blocks"),  # columns of block_table
        ("int", "causal"),
        ("int", "q_map_heads"),  # extent of q_map's second dimension
        ("int", "q_map_rows"),  # of a box
        ("int", "q_is_aligned"),  # every row begins at a multiple of 16 bytes
        ("int", "out_is_aligned"),
        ("float", "scale_log2"),  # softmax_scale * log2(e)
    ),
)

SCHEDULE_PARAMS = ParamStruct(
    "MlaScheduleParams",
    (
        ("const int*", "cache_seqlens"),  # [batch]
        ("int*", "plan"),  # [num_parts, 8]
        ("int*", "num_splits"),  # [batch + 1]
        ("int", "batch"),
        ("int", "num_parts"),
        ("int", "segment_cost"),
        ("int", "piece_cost"),
        ("int", "merge_cost"),
        ("int", "merge_longest_cost"),
        ("int", "pooled"),
    ),
)
