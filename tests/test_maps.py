"""What the copy engine brings through the tensor maps of a call: its addresses, said in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_rtc import geometry, maps
from flashmla_rtc.checks import DecodeShape
from flashmla_rtc.maps import QueryMap

COLUMNS = geometry.BOX_COLUMNS
HEAD_DIM = geometry.HEAD_DIM
OUTSIDE = -(1 << 62)  # what arrives as zeros


class Map(NamedTuple):
    """As ``cuTensorMapEncodeTiled`` is told of a tensor of 16-bit numbers."""

    extents: tuple[int, ...]
    strides_bytes: tuple[int, ...]  # of dimensions 1..
    box: tuple[int, ...]

    def copied(self, start: tuple[int, ...]) -> np.ndarray:
        """Where each element of the box at ``start`` comes from, in elements behind the tensor's
        first: in the order in which they are put down. OUTSIDE: from nowhere."""
        rank = len(self.extents)
        strides = (1, *(stride // 2 for stride in self.strides_bytes))
        offset: Any = np.zeros((1,) * rank, np.int64)
        inside: Any = np.ones((1,) * rank, bool)
        for dimension in range(rank):
            index = start[dimension] + np.arange(self.box[dimension], dtype=np.int64)
            index = np.expand_dims(index, tuple(i for i in range(rank) if i != dimension))
            offset = offset + index * strides[dimension]
            inside = inside & (index >= 0) & (index < self.extents[dimension])
        found: np.ndarray = np.where(inside, offset, OUTSIDE)
        return found.ravel(order="F")  # dimension 0 is the innermost

    def check_limits(self) -> None:
        """What the driver asks of a description with a swizzle of 128 bytes."""
        assert len(self.extents) == len(self.box) == len(self.strides_bytes) + 1 <= 5
        assert all(1 <= extent < 1 << 32 for extent in self.extents)
        assert all(1 <= extent <= 256 for extent in self.box)
        assert self.box[0] * 2 == 128
        assert all(stride % 16 == 0 and 0 <= stride < 1 << 40 for stride in self.strides_bytes)


def decode_shape(batch: int, queries: int, group: int, heads_k: int, pages: int = 5) -> DecodeShape:
    return DecodeShape(
        batch, queries, group * heads_k, heads_k, HEAD_DIM, 512, pages, 64, 7, "bfloat16"
    )


# -- q --------------------------------------------------------------------------------------------


class Query(NamedTuple):
    """A q: sizes, and the strides of batch, queries and heads in elements."""

    shape: DecodeShape
    strides: tuple[int, ...]


groups = st.integers(1, 20) | st.sampled_from([24, 30, 32, 40, 48, 60, 64, 80, 96, 128, 192])
unused_strides = st.sampled_from([0, 1, 3, -5, -(1 << 41), 1 << 41, 576, 1 << 62])


@st.composite
def query_layouts(draw: st.DrawFn, most_queries: int = 7) -> Query:
    """Axes in any order in memory, slices of wider ones, some repeated or turned around."""
    shape = decode_shape(
        draw(st.integers(1, 3)),
        draw(st.integers(1, most_queries)),
        draw(groups),
        draw(st.sampled_from([1, 1, 2, 3])),
    )
    extents = [shape.batch, shape.seq_len_q, shape.heads_q]
    order = draw(st.sampled_from([(0, 1, 2)] * 3 + [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)]))
    strides, step = [0, 0, 0], HEAD_DIM + draw(st.sampled_from([0, 0, 8, 64]))
    for axis in reversed(order):
        strides[axis] = step
        step *= extents[axis] + draw(st.sampled_from([0, 0, 0, 1, 3]))
    for axis in range(3):
        if extents[axis] == 1:
            strides[axis] = draw(st.just(strides[axis]) | unused_strides)
        elif draw(st.integers(0, 19)) == 0:
            strides[axis] *= draw(st.sampled_from([0, -1, 1 << 30]))
    return Query(shape, (*strides, 1))


def rows_of_a_tile(query: Query, tile: int, group: int, request: int, box_rows: int) -> np.ndarray:
    """Where the first elements of a tile's rows are; OUTSIDE for rows that there are not."""
    heads = query.shape.heads_per_group
    rows = tile * geometry.BLOCK_ROWS + np.arange(box_rows)
    at = (
        request * query.strides[0]
        + rows // heads * query.strides[1]
        + (group * heads + rows % heads) * query.strides[2]
    )
    return np.where(rows < query.shape.rows_per_group, at, OUTSIDE)


