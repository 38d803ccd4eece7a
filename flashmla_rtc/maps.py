"""The tensor maps of a decode call: how the copy engine finds pages of the cache and tiles of q."""

from __future__ import annotations

from typing import NamedTuple

from . import geometry
from .arrays import View
from .checks import DecodeShape
from .rtc.tensor_map import BYTES as BYTES
from .rtc.tensor_map import tiled_map

_MOST_BYTES = 1 << 40
"""Strides of a tensor map are below this."""


class QueryMap(NamedTuple):
    """The map of q but for its address: ``(head_dim, head, query, KV head, request)``.

    A box holds the rows of a tile, one for each (query, head), queries first: 64, or 16 or 32 where
    there are no more. Where rows of a group lie at equal distances all of them
    count as heads of one query.
    """

    dtype: str
    extents: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]

    def at(self, pointer: int) -> bytes:
        """The map for q at ``pointer``, a multiple of 16."""
        return tiled_map(pointer, *self)


def query_map(shape: DecodeShape, strides: tuple[int, ...]) -> QueryMap | None:
    """The map of a q whose rows are aligned to 16 bytes; None where no box holds a tile's rows.

    Args:
        strides: of q's batch, queries and heads, in elements.
    """
    heads, queries = shape.heads_per_group, shape.seq_len_q
    few = shape.rows_per_group <= geometry.FEW_ROWS
    box_rows = -(-shape.rows_per_group // 16) * 16 if few else geometry.BLOCK_ROWS
    batch_stride, query_stride, head_stride = strides[:3]
    group_stride = heads * head_stride
    if queries == 1 or (shape.heads_k == 1 and query_stride == heads * head_stride):
        heads, queries = shape.rows_per_group, 1
    box_heads = min(heads, box_rows) if queries > 1 else box_rows
    if box_rows % box_heads or (queries > 1 and heads % box_heads):
        return None
    extents = (heads, queries, shape.heads_k, shape.batch)
    natural = shape.head_dim  # what the stride of a single index says does not matter
    strides_bytes = tuple(
        2 * (stride if extent > 1 else natural)
        for stride, extent in zip(
            (head_stride, query_stride, group_stride, batch_stride), extents, strict=True
        )
    )
    if not all(0 < stride < _MOST_BYTES for stride in strides_bytes):
        return None
    return QueryMap(
        shape.dtype,
        (shape.head_dim, *extents),
        strides_bytes,
        (geometry.BOX_COLUMNS, box_heads, box_rows // box_heads, 1, 1),
    )


def cache_maps(shape: DecodeShape, k_cache: View, metadata: View) -> tuple[bytes, bytes]:
    """The cache as (column of a run, row of a page, run of 64 columns, KV head, page).

    Boxes of the first map are two runs of columns, those of the second one.

    A map can't be empty. For a cache without pages it names one that is never in use, at an address
    that is as good as any other: no page number is valid then, and such pages are read as zeros
    from outside the map.
    """
    page_stride, row_stride, head_stride = (
        stride * 2 if extent > 1 else shape.head_dim * 2
        for stride, extent in zip(k_cache.strides[:3], k_cache.shape[:3], strict=True)
    )
    columns = geometry.BOX_COLUMNS
    runs = shape.head_dim // columns
    extents = (columns, shape.page_block_size, runs, shape.heads_k, max(shape.num_blocks, 1))
    strides = (row_stride, columns * 2, head_stride, page_stride)
    pointer = k_cache.pointer if shape.num_blocks else metadata.pointer
    pairs, single = (
        tiled_map(
            pointer, shape.dtype, extents, strides, (columns, geometry.BLOCK_KEYS, runs_a_box, 1, 1)
        )
        for runs_a_box in (2, 1)
    )
    return pairs, single
