"""Accuracy over 320 shapes, within the figures that FlashMLA's kernels are known for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from problem import OUT_BOUND, assert_matches, make

NAMED_HEADS = (1, 3, 5, 12, 16, 20, 32, 63, 64, 96, 126, 128)
EDGE_LENGTHS = (0, 1, 63, 64, 65)
SHAPES = 320
ROWS = 64  # at least so many query rows a call, that the mean error is close to the expected one


@dataclass(frozen=True)
class Shape:
    number: int
    heads_q: int
    heads_k: int
    seq_len_q: int
    lengths: tuple[int, ...]
    dtype: torch.dtype
    causal: bool

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype is torch.bfloat16 else "fp16"
        mask = "-causal" if self.causal else ""
        heads = f"h{self.heads_q}_{self.heads_k}"
        return f"{self.number}-b{len(self.lengths)}-q{self.seq_len_q}-{heads}-{dtype}{mask}"


def shapes() -> list[Shape]:
    """Every head count from 1 to 128, the notable ones many times; the same list at every call."""
    rng = random.Random(20261)
    found = []
    for number in range(SHAPES):
        heads_q = number + 1 if number < 128 else rng.choice(NAMED_HEADS)
        heads_k = rng.choice([n for n in range(1, 9) if heads_q % n == 0])
        seq_len_q = rng.randint(1, 8)
        # Many short requests (few are cut) or few long ones (each is cut over many parts).
        longest = rng.choice((100, 400, 1500, 4000))
        batch = max(8, -(-ROWS // (heads_q * seq_len_q)), rng.randint(1, 24000 // longest))
        lengths = [int(longest ** rng.uniform(0.5, 1)) for _ in range(batch)]
        for edge in EDGE_LENGTHS:
            lengths[rng.randrange(batch)] = edge
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        causal = number % 4 >= 2
        found.append(Shape(number, heads_q, heads_k, seq_len_q, tuple(lengths), dtype, causal))
    return found


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_error_against_float64(shape: Shape) -> None:
    problem = make(
        shape.lengths,
        heads_q=shape.heads_q,
        heads_k=shape.heads_k,
        seq_len_q=shape.seq_len_q,
        dtype=shape.dtype,
        causal=shape.causal,
        seed=shape.number,
        poison=torch.nan if shape.number % 3 == 0 else None,
    )
    assert_matches(problem.run(), problem.expected(), OUT_BOUND[shape.dtype])