def brings_its_rows(query: Query, of: Map, columns: list[int]) -> bool:
    """Whether every tile is what the kernel's QueryTile and produce_q count on."""
    shape = query.shape
    box_rows, map_heads = of.box[1] * of.box[2], of.extents[1]
    for tile in range(-(-shape.rows_per_group // geometry.BLOCK_ROWS)):
        first_row = tile * geometry.BLOCK_ROWS
        at_query = first_row // map_heads
        at_head = first_row - at_query * map_heads
        for group in range(shape.heads_k):
            for request in range(shape.batch):
                rows = rows_of_a_tile(query, tile, group, request, box_rows)
                for column in columns:
                    start = (column, at_head, at_query, group, request)
                    place = column + np.arange(COLUMNS)
                    expected = np.where(rows[:, None] == OUTSIDE, OUTSIDE, rows[:, None] + place)
                    if not np.array_equal(of.copied(start), expected.ravel()):
                        return False
    return True


def box_rows_of(shape: DecodeShape) -> int:
    """A tile's, or of few rows those that there are, in whole strips of 16."""
    rows = shape.rows_per_group
    return -(-rows // 16) * 16 if rows <= 32 else geometry.BLOCK_ROWS


def some_map(query: Query) -> bool:
    """Whether any map would do: each way to divide the rows of a box, tried out."""
    shape = query.shape
    heads, queries = shape.heads_per_group, shape.seq_len_q
    _, query_stride, head_stride, _ = query.strides
    ways = [(heads, queries, head_stride, query_stride)]
    if shape.heads_k == 1:  # heads and queries as one dimension
        row_stride = head_stride if heads > 1 else query_stride
        ways.append((heads * queries, 1, row_stride, 0))
    box_rows = box_rows_of(shape)
    for box_heads in range(1, box_rows + 1):
        if box_rows % box_heads:
            continue
        for map_heads, map_queries, of_head, of_query in ways:
            extents = (map_heads, map_queries, shape.heads_k, shape.batch)
            strides = (of_head, of_query, heads * head_stride, query.strides[0])
            used = [
                2 * stride if extent > 1 else 2 * HEAD_DIM
                for stride, extent in zip(strides, extents, strict=True)
            ]
            box = (COLUMNS, box_heads, box_rows // box_heads, 1, 1)
            if all(0 < stride < 1 << 40 for stride in used) and brings_its_rows(
                query, Map((HEAD_DIM, *extents), tuple(used), box), [0]
            ):
                return True
    return False


def map_of(query: Query) -> Map | None:
    found = maps.query_map(*query)
    if found is None:
        return None
    assert found.dtype == query.shape.dtype
    made = Map(found.extents, found.strides_bytes, found.box)
    made.check_limits()
    return made


@settings(max_examples=300, deadline=None)
@given(query_layouts())
def test_every_tile_gets_its_rows_in_order(query: Query) -> None:
    made = map_of(query)
    if made is None:
        return
    assert made.box[1] * made.box[2] == box_rows_of(query.shape)
    assert brings_its_rows(query, made, [0, 8 * COLUMNS])


@settings(max_examples=300, deadline=None)
@given(query_layouts())
def test_there_is_no_map_only_where_no_box_will_do(query: Query) -> None:
    assert (map_of(query) is not None) == some_map(query)


def contiguous(batch: int, queries: int, group: int, heads_k: int = 1) -> Query:
    heads = group * heads_k
    strides = (queries * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM, 1)
    return Query(decode_shape(batch, queries, group, heads_k), strides)


def but(query: Query, axis: int, stride: int) -> Query:
    return query._replace(strides=(*query.strides[:axis], stride, *query.strides[axis + 1 :]))


@pytest.mark.parametrize("heads_k", [1, 2])
def test_one_query_has_a_map_with_any_number_of_heads(heads_k: int) -> None:
    for group in range(1, 200):
        query = contiguous(2, 1, group, heads_k)
        made = map_of(query)
        assert made is not None
        assert brings_its_rows(query, made, [0])


def test_queries_one_behind_the_other_have_a_map_with_any_number_of_heads() -> None:
    for group, queries in [(5, 3), (12, 2), (126, 2), (3, 43), (1, 70), (96, 2)]:
        query = contiguous(2, queries, group)
        made = map_of(query)
        assert made is not None
        assert made.extents[1:3] == (group * queries, 1)
        assert brings_its_rows(query, made, [64])


@pytest.mark.parametrize(
    "group, queries, exists",
    [
        (16, 3, True),  # 48 rows of a box of 64
        (24, 2, False),  # 64 rows are not whole queries
        (128, 2, True),
        (32, 3, True),
        (8, 3, True),  # 24 rows of a box of 32
        (1, 7, True),
        (12, 2, False),  # 32 rows are not whole queries
        (96, 2, False),  # a tile has heads of two queries
        (24, 3, False),
        (5, 2, False),
        (30, 2, False),
    ],
)
@pytest.mark.parametrize("heads_k", [1, 2])
def test_queries_apart_have_a_map_where_boxes_hold_whole_queries(
    group: int, queries: int, exists: bool, heads_k: int
) -> None:
    heads = group * heads_k
    query = but(contiguous(3, queries, group, heads_k), 1, (heads + 2) * HEAD_DIM)
    query = but(query, 0, queries * (heads + 2) * HEAD_DIM)
    made = map_of(query)
    assert (made is not None) is exists
    assert made is None or brings_its_rows(query, made, [0])


@pytest.mark.parametrize("stride", [0, -HEAD_DIM, 1 << 39])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_that_a_map_does_not_take(axis: int, stride: int) -> None:
    """Of axes with one element they do not matter."""
    assert map_of(but(contiguous(2, 2, 8), axis, stride)) is None
    assert map_of(but(contiguous(1, 1, 1), axis, stride)) is not None


def test_the_map_of_q_is_made_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def tiled_map(*description: Any) -> bytes:
        told.append(description)
        return b"map"

    monkeypatch.setattr(maps, "tiled_map", tiled_map)
    found = QueryMap("float16", (576, 3), (1152,), (64, 16))
    assert found.at(0x4560) == b"map"
    assert told == [(0x4560, "float16", (576, 3), (1152,), (64, 16))]


# -- the cache ------------------------------------------------------------------------------------


@st.composite
def caches(draw: st.DrawFn) -> tuple[DecodeShape, tuple[int, ...]]:
    """Sizes, and the strides of pages, rows and heads in elements."""
    shape = decode_shape(1, 1, 1, draw(st.sampled_from([1, 1, 2, 5])), draw(st.integers(0, 4)))
    extents = [shape.num_blocks, shape.page_block_size, shape.heads_k]
    order = draw(st.permutations(range(3)))
    strides, step = [0, 0, 0], HEAD_DIM + draw(st.sampled_from([0, 8, 72]))
    for axis in reversed(order):
        strides[axis] = step
        step *= max(extents[axis], 1) + draw(st.sampled_from([0, 0, 1, 5]))
    for axis in (0, 2):
        if extents[axis] <= 1:
            strides[axis] = draw(st.just(strides[axis]) | unused_strides)
    return shape, (*strides, 1)


def cache_maps(
    monkeypatch: pytest.MonkeyPatch, shape: DecodeShape, strides: tuple[int, ...]
) -> list[Map]:
    told: list[Map] = []
    address = 0x1000 if shape.num_blocks else 0x2000

    def tiled_map(pointer: int, dtype: str, *description: Any) -> bytes:
        assert (pointer, dtype) == (address, shape.dtype)
        told.append(Map(*description))
        return bytes([len(told)])

    monkeypatch.setattr(maps, "tiled_map", tiled_map)
    sizes = (shape.num_blocks, shape.page_block_size, shape.heads_k, HEAD_DIM)
    k_cache: Any = SimpleNamespace(pointer=0x1000, shape=sizes, strides=strides)
    metadata: Any = SimpleNamespace(pointer=0x2000)
    assert maps.cache_maps(shape, k_cache, metadata) == (b"\1", b"\2")
    return told


@settings(max_examples=100, deadline=None)
@given(caches())
def test_boxes_of_the_cache(cache: tuple[DecodeShape, tuple[int, ...]]) -> None:
    """Four pairs of runs of 64 columns and the last run alone are a page of a head."""
    shape, (page_stride, row_stride, head_stride, _) = cache
    with pytest.MonkeyPatch.context() as patch:
        pairs, single = cache_maps(patch, *cache)
    for made in (pairs, single):
        made.check_limits()
    assert pairs._replace(box=single.box) == single
    rows = np.arange(geometry.BLOCK_KEYS)[:, None] * row_stride
    for page in range(shape.num_blocks):
        for head in range(shape.heads_k):
            first = (page * page_stride if shape.num_blocks > 1 else 0) + (
                head * head_stride if shape.heads_k > 1 else 0
            )
            boxes = [
                first + rows + run * COLUMNS + np.arange(COLUMNS)
                for run in range(HEAD_DIM // COLUMNS)
            ]
            for run in (0, 2, 4, 6):
                expected = np.concatenate(boxes[run : run + 2]).ravel()
                assert np.array_equal(pairs.copied((0, 0, run, head, page)), expected)
            assert np.array_equal(single.copied((0, 0, 8, head, page)), boxes[8].ravel())
    for head in range(shape.heads_k):  # a page number out of range
        assert (pairs.copied((0, 0, 0, head, -1)) == OUTSIDE).all()
        assert (single.copied((0, 0, 8, head, -1)) == OUTSIDE).all()
