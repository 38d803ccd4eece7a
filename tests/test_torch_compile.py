"""Programs that torch compiles, exports, differentiates or runs on fake tensors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import flashmla_rtc

torch = pytest.importorskip("torch")
importlib.import_module("flashmla_rtc.integrations.torch")  # which defines the operators

HEAD_DIM_V = 32
BACKENDS = ("eager", "aot_eager", "inductor")


def make(batch: int = 3, seed: int = 0, dtype: Any = None) -> tuple[Any, ...]:
    """q, k_cache, block_table, cache_seqlens and head_dim_v of a random call on the CPU."""
    random = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float32
    q = torch.randn(batch, 2, 4, 40, generator=random).to(dtype)
    k_cache = torch.randn(24, 16, 1, 40, generator=random).to(dtype)
    table = torch.randint(0, 24, (batch, 8), generator=random, dtype=torch.int32)
    lengths = torch.randint(0, 8 * 16 + 1, (batch,), generator=random, dtype=torch.int32)
    return q, k_cache, table, lengths, HEAD_DIM_V


def rows(q: Any, k_cache: Any) -> int:
    return q.shape[1] * q.shape[2] // k_cache.shape[2]


def with_arrays(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    plan, splits = flashmla_rtc.get_mla_metadata(lengths, rows(q, k_cache), k_cache.shape[2])
    first = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, plan, splits, causal=True
    )
    second = flashmla_rtc.flash_mla_with_kvcache(
        q * 2, k_cache, table, lengths, width, plan, splits, softmax_scale=1, causal=True
    )
    return first[0] + second[0], first[1], second[1]


def with_an_object(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    plan, _ = flashmla_rtc.get_mla_metadata()
    first = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, plan)
    second = flashmla_rtc.flash_mla_with_kvcache(q * 2, k_cache, table, lengths, width, plan)
    return first[0] + second[0], first[1], second[1]


def without_a_plan(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out, lse = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, None)
    return out * 2, lse


def into_out(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out = torch.full((*q.shape[:3], width), torch.nan, dtype=q.dtype)
    given, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, None, out=out
    )
    return out, given, lse


def into_both(q: Any, k_cache: Any, table: Any, lengths: Any, width: int) -> Any:
    out = torch.full((*q.shape[:3], width), torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, width, None, out=out, lse=lse, causal=True
    )
    return out, lse


STEPS = (with_arrays, with_an_object, without_a_plan, into_out, into_both)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(result: Any, expected: Any) -> None:
    """Up to the order in which the CPU's matrix products sum, which may go by addresses."""
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_compiled_program_has_no_break_and_the_same_results(
    step: Callable[..., Any], backend: str
) -> None:
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(2):
        arguments = make(seed=seed)
        assert_same(compiled(*arguments), step(*arguments))


def test_a_plan_object_from_outside_is_filled_once_and_used_on() -> None:
    def step(plan: Any, q: Any, *rest: Any) -> Any:
        first = flashmla_rtc.flash_mla_with_kvcache(q, *rest, plan)
        second = flashmla_rtc.flash_mla_with_kvcache(q * 2, *rest, plan)
        return (*first, *second)

    arguments = make()
    compiled = torch.compile(step, fullgraph=True)
    plan = flashmla_rtc.FlashMLASchedMeta()
    expected = step(flashmla_rtc.FlashMLASchedMeta(), *arguments)
    assert_same(compiled(plan, *arguments), expected)
    filled = plan.tile_scheduler_metadata
    made, splits = flashmla_rtc.get_mla_metadata(arguments[3], 8, 1)
    assert torch.equal(filled, made)
    assert torch.equal(plan.num_splits, splits)
    assert_same(compiled(plan, *arguments), expected)
    assert plan.tile_scheduler_metadata is filled
    assert_same(step(plan, *arguments), expected)  # and by a plain call


def test_one_dynamic_program_serves_all_batches() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(with_arrays, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 7, 11):
        arguments = make(batch, seed=batch)
        assert_same(compiled(*arguments), with_arrays(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "options, error",
    [
        ({"indices": 1}, "NotImplementedError"),
        ({"is_fp8_kvcache": True}, "NotImplementedError"),
        ({"softmax_scale": True}, "TypeError"),
        ({"softmax_scale": -1.0}, "ValueError"),
        ({"causal": 1}, "TypeError"),
    ],
    ids=str,
)
def test_options_are_checked_when_a_program_is_compiled(options: Any, error: str) -> None:
    def step(*arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, None, **options)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=error):
        torch.compile(step, fullgraph=True)(*make())


def test_a_wrong_rank_is_an_error_when_a_program_is_compiled() -> None:
    def step(q: Any, *rest: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(q[0], *rest, None)

    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="q must have 4 dimensions"):
        torch.compile(step, fullgraph=True)(*make())


def test_contents_of_a_compiled_program_are_checked_when_it_runs() -> None:
    def step(plan: Any, *arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, plan)

    plan = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tile_scheduler_metadata must have shape \(1, 8\)"):
        torch.compile(step, fullgraph=True)(plan, *make())


