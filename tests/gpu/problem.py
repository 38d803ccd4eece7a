"""Random decode calls on the GPU, and how close their results have to be to the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
from torch import Tensor

import flashmla_rtc

DEVICE = torch.device("cuda")
HEAD_DIM, HEAD_DIM_V, PAGE = 576, 512, 64

# What a table holds past a request's last page.
GARBAGE_PAGES = (2147480000, -1)

# Relative Frobenius error for q, k ~ N(0, 0.1^2). Probabilities lie just below 1 there, so rounding
# them costs 1.19e-3 in bfloat16; rounding the output costs 1.66e-3; together 2.04e-3.
OUT_BOUND = {torch.bfloat16: 2.1e-3, torch.float16: 2.6e-4}
LSE_BOUND = 5e-6
FEW_ROWS = 1.1  # the mean error of a call with few rows varies by some percent around those figures


@dataclass
class Problem:
    """The arguments of a decode call."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    causal: bool = False
    softmax_scale: float | None = None

    @property
    def heads_k(self) -> int:
        return self.k_cache.shape[2]

    @property
    def rows_per_group(self) -> int:
        return self.q.shape[1] * self.q.shape[2] // self.heads_k

    def but(self, **changes: Any) -> Problem:
        """The same call with other arguments."""
        return replace(self, **changes)

    def plan(self, cache_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The split plan, for these lengths or others."""
        lengths = self.cache_seqlens if cache_seqlens is None else cache_seqlens
        return flashmla_rtc.get_mla_metadata(lengths, self.rows_per_group, self.heads_k)

    def poisoned(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` to write to, full of NaN."""
        batch, seq_len_q, heads_q, _ = self.q.shape
        out = self.q.new_full((batch, seq_len_q, heads_q, HEAD_DIM_V), torch.nan)
        return out, out.new_full((batch, heads_q, seq_len_q), torch.nan, dtype=torch.float32)

    def run(
        self,
        plan: tuple[Any, Any] | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode, into poisoned results unless others are given."""
        if out is None or lse is None:
            out, lse = self.poisoned()
        metadata, num_splits = self.plan() if plan is None else plan
        return flashmla_rtc.flash_mla_with_kvcache(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            self.softmax_scale,
            self.causal,
            out=out,
            lse=lse,
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """The formula's ``(out, lse)`` in float64."""
        return oracle.attention(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
        )


def make(
    lengths: Sequence[int],
    *,
    heads_q: int = 16,
    heads_k: int = 1,
    seq_len_q: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    softmax_scale: float | None = None,
    spread: float = 0.1,
    seed: int = 0,
    spare_blocks: int = 3,
    room: int = 2,
    poison: float | None = None,
    device: torch.device = DEVICE,
) -> Problem:
    """A call with requests of these lengths on shuffled pages.

    q and k_cache are normal with standard deviation ``spread``. The cache has ``spare_blocks``
    pages that nobody uses and the table ``room`` columns more than the longest request needs; what
    no request uses in the table are page numbers that do not exist.
    ``poison`` replaces every number of the cache that no request owns.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=dtype, device=device).mul_(spread)

    keys = torch.tensor(list(lengths), dtype=torch.int32)
    pages = (keys + PAGE - 1) // PAGE
    used_blocks = int(pages.sum())
    num_blocks = used_blocks + spare_blocks
    max_blocks = int(pages.max()) + room if len(keys) else room
    table = torch.empty(len(keys), max_blocks, dtype=torch.int32)
    table[:, 0::2], table[:, 1::2] = GARBAGE_PAGES
    used = torch.arange(max_blocks) < pages[:, None]
    shuffle = torch.Generator().manual_seed(seed)
    table[used] = torch.randperm(num_blocks, generator=shuffle)[:used_blocks].int()

    k_cache = normal(num_blocks, PAGE, heads_k, HEAD_DIM)
    if poison is not None:
        position = torch.arange(max_blocks * PAGE).view(max_blocks, PAGE)
        owned = torch.zeros(num_blocks, PAGE, dtype=torch.bool)
        owned[table[used].long()] = (position < keys[:, None, None])[used]
        k_cache[~owned.to(device)] = poison
    q = normal(len(keys), seq_len_q, heads_q, HEAD_DIM)
    arrays = (q, k_cache, table.to(device), keys.to(device))
    return Problem(*arrays, causal=causal, softmax_scale=softmax_scale)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected; 0 if both are 0."""
    error = (got.double() - expected).norm().item()
    return error / expected.norm().item() if error else 0.0


def assert_matches(
    result: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    out_bound: float | None = None,
    lse_bound: float = LSE_BOUND,
) -> None:
    """``(out, lse)`` are within the bounds; rows without keys are exactly 0 and +inf.

    ``out_bound`` holds for the relative error over the call. Short requests have large outputs and
    dominate that, so it also holds, with 5 % more, for the mean over rows of each row's relative
    error, and two and a half times for every single row.
    """
    (out, lse), (true_out, true_lse) = result, expected
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all(), "out holds NaN or inf"
    assert not torch.isnan(lse).any(), "lse holds NaN"
    empty = torch.isposinf(true_lse)
    assert torch.equal(torch.isposinf(lse), empty)
    assert out[empty.transpose(1, 2)].count_nonzero() == 0
    if empty.all():
        return
    bound = OUT_BOUND[out.dtype] * FEW_ROWS if out_bound is None else out_bound
    assert relative_error(out, true_out) <= bound
    rows = ~empty.transpose(1, 2)
    row_errors = (out[rows].double() - true_out[rows]).norm(dim=-1) / true_out[rows].norm(dim=-1)
    assert row_errors.square().mean().sqrt().item() <= 1.05 * bound
    assert row_errors.max().item() <= 2.5 * bound
    assert (lse.double() - true_lse)[~empty].abs().max().item() <= lse_bound


def check(problem: Problem, plan: tuple[Any, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Run a call and hold it to the formula; its results."""
    result = problem.run(plan)
    assert_matches(result, problem.expected())
    return result


def assert_same_bits(result: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Two results are equal bit by bit (NaN equals NaN)."""
    for one, two in zip(result, other, strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        integer = torch.int16 if one.element_size() == 2 else torch.int32
        assert torch.equal(one.contiguous().view(integer), two.contiguous().view(integer))
