"""The shapes of the benchmark, and how operations and bytes are counted.

The full grid is the one FlashMLA and its users report on: dense decode at 16 to 128 query heads
over one latent head, one or two query tokens, batches from one long request to 128 of 8192 keys,
and 128 of ragged length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HEAD_DIM = 576
HEAD_DIM_V = 512
PAGE = 64
ELEMENT_BYTES = 2  # bfloat16 and float16
KEY_BYTES = HEAD_DIM * ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the grid. ``seqlen`` is every request's length, or its mean when ``varlen``."""

    batch: int
    seq_len_q: int
    heads_q: int
    seqlen: int
    varlen: bool = False
    dtype: str = "bfloat16"

    def lengths(self) -> npt.NDArray[np.int32]:
        """Keys of each request, ``(batch,)``: the same at every call.

        Ragged lengths are drawn from a normal distribution of mean ``seqlen`` and standard
        deviation ``seqlen / 2``, and are at least ``seq_len_q``.
        """
        if not self.varlen:
            return np.full(self.batch, self.seqlen, dtype=np.int32)
        drawn = np.random.default_rng(0).normal(self.seqlen, self.seqlen / 2, self.batch)
        return np.maximum(drawn, self.seq_len_q).astype(np.int32)

    @property
    def keys(self) -> int:
        """Keys of all requests together."""
        return int(self.lengths().sum(dtype=np.int64))

    @property
    def flops(self) -> float:
        """Floating-point operations of Q Kᵀ and P V. A causal mask is not subtracted, as nobody
        subtracts it.
        """
        return 2.0 * self.heads_q * self.seq_len_q * (HEAD_DIM + HEAD_DIM_V) * self.keys

    @property
    def bytes(self) -> float:
        """Bytes that must cross device memory: keys, queries and output, once each."""
        rows = self.batch * self.seq_len_q * self.heads_q
        return float(self.keys * KEY_BYTES + rows * (HEAD_DIM + HEAD_DIM_V) * ELEMENT_BYTES)

    @property
    def label(self) -> str:
        """``b 128, s_q 2, heads 128, keys 8192``; ragged lengths as ``keys ~4096``."""
        keys = f"{'~' if self.varlen else ''}{self.seqlen}"
        return f"b {self.batch}, s_q {self.seq_len_q}, heads {self.heads_q}, keys {keys}"

    def limit_seconds(self, read_TBps: float, matmul_TFLOPS: float) -> float:
        """The floor of any kernel on a device with these measured ceilings: the slower of bytes and
        operations.
        """
        return max(self.bytes / (read_TBps * 1e12), self.flops / (matmul_TFLOPS * 1e12))


def full_grid(dtype: str = "bfloat16") -> list[Shape]:
    """The 64 shapes."""
    uniform = (
        (1, 4096),
        (1, 65536),
        (8, 8192),
        (32, 4096),
        (64, 8192),
        (128, 4096),
        (128, 8192),
    )
    shapes = []
    for heads in (16, 32, 64, 128):
        for seq_len_q in (1, 2):
            shapes += [Shape(b, seq_len_q, heads, keys, False, dtype) for b, keys in uniform]
            shapes.append(Shape(128, seq_len_q, heads, 4096, True, dtype))
    return shapes


def quick_grid(dtype: str = "bfloat16") -> list[Shape]:
    """Eight of the 64: one for each regime (latency, splits of one request, few heads, bandwidth,
    ragged, compute).
    """
    return [
        Shape(1, 1, 16, 4096, False, dtype),
        Shape(1, 1, 128, 65536, False, dtype),
        Shape(8, 1, 128, 8192, False, dtype),
        Shape(32, 1, 64, 4096, False, dtype),
        Shape(128, 1, 16, 8192, False, dtype),
        Shape(128, 1, 128, 4096, True, dtype),
        Shape(128, 1, 128, 8192, False, dtype),
        Shape(128, 2, 128, 8192, False, dtype),
    ]


GRIDS = {"full": full_grid, "quick": quick_grid}

Pattern = tuple[int | None, int | None, int | None, int | None]


def parse_pattern(text: str) -> Pattern:
    """``"128,1,*,8192"`` (batch, seq_len_q, heads_q, seqlen; ``*`` takes any) as four numbers or
    None.

    Raises:
        ValueError: ``text`` is not four positive numbers or stars.
    """
    parts = [part.strip() for part in text.split(",")]
    values = [None if part == "*" else int(part) if part.isdecimal() else 0 for part in parts]
    if len(values) != 4 or any(value == 0 for value in values):
        raise ValueError(
            "a shape is written batch,seq_len_q,heads_q,seqlen with * for any, such as "
            f"128,1,*,8192; got {text!r}"
        )
    batch, seq_len_q, heads_q, seqlen = values
    return batch, seq_len_q, heads_q, seqlen


def select(shapes: Sequence[Shape], patterns: Iterable[Pattern]) -> list[Shape]:
    """The shapes that match any pattern, in the grid's order; without patterns, all.

    A pattern without stars that the grid lacks is a uniform shape of its own, so that any one shape
    can be measured.
    """
    patterns = list(patterns)
    if not patterns:
        return list(shapes)
    chosen = [shape for shape in shapes if any(_matches(shape, p) for p in patterns)]
    dtype = shapes[0].dtype if shapes else "bfloat16"
    for batch, seq_len_q, heads_q, seqlen in patterns:
        if batch is None or seq_len_q is None or heads_q is None or seqlen is None:
            continue
        single = Shape(batch, seq_len_q, heads_q, seqlen, False, dtype)
        if not any(_matches(shape, (batch, seq_len_q, heads_q, seqlen)) for shape in chosen):
            chosen.append(single)
    return chosen


def _matches(shape: Shape, pattern: Pattern) -> bool:
    values = (shape.batch, shape.seq_len_q, shape.heads_q, shape.seqlen)
    return all(want is None or want == value for want, value in zip(pattern, values, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