def test_numpy_arrays_are_refused_in_a_compiled_program() -> None:
    def step(*arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, None)

    arguments = [array.numpy() if torch.is_tensor(array) else array for array in make()]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="q must be a torch tensor"):
        torch.compile(step, fullgraph=True)(*arguments)


def test_a_plan_object_with_splits_beside_it_is_refused() -> None:
    def step(splits: Any, *arguments: Any) -> Any:
        plan = flashmla_rtc.FlashMLASchedMeta()
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, plan, splits)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="num_splits must be None"):
        torch.compile(step, fullgraph=True)(torch.zeros(4, dtype=torch.int32), *make())


def test_compiling_before_the_first_plain_call_and_importing_torch_last() -> None:
    code = (
        "import flashmla_rtc\n"
        "import torch\n"
        "step = lambda *a: flashmla_rtc.flash_mla_with_kvcache(*a, None)[0]\n"
        "compiled = torch.compile(step, fullgraph=True, backend='eager')\n"
        "ints = dict(dtype=torch.int32)\n"
        "arguments = (torch.randn(1, 1, 4, 40), torch.randn(4, 16, 1, 40),\n"
        "             torch.zeros(1, 2, **ints), torch.ones(1, **ints), 32)\n"
        "first, plain, last = compiled(*arguments), step(*arguments), compiled(*arguments)\n"
        "print(torch.allclose(first, plain) and torch.allclose(plain, last))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "True", result.stderr


# -- operators -------------------------------------------------------------------------------------


def operator_calls() -> list[Any]:
    q, k_cache, table, lengths, width = make()
    plan = flashmla_rtc.get_mla_metadata(lengths, 8, 1)
    strided = torch.randn(3, 2, 4, 50)[..., :40]
    results = {"out": torch.empty(3, 2, 4, width), "lse": torch.empty(3, 4, 2)}
    call = (q, k_cache, table, lengths, width)
    ops = torch.ops.flashmla_rtc
    return [
        pytest.param(ops.mla_decode, call, {}, id="decode"),
        pytest.param(ops.mla_decode, (*call, *plan, 0.3, True), {}, id="decode-planned"),
        pytest.param(ops.mla_decode, (strided, *call[1:]), {}, id="decode-strided"),
        pytest.param(
            ops.mla_decode, make(dtype=torch.bfloat16), {"causal": True}, id="decode-bfloat16"
        ),
        pytest.param(ops.mla_decode_out, call, results, id="out"),
        pytest.param(ops.mla_decode_out, (*call, *plan, 0.3, True), results, id="out-planned"),
        pytest.param(ops.mla_metadata, (lengths, 8, 1), {}, id="metadata"),
    ]


@pytest.mark.parametrize("operator, arguments, options", operator_calls())
def test_opcheck(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.library.opcheck(operator, arguments, options)


def test_operators_compute_what_the_calls_do() -> None:
    arguments = make()
    ops = torch.ops.flashmla_rtc
    plan = ops.mla_metadata(arguments[3], 8, 1)
    assert_same(plan, flashmla_rtc.get_mla_metadata(arguments[3], 8, 1))
    expected = flashmla_rtc.flash_mla_with_kvcache(*arguments, *plan, causal=True)
    assert_same(ops.mla_decode(*arguments, *plan, causal=True), expected)
    out, lse = (torch.full_like(result, torch.nan) for result in expected)
    assert ops.mla_decode_out(*arguments, *plan, causal=True, out=out, lse=lse) is None
    assert_same((out, lse), expected)


def test_an_exported_program() -> None:
    class Step(torch.nn.Module):
        def forward(self, q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
            return with_arrays(q, k_cache, table, lengths, HEAD_DIM_V)

    arguments = make()[:4]
    program = torch.export.export(Step(), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("flashmla_rtc.mla_decode.default") == 2
    assert targets.count("flashmla_rtc.mla_metadata.default") == 1
    assert_same(program.module()(*arguments), Step()(*arguments))


def test_fake_tensors_give_fake_results() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    arguments = make()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
        results = with_arrays(*fake)
    for result, expected in zip(results, with_arrays(*arguments), strict=True):
        assert isinstance(result, FakeTensor)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.stride() == expected.stride()


def test_parts_of_a_plan_are_known_without_lengths() -> None:
    plan, _ = flashmla_rtc.get_mla_metadata(make()[3], 8, 1)
    for device in ("cpu", torch.device("cpu")):
        assert flashmla_rtc.num_sm_parts(device, 8, 1) == plan.shape[0]
    with pytest.raises(ValueError, match="num_heads_k must be at least 1, but it is 0"):
        flashmla_rtc.num_sm_parts("cpu", 8, 0)
    with pytest.raises(TypeError, match="num_q_tokens_per_head_k"):
        flashmla_rtc.num_sm_parts("cpu", 8.0, 1)


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
