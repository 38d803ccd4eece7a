"""Inputs of the benchmark: one pool of pages for the whole grid, and problems that are views of it.

A shape is measured over several *copies*: block tables that point at disjoint pages of the pool,
played in turn, so that together they read far more than the L2 cache holds and every call finds its
keys in device memory only. Filling gigabytes with random numbers takes device time, so it happens
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .shapes import HEAD_DIM, HEAD_DIM_V, KEY_BYTES, PAGE, Shape

ROTATE_BYTES = 200e6  # of keys, four times the 50 MB L2 of an H100
MAX_COPIES = 256
SPREAD = 0.1  # standard deviation of queries and keys

Call = Callable[[], Any]


@dataclass(slots=True)
class Problem:
    """One shape's inputs, all torch tensors on one device.

    ``k_cache`` (num_blocks, 64, 1, 576); ``cache_seqlens`` (batch,) int32; for each copy a query
    tensor (batch, seq_len_q, heads_q, 576) and a block table (batch, max_blocks) int32.
    """

    shape: Shape
    lengths: npt.NDArray[np.int32]
    cache_seqlens: Any
    k_cache: Any
    queries: list[Any]
    tables: list[Any]

    @property
    def copies(self) -> int:
        return len(self.queries)


def pages_of(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Pages that each request uses."""
    return -(-lengths.astype(np.int64) // PAGE)


def copies_of(shape: Shape, rotate_bytes: float = ROTATE_BYTES) -> int:
    """How many copies of ``shape`` read at least ``rotate_bytes`` of keys."""
    return max(1, min(MAX_COPIES, math.ceil(rotate_bytes / (shape.keys * KEY_BYTES))))


class Pool:
    """Random pages for the largest of ``shapes``.

    The queries and keys are normal with standard deviation 0.1, as in the published measurements:
    the power that tensor cores draw depends on the numbers that they multiply.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cuda",
        dtype: str = "bfloat16",
        rotate_bytes: float = ROTATE_BYTES,
    ) -> None:
        import torch

        self._torch = torch
        self._rotate_bytes = rotate_bytes
        self.device = device
        self.dtype = getattr(torch, dtype)
        self.num_pages = max(
            copies_of(shape, rotate_bytes) * int(pages_of(shape.lengths()).sum())
            for shape in shapes
        )
        self.k_cache = self._random(self.num_pages, PAGE, 1, HEAD_DIM)
        self._split: tuple[Any, Any] | None = None

    def _random(self, *extents: int) -> Any:
        values = self._torch.empty(extents, dtype=self.dtype, device=self.device)
        return values.normal_(0.0, SPREAD)

    def split_cache(self) -> tuple[Any, Any]:
        """The same keys as two contiguous caches, latent (…, 512) and rope (…, 64), for kernels
        that want them so.
        """
        if self._split is None:
            flat = self.k_cache[:, :, 0]
            self._split = (
                flat[..., :HEAD_DIM_V].contiguous(),
                flat[..., HEAD_DIM_V:].contiguous(),
            )
        return self._split

    def problem(self, shape: Shape, copies: int | None = None) -> Problem:
        """The inputs of ``shape``; pages in random order, as a cache in use has them.

        ``copies`` defaults to as many as rotate past the L2 cache.
        """
        torch = self._torch
        lengths = shape.lengths()
        pages = pages_of(lengths)
        copies = copies or copies_of(shape, self._rotate_bytes)
        order = np.random.default_rng(1).permutation(self.num_pages).astype(np.int32)
        tables = np.zeros((copies, shape.batch, int(pages.max())), dtype=np.int32)
        taken = 0
        for copy in range(copies):
            for request, count in enumerate(pages.tolist()):
                tables[copy, request, :count] = order[taken : taken + count]
                taken += count
        queries = self._random(copies, shape.batch, shape.seq_len_q, shape.heads_q, HEAD_DIM)
        on_device = torch.from_numpy(tables).to(self.device)
        return Problem(
            shape=shape,
            lengths=lengths,
            cache_seqlens=torch.from_numpy(lengths).to(self.device),
            k_cache=self.k_cache,
            queries=list(queries),
            tables=list(on_device),
        )


def own_calls(problem: Problem) -> list[Call]:
    """This package's decode of each copy: planned once outside the timed call, into outputs that
    exist already.
    """
    import torch

    from flashmla_rtc import flash_mla_with_kvcache, get_mla_metadata

    shape = problem.shape
    metadata, num_splits = get_mla_metadata(
        problem.cache_seqlens, shape.seq_len_q * shape.heads_q, 1
    )
    calls: list[Call] = []
    for query, table in zip(problem.queries, problem.tables, strict=True):
        out = query.new_empty((shape.batch, shape.seq_len_q, shape.heads_q, HEAD_DIM_V))
        lse = query.new_empty((shape.batch, shape.heads_q, shape.seq_len_q), dtype=torch.float32)

        def call(query: Any = query, table: Any = table, out: Any = out, lse: Any = lse) -> Any:
            return flash_mla_with_kvcache(
                query,
                problem.k_cache,
                table,
                problem.cache_seqlens,
                HEAD_DIM_V,
                metadata,
                num_splits,
                causal=True,
                out=out,
                lse=lse,
            )

        calls.append(call)
    return calls
