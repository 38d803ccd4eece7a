"""JAX arrays through the public calls: never written, results in JAX, tracers refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashmla_rtc

jax = pytest.importorskip("jax")
jnp = jax.numpy

HEADS, HEAD_DIM, HEAD_DIM_V, PAGE = 6, 72, 64, 16
LENGTHS = [50, 16, 0, 1]
Arrays = tuple[Any, Any, Any, Any]


def make(dtype: Any, seed: int = 0) -> Arrays:
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (len(LENGTHS), 1, HEADS, HEAD_DIM), dtype=dtype)
    k_cache = jax.random.normal(keys[1], (20, PAGE, 1, HEAD_DIM), dtype=dtype)
    table = jax.random.permutation(keys[2], 20)[:16].astype(jnp.int32).reshape(4, 4)
    return q, k_cache, table, jnp.array(LENGTHS, dtype=jnp.int32)


def attention(arrays: Arrays) -> np.ndarray:
    """The formula in float64."""
    q, k_cache = (np.asarray(array, dtype=np.float64) for array in arrays[:2])
    table = np.asarray(arrays[2])
    out = np.zeros((*q.shape[:-1], HEAD_DIM_V))
    for b, length in enumerate(LENGTHS):
        if length:
            keys = k_cache[table[b]].reshape(-1, HEAD_DIM)[:length]
            weights = np.exp(q[b, 0] @ keys.T * HEAD_DIM**-0.5)
            out[b, 0] = weights / weights.sum(axis=1, keepdims=True) @ keys[:, :HEAD_DIM_V]
    return out


def decode(arrays: Arrays, *plan: Any, **more: Any) -> tuple[Any, Any]:
    return flashmla_rtc.flash_mla_with_kvcache(*arrays, HEAD_DIM_V, *plan or (None,), **more)


def relative_error(result: Any, expected: np.ndarray) -> float:
    return float(
        np.linalg.norm(np.asarray(result, dtype=np.float64) - expected) / np.linalg.norm(expected)
    )


@pytest.mark.parametrize("dtype, bound", [("float16", 4e-4), ("bfloat16", 3e-3)])
def test_results_are_jax_arrays_and_inputs_keep_their_bits(dtype: str, bound: float) -> None:
    arrays = make(jnp.dtype(dtype))
    before = [np.asarray(array).tobytes() for array in arrays]
    expected = attention(arrays)
    arrays_plan = flashmla_rtc.get_mla_metadata(arrays[3], HEADS, 1)
    plan_before = [np.asarray(array).tobytes() for array in arrays_plan]
    plan_object, _ = flashmla_rtc.get_mla_metadata()
    for plan in (arrays_plan, (plan_object,), (plan_object,), (None,)):
        out, lse = decode(arrays, *plan)
        assert isinstance(out, jax.Array)
        assert isinstance(lse, jax.Array)
        assert (str(out.dtype), str(lse.dtype)) == (dtype, "float32")
        assert relative_error(out, expected) < bound
        assert np.isposinf(np.asarray(lse)[2]).all()
    assert isinstance(plan_object.tile_scheduler_metadata, jax.Array)
    assert [np.asarray(array).tobytes() for array in arrays] == before
    assert [np.asarray(array).tobytes() for array in arrays_plan] == plan_before


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_jax_array_cannot_be_asked_to_hold_a_result(name: str) -> None:
    arrays = make(jnp.float16)
    out, lse = decode(arrays)
    given = {"out": out, "lse": lse}[name]
    before = np.asarray(given).tobytes()
    with pytest.raises(TypeError, match=f"^{name} is a JAX array, which is immutable"):
        decode(make(jnp.float16, seed=1), **{name: given})
    assert np.asarray(given).tobytes() == before


def test_the_call_sits_between_jitted_functions() -> None:
    @jax.jit
    def before(arrays: Arrays) -> Arrays:
        q, k_cache, table, lengths = arrays
        return q * 2, k_cache + 1, table, lengths

    arrays = before(make(jnp.float32))
    out, _ = decode(arrays)
    assert relative_error(jax.jit(lambda out: 3 * out)(out), 3 * attention(arrays)) < 1e-5


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_what_is_traced_is_refused_by_name(transform: str) -> None:
    q, *others = make(jnp.float32)

    def loss(q: Any) -> Any:
        return decode((q, *others))[0].sum()

    with pytest.raises(TypeError, match=r"^q is a JAX tracer.*outside of them"):
        getattr(jax, transform)(loss)(q[None] if transform == "vmap" else q)


def test_other_arguments_that_are_traced() -> None:
    arrays = make(jnp.float32)
    calls: dict[str, Callable[[Any], Any]] = {
        "cache_seqlens": lambda traced: flashmla_rtc.get_mla_metadata(traced, HEADS, 1),
        "out": lambda traced: decode(arrays, out=traced),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} is a JAX tracer"):
            jax.jit(call)(jnp.ones(4, jnp.int32))


def test_an_array_that_was_donated_is_named() -> None:
    arrays = make("float32")
    arrays[1].delete()
    with pytest.raises(ValueError, match=r"^k_cache is a JAX array that was deleted or donated"):
        decode(arrays)
