"""Gradients, transforms, autocast and deterministic mode."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashmla_rtc

torch = pytest.importorskip("torch")

from torch_programs import HEAD_DIM_V, assert_same, make, with_arrays, without_a_plan  # noqa: E402  # which needs torch

importlib.import_module("flashmla_rtc.integrations.torch")  # which defines the operators


pytestmark = pytest.mark.usefixtures("fresh_compiler")


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("which", [0, 1], ids=["q", "k_cache"])
def test_a_gradient_is_refused_when_it_is_asked_for(which: int, compiled: bool) -> None:
    step = torch.compile(without_a_plan, fullgraph=True) if compiled else without_a_plan
    arguments = list(make())
    expected = without_a_plan(*arguments)
    arguments[which].requires_grad_()
    out, lse = step(*arguments)  # which alone is no mistake
    assert_same((out.detach(), lse.detach()), expected)
    for result in (out, lse):
        assert result.requires_grad
        with pytest.raises(NotImplementedError, match="flash_mla_with_kvcache has no backward"):
            result.sum().backward(retain_graph=True)
    assert arguments[which].grad is None


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_out_is_refused_where_a_gradient_would_have_to_follow_it(compiled: bool) -> None:
    def step(out: Any, q: Any, *rest: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(q, *rest, None, out=out)

    arguments = list(make())
    expected = without_a_plan(*arguments)[0] / 2
    out = torch.empty(3, 2, 4, HEAD_DIM_V)
    arguments[0].requires_grad_()
    run = torch.compile(step, fullgraph=True) if compiled else step
    with pytest.raises(RuntimeError, match="out and lse can't be given"):
        run(out, *arguments)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(run(out, *arguments)[0], expected)
    assert not out.requires_grad


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("given", ["out", "lse"])
def test_a_result_that_requires_a_gradient_is_refused(given: str, compiled: bool) -> None:
    def step(result: Any, *arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, None, **{given: result})

    arguments = make()
    shape = {"out": (3, 2, 4, HEAD_DIM_V), "lse": (3, 4, 2)}[given]
    result = torch.zeros(shape, requires_grad=True)
    run = torch.compile(step, fullgraph=True) if compiled else step
    with pytest.raises(RuntimeError, match="out and lse can't be given"):
        run(result, *arguments)
    assert not result.any()
    with torch.no_grad():
        run(result, *arguments)
    assert result.any()


def test_the_operator_with_out_refuses_it_too() -> None:
    arguments = list(make())
    arguments[0].requires_grad_()
    out, lse = torch.empty(3, 2, 4, HEAD_DIM_V), torch.empty(3, 4, 2)
    with pytest.raises(RuntimeError, match="out and lse can't be given"):
        torch.ops.flashmla_rtc.mla_decode_out(*arguments, out=out, lse=lse)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_kept_where_none_is_asked_for(mode: Any) -> None:
    arguments = list(make())
    expected = without_a_plan(*arguments)
    arguments[0].requires_grad_()
    with mode():
        results = without_a_plan(*arguments)
        compiled = torch.compile(without_a_plan, fullgraph=True)(*arguments)
    for result in (results, compiled):
        assert not result[0].requires_grad
        assert_same(result, expected)


@pytest.mark.parametrize("name", ["block_table", "cache_seqlens"])
def test_errors_are_the_same_where_gradients_are_followed(name: str) -> None:
    q, k_cache, table, lengths, width = make()
    arrays = {"block_table": table, "cache_seqlens": lengths}
    arrays[name] = arrays[name].numpy()
    q.requires_grad_()
    with pytest.raises(TypeError, match=f"{name} must be a torch tensor"):
        flashmla_rtc.flash_mla_with_kvcache(
            q, k_cache, **arrays, head_dim_v=width, tile_scheduler_metadata=None
        )
    with pytest.raises(TypeError, match="head_dim_v must be an integer"):
        flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, "32", None)
    out, _ = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, np.int64(width), None)
    assert out.shape[-1] == width


def test_transforms_and_tangents_are_refused() -> None:
    from torch.autograd import forward_ad

    q, *rest = make()

    def step(q: Any) -> Any:
        return without_a_plan(q, *rest)[0]

    def total(q: Any) -> Any:
        return step(q).sum()

    def step_of_lengths(lengths: Any) -> Any:
        k_cache, table, _, width = rest
        return flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, None)[0]

    lengths = rest[2]
    for transformed in (
        lambda: torch.func.grad(total)(q),
        lambda: torch.func.jvp(step, (q,), (q,)),
        lambda: torch.func.vjp(step, q),
        lambda: torch.func.vmap(step)(q[None]),
        lambda: torch.func.vmap(step_of_lengths)(lengths[None]),
        lambda: torch.func.vmap(lambda x: flashmla_rtc.get_mla_metadata(x, 8, 1)[0])(lengths[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"can't be transformed by torch\.func"):
            transformed()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            step(forward_ad.make_dual(q, torch.ones_like(q)))
        assert_same((step(q),), (step(q),))  # without a tangent


def test_tangents_and_transforms_of_results_are_refused() -> None:
    from torch.autograd import forward_ad

    q, k_cache, table, lengths, width = make()

    def step(out: Any) -> Any:
        plan = None
        return flashmla_rtc.flash_mla_with_kvcache(
            q, k_cache, table, lengths, width, plan, out=out
        )[0]

    out = torch.empty(3, 2, 4, HEAD_DIM_V)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has a tangent"):
        step(forward_ad.make_dual(out, torch.ones_like(out)))
    with pytest.raises(NotImplementedError, match=r"can't be transformed by torch\.func"):
        torch.func.vmap(step)(out[None])


def test_the_operators_refuse_tangents_and_derivatives() -> None:
    from torch.autograd import forward_ad

    q, *rest = make()
    out, lse = torch.empty(3, 2, 4, HEAD_DIM_V), torch.empty(3, 4, 2)
    expected = torch.ops.flashmla_rtc.mla_decode(q, *rest)

    def step(q: Any) -> Any:
        return torch.ops.flashmla_rtc.mla_decode(q, *rest)[0]

    def step_out(q: Any) -> Any:
        torch.ops.flashmla_rtc.mla_decode_out(q, *rest, out=out, lse=lse)
        return out

    for run, refused in (
        (step, (NotImplementedError, r"can't be transformed by torch\.func")),
        (step_out, (RuntimeError, "out and lse can't be given")),
    ):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
            run(forward_ad.make_dual(q, torch.ones_like(q)))
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            torch.func.jvp(run, (q,), (q,))
        for transformed in (
            lambda run=run: torch.func.grad(lambda q: run(q).sum())(q),
            lambda run=run: torch.func.vjp(run, q),
        ):
            with pytest.raises(refused[0], match=refused[1]):
                transformed()
    with forward_ad.dual_level():
        assert_same(torch.ops.flashmla_rtc.mla_decode(q, *rest), expected)
    step_out(q)
    assert_same((out, lse), expected)


def test_the_operators_are_constants_of_what_is_differentiated() -> None:
    q, *rest = make()
    out, _ = torch.ops.flashmla_rtc.mla_decode(q, *rest)

    def scaled(scale: Any, q: Any) -> Any:
        return (scale * torch.ops.flashmla_rtc.mla_decode(q, *rest)[0]).sum()

    gradient = torch.func.grad(scaled)(torch.ones(()), q)
    torch.testing.assert_close(gradient, out.sum())
    results = torch.func.vmap(lambda q: torch.ops.flashmla_rtc.mla_decode(q, *rest)[0])(q[None])
    torch.testing.assert_close(results, out[None])  # one after the other


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_tangent_that_reaches_the_call_in_a_compiled_program_is_refused(backend: str) -> None:
    from torch.autograd import forward_ad

    compiled = torch.compile(without_a_plan, fullgraph=True, backend=backend)
    q, *rest = make()
    expected = compiled(q, *rest)
    with forward_ad.dual_level():
        with pytest.raises(Exception, match="no forward-mode derivative"):
            compiled(forward_ad.make_dual(q, torch.ones_like(q)), *rest)
        assert_same(compiled(q, *rest), expected)


# -- autocast, determinism -------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [without_a_plan, with_arrays], ids=lambda step: step.__name__)
def test_autocast_gives_queries_the_dtype_of_the_cache(
    step: Callable[..., Any], cache: Any, compiled: bool
) -> None:
    q, k_cache, *rest = make()
    k_cache = k_cache.to(cache)
    expected = step(q.to(cache), k_cache, *rest)
    run = torch.compile(step, fullgraph=True) if compiled else step
    with torch.autocast("cpu", torch.bfloat16):
        results = run(q, k_cache, *rest)
    assert results[0].dtype == cache
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_the_cache_and_float64_alone() -> None:
    q, k_cache, *rest = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert without_a_plan(q, k_cache, *rest)[0].dtype == torch.float32
        with pytest.raises(TypeError, match="k_cache must have q's dtype float64"):
            without_a_plan(q.double(), k_cache.bfloat16(), *rest)
        with pytest.raises(TypeError, match="k_cache must have q's dtype bfloat16"):
            without_a_plan(q.bfloat16(), k_cache, *rest)
    with pytest.raises(TypeError, match="k_cache must have q's dtype float32"):
        without_a_plan(q, k_cache.bfloat16(), *rest)


def test_deterministic_mode() -> None:
    arguments = make()
    expected = with_arrays(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        for step in (with_arrays, torch.compile(with_arrays, fullgraph=True)):
            for _ in range(3):
                assert_same(step(*arguments), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_arrays_of_others_are_no_matter_of_torch() -> None:
    arguments = [array.numpy() if torch.is_tensor(array) else array for array in make()]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = flashmla_rtc.flash_mla_with_kvcache(*arguments, None)
    assert isinstance(out, np.ndarray)
    expected = without_a_plan(*make())[0].numpy() / 2
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
