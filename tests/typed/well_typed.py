"""A user's program that type checkers accept, and that runs: see tests/test_types.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import flashmla_rtc


def arrays() -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    rng = np.random.default_rng()
    return (
        rng.standard_normal((2, 1, 4, 40), dtype=np.float32),
        rng.standard_normal((4, 16, 1, 40), dtype=np.float32),
        np.arange(4, dtype=np.int32).reshape(2, 2),
        np.array([20, 3], dtype=np.int32),
    )


def first_release() -> None:
    q, k_cache, block_table, cache_seqlens = arrays()
    plan, num_splits = flashmla_rtc.get_mla_metadata(cache_seqlens, 4, 1)
    assert_type(plan, npt.NDArray[Any])
    flashmla_rtc.get_mla_metadata(cache_seqlens, num_heads_per_head_k=4, num_heads_k=1)
    out, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 32, plan, num_splits, 0.5, True
    )
    print(out.shape, lse.sum())


def newest() -> None:
    q, k_cache, block_table, cache_seqlens = arrays()
    plan, num_splits = flashmla_rtc.get_mla_metadata()
    assert_type(plan, flashmla_rtc.FlashMLASchedMeta)
    assert_type(num_splits, None)
    out = np.empty((2, 1, 4, 32), np.float32)
    result = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 32, plan, causal=True, out=out
    )
    assert result[0] is out
    plan.tile_scheduler_metadata = None


def arrays_whose_dtypes_are_known() -> None:
    q = np.zeros((1, 1, 4, 40), np.float16)
    k_cache = np.zeros((1, 16, 1, 40), np.float16)
    block_table, cache_seqlens = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    out, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 32, None, softmax_scale=1
    )
    assert_type(out, npt.NDArray[np.float16])
    assert_type(lse, npt.NDArray[np.float32])
    assert out.dtype == np.float16
    assert lse.dtype == np.float32


class Capsule:
    """An array of a library that nobody has heard of."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def __dlpack__(self, *, stream: int | None = None, **rest: Any) -> object:
        return self.array.__dlpack__(**rest)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def foreign() -> None:
    q, k_cache, block_table, cache_seqlens = map(Capsule, arrays())
    out, _ = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 32, None)
    assert_type(out, Capsule)


def prepare() -> None:
    flashmla_rtc.prepare()
    flashmla_rtc.prepare("cpu")
    print(flashmla_rtc.__version__.upper())


if __name__ == "__main__":
    first_release()
    newest()
    arrays_whose_dtypes_are_known()
    foreign()
    prepare()
