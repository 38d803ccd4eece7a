"""Compiled programs, operators, graphs made by torch, gradients and modes on the kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problem import HEAD_DIM_V, Problem, assert_matches, assert_same_bits, make

import flashmla_rtc
import flashmla_rtc.integrations.torch  # which defines the operators

OPS = torch.ops.flashmla_rtc
LENGTHS = [3000, 64, 1, 700, 0, 129]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments_of(problem: Problem) -> tuple[Any, ...]:
    return (
        problem.q,
        problem.k_cache,
        problem.block_table,
        problem.cache_seqlens,
        HEAD_DIM_V,
    )


def planned(q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
    """Two layers on one plan."""
    rows, heads_k = q.shape[1] * q.shape[2] // k_cache.shape[2], k_cache.shape[2]
    plan, splits = flashmla_rtc.get_mla_metadata(lengths, rows, heads_k)
    call = (k_cache, table, lengths, HEAD_DIM_V, plan, splits)
    first = flashmla_rtc.flash_mla_with_kvcache(q, *call, causal=True)
    second = flashmla_rtc.flash_mla_with_kvcache(q * 0.5, *call, causal=True)
    return (*first, *second)


def by_object(q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
    plan, _ = flashmla_rtc.get_mla_metadata()
    call = (k_cache, table, lengths, HEAD_DIM_V, plan)
    first = flashmla_rtc.flash_mla_with_kvcache(q, *call, causal=True)
    second = flashmla_rtc.flash_mla_with_kvcache(q * 0.5, *call, causal=True)
    return (*first, *second)


def into_out(q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
    out = torch.full((*q.shape[:3], HEAD_DIM_V), torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan, device=q.device)
    flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, table, lengths, HEAD_DIM_V, None, out=out, lse=lse
    )
    return out, lse


def decode(problem: Problem, **options: Any) -> Any:
    return flashmla_rtc.flash_mla_with_kvcache(*arguments_of(problem), None, **options)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_program_knows_the_rows_of_plans(dynamic: bool) -> None:
    def plan_buffer(q: Any) -> Any:
        rows = q.shape[1] * q.shape[2]
        return q.new_zeros(flashmla_rtc.num_sm_parts(q.device, rows, 1), 8)

    compiled = torch.compile(plan_buffer, fullgraph=True, dynamic=dynamic)
    for queries in (1, 2, 4):
        q = torch.empty(1, queries, 64, 576, device="cuda")
        parts = flashmla_rtc.num_sm_parts("cuda", queries * 64, 1)
        assert compiled(q).shape == (parts, 8)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("step", [planned, by_object, into_out], ids=lambda step: step.__name__)
def test_a_compiled_program_gives_the_same_bits(step: Any, mode: str) -> None:
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for seed in range(4):  # reduce-overhead warms up, records and then replays
        problem = make(LENGTHS, seed=seed, seq_len_q=2)
        arguments = arguments_of(problem)[:4]
        expected = [result.clone() for result in step(*arguments)]
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits([result.clone() for result in compiled(*arguments)], expected)


def test_the_compiled_program_is_right() -> None:
    problem = make(LENGTHS, seq_len_q=2, causal=True)
    results = torch.compile(planned, fullgraph=True)(*arguments_of(problem)[:4])
    assert_matches(results[:2], problem.expected())


def test_one_dynamic_program_serves_all_batches() -> None:
    compiled = torch.compile(planned, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 7):
            arguments = arguments_of(make(LENGTHS[:batch], seed=batch, seq_len_q=1))[:4]
            assert_same_bits(compiled(*arguments), planned(*arguments))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_layer_of_matrices_around_the_call(backend: str) -> None:
    """As in a model: projections before and behind, fused by the compiler as it likes."""
    torch.manual_seed(1)
    problem = make(LENGTHS, heads_q=16)
    hidden = torch.randn(len(LENGTHS), 1, 256, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(256, 16 * 576, device="cuda", dtype=torch.bfloat16) / 256
    down = torch.randn(16 * HEAD_DIM_V, 256, device="cuda", dtype=torch.bfloat16) / 64

    def layer(hidden: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
        q = (hidden @ up).view(-1, 1, 16, 576)
        out, _ = flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, HEAD_DIM_V, None)
        return torch.relu(out.flatten(2) @ down) + hidden

    arguments = (hidden, *arguments_of(problem)[1:4])
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments), layer(*arguments), rtol=2e-2, atol=2e-2)


# -- operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: Any) -> None:
    problem = make(LENGTHS, dtype=dtype, seq_len_q=2)
    arguments = arguments_of(problem)
    plan = problem.plan()
    out, lse = problem.poisoned()
    torch.library.opcheck(OPS.mla_decode, arguments)
    torch.library.opcheck(OPS.mla_decode, (*arguments, *plan, 0.04, True))
    torch.library.opcheck(
        OPS.mla_decode_out, (*arguments, *plan, 0.04, True), {"out": out, "lse": lse}
    )
    torch.library.opcheck(OPS.mla_metadata, (problem.cache_seqlens, problem.rows_per_group, 1))


def test_parts_of_a_plan_are_known_without_lengths() -> None:
    for heads_q, heads_k in ((16, 1), (128, 1), (64, 2)):
        problem = make(LENGTHS, heads_q=heads_q, heads_k=heads_k)
        parts = flashmla_rtc.num_sm_parts("cuda", problem.rows_per_group, heads_k)
        assert problem.plan()[0].shape == (parts, 8)


# -- graphs ----------------------------------------------------------------------------------------


def test_make_graphed_callables() -> None:
    problem = make(LENGTHS, seq_len_q=2, causal=True)

    class Layer(torch.nn.Module):
        def forward(self, q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
            return planned(q, k_cache, table, lengths)

    arguments = arguments_of(problem)[:4]
    graphed = torch.cuda.make_graphed_callables(Layer().eval(), arguments)
    for seed in (3, 4):
        other = arguments_of(make(LENGTHS, seed=seed, seq_len_q=2, causal=True))[:4]
        assert_same_bits(graphed(*other), planned(*other))


def test_the_operators_in_a_graph() -> None:
    problem = make(LENGTHS, seq_len_q=2)
    arguments = arguments_of(problem)
    out, lse = problem.poisoned()

    def step() -> None:
        plan = OPS.mla_metadata(problem.cache_seqlens, problem.rows_per_group, 1)
        OPS.mla_decode_out(*arguments, *plan, out=out, lse=lse)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    problem.cache_seqlens.copy_(torch.tensor([1, 3000, 64, 0, 700, 5], dtype=torch.int32))
    out.fill_(torch.nan)
    graph.replay()
    assert_matches((out, lse), problem.expected())


# -- gradients and modes ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_gradient_is_refused_after_calls_that_asked_for_none(compiled: bool) -> None:
    """Such calls are launched from a note, which must not serve the one that is followed."""
    problem = make(LENGTHS)
    for _ in range(3):
        expected = decode(problem)
    call = torch.compile(decode, fullgraph=True) if compiled else decode
    problem = problem.but(q=problem.q.clone().requires_grad_())
    for _ in range(3):
        out, lse = call(problem)
        assert out.requires_grad
        assert_same_bits((out.detach(), lse.detach()), expected)
        with pytest.raises(NotImplementedError, match="has no backward pass"):
            out.sum().backward()
        with torch.no_grad():
            silent = decode(problem)
        assert not silent[0].requires_grad
        assert_same_bits(silent, expected)
    with pytest.raises(RuntimeError, match="out and lse can't be given"):
        decode(problem, out=torch.empty_like(out), lse=torch.empty_like(lse))


def test_inference_mode_and_back() -> None:
    problem = make(LENGTHS)
    expected = decode(problem)
    for _ in range(2):
        with torch.inference_mode():
            for _ in range(3):
                out, lse = decode(problem)
                assert out.is_inference()
                assert_same_bits((out, lse), expected)
            inside = decode(problem.but(q=problem.q.clone()))
        assert_same_bits(inside, expected)
        assert not decode(problem)[0].is_inference()


def test_autocast_gives_queries_the_dtype_of_the_cache() -> None:
    problem = make(LENGTHS)
    expected = decode(problem)
    wide = problem.but(q=problem.q.float())
    with pytest.raises(TypeError, match="k_cache must have q's dtype float32"):
        decode(wide)
    with torch.autocast("cuda", torch.bfloat16):
        for call in (decode, torch.compile(decode, fullgraph=True)):
            for _ in range(2):
                assert_same_bits(call(wide), expected)
    with pytest.raises(TypeError, match="k_cache must have q's dtype float32"):
        decode(wide)


def test_deterministic_mode() -> None:
    problem = make(LENGTHS, heads_q=128)
    expected = decode(problem)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert_same_bits(decode(problem), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_waits_for_the_gpu() -> None:
    problem = make(LENGTHS, seq_len_q=2)
    arguments = arguments_of(problem)
    compiled = torch.compile(planned, fullgraph=True)
    compiled(*arguments[:4])
    holder = flashmla_rtc.FlashMLASchedMeta()
    fresh = make(LENGTHS[:3], heads_q=24)  # one that no call has been like
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            planned(*arguments[:4])
            compiled(*arguments[:4])
            decode(problem)
            flashmla_rtc.flash_mla_with_kvcache(*arguments, holder)
            OPS.mla_decode(*arguments)
        result = decode(fresh)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_matches(result, fresh.expected())


def test_a_plan_object_from_outside_in_recorded_graphs() -> None:
    """Filled by a plain call: what a recorded graph makes is gone when the next one runs."""

    def step(holder: Any, *arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, holder)

    problem = make(LENGTHS, seq_len_q=2)
    holder = flashmla_rtc.FlashMLASchedMeta()
    expected = step(holder, *arguments_of(problem))
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits(compiled(holder, *arguments_of(problem)), expected)


def test_who_listens_hears_of_calls_that_were_made_before() -> None:
    """Such calls are launched from a note, past the dispatcher."""
    from torch.fx.experimental.proxy_tensor import make_fx

    problem = make(LENGTHS)
    expected = decode(problem)
    for _ in range(3):
        decode(problem)
    q, *rest = arguments_of(problem)
    graph = make_fx(lambda q: flashmla_rtc.flash_mla_with_kvcache(q, *rest, None))(q)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "flashmla_rtc.mla_decode.default" in targets
    assert_same_bits(graph(q), expected)
    assert_same_bits(decode(problem), expected)


def test_a_tangent_is_refused_after_calls_without_one() -> None:
    from torch.autograd import forward_ad

    problem = make(LENGTHS)
    expected = decode(problem)
    for _ in range(3):
        decode(problem)
    with forward_ad.dual_level():
        dual = problem.but(q=forward_ad.make_dual(problem.q, torch.ones_like(problem.q)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            decode(dual)
        assert_same_bits(decode(problem), expected)


def test_other_threads_go_on_while_one_compiles() -> None:
    problem = make(LENGTHS)
    expected = decode(problem)
    done, failed = threading.Event(), []

    def call() -> None:
        while not done.is_set():
            try:
                assert_same_bits(decode(problem), expected)
            except BaseException as error:
                failed.append(error)
                return

    thread = threading.Thread(target=call)
    thread.start()
    torch.compile(lambda x: torch.sin(x) * 2 + torch.cos(x))(torch.ones(300, device="cuda"))
    done.set()
    thread.join()
    assert not failed
