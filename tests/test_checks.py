"""Every check: good input passes, and each kind of bad input says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from flashmla_rtc import checks, option_checks, plan_checks
from flashmla_rtc.arrays import Device, View, view
from flashmla_rtc.checks import DecodeShape
from flashmla_rtc.validation import validate_contents, validation_enabled

CPU = Device("cpu", 0)
GPU = Device("cuda", 0)


def make_view(
    shape: tuple[int, ...],
    dtype: str = "bfloat16",
    *,
    strides: tuple[int, ...] | None = None,
    device: Device = GPU,
    library: str = "torch",
    pointer: int = 1 << 20,
) -> View:
    """A view of memory that does not exist; contiguous unless ``strides`` says else."""
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(None, library, None, pointer, shape, strides, dtype, device)


def decode_arguments(**changes: Any) -> dict[str, Any]:
    """A good call (batch 3, 2 queries, 16 heads, 5 pages in a row) but for ``changes``."""
    arguments = {
        "q": make_view((3, 2, 16, 576)),
        "k_cache": make_view((40, 64, 1, 576)),
        "block_table": make_view((3, 5), "int32"),
        "cache_seqlens": make_view((3,), "int32"),
        "head_dim_v": 512,
        "out": make_view((3, 2, 16, 512)),
        "lse": make_view((3, 16, 2), "float32"),
    }
    arguments.update(changes)
    return arguments


def expect(error: type[Exception], words: list[str], call: Callable[[], object]) -> None:
    """``call`` raises exactly ``error`` with a complete sentence that holds all of ``words``."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error, message
    for word in words:
        assert word in message
    assert message.endswith(".")
    assert "  " not in message
    assert "View(" not in message


# -- check_decode: what is accepted ---------------------------------------------------------------


def test_the_shape_of_a_call() -> None:
    shape = checks.check_decode(**decode_arguments())
    assert shape == DecodeShape(
        batch=3,
        seq_len_q=2,
        heads_q=16,
        heads_k=1,
        head_dim=576,
        head_dim_v=512,
        num_blocks=40,
        page_block_size=64,
        max_blocks=5,
        dtype="bfloat16",
    )
    assert shape.heads_per_group == 16
    assert shape.rows_per_group == 32
    assert len({shape, checks.check_decode(**decode_arguments())}) == 1


def test_groups_of_heads() -> None:
    shape = checks.check_decode(
        **decode_arguments(q=make_view((3, 2, 12, 576)), k_cache=make_view((40, 64, 4, 576)),
                           out=None, lse=None)
    )  # fmt: skip
    assert shape.heads_per_group == 3
    assert shape.rows_per_group == 6


