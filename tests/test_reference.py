"""The reference backend against a formula written out here, one key at a time."""

from __future__ import annotations

import builtins
import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_rtc.reference import attend

GARBAGE = 2147480000  # what a cache manager may leave in the unused entries of a table


class Call(NamedTuple):
    """The arguments of a decode call, as NumPy arrays."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray
    head_dim_v: int
    softmax_scale: float
    causal: bool


def naive(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 by its definition. Shares no idea of layout with the code under test."""
    q, k_cache = call.q.astype(np.float64), call.k_cache.astype(np.float64)
    batch, seq_len_q, heads_q, _ = q.shape
    num_blocks, page, heads_k, _ = k_cache.shape
    out = np.zeros((batch, seq_len_q, heads_q, call.head_dim_v))
    lse = np.full((batch, heads_q, seq_len_q), np.inf)
    for b in range(batch):
        seqlen = min(max(int(call.cache_seqlens[b]), 0), call.block_table.shape[1] * page)
        for i in range(seq_len_q):
            for h in range(heads_q):
                scores, values = [], []
                for position in range(seqlen):
                    block = int(call.block_table[b, position // page])
                    hidden = call.causal and position > seqlen - seq_len_q + i
                    if hidden or not 0 <= block < num_blocks:
                        continue
                    key = k_cache[block, position % page, h // (heads_q // heads_k)]
                    scores.append(call.softmax_scale * float(np.dot(q[b, i, h], key)))
                    values.append(key[: call.head_dim_v])
                if not scores:
                    continue
                top = max(scores) if not any(map(math.isnan, scores)) else math.nan
                weights = np.exp(np.array(scores) - top)
                out[b, i, h] = weights @ np.array(values) / weights.sum()
                lse[b, h, i] = top + np.log(weights.sum())
    return out, lse


def make_call(
    seqlens: list[int],
    *,
    seq_len_q: int = 1,
    heads_q: int = 2,
    heads_k: int = 1,
    head_dim: int = 12,
    head_dim_v: int = 8,
    page: int = 4,
    spare: int = 3,
    causal: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> Call:
    """A float32 call whose requests own their pages, shuffled over a cache with ``spare`` more.

    Every slot beyond a sequence's end holds NaN, every unused entry of the table garbage.
    """
    rng = np.random.default_rng(seed)
    counts = [-(-n // page) for n in seqlens]
    num_blocks = sum(counts) + spare
    max_blocks = max(counts, default=0) + 2
    k_cache = np.full((num_blocks, page, heads_k, head_dim), np.nan, np.float32)
    block_table = np.where(rng.random((len(seqlens), max_blocks)) < 0.5, GARBAGE, -1)
    pages = iter(rng.permutation(num_blocks))
    for b, n in enumerate(seqlens):
        for j in range(counts[b]):
            block_table[b, j] = block = next(pages)
            filled = min(page, n - j * page)
            k_cache[block, :filled] = rng.standard_normal((filled, heads_k, head_dim))
    q = rng.standard_normal((len(seqlens), seq_len_q, heads_q, head_dim)).astype(np.float32)
    return Call(
        q,
        k_cache,
        block_table.astype(np.int32),
        np.array(seqlens, np.int32).reshape(len(seqlens)),
        head_dim_v,
        head_dim**-0.5 if scale is None else scale,
        causal,
    )


def check(call: Call, tolerance: float = 2e-6) -> tuple[np.ndarray, np.ndarray]:
    """Compare NumPy's result with the formula; returns it."""
    out, lse = attend(*call)
    expected_out, expected_lse = naive(call)
    assert out.dtype == call.q.dtype
    assert lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float64), expected_out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=tolerance)
    return out, lse


# -- against the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_len_q", [1, 2, 5])
@pytest.mark.parametrize("heads_q, heads_k", [(1, 1), (3, 1), (5, 5), (6, 2), (12, 4), (7, 1)])
def test_heads_and_queries(heads_q: int, heads_k: int, seq_len_q: int, causal: bool) -> None:
    call = make_call(
        [0, 1, 3, 4, 13], heads_q=heads_q, heads_k=heads_k, seq_len_q=seq_len_q, causal=causal
    )
    check(call)


@pytest.mark.parametrize("page", [1, 2, 3, 16, 64, 128])
def test_any_page_size(page: int) -> None:
    check(make_call([0, 1, 63, 64, 65, 130], page=page, seq_len_q=3, causal=True))


@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(1, 1), (7, 7), (9, 1), (320, 256), (288, 256), (512, 512), (576, 512)]
)
def test_any_geometry(head_dim: int, head_dim_v: int) -> None:
    call = make_call([5, 20], head_dim=head_dim, head_dim_v=head_dim_v, seq_len_q=2, causal=True)
    check(call, tolerance=4e-6)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    heads_k = draw(st.integers(1, 3))
    head_dim = draw(st.integers(1, 9))
    return make_call(
        draw(st.lists(st.integers(0, 23), max_size=4)),
        seq_len_q=draw(st.integers(1, 4)),
        heads_q=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=head_dim,
        head_dim_v=draw(st.integers(1, head_dim)),
        page=draw(st.integers(1, 9)),
        spare=draw(st.integers(0, 3)),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.floats(0, 2)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(deadline=None)
@given(calls())
def test_any_call(call: Call) -> None:
    check(call, tolerance=1e-5)


@settings(deadline=None)
@given(calls(), st.data())
def test_any_call_with_holes_in_the_table(call: Call, data: st.DataObject) -> None:
    """Pages out of range inside the used part: their keys do not exist, nothing faults."""
    table = call.block_table.copy()
    holes = st.sampled_from([-1, -(2**31), len(call.k_cache), GARBAGE, 2**31 - 1])
    for index in np.ndindex(table.shape):
        if data.draw(st.booleans()):
            table[index] = data.draw(holes)
    check(call._replace(block_table=table), tolerance=1e-5)


@settings(deadline=None)
@given(calls(), st.integers(0, 2**16))
def test_order_of_pages_in_the_cache_does_not_matter(call: Call, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(call.k_cache))
    used = (call.block_table >= 0) & (call.block_table < len(order))
    place = np.append(np.argsort(order), 0)
    table = np.where(used, place[np.where(used, call.block_table, 0)], call.block_table)
    moved = call._replace(k_cache=call.k_cache[order], block_table=table.astype(np.int32))
    for result, expected in zip(attend(*moved), attend(*call), strict=True):
        np.testing.assert_array_equal(result, expected)


@settings(deadline=None)
@given(calls())
def test_a_request_does_not_depend_on_its_batch(call: Call) -> None:
    out, lse = attend(*call)
    for b in range(len(call.q)):
        alone = call._replace(
            q=call.q[b : b + 1],
            block_table=call.block_table[b : b + 1],
            cache_seqlens=call.cache_seqlens[b : b + 1],
        )
        for result, expected in zip(attend(*alone), (out[b], lse[b]), strict=True):
            np.testing.assert_array_equal(result[0], expected)


@settings(deadline=None)
@given(calls())
def test_lse_merges_two_halves(call: Call) -> None:
    """The halves of a cache, merged by their LSE, give the whole: what lse is for."""
    call = call._replace(causal=False)
    page = call.k_cache.shape[1]
    pages = -(-call.cache_seqlens // page)
    cut = pages // 2
    columns = np.arange(call.block_table.shape[1])
    first = np.where(columns < cut[:, None], call.block_table, -1)
    second = np.where(columns >= cut[:, None], call.block_table, -1)
    halves = [attend(*call._replace(block_table=t.astype(np.int32))) for t in (first, second)]
    # No key has lse +inf, which as a weight must be nothing: exp(-inf).
    logs = [np.where(lse == np.inf, -np.inf, lse.astype(np.float64)) for _, lse in halves]
    total = np.logaddexp(*logs)
    merged = sum(
        out * np.where(log == -np.inf, 0, np.exp(log - np.where(total == -np.inf, 0, total)))
        .transpose(0, 2, 1)[..., None]
        for (out, _), log in zip(halves, logs, strict=True)
    )  # fmt: skip
    out, lse = attend(*call)
    np.testing.assert_allclose(merged, out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.where(total == -np.inf, np.inf, total), lse, rtol=0, atol=1e-5)


# -- edges ----------------------------------------------------------------------------------------


def test_no_key_gives_zero_and_inf() -> None:
    out, lse = attend(*make_call([0, 0], seq_len_q=2))
    assert not out.any()
    assert np.isposinf(lse).all()


def test_causal_with_more_queries_than_keys() -> None:
    out, lse = check(make_call([3], seq_len_q=5, causal=True))
    assert not out[0, :2].any()
    assert np.isposinf(lse[0, :, :2]).all()
    assert np.isfinite(lse[0, :, 2:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_causally_hidden_keys_contribute_nothing(bad: float) -> None:
    """The last key is bad: the last query sees it, the queries before must not notice."""
    call = make_call([10, 7], seq_len_q=3, heads_q=4, heads_k=2, causal=True)
    expected, expected_lse = naive(call)
    for b, n in enumerate(call.cache_seqlens):
        call.k_cache[call.block_table[b, (n - 1) // 4], (n - 1) % 4] = bad
    out, lse = attend(*call)
    np.testing.assert_allclose(out[:, :2], expected[:, :2], rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse[..., :2], expected_lse[..., :2], rtol=0, atol=2e-6)
    assert np.isnan(out[:, 2]).all()


def test_a_visible_nan_reaches_its_rows_only() -> None:
    call = make_call([6, 6], heads_q=4, heads_k=2)
    clean, _ = naive(call)
    call.k_cache[call.block_table[0, 0], 1, 1, 3] = np.nan  # request 0, key head 1
    out, lse = attend(*call)
    assert np.isnan(out[0, 0, 2:]).all()
    assert np.isnan(lse[0, 2:]).all()
    np.testing.assert_allclose(out[0, 0, :2], clean[0, 0, :2], rtol=0, atol=2e-6)
    np.testing.assert_allclose(out[1], clean[1], rtol=0, atol=2e-6)


def test_bad_numbers_raise_no_warning() -> None:
    call = make_call([6])
    call.k_cache[call.block_table[0, 0], 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*call)


def test_shared_pages() -> None:
    call = make_call([9, 9, 6, 9])
    table = call.block_table.copy()
    table[1:] = table[0]
    table[3, 1] = table[3, 0]  # one page twice in one request
    check(call._replace(block_table=table))


def test_lengths_are_clamped() -> None:
    call = make_call([8, 4], page=4)
    lengths = np.array([-5, 2**31 - 1], np.int32)
    table = np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    cache = np.nan_to_num(call.k_cache)
    call = call._replace(cache_seqlens=lengths, block_table=table, k_cache=cache)
    _, lse = check(call)
    assert np.isposinf(lse[0]).all()


@pytest.mark.parametrize("axis", ["batch", "num_blocks", "max_blocks"])
def test_empty_axes(axis: str) -> None:
    call = make_call([5, 3], seq_len_q=2, causal=True)
    if axis == "batch":
        call = call._replace(
            q=call.q[:0], block_table=call.block_table[:0], cache_seqlens=call.cache_seqlens[:0]
        )
    elif axis == "num_blocks":
        call = call._replace(k_cache=call.k_cache[:0])
    else:
        call = call._replace(block_table=call.block_table[:, :0])
    out, lse = check(call)
    assert out.shape == (*call.q.shape[:3], 8)
    assert not out.any()
    assert np.isposinf(lse).all()


def test_scores_far_apart_do_not_overflow() -> None:
    call = make_call([20], scale=1000.0)
    out, lse = attend(*call)
    expected, expected_lse = naive(call)
    np.testing.assert_allclose(out, expected, atol=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


def test_scale_of_numpy_type_keeps_the_precision() -> None:
    call = make_call([20])
    plain = attend(*call)
    for result, expected in zip(
        attend(*call._replace(softmax_scale=np.float64(call.softmax_scale))), plain, strict=True
    ):
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


# -- dtypes ---------------------------------------------------------------------------------------


def rounded(call: Call, dtype: object) -> Call:
    return call._replace(q=call.q.astype(dtype), k_cache=call.k_cache.astype(dtype))


def test_numpy_float16() -> None:
    call = rounded(make_call([30, 7], seq_len_q=2, causal=True), np.float16)
    check(call, tolerance=2e-3)


def test_numpy_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    call = rounded(make_call([30, 7], seq_len_q=2, causal=True), ml_dtypes.bfloat16)
    out, lse = attend(*call)
    expected, expected_lse = naive(call)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(out, expected.astype(np.float32).astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=2e-6)


def test_float64_is_computed_in_float64() -> None:
    call = rounded(make_call([50, 7], seq_len_q=2, causal=True), np.float64)
    out, lse = attend(*call)
    expected, expected_lse = naive(call)
    assert out.dtype == np.float64
    assert lse.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-7)


def test_oracle_keeps_float64() -> None:
    call = rounded(make_call([50, 7], seq_len_q=2), np.float16)
    out, lse = attend(*call, compute_dtype="float64", out_dtype="float64")
    expected, expected_lse = naive(call)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-14)


def test_float64_arithmetic_with_the_caller_s_dtype() -> None:
    call = rounded(make_call([50]), np.float16)
    out, lse = attend(*call, compute_dtype="float64")
    assert out.dtype == np.float16
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(out, naive(call)[0].astype(np.float16))


def test_bfloat16_by_name_in_numpy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    out, _ = attend(*make_call([5]), out_dtype="bfloat16")
    assert out.dtype == ml_dtypes.bfloat16


# -- arrays given by the caller -------------------------------------------------------------------


def test_strided_inputs() -> None:
    call = make_call([9, 14], heads_q=4, heads_k=2, seq_len_q=2, causal=True)
    expected = attend(*call)
    wide_q = np.full((2, 3, 8, 20), np.nan, np.float32)[:, :2, ::2, 4:16]
    wide_q[...] = call.q
    wide_k = np.full((2 * len(call.k_cache), 5, 3, 16), np.nan, np.float32)[::2, :4, :2, :12]
    wide_k[...] = call.k_cache
    wide_table = np.zeros((2, 40), np.int32)[:, 7 : 7 + call.block_table.shape[1]]
    wide_table[...] = call.block_table
    strided = call._replace(q=wide_q, k_cache=wide_k, block_table=wide_table)
    for result, value in zip(attend(*strided), expected, strict=True):
        np.testing.assert_array_equal(result, value)


def test_writes_in_place() -> None:
    call = make_call([9, 0, 14], seq_len_q=2, causal=True)
    expected = attend(*call)
    out, lse = np.full_like(expected[0], 7), np.full_like(expected[1], 7)
    result = attend(*call, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_writes_in_place_strided_and_nothing_else() -> None:
    call = make_call([9, 0, 14], seq_len_q=2, causal=True)
    expected = attend(*call)
    big_out = np.full((3, 4, 5, 10), 7, np.float32)
    big_lse = np.full((2, 2, 3), 7, np.float32)
    out, lse = big_out[:, ::2, 1:3, 1:9], big_lse.transpose(2, 1, 0)
    attend(*call, out=out, lse=lse)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    out[...] = 7
    assert (big_out == 7).all()


def test_only_one_of_out_and_lse() -> None:
    call = make_call([9, 14])
    expected = attend(*call)
    out, lse = np.empty_like(expected[0]), np.empty_like(expected[1])
    np.testing.assert_array_equal(attend(*call, out=out)[1], expected[1])
    np.testing.assert_array_equal(attend(*call, lse=lse)[0], expected[0])
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_inputs_are_left_alone() -> None:
    call = make_call([9, 14])
    before = [array.copy() for array in call[:4]]
    attend(*call)
    for array, copy in zip(call[:4], before, strict=True):
        np.testing.assert_array_equal(array, copy)


# -- other libraries ------------------------------------------------------------------------------


def to_torch(call: Call, dtype: str = "float32") -> Call:
    torch = pytest.importorskip("torch")
    q, k_cache, table, seqlens = (torch.from_numpy(array) for array in call[:4])
    dtype = getattr(torch, dtype)
    return call._replace(
        q=q.to(dtype), k_cache=k_cache.to(dtype), block_table=table, cache_seqlens=seqlens
    )


@pytest.mark.parametrize("causal", [False, True])
def test_torch_agrees_with_numpy(causal: bool) -> None:
    torch = pytest.importorskip("torch")
    call = make_call([0, 3, 22], seq_len_q=4, heads_q=6, heads_k=2, causal=causal)
    out, lse = attend(*to_torch(call))
    assert isinstance(out, torch.Tensor)
    assert out.dtype == lse.dtype == torch.float32
    for result, expected in zip((out, lse), attend(*call), strict=True):
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_torch_half_precision(dtype: str, tolerance: float) -> None:
    torch = pytest.importorskip("torch")
    call = to_torch(make_call([3, 22], head_dim=576, head_dim_v=512, seq_len_q=2), dtype)
    exact = naive(call._replace(q=call.q.float().numpy(), k_cache=call.k_cache.float().numpy()))
    out, lse = attend(*call)
    assert out.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(out.float().numpy(), exact[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse.numpy(), exact[1], rtol=0, atol=4e-6)
    out, lse = attend(*call, compute_dtype="float64", out_dtype="float64")
    assert out.dtype == lse.dtype == torch.float64
    np.testing.assert_allclose(out.numpy(), exact[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), exact[1], rtol=0, atol=1e-13)


def test_torch_strided_and_in_place() -> None:
    torch = pytest.importorskip("torch")
    call = to_torch(make_call([0, 9, 14], seq_len_q=2, causal=True))
    expected = attend(*call)
    wide = torch.full((3, 2, 2, 20), torch.nan)
    wide[..., 4:16] = call.q
    big_out, big_lse = torch.full((3, 2, 5, 10), 7.0), torch.full((2, 2, 3), 7.0)
    out, lse = big_out[:, :, 1:3, 1:9], big_lse.permute(2, 1, 0)
    result = attend(*call._replace(q=wide[..., 4:16]), out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    out[...] = 7
    assert (big_out == 7).all()


def test_torch_records_no_gradient() -> None:
    call = to_torch(make_call([5]))
    out = call.q[..., :8].clone()
    for array in (call.q, call.k_cache, out):
        array.requires_grad_(True)
    for result in attend(*call):
        assert not result.requires_grad
    attend(*call, out=out)


def test_torch_without_array_api_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    call = to_torch(make_call([5]))
    original = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "array_api_compat":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"torch arrays.*pip install 'flashmla_rtc\[torch\]'"):
        attend(*call)
    attend(*make_call([5]))  # NumPy needs nothing


def test_jax_agrees_with_numpy() -> None:
    jnp = pytest.importorskip("jax.numpy")
    call = make_call([0, 3, 22], seq_len_q=4, heads_q=6, heads_k=2, causal=True)
    arrays = [jnp.asarray(array) for array in call[:4]]
    out, lse = attend(*arrays, *call[4:])
    assert isinstance(out, type(arrays[0]))
    for result, expected in zip((out, lse), attend(*call), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)
    out, _ = attend(arrays[0].astype(jnp.bfloat16), *arrays[1:], *call[4:])
    assert out.dtype == jnp.bfloat16
    out, lse = attend(arrays[0][:0], arrays[1], arrays[2][:0], arrays[3][:0], *call[4:])
    assert out.shape == (0, 4, 6, 8)
    assert lse.shape == (0, 6, 4)
