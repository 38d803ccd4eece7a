"""The public calls end to end on the CPU: every form of planning, and what bad calls get."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import flashmla_rtc
from flashmla_rtc import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata, validation

PAGE = 64
HEAD_DIM, HEAD_DIM_V = 576, 512


@dataclass
class Problem:
    """A small batch in one library, and the answer in float64."""

    q: Any
    k_cache: Any
    block_table: Any
    cache_seqlens: Any
    out: np.ndarray
    lse: np.ndarray

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.q, self.k_cache, self.block_table, self.cache_seqlens

    def check(self, result: tuple[Any, Any], tolerance: float = 1e-5) -> None:
        out, lse = result
        np.testing.assert_allclose(numbers(out), self.out, atol=tolerance)
        np.testing.assert_allclose(numbers(lse), self.lse, atol=tolerance)


def numbers(array: Any) -> np.ndarray:
    """Any array as float64."""
    if hasattr(array, "detach"):
        array = array.detach().double().numpy()
    return np.asarray(array).astype(np.float64)


def attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    table: np.ndarray,
    seqlens: list[int],
    causal: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale q k) v of one request after the other, as simple as it can be said."""
    batch, seq_len_q, heads_q, _ = q.shape
    heads_k = k_cache.shape[2]
    out = np.zeros((batch, seq_len_q, heads_q, HEAD_DIM_V))
    lse = np.full((batch, heads_q, seq_len_q), math.inf)
    for b, length in enumerate(seqlens):
        keys = k_cache[table[b]].reshape(-1, heads_k, HEAD_DIM)[:length]
        for s in range(seq_len_q):
            seen = min(length, max(length - seq_len_q + s + 1, 0)) if causal else length
            for h in range(heads_q if seen else 0):
                k = keys[:seen, h // (heads_q // heads_k)]
                scores = scale * k @ q[b, s, h]
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights @ k[:, :HEAD_DIM_V] / weights.sum()
                lse[b, h, s] = scores.max() + math.log(weights.sum())
    return out, lse


SEQLENS = [100, 64, 0, 1]
SEQ_LEN_Q, HEADS_Q, HEADS_K = 2, 4, 2
ROWS = SEQ_LEN_Q * HEADS_Q // HEADS_K


def make_problem(
    library: str = "numpy", causal: bool = False, scale: float | None = None
) -> Problem:
    rng = np.random.default_rng(7)
    pages = 9
    q = rng.standard_normal((len(SEQLENS), SEQ_LEN_Q, HEADS_Q, HEAD_DIM)).astype(np.float32)
    k_cache = rng.standard_normal((pages, PAGE, HEADS_K, HEAD_DIM)).astype(np.float32)
    table = rng.permutation(pages)[:8].reshape(4, 2).astype(np.int32)
    seqlens = np.array(SEQLENS, np.int32)
    out, lse = attention(
        q.astype(float), k_cache.astype(float), table, SEQLENS, causal, scale or HEAD_DIM**-0.5
    )
    given: tuple[Any, ...] = (q, k_cache, table, seqlens)
    if library == "torch":
        torch = pytest.importorskip("torch")
        given = tuple(torch.from_numpy(array) for array in given)
    elif library == "jax":
        jnp = pytest.importorskip("jax.numpy")
        given = tuple(jnp.asarray(array) for array in given)
    elif library == "dlpack":
        given = tuple(Exported(array) for array in given)
    return Problem(*given, out, lse)


class Exported:
    """An array that only speaks DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


LIBRARIES = ["numpy", "torch", "jax", "dlpack"]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    if request.param in ("torch", "jax"):
        pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def numpy_problem() -> Problem:
    return make_problem()


# -- the surface ----------------------------------------------------------------------------------


def test_the_public_names() -> None:
    assert set(flashmla_rtc.__all__) == {
        "FlashMLASchedMeta", "__version__", "flash_mla_with_kvcache", "get_mla_metadata", "prepare",
        "DecodeTime", "KernelDifference", "KernelInspection", "PlanFacts", "PlanPicture",
        "SourceOverride", "draw_plan", "inspect_kernel", "kernel_names", "kernel_sources",
        "num_sm_parts", "override_sources", "plan_for", "time_decode",
    }  # fmt: skip
    for name in flashmla_rtc.__all__:
        assert getattr(flashmla_rtc, name) is not None


def test_the_signature_is_flashmlas_and_more_by_keyword() -> None:
    parameters = inspect.signature(flash_mla_with_kvcache).parameters
    assert list(parameters) == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata",
        "num_splits", "softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink",
        "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
        "out", "lse",
    ]  # fmt: skip
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == ["out", "lse"]
    assert [name for name, p in parameters.items() if p.default is p.empty] == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata",
    ]  # fmt: skip
    planning = inspect.signature(get_mla_metadata).parameters
    assert list(planning)[:6] == [
        "cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q",
        "is_fp8_kvcache", "topk",
    ]  # fmt: skip
    assert planning["num_heads_per_head_k"].kind is inspect.Parameter.KEYWORD_ONLY


# -- end to end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_decode_in_the_callers_library(library: str, causal: bool) -> None:
    problem = make_problem(library, causal)
    metadata, num_splits = get_mla_metadata(problem.cache_seqlens, ROWS, HEADS_K)
    result = flash_mla_with_kvcache(
        *problem.arrays, HEAD_DIM_V, metadata, num_splits, causal=causal
    )
    problem.check(result)
    expected = type(problem.q) if library != "dlpack" else np.ndarray
    assert [type(array) for array in result] == [expected] * 2
    out, lse = result
    assert tuple(out.shape) == (4, SEQ_LEN_Q, HEADS_Q, HEAD_DIM_V)
    assert tuple(lse.shape) == (4, HEADS_Q, SEQ_LEN_Q)
    assert str(out.dtype).removeprefix("torch.") == "float32"
    assert str(lse.dtype).removeprefix("torch.") == "float32"


def test_a_request_without_keys_gives_0_and_inf(numpy_problem: Problem) -> None:
    out, lse = flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None)
    empty = SEQLENS.index(0)
    assert (out[empty] == 0).all()
    assert np.isposinf(lse[empty]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_in_half_precision(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    problem = make_problem("torch")
    half = getattr(torch, dtype)
    out, lse = flash_mla_with_kvcache(
        problem.q.to(half), problem.k_cache.to(half), *problem.arrays[2:], HEAD_DIM_V, None
    )
    assert (out.dtype, lse.dtype) == (half, torch.float32)
    problem.check((out, lse), tolerance=0.06)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("pages", [0, 3])
def test_a_batch_of_none(name: str, pages: int) -> None:
    """NumPy's arrays without elements have strides of 0, torch's have those of the shape."""
    arrays: list[Any] = [
        np.zeros((0, 2, 4, HEAD_DIM), np.float32),
        np.zeros((pages, PAGE, 1, HEAD_DIM), np.float32),
        np.zeros((0, 5), np.int32),
        np.zeros(0, np.int32),
    ]
    out, lse = np.zeros((0, 2, 4, HEAD_DIM_V), np.float32), np.zeros((0, 4, 2), np.float32)
    if name == "torch":
        torch = pytest.importorskip("torch")
        arrays = [torch.from_numpy(array) for array in arrays]
        out, lse = torch.from_numpy(out), torch.from_numpy(lse)
    for plan in (get_mla_metadata(arrays[3], 8, 1), get_mla_metadata(), (None,)):
        for given in ({}, {"out": out, "lse": lse}):
            result = flash_mla_with_kvcache(*arrays, HEAD_DIM_V, *plan, **given)
            assert [tuple(a.shape) for a in result] == [(0, 2, 4, HEAD_DIM_V), (0, 4, 2)]


def test_a_new_cache_without_pages() -> None:
    out, lse = flash_mla_with_kvcache(
        np.ones((1, 1, 2, HEAD_DIM), np.float32),
        np.zeros((0, PAGE, 1, HEAD_DIM), np.float32),
        np.zeros((1, 1), np.int32),
        np.array([3], np.int32),
        HEAD_DIM_V,
        None,
    )
    assert (out == 0).all()
    assert np.isposinf(lse).all()


def test_a_table_that_names_no_page_of_the_cache(numpy_problem: Problem) -> None:
    q, k_cache, _, seqlens = numpy_problem.arrays
    nowhere = np.where(np.arange(8).reshape(4, 2) % 2, -1, 2147480000).astype(np.int32)
    for cache in (k_cache, k_cache[:0]):
        out, lse = flash_mla_with_kvcache(q, cache, nowhere, seqlens, HEAD_DIM_V, None)
        assert (out == 0).all()
        assert np.isposinf(lse).all()


def test_the_scale_is_used(numpy_problem: Problem) -> None:
    problem = make_problem(scale=0.01)
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, None, None, 0.01))
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, None, softmax_scale=0.01))
    with pytest.raises(AssertionError):
        numpy_problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, None, None, 0.01))


def test_everything_by_position_and_everything_by_keyword() -> None:
    problem = make_problem(causal=True)
    metadata, num_splits = get_mla_metadata(problem.cache_seqlens, ROWS, HEADS_K)
    positional = flash_mla_with_kvcache(
        *problem.arrays, HEAD_DIM_V, metadata, num_splits, None, True, False,
        None, None, None, None, None, None,
    )  # fmt: skip
    named = flash_mla_with_kvcache(
        q=problem.q,
        k_cache=problem.k_cache,
        block_table=problem.block_table,
        cache_seqlens=problem.cache_seqlens,
        head_dim_v=HEAD_DIM_V,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=None,
        causal=True,
        is_fp8_kvcache=False,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
        out=None,
        lse=None,
    )
    problem.check(positional)
    problem.check(named)


def test_inputs_are_left_as_they_were(library: str) -> None:
    problem = make_problem(library)
    metadata = get_mla_metadata(problem.cache_seqlens, ROWS, HEADS_K)
    given = [*problem.arrays, *metadata]
    views = [getattr(array, "array", array) for array in given]
    before = [numbers(array).copy() for array in views]
    flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, *metadata)
    for array, kept in zip(views, before, strict=True):
        np.testing.assert_array_equal(numbers(array), kept)


# -- results into the caller's arrays -------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("given", ["out", "lse", "both"])
def test_results_go_where_they_are_asked_for(name: str, given: str) -> None:
    problem = make_problem(name)
    # Strided, with a margin that must stay as it is.
    big_out = np.full((4, SEQ_LEN_Q + 1, HEADS_Q, HEAD_DIM_V + 8), 5, np.float32)
    big_lse = np.full((4, SEQ_LEN_Q, HEADS_Q, 2), 5, np.float32)
    if name == "torch":
        torch = pytest.importorskip("torch")
        big_out, big_lse = torch.from_numpy(big_out), torch.from_numpy(big_lse)
    out = big_out[:, 1:, :, :HEAD_DIM_V]
    lse = big_lse[..., 0].swapaxes(1, 2)
    wanted = {"out": {"out": out}, "lse": {"lse": lse}, "both": {"out": out, "lse": lse}}[given]
    result = flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, None, **wanted)
    problem.check(result)
    assert (result[0] is out) == ("out" in wanted)
    assert (result[1] is lse) == ("lse" in wanted)
    if "out" in wanted:
        assert (big_out[:, 0] == 5).all()
        assert (big_out[..., HEAD_DIM_V:] == 5).all()
    if "lse" in wanted:
        assert (big_lse[..., 1] == 5).all()


def test_an_out_that_does_not_fit_is_left_alone(numpy_problem: Problem) -> None:
    out = np.full((4, SEQ_LEN_Q, HEADS_Q, HEAD_DIM_V + 1), 5, np.float32)
    with pytest.raises(ValueError, match=r"^out must have shape"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None, out=out)
    assert (out == 5).all()


# -- planning: the two-array forms ----------------------------------------------------------------


def test_every_spelling_of_the_two_array_form_makes_the_same_plan(library: str) -> None:
    seqlens = make_problem(library).cache_seqlens
    plans = [
        get_mla_metadata(seqlens, ROWS, HEADS_K),
        get_mla_metadata(seqlens, num_heads_per_head_k=ROWS, num_heads_k=HEADS_K),
        get_mla_metadata(cache_seqlens=seqlens, num_q_tokens_per_head_k=ROWS, num_heads_k=HEADS_K),
        get_mla_metadata(seqlens, ROWS, HEADS_K, HEADS_Q),
        get_mla_metadata(seqlens, ROWS, HEADS_K, num_heads_q=HEADS_Q, is_fp8_kvcache=False),
        get_mla_metadata(seqlens, ROWS, HEADS_K, HEADS_Q, False, None),
        get_mla_metadata(seqlens, np.int64(ROWS), np.int32(HEADS_K)),
    ]
    for metadata, num_splits in plans:
        assert tuple(metadata.shape) == (1, 8)  # a CPU works through requests one by one
        assert tuple(num_splits.shape) == (len(SEQLENS) + 1,)
        for array in (metadata, num_splits):
            assert str(array.dtype).removeprefix("torch.") == "int32"
        np.testing.assert_array_equal(numbers(metadata), numbers(plans[0][0]))
        np.testing.assert_array_equal(numbers(num_splits), [0, 1, 2, 3, 4])
    assert type(plans[0][0]) is (type(seqlens) if library != "dlpack" else np.ndarray)


def test_one_plan_serves_every_layer_and_lengths_that_changed(numpy_problem: Problem) -> None:
    plan = get_mla_metadata(np.array([5, 5, 5, 5], np.int32), ROWS, HEADS_K)
    for _ in range(2):
        numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, *plan))


def test_a_plan_for_fewer_requests_is_legal(numpy_problem: Problem) -> None:
    plan = get_mla_metadata(numpy_problem.cache_seqlens[:2], ROWS, HEADS_K)
    flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, *plan)


def test_a_plan_without_num_splits_is_legal(numpy_problem: Problem) -> None:
    metadata, _ = get_mla_metadata(numpy_problem.cache_seqlens, ROWS, HEADS_K)
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, metadata))


def test_a_plan_of_another_shape_is_refused(numpy_problem: Problem) -> None:
    metadata, num_splits = get_mla_metadata(numpy_problem.cache_seqlens, ROWS, HEADS_K)
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata must have shape \(1, 8\)"):
        flash_mla_with_kvcache(
            *numpy_problem.arrays, HEAD_DIM_V, np.concatenate([metadata, metadata]), num_splits
        )
    with pytest.raises(ValueError, match=r"^num_splits must have between 1 and batch"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, metadata, np.zeros(9, np.int32))


@pytest.mark.parametrize("plan", [7, "plan", [1, 2], object()])
def test_a_plan_that_is_no_array(numpy_problem: Problem, plan: Any) -> None:
    with pytest.raises(TypeError, match=r"^tile_scheduler_metadata must be an array"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, plan)


BAD_PLANNING = [
    ({"num_q_tokens_per_head_k": 4, "num_heads_k": 1}, TypeError, "cache_seqlens is missing"),
    ({"cache_seqlens": "seqlens", "num_heads_k": 1}, TypeError, "per_head_k is missing"),
    (
        {"cache_seqlens": "seqlens", "num_q_tokens_per_head_k": 4},
        TypeError,
        "num_heads_k is missing",
    ),
    (
        {"cache_seqlens": "seqlens", "num_q_tokens_per_head_k": 4, "num_heads_per_head_k": 4},
        TypeError,
        "old name",
    ),
    (
        {
            "cache_seqlens": "seqlens",
            "num_q_tokens_per_head_k": 4,
            "num_heads_k": 3,
            "num_heads_q": 4,
        },
        ValueError,
        "multiple of num_heads_k",
    ),
    (
        {"cache_seqlens": [1, 2], "num_q_tokens_per_head_k": 4, "num_heads_k": 1},
        TypeError,
        "^cache_seqlens must be an array",
    ),
    (
        {"cache_seqlens": "seqlens", "num_q_tokens_per_head_k": True, "num_heads_k": 1},
        TypeError,
        "^num_q_tokens_per_head_k must be an integer",
    ),
    ({"is_fp8_kvcache": 1}, TypeError, "^is_fp8_kvcache must be True or False"),
    ({"is_fp8_kvcache": True}, NotImplementedError, "^is_fp8_kvcache=True"),
    ({"topk": 64}, NotImplementedError, "^topk"),
]


@pytest.mark.parametrize("arguments, error, words", BAD_PLANNING)
def test_bad_planning_says_what_is_wrong(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    seqlens = np.array(SEQLENS, np.int32)
    given = {k: seqlens if v == "seqlens" else v for k, v in arguments.items()}
    with pytest.raises(error, match=words) as caught:
        get_mla_metadata(**given)
    assert caught.type is error
    assert str(caught.value).endswith(".")


# -- planning: the object -------------------------------------------------------------------------


def test_the_object_is_filled_by_the_first_call_and_used_by_the_next(library: str) -> None:
    problem = make_problem(library)
    meta, nothing = get_mla_metadata()
    assert isinstance(meta, FlashMLASchedMeta)
    assert nothing is None
    assert meta.tile_scheduler_metadata is None
    assert meta.num_splits is None
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, meta, nothing))
    plan, splits = meta.tile_scheduler_metadata, meta.num_splits
    expected = get_mla_metadata(problem.cache_seqlens, ROWS, HEADS_K)
    np.testing.assert_array_equal(numbers(plan), numbers(expected[0]))
    np.testing.assert_array_equal(numbers(splits), numbers(expected[1]))
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, meta))
    assert meta.tile_scheduler_metadata is plan
    assert meta.num_splits is splits


def test_the_object_can_be_made_by_hand(numpy_problem: Problem) -> None:
    meta = FlashMLASchedMeta()
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta))
    assert "made_for" not in repr(meta)


def another_call(what: str) -> tuple[Any, ...]:
    q, k_cache, table, seqlens = make_problem().arrays
    return {
        "batch": (q[:3], k_cache, table[:3], seqlens[:3]),
        "seq_len_q": (q[:, :1], k_cache, table, seqlens),
        "heads_q": (q[:, :, :2], k_cache, table, seqlens),
        "heads_k": (q, k_cache[:, :, :1], table, seqlens),
    }[what]


@pytest.mark.parametrize("what", ["batch", "seq_len_q", "heads_q", "heads_k"])
def test_the_object_refuses_a_call_of_another_configuration(
    numpy_problem: Problem, what: str
) -> None:
    meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta)
    kept = meta.tile_scheduler_metadata
    with pytest.raises(ValueError, match="another configuration") as caught:
        flash_mla_with_kvcache(*another_call(what), HEAD_DIM_V, meta)
    assert f"{what} " in str(caught.value)
    assert "get_mla_metadata()" in str(caught.value)
    # The refusal leaves it as it was.
    assert meta.tile_scheduler_metadata is kept
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta))


def test_the_object_takes_calls_that_differ_elsewhere(numpy_problem: Problem) -> None:
    meta, _ = get_mla_metadata()
    q, k_cache, table, seqlens = numpy_problem.arrays
    for arrays in (
        (q, k_cache, table, seqlens),
        (q, k_cache, np.repeat(table, 2, 1), seqlens),
        (q, np.concatenate([k_cache, k_cache]), table, seqlens),
        (q, k_cache, table, seqlens // 2),
    ):
        flash_mla_with_kvcache(*arrays, HEAD_DIM_V, meta, causal=True)


def test_plans_can_be_assigned_to_the_object(numpy_problem: Problem) -> None:
    plan, splits = get_mla_metadata(numpy_problem.cache_seqlens, ROWS, HEADS_K)
    meta, _ = get_mla_metadata()
    meta.tile_scheduler_metadata, meta.num_splits = plan, splits
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta))
    assert meta.tile_scheduler_metadata is plan
    assert meta.num_splits is splits
    # Back to None: planned anew.
    meta.tile_scheduler_metadata = None
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta))
    assert meta.tile_scheduler_metadata is not None
    # What is assigned is checked as any plan is.
    meta.tile_scheduler_metadata = plan.astype(np.int64)
    with pytest.raises(TypeError, match=r"^tile_scheduler_metadata must have dtype int32"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta)


def test_what_get_mla_metadata_returns_has_to_be_taken_apart(numpy_problem: Problem) -> None:
    for both in (get_mla_metadata(), get_mla_metadata(numpy_problem.cache_seqlens, ROWS, HEADS_K)):
        with pytest.raises(TypeError, match=r"it is a tuple\. get_mla_metadata returns two"):
            flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, both)


def test_num_splits_beside_the_object_is_refused(numpy_problem: Problem) -> None:
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match=r"^num_splits must be None"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, meta, np.zeros(5, np.int32))
    assert meta.tile_scheduler_metadata is None


# -- no plan at all -------------------------------------------------------------------------------


def test_without_a_plan_the_call_plans_for_itself(library: str) -> None:
    problem = make_problem(library)
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, None))
    problem.check(flash_mla_with_kvcache(*problem.arrays, HEAD_DIM_V, tile_scheduler_metadata=None))


# -- what is not supported, and what is wrong -----------------------------------------------------

UNSUPPORTED = [
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(numpy_problem: Problem, name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported yet"):
        flash_mla_with_kvcache(
            *numpy_problem.arrays, HEAD_DIM_V, None, **{name: np.zeros(1, np.int32)}
        )


def test_an_fp8_cache_is_named(numpy_problem: Problem) -> None:
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache=True"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None, is_fp8_kvcache=True)
    q, k_cache, *rest = numpy_problem.arrays
    with pytest.raises(NotImplementedError, match=r"^k_cache of dtype uint8"):
        flash_mla_with_kvcache(q, k_cache.astype(np.uint8), *rest, HEAD_DIM_V, None)


def test_every_name_of_the_signature_is_either_used_or_refused() -> None:
    used = {
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata",
        "num_splits", "softmax_scale", "causal", "out", "lse",
    }  # fmt: skip
    names = set(inspect.signature(flash_mla_with_kvcache).parameters)
    assert names == used | set(UNSUPPORTED) | {"is_fp8_kvcache"}


@pytest.mark.parametrize("value", [True, False, np.True_])
def test_a_positional_causal_in_the_place_of_the_scale(numpy_problem: Problem, value: Any) -> None:
    """The mistake is silent in FlashMLA: True is a scale of 1."""
    plan = get_mla_metadata(numpy_problem.cache_seqlens, ROWS, HEADS_K)
    with pytest.raises(TypeError, match=rf"causal={bool(value)}"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, *plan, value)


@pytest.mark.parametrize("name", ["causal", "is_fp8_kvcache"])
@pytest.mark.parametrize("value", [1, 0, None, "True"])
def test_flags_are_bools(numpy_problem: Problem, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be True or False"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None, **{name: value})


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("thing", [None, 3, [1]])
def test_arguments_that_are_no_arrays_are_named(
    numpy_problem: Problem, position: int, thing: Any
) -> None:
    given = list(numpy_problem.arrays)
    given[position] = thing
    name = ("q", "k_cache", "block_table", "cache_seqlens")[position]
    with pytest.raises(TypeError, match=f"^{name} must be an array"):
        flash_mla_with_kvcache(*given, HEAD_DIM_V, None)


def test_libraries_are_not_mixed(numpy_problem: Problem) -> None:
    torch = pytest.importorskip("torch")
    q, *rest = numpy_problem.arrays
    with pytest.raises(TypeError, match="k_cache must be an array of q's library"):
        flash_mla_with_kvcache(torch.from_numpy(q), *rest, HEAD_DIM_V, None)
    with pytest.raises(TypeError, match=r"^out must be an array of q's library"):
        out = torch.zeros(4, SEQ_LEN_Q, HEADS_Q, HEAD_DIM_V)
        flash_mla_with_kvcache(q, *rest, HEAD_DIM_V, None, out=out)


# -- the debug switch -----------------------------------------------------------------------------


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Any:
    def turn(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(validation.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(validation.VARIABLE, value)
        validation.validation_enabled.cache_clear()

    yield turn
    validation.validation_enabled.cache_clear()


def test_bad_contents_pass_in_silence_until_the_switch_is_on(
    numpy_problem: Problem, switch: Any
) -> None:
    q, k_cache, table, seqlens = numpy_problem.arrays
    bad_page = table.copy()
    bad_page[0, 1] = 9
    too_long, negative = seqlens.copy(), seqlens.copy()
    too_long[1], negative[3] = 129, -2
    bad = [
        (q, k_cache, bad_page, seqlens, r"block_table\[0, 1\]"),
        (q, k_cache, table, too_long, r"cache_seqlens\[1\]"),
        (q, k_cache, table, negative, r"cache_seqlens\[3\]"),
    ]
    switch(None)
    for *arrays, _ in bad:
        out, _ = flash_mla_with_kvcache(*arrays, HEAD_DIM_V, None)
        assert np.isfinite(out).all()
    switch("1")
    for *arrays, words in bad:
        with pytest.raises(ValueError, match=words):
            flash_mla_with_kvcache(*arrays, HEAD_DIM_V, None)
    numpy_problem.check(flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None))


def test_a_switch_that_is_neither_on_nor_off(numpy_problem: Problem, switch: Any) -> None:
    switch("yes")
    with pytest.raises(ValueError, match=validation.VARIABLE):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None)


# -- prepare --------------------------------------------------------------------------------------


def test_prepare_asks_for_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from flashmla_rtc import backends, interface, sm90

    prepared: list[int] = []
    monkeypatch.setattr(backends, "why_not", lambda device: None)
    monkeypatch.setattr(sm90, "prepare", prepared.append)
    third = SimpleNamespace(type="cuda", index=3)
    some = SimpleNamespace(type="cuda", index=None)
    for device in (None, 0, 2, np.int64(1), third, some, "cuda:4", "cuda", SimpleNamespace(id=5)):
        assert interface.prepare(device) is None
    assert prepared == [0, 0, 2, 1, 3, 0, 4, 0, 5]


@pytest.mark.parametrize(
    "device, error",
    [
        (-1, ValueError),
        ("cuda:", ValueError),
        ("gpu", ValueError),
        (1.7, TypeError),
        (True, ValueError),
        ("cuda:-1", ValueError),
    ],
)
def test_prepare_refuses_what_is_no_device(device: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="device must be the index of a CUDA device"):
        flashmla_rtc.prepare(device)


def test_prepare_of_a_cpu_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmla_rtc import sm90

    monkeypatch.setattr(sm90, "prepare", lambda index: pytest.fail("nothing to prepare"))
    flashmla_rtc.prepare("cpu")


def test_prepare_does_nothing_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashmla_rtc import backends, sm90

    monkeypatch.setattr(backends, "why_not", lambda device: "No.")
    monkeypatch.setattr(sm90, "prepare", lambda index: pytest.fail("nothing to prepare"))
    flashmla_rtc.prepare()


def test_num_splits_without_a_plan_is_refused(numpy_problem: Problem) -> None:
    splits = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="num_splits belongs to a plan of arrays"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, None, splits)


def test_a_plan_of_another_library_is_refused(numpy_problem: Problem) -> None:
    torch = pytest.importorskip("torch")
    plan = torch.zeros((1, 8), dtype=torch.int32)
    with pytest.raises(TypeError, match="tile_scheduler_metadata must be an array of q's library"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, plan)


def test_num_heads_q_alone_is_no_plan() -> None:
    with pytest.raises(TypeError, match="cache_seqlens is missing"):
        get_mla_metadata(num_heads_q=16)


def test_a_call_that_fails_leaves_the_object_open(numpy_problem: Problem) -> None:
    """... to a good call of any configuration, and so does an assignment."""
    held, _ = get_mla_metadata()
    with pytest.raises(ValueError, match="num_splits must be None"):
        flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, held, np.zeros(2, np.int32))
    flash_mla_with_kvcache(*numpy_problem.arrays, HEAD_DIM_V, held)