GOOD = {
    "no out, no lse": {"out": None, "lse": None},
    "out only": {"lse": None},
    "lse only": {"out": None},
    "batch 0": {
        "q": make_view((0, 2, 16, 576)),
        "block_table": make_view((0, 5), "int32"),
        "cache_seqlens": make_view((0,), "int32"),
        "out": make_view((0, 2, 16, 512)),
        "lse": make_view((0, 16, 2), "float32"),
    },
    "no pages": {"k_cache": make_view((0, 64, 1, 576))},
    "no columns": {"block_table": make_view((3, 0), "int32")},
    "page of 1": {"k_cache": make_view((40, 1, 1, 576))},
    "as many key heads as query heads": {"k_cache": make_view((40, 64, 16, 576))},
    "head_dim_v of head_dim": {"head_dim_v": 576, "out": None},
    "NumPy integer": {"head_dim_v": np.int64(512)},
    "0-d NumPy integer": {"head_dim_v": np.array(512)},
    "strided q": {"q": make_view((3, 2, 16, 576), strides=(99999, 640, 1280, 1))},
    "strided pages": {"k_cache": make_view((40, 64, 1, 576), strides=(40001, 600, 7, 1))},
    "broadcast q": {"q": make_view((3, 2, 16, 576), strides=(0, 0, 576, 1))},
    "wide table": {"block_table": make_view((3, 5), "int32", strides=(100, 1))},
    "table of one column": {
        "block_table": make_view((3, 1), "int32", strides=(100, 7)),
    },
    "strided out": {"out": make_view((3, 2, 16, 512), strides=(50000, 600, 1200, 1))},
    "lse of any strides": {"lse": make_view((3, 16, 2), "float32", strides=(7, 21, 3))},
    "stride 0 of an axis of 1": {
        "q": make_view((1, 1, 16, 576), strides=(0, 0, 576, 1)),
        "block_table": make_view((1, 5), "int32", strides=(0, 1)),
        "cache_seqlens": make_view((1,), "int32", strides=(0,)),
        "out": make_view((1, 1, 16, 512), strides=(0, 0, 512, 1)),
        "lse": make_view((1, 16, 1), "float32", strides=(0, 1, 0)),
    },
    "last axis of 1 with any stride": {
        "q": make_view((3, 2, 16, 1), strides=(900, 400, 20, 9)),
        "k_cache": make_view((40, 64, 1, 1), strides=(640, 10, 10, 9)),
        "head_dim_v": 1,
        "out": make_view((3, 2, 16, 1), strides=(900, 400, 20, 9)),
    },
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_good_calls(changes: dict[str, Any]) -> None:
    shape = checks.check_decode(**decode_arguments(**changes))
    assert all(type(size) is int for size in shape[:-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_dtype(dtype: str) -> None:
    arguments = decode_arguments(
        q=make_view((3, 2, 16, 576), dtype),
        k_cache=make_view((40, 64, 1, 576), dtype),
        out=make_view((3, 2, 16, 512), dtype),
    )
    assert checks.check_decode(**arguments).dtype == dtype


def test_views_of_real_arrays() -> None:
    q = np.zeros((2, 1, 4, 24), np.float32)
    k_cache = np.zeros((6, 8, 2, 24), np.float32)
    out, lse = np.zeros((2, 1, 4, 16), np.float32), np.zeros((2, 4, 1), np.float32)
    table, seqlens = np.zeros((2, 3), np.int32), np.zeros(2, np.int32)
    views = [view(array, "array") for array in (q, k_cache, table, seqlens)]
    shape = checks.check_decode(*views, 16, view(out, "out"), view(lse, "lse"))
    assert shape == DecodeShape(2, 1, 4, 2, 24, 16, 6, 8, 3, "float32")


def test_views_of_real_tensors() -> None:
    torch = pytest.importorskip("torch")
    q = torch.zeros(2, 4, 1, 24, dtype=torch.bfloat16).transpose(1, 2)
    k_cache = torch.zeros(6, 8, 2, 32, dtype=torch.bfloat16)[..., :24]
    table, seqlens = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    views = [view(array, "array") for array in (q, k_cache, table, seqlens)]
    out = view(torch.empty(2, 1, 4, 16, dtype=torch.bfloat16), "out")
    shape = checks.check_decode(*views, 16, out, view(torch.empty(2, 4, 1), "lse"))
    assert shape == DecodeShape(2, 1, 4, 2, 24, 16, 6, 8, 3, "bfloat16")
    expanded = view(torch.empty(2, 1, 4, 1, dtype=torch.bfloat16).expand(2, 1, 4, 16), "out")
    expect(ValueError, ["out"], lambda: checks.check_decode(*views, 16, expanded))


# -- check_decode: what is refused ----------------------------------------------------------------

Q, K = (3, 2, 16, 576), (40, 64, 1, 576)
BAD = [
    # libraries
    ({"k_cache": make_view(K, library="cupy")}, TypeError, ["k_cache", "cupy", "torch", "q's"]),
    ({"block_table": make_view((3, 5), "int32", library="numpy")}, TypeError,
     ["block_table", "numpy", "torch"]),
    ({"cache_seqlens": make_view((3,), "int32", library="jax")}, TypeError,
     ["cache_seqlens", "jax", "torch"]),
    ({"out": make_view((3, 2, 16, 512), library="cupy")}, TypeError, ["out", "cupy", "torch"]),
    ({"lse": make_view((3, 16, 2), "float32", library="cupy")}, TypeError,
     ["lse", "cupy", "torch"]),
    # ranks
    ({"q": make_view((3, 16, 576))}, ValueError,
     ["q must have 4 dimensions", "(batch, seq_len_q, heads_q, head_dim)", "has 3",
      "(3, 16, 576)"]),
    ({"k_cache": make_view((40, 64, 576))}, ValueError,
     ["k_cache must have 4 dimensions", "(num_blocks, page_block_size, heads_k, head_dim)",
      "(40, 64, 576)"]),
    ({"block_table": make_view((15,), "int32")}, ValueError,
     ["block_table must have 2 dimensions", "(batch, max_blocks)", "(15,)"]),
    ({"cache_seqlens": make_view((3, 1), "int32")}, ValueError,
     ["cache_seqlens must have 1 dimension ", "(batch,)", "(3, 1)"]),
    ({"cache_seqlens": make_view((), "int32")}, ValueError,
     ["cache_seqlens must have 1 dimension ", "has 0", "()"]),
    # dtypes
    ({"q": make_view(Q, "int8")}, TypeError,
     ["q must have dtype bfloat16, float16, float32 or float64", "int8"]),
    ({"q": make_view(Q, "float8_e4m3fn")}, TypeError, ["q must have dtype", "float8_e4m3fn"]),
    ({"k_cache": make_view(K, "float16")}, TypeError,
     ["k_cache", "q's dtype bfloat16", "float16"]),
    ({"k_cache": make_view(K, "int8")}, TypeError, ["k_cache", "bfloat16", "int8"]),
    ({"k_cache": make_view((40, 64, 1, 656), "uint8")}, NotImplementedError,
     ["k_cache", "uint8", "fp8 KV cache", "not supported"]),
    ({"k_cache": make_view(K, "float8_e4m3fn")}, NotImplementedError,
     ["k_cache", "float8_e4m3fn", "fp8 KV cache"]),
    ({"block_table": make_view((3, 5), "int64")}, TypeError, ["block_table", "int32", "int64"]),
    ({"cache_seqlens": make_view((3,), "int64")}, TypeError, ["cache_seqlens", "int32", "int64"]),
    ({"out": make_view((3, 2, 16, 512), "float32")}, TypeError,
     ["out must have q's dtype bfloat16", "float32"]),
    ({"lse": make_view((3, 16, 2), "bfloat16")}, TypeError, ["lse", "dtype float32", "bfloat16"]),
    # devices
    ({"k_cache": make_view(K, device=Device("cuda", 1))}, ValueError,
     ["k_cache", "cuda:0", "cuda:1"]),
    ({"block_table": make_view((3, 5), "int32", device=CPU)}, ValueError,
     ["block_table", "cuda:0", "cpu"]),
    ({"cache_seqlens": make_view((3,), "int32", device=CPU)}, ValueError,
     ["cache_seqlens", "cuda:0", "cpu"]),
    ({"out": make_view((3, 2, 16, 512), device=CPU)}, ValueError, ["out", "cuda:0", "cpu"]),
    ({"lse": make_view((3, 16, 2), "float32", device=Device("cuda", 3))}, ValueError,
     ["lse", "cuda:0", "cuda:3"]),
    # sizes
    ({"q": make_view((3, 0, 16, 576))}, ValueError, ["q (batch,", "seq_len_q", "(3, 0, 16, 576)"]),
    ({"q": make_view((3, 2, 0, 576))}, ValueError, ["q (batch,", "heads_q", "(3, 2, 0, 576)"]),
    ({"q": make_view((3, 2, 16, 0))}, ValueError, ["q (batch,", "head_dim", "(3, 2, 16, 0)"]),
    ({"k_cache": make_view((40, 0, 1, 576))}, ValueError,
     ["k_cache (num_blocks,", "page_block_size", "(40, 0, 1, 576)"]),
    ({"k_cache": make_view((40, 64, 0, 576))}, ValueError,
     ["k_cache (num_blocks,", "heads_k", "(40, 64, 0, 576)"]),
    ({"k_cache": make_view((40, 64, 1, 512))}, ValueError,
     ["k_cache", "head_dim", "512", "576", "(40, 64, 1, 512)"]),
    ({"k_cache": make_view((40, 64, 3, 576))}, ValueError,
     ["heads_q", "multiple", "heads_k", "16", "3"]),
    ({"k_cache": make_view((40, 64, 32, 576))}, ValueError,
     ["heads_q", "multiple", "heads_k", "16", "32"]),
    ({"block_table": make_view((4, 5), "int32")}, ValueError,
     ["block_table (batch, max_blocks)", "batch of 3", "(4, 5)"]),
    ({"cache_seqlens": make_view((2,), "int32")}, ValueError,
     ["cache_seqlens (batch,)", "batch of 3", "(2,)"]),
    ({"out": make_view((3, 2, 16, 576))}, ValueError,
     ["out", "(batch, seq_len_q, heads_q, head_dim_v) = (3, 2, 16, 512)", "(3, 2, 16, 576)"]),
    ({"out": make_view((3, 32, 512))}, ValueError, ["out", "(3, 2, 16, 512)", "(3, 32, 512)"]),
    ({"lse": make_view((3, 2, 16), "float32")}, ValueError,
     ["lse", "(batch, heads_q, seq_len_q) = (3, 16, 2)", "(3, 2, 16)"]),
    # head_dim_v
    ({"head_dim_v": 577}, ValueError, ["head_dim_v", "between 1 and head_dim (576)", "577"]),
    ({"head_dim_v": 0}, ValueError, ["head_dim_v", "between 1", "0"]),
    ({"head_dim_v": -512}, ValueError, ["head_dim_v", "-512"]),
    ({"head_dim_v": 512.0}, TypeError, ["head_dim_v", "integer", "512.0", "float"]),
    ({"head_dim_v": True}, TypeError, ["head_dim_v", "integer", "True", "bool"]),
    ({"head_dim_v": np.True_}, TypeError, ["head_dim_v", "integer", "bool"]),
    ({"head_dim_v": "512"}, TypeError, ["head_dim_v", "integer", "'512'", "str"]),
    ({"head_dim_v": None}, TypeError, ["head_dim_v", "integer", "None"]),
    ({"head_dim_v": np.array([512])}, TypeError, ["head_dim_v", "integer", "ndarray"]),
    # strides
    ({"q": make_view(Q, strides=(36864, 18432, 1152, 2))}, ValueError,
     ["q must be contiguous along its last axis", "(36864, 18432, 1152, 2)"]),
    ({"k_cache": make_view(K, strides=(36864, 1, 576, 64))}, ValueError,
     ["k_cache must be contiguous along its last axis", "(36864, 1, 576, 64)"]),
    ({"block_table": make_view((3, 5), "int32", strides=(1, 3))}, ValueError,
     ["block_table must be contiguous along its last axis", "(1, 3)"]),
    ({"cache_seqlens": make_view((3,), "int32", strides=(2,))}, ValueError,
     ["cache_seqlens must be contiguous", "(2,)"]),
    ({"cache_seqlens": make_view((3,), "int32", strides=(0,))}, ValueError,
     ["cache_seqlens must be contiguous", "(0,)"]),
    ({"out": make_view((3, 2, 16, 512), strides=(32768, 16384, 1, 16))}, ValueError,
     ["out must be contiguous along its last axis", "(32768, 16384, 1, 16)"]),
    ({"out": make_view((3, 2, 16, 512), strides=(0, 8192, 512, 1))}, ValueError,
     ["out", "its own place", "stride 0", "(0, 8192, 512, 1)"]),
    ({"lse": make_view((3, 16, 2), "float32", strides=(32, 2, 0))}, ValueError,
     ["lse", "its own place", "stride 0", "(32, 2, 0)"]),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, words", BAD)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    expect(error, words, lambda: checks.check_decode(**decode_arguments(**changes)))


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_in_jax_arrays(name: str) -> None:
    """They cannot be written. All arrays are JAX arrays here, so nothing else is wrong."""
    arguments = decode_arguments(out=None, lse=None)
    arguments[name] = decode_arguments()[name]
    for value in arguments.values():
        if isinstance(value, View):
            value.library = "jax"
    expect(
        TypeError, [f"{name} is a JAX array", "immutable"], lambda: checks.check_decode(**arguments)
    )


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_in_read_only_arrays(name: str) -> None:
    arrays = {
        "q": np.zeros((2, 1, 4, 24), np.float32),
        "k_cache": np.zeros((6, 8, 2, 24), np.float32),
        "block_table": np.zeros((2, 3), np.int32),
        "cache_seqlens": np.zeros(2, np.int32),
        "out": np.zeros((2, 1, 4, 16), np.float32),
        "lse": np.zeros((2, 4, 1), np.float32),
    }
    arrays[name].flags.writeable = False
    views = {key: view(array, key) for key, array in arrays.items()}
    expect(
        ValueError,
        [f"{name} must be writable", "read-only"],
        lambda: checks.check_decode(**views, head_dim_v=16),
    )


# -- check_kernel_limits --------------------------------------------------------------------------


def limits(changes: dict[str, Any] | None = None, **k_changes: Any) -> None:
    """Check a call that fits the kernels, but for ``changes`` of its sizes or of its k_cache."""
    k_cache = make_view(**{"shape": (40, 64, 2, 576), **k_changes})
    fields: dict[str, Any] = {
        "batch": 3,
        "seq_len_q": 2,
        "heads_q": 16,
        "heads_k": k_cache.shape[2],
        "head_dim": 576,
        "head_dim_v": 512,
        "num_blocks": k_cache.shape[0],
        "page_block_size": 64,
        "max_blocks": 5,
        "dtype": k_cache.dtype,
    }
    checks.check_kernel_limits(DecodeShape(**{**fields, **(changes or {})}), make_view(Q), k_cache)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"pointer": (1 << 20) + 16},
        {"strides": (1 << 30, 8 * 200, 8 * 90, 1)},
        {"strides": ((1 << 39) - 8, 1152, 576, 1)},
        {"shape": (0, 64, 2, 576), "pointer": 0},
        {"shape": (1, 64, 1, 576), "strides": (7, 576, -3, 1)},  # axes of 1: strides say nothing
    ],
)
def test_what_the_kernels_take(changes: dict[str, Any]) -> None:
    limits(**changes)


LIMITS = [
    ({"dtype": "float32"}, ["dtype float32", "bfloat16 or float16", "SM90"]),
    ({"head_dim": 512}, ["head_dim 512", "576", "SM90"]),
    ({"head_dim_v": 256}, ["head_dim_v 256", "512", "SM90"]),
    ({"page_block_size": 16}, ["page_block_size 16", "64 keys", "SM90"]),
]


@pytest.mark.parametrize("fields, words", LIMITS)
def test_what_no_kernel_is_compiled_for(fields: dict[str, Any], words: list[str]) -> None:
    expect(NotImplementedError, words, lambda: limits(fields))


def test_cache_at_an_unaligned_address() -> None:
    expect(
        ValueError,
        ["k_cache", "16 bytes", "0x100002"],
        lambda: limits(pointer=0x100002),
    )


@pytest.mark.parametrize(
    "strides",
    [
        (73732, 1152, 576, 1),
        (73728, 1156, 576, 1),
        (73728, 1152, 577, 1),
        (-73728, 1152, 576, 1),
        (73728, -1152, 576, 1),
        (73728, 1152, -576, 1),
        (1 << 39, 1152, 576, 1),
        (1152, 1 << 39, 576, 1),
        (1152, 1152, 1 << 39, 1),
    ],
)
def test_cache_with_strides_that_tma_cannot_read(strides: tuple[int, ...]) -> None:
    expect(
        ValueError,
        ["k_cache", "multiples of 8 elements (16 bytes)", "2^40", "TMA", str(strides)],
        lambda: limits(strides=strides),
    )


# -- scale and flags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, expected",
    [
        (None, 576**-0.5),
        (0.25, 0.25),
        (0, 0.0),
        (1, 1.0),
        (np.float32(0.25), 0.25),
        (np.float16(0.25), 0.25),
        (np.float64(0.25), 0.25),
        (np.int64(2), 2.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_good_scales(scale: Any, expected: float) -> None:
    result = option_checks.check_scale(scale, 576)
    assert type(result) is float
    assert result == expected


@pytest.mark.parametrize(
    "scale, error, words",
    [
        (True, TypeError, ["softmax_scale", "True (a bool)", "causal=True"]),
        (False, TypeError, ["softmax_scale", "False (a bool)", "causal=False"]),
        (np.True_, TypeError, ["softmax_scale", "a bool", "causal=True"]),
        ("0.1", TypeError, ["softmax_scale", "real number", "'0.1' (str)"]),
        (1j, TypeError, ["softmax_scale", "real number", "1j (complex)"]),
        (Decimal("0.1"), TypeError, ["softmax_scale", "real number", "Decimal"]),
        (np.array(0.1), TypeError, ["softmax_scale", "real number", "ndarray"]),
        ([0.1], TypeError, ["softmax_scale", "real number", "list"]),
        (math.nan, ValueError, ["softmax_scale", "finite", "nan"]),
        (math.inf, ValueError, ["softmax_scale", "finite", "inf"]),
        (-0.1, ValueError, ["softmax_scale", "at least 0", "-0.1"]),
        (-1, ValueError, ["softmax_scale", "at least 0", "-1"]),
        (1.1e8, ValueError, ["softmax_scale", "at most 1e8", "110000000.0"]),
        (10**400, ValueError, ["softmax_scale", "finite", "inf"]),
    ],
)
def test_bad_scales(scale: Any, error: type[Exception], words: list[str]) -> None:
    expect(error, words, lambda: option_checks.check_scale(scale, 576))


def test_flags() -> None:
    for value in (True, False, np.True_, np.False_):
        result = option_checks.check_flag(value, "causal")
        assert type(result) is bool
        assert result == value


@pytest.mark.parametrize("value", [None, 0, 1, 0.125, "yes", np.array(True), np.ones(3)])
def test_bad_flags(value: Any) -> None:
    words = ["causal must be True or False", type(value).__name__]
    expect(TypeError, words, lambda: option_checks.check_flag(value, "causal"))


# -- what is not supported ------------------------------------------------------------------------

NOTHING: dict[str, Any] = {
    "is_fp8_kvcache": False,
    "indices": None,
    "attn_sink": None,
    "extra_k_cache": None,
    "extra_indices_in_kvcache": None,
    "topk_length": None,
    "extra_topk_length": None,
}


def test_nothing_unsupported() -> None:
    option_checks.reject_unsupported(**NOTHING)
    option_checks.reject_unsupported(**{**NOTHING, "is_fp8_kvcache": np.False_})


@pytest.mark.parametrize("name", [name for name in NOTHING if name != "is_fp8_kvcache"])
def test_unsupported_arguments(name: str) -> None:
    value = make_view((3, 2, 64), "int32")
    words = [f"{name} is not supported yet", f"leave {name} at None"]
    expect(
        NotImplementedError,
        words,
        lambda: option_checks.reject_unsupported(**{**NOTHING, name: value}),
    )


@pytest.mark.parametrize("value", [True, np.True_])
def test_unsupported_fp8(value: Any) -> None:
    expect(
        NotImplementedError,
        ["is_fp8_kvcache=True is not supported yet", "fp8 KV cache"],
        lambda: option_checks.reject_unsupported(**{**NOTHING, "is_fp8_kvcache": value}),
    )


def test_fp8_flag_of_a_wrong_type() -> None:
    expect(
        TypeError,
        ["is_fp8_kvcache must be True or False", "None"],
        lambda: option_checks.reject_unsupported(**{**NOTHING, "is_fp8_kvcache": None}),
    )


# -- plans ----------------------------------------------------------------------------------------

SHAPE = DecodeShape(3, 2, 16, 1, 576, 512, 40, 64, 5, "bfloat16")
METADATA = make_view((132, 8), "int32")
SPLITS = make_view((4,), "int32")


@pytest.mark.parametrize(
    "metadata, splits, parts",
    [
        (METADATA, SPLITS, 132),
        (METADATA, None, 132),
        (METADATA, make_view((1,), "int32"), 132),
        (METADATA, make_view((3,), "int32"), 132),
        (METADATA, make_view((1,), "int32", strides=(5,)), 132),
        (make_view((1, 8), "int32", strides=(100, 1)), SPLITS, 1),
    ],
)
def test_good_plans(metadata: View, splits: View | None, parts: int) -> None:
    plan_checks.check_metadata(metadata, splits, SHAPE, parts, GPU)


@pytest.mark.parametrize(
    "metadata, splits, error, words",
    [
        (make_view((132, 8), "int64"), SPLITS, TypeError,
         ["tile_scheduler_metadata", "int32", "int64"]),
        (make_view((78, 8), "int32"), SPLITS, ValueError,
         ["tile_scheduler_metadata", "(132, 8)", "(78, 8)", "cuda:0",
          "get_mla_metadata(cache_seqlens, 32, 1)"]),
        (make_view((132 * 8,), "int32"), SPLITS, ValueError,
         ["tile_scheduler_metadata", "(132, 8)", "(1056,)"]),
        (make_view((132, 8), "int32", device=CPU), SPLITS, ValueError,
         ["tile_scheduler_metadata", "cuda:0", "cpu"]),
        (make_view((132, 8), "int32", strides=(1, 132)), SPLITS, ValueError,
         ["tile_scheduler_metadata must be contiguous", "(1, 132)"]),
        (make_view((132, 8), "int32", strides=(16, 1)), SPLITS, ValueError,
         ["tile_scheduler_metadata must be contiguous", "(16, 1)"]),
        (make_view((132, 8), "int32", pointer=0x100004), SPLITS, ValueError,
         ["tile_scheduler_metadata", "16 bytes", "0x100004"]),
        (METADATA, make_view((4,), "int64"), TypeError, ["num_splits", "int32", "int64"]),
        (METADATA, make_view((4, 1), "int32"), ValueError,
         ["num_splits must have 1 dimension ", "(requests + 1,)", "(4, 1)"]),
        (METADATA, make_view((0,), "int32"), ValueError, ["num_splits", "batch + 1 = 4", "has 0"]),
        (METADATA, make_view((5,), "int32"), ValueError, ["num_splits", "batch + 1 = 4", "has 5"]),
        (METADATA, make_view((4,), "int32", device=CPU), ValueError,
         ["num_splits", "cuda:0", "cpu"]),
        (METADATA, make_view((4,), "int32", strides=(2,)), ValueError,
         ["num_splits must be contiguous", "(2,)"]),
    ],
)  # fmt: skip
def test_bad_plans(
    metadata: View, splits: View, error: type[Exception], words: list[str]
) -> None:  # fmt: skip
    expect(error, words, lambda: plan_checks.check_metadata(metadata, splits, SHAPE, 132, GPU))


LENGTHS = make_view((3,), "int32")


@pytest.mark.parametrize(
    "arguments",
    [
        (LENGTHS, 16, 1),
        (LENGTHS, 16, 1, None),
        (LENGTHS, 32, 4, 64),
        (LENGTHS, np.int32(16), np.int64(1), np.int64(16)),
        (make_view((0,), "int32"), 1, 1),
        (make_view((1,), "int32", strides=(3,)), 1, 1),
    ],
)
def test_good_planning(arguments: tuple[Any, ...]) -> None:
    plan_checks.check_planning(*arguments)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((make_view((3, 1), "int32"), 16, 1), ValueError,
         ["cache_seqlens must have 1 dimension ", "(3, 1)"]),
        ((make_view((3,), "int64"), 16, 1), TypeError, ["cache_seqlens", "int32", "int64"]),
        ((make_view((3,), "int32", strides=(2,)), 16, 1), ValueError,
         ["cache_seqlens must be contiguous", "(2,)"]),
        ((LENGTHS, 0, 1), ValueError, ["num_q_tokens_per_head_k", "at least 1", "0"]),
        ((LENGTHS, 16.0, 1), TypeError, ["num_q_tokens_per_head_k", "integer", "16.0"]),
        ((LENGTHS, True, 1), TypeError, ["num_q_tokens_per_head_k", "integer", "bool"]),
        ((LENGTHS, 16, 0), ValueError, ["num_heads_k", "at least 1", "0"]),
        ((LENGTHS, 16, True), TypeError, ["num_heads_k", "integer", "bool"]),
        ((LENGTHS, 16, None), TypeError, ["num_heads_k", "integer", "None"]),
        ((LENGTHS, 16, 1, -4), ValueError, ["num_heads_q", "at least 1", "-4"]),
        ((LENGTHS, 16, 1, "16"), TypeError, ["num_heads_q", "integer", "'16'"]),
        ((LENGTHS, 16, 3, 16), ValueError, ["num_heads_q", "multiple of num_heads_k", "16", "3"]),
        ((LENGTHS, 20, 1, 16), ValueError, ["num_q_tokens_per_head_k", "multiple", "16", "20"]),
    ],
)  # fmt: skip
def test_bad_planning(
    arguments: tuple[Any, ...], error: type[Exception], words: list[str]
) -> None:  # fmt: skip
    expect(error, words, lambda: plan_checks.check_planning(*arguments))


# -- the debug switch -----------------------------------------------------------------------------


def validate(table: list[list[int]], seqlens: list[int], num_blocks: int = 40) -> None:
    """NumPy arrays; pages of 64 keys."""
    columns = len(table[0]) if table else 2
    arrays = [np.array(table, np.int32).reshape(len(table), columns), np.array(seqlens, np.int32)]
    shape = SHAPE._replace(batch=len(seqlens), num_blocks=num_blocks, max_blocks=columns)
    validate_contents(shape, *(view(array, "array") for array in arrays))


@pytest.mark.parametrize(
    "table, seqlens",
    [
        ([[0, 1, 2], [39, 0, 0]], [192, 129]),
        ([[5, -1, -1], [39, 2147480000, 40]], [64, 1]),
        ([[-1, -1], [2147480000, -1]], [0, 0]),
        ([[], []], [0, 0]),
        ([], []),
    ],
)
def test_good_contents(table: list[list[int]], seqlens: list[int]) -> None:
    validate(table, seqlens)


@pytest.mark.parametrize(
    "table, seqlens, words",
    [
        ([[0, 1], [2, 3]], [5, -1], ["cache_seqlens[1]", "at least 0", "-1"]),
        ([[0, 1], [2, 3]], [129, 5],
         ["cache_seqlens[0]", "at most 128", "2 pages of 64 keys", "129"]),
        ([[], []], [0, 1], ["cache_seqlens[1]", "at most 0", "is 1."]),
        ([[0, 1], [2, 40]], [128, 65],
         ["block_table[1, 1]", "from 0 to 39", "request 1 has 65 keys", "is 40."]),
        ([[0, -1], [2, 3]], [65, 65], ["block_table[0, 1]", "from 0 to 39", "is -1."]),
        ([[0, 1], [2147480000, 3]], [64, 1], ["block_table[1, 0]", "2147480000"]),
    ],
)  # fmt: skip
def test_bad_contents(table: list[list[int]], seqlens: list[int], words: list[str]) -> None:
    expect(ValueError, words, lambda: validate(table, seqlens))


def test_contents_without_pages() -> None:
    validate([[0, 0]], [0], num_blocks=0)
    words = ["cache_seqlens[0] must be 0", "no pages", "is 7."]
    expect(ValueError, words, lambda: validate([[0, 0]], [7], num_blocks=0))


def test_contents_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    table = view(torch.tensor([[0, 1], [2, 40]], dtype=torch.int32), "block_table")
    shape = SHAPE._replace(batch=2, max_blocks=2)
    validate_contents(shape, table, view(torch.tensor([128, 64], dtype=torch.int32), "seqlens"))
    long = view(torch.tensor([128, 65], dtype=torch.int32), "seqlens")
    words = ["block_table[1, 1]", "is 40."]
    expect(ValueError, words, lambda: validate_contents(shape, table, long))


def test_contents_of_device_arrays() -> None:
    """CuPy arrays are copied with their own method; a stand-in shows it without a GPU."""

    class Resident:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def get(self) -> np.ndarray:
            return self.array

        def __array__(self) -> np.ndarray:
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    table, seqlens = make_view((1, 2), "int32"), make_view((1,), "int32")
    shape = SHAPE._replace(batch=1, max_blocks=2)
    for library in ("cupy", "jax", "dlpack"):
        table.library = seqlens.library = library
        table.native = Resident(np.array([[0, 99]], np.int32))
        seqlens.native = Resident(np.array([65], np.int32))
        words = ["block_table[0, 1]", "is 99."]
        expect(ValueError, words, lambda: validate_contents(shape, table, seqlens))


@pytest.mark.parametrize("value, enabled", [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, enabled: bool) -> None:
    monkeypatch.delenv("FLASHMLA_RTC_VALIDATE", raising=False)
    if value is not None:
        monkeypatch.setenv("FLASHMLA_RTC_VALIDATE", value)
    validation_enabled.cache_clear()
    try:
        assert checks.validation_enabled() is enabled
    finally:
        validation_enabled.cache_clear()


def test_the_switch_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_RTC_VALIDATE", "maybe")
    validation_enabled.cache_clear()
    expect(ValueError, ["FLASHMLA_RTC_VALIDATE", "1 or 0", "'maybe'"], validation_enabled)
