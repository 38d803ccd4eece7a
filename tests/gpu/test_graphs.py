"""CUDA graphs: captured once, replayed with other contents of the same arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problem import Problem, assert_matches, assert_same_bits, make

import flashmla_rtc

BATCH, LONGEST = 6, 3000
STEPS = [
    [3000, 64, 1, 700, 0, 2999],
    [1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0],
    [0, 0, 3000, 0, 0, 0],
    [3000] * 6,
]


class Step:
    """Arrays that a captured graph reads and writes where they are."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        options = {"seq_len_q": 2, "causal": True, **options}
        self.call = make([LONGEST] * BATCH, seed=seed, **options)
        self.options = options
        self.out, self.lse = self.call.poisoned()

    def fill(self, lengths: list[int], seed: int) -> None:
        """New contents: queries, cache, table and lengths; unused requests are padding."""
        new = make([LONGEST] * BATCH, seed=seed, **self.options)
        self.call.q.copy_(new.q)
        self.call.k_cache.copy_(new.k_cache)
        self.call.block_table.copy_(new.block_table)
        self.call.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.call.block_table[self.call.cache_seqlens == 0] = -1
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)
        torch.cuda.synchronize()

    def run(self, plan: Any = None) -> None:
        self.call.run(plan, self.out, self.lse)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        torch.cuda.synchronize()
        return self.out.clone(), self.lse.clone()

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the same call gives outside the graph."""
        result = self.call.run()
        torch.cuda.synchronize()
        return result

    def assert_right(self) -> None:
        assert_matches(self.result(), self.call.expected())


@pytest.fixture(autouse=True)
def _loaded() -> None:
    flashmla_rtc.prepare()


@pytest.mark.parametrize("heads_q", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_graph_that_plans_anew_at_each_replay(heads_q: int, dtype: torch.dtype) -> None:
    step = Step(heads_q=heads_q, dtype=dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = step.call.plan()
        step.run(plan)
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        graph.replay()
        step.assert_right()
        assert_same_bits(step.result(), step.eager())
        assert torch.equal(plan[0], step.call.plan()[0])  # so the graph did plan anew
        assert torch.equal(plan[1], step.call.plan()[1])


def test_a_graph_whose_call_plans_by_itself() -> None:
    step = Step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run((None, None))
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        graph.replay()
        assert_same_bits(step.result(), step.eager())


def test_a_graph_that_fills_a_plan_object_for_two_layers() -> None:
    step, second = Step(), Step(seed=9)
    second.call.cache_seqlens = step.call.cache_seqlens
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, _ = flashmla_rtc.get_mla_metadata()
        step.run((plan, None))
        second.run((plan, None))
    for seed, lengths in enumerate(STEPS):
        second.fill(lengths, seed + 50)
        step.fill(lengths, seed)
        graph.replay()
        step.assert_right()
        second.assert_right()


def test_a_plan_made_outside_is_copied_into_the_captured_one() -> None:
    step = Step()
    captured = step.call.plan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(captured)
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        for array, new in zip(captured, step.call.plan(), strict=True):
            array.copy_(new)
        graph.replay()
        assert_same_bits(step.result(), step.eager())
    step.assert_right()


def test_a_captured_plan_that_is_never_updated_stays_correct() -> None:
    step = Step()
    graph = torch.cuda.CUDAGraph()
    plan = step.call.plan()
    with torch.cuda.graph(graph):
        step.run(plan)
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        graph.replay()
        step.assert_right()


def test_results_that_the_call_allocates_live_in_the_graph() -> None:
    step = Step()
    call = step.call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashmla_rtc.flash_mla_with_kvcache(
            call.q, call.k_cache, call.block_table, call.cache_seqlens, 512, None, causal=True
        )
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        graph.replay()
        torch.cuda.synchronize()
        assert_matches((out, lse), call.expected())


def test_capture_on_a_stream_that_has_never_run_a_call() -> None:
    step = Step(heads_q=32)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step.run()
    step.fill(STEPS[0], 1)
    graph.replay()
    step.assert_right()


def test_a_call_on_the_stream_after_its_capture_is_eager_again() -> None:
    step, other = Step(), Step(seed=5)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step.run()
    step.fill(STEPS[0], 1)
    with torch.cuda.stream(stream):
        other.run()
    torch.cuda.synchronize()
    other.assert_right()
    assert torch.isnan(step.out).all()  # the graph has not been replayed
    graph.replay()
    step.assert_right()


def test_graphs_and_eager_calls_run_beside_each_other() -> None:
    """Two graphs and an eager call on three streams, racing many times: no workspace is shared."""
    steps = [Step(seed=seed) for seed in range(3)]
    graphs = []
    for step in steps[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run(step.call.plan())
        graphs.append(graph)
    for seed, step in enumerate(steps):
        step.fill([[3000] * 6, STEPS[0], [2500, 0, 3000, 1, 64, 65]][seed], seed)
    expected = [step.eager() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], [], []]
    torch.cuda.synchronize()
    for _ in range(40):
        for i, step in enumerate(steps):
            with torch.cuda.stream(streams[i]):
                step.out.fill_(torch.nan)
                if i < 2:
                    graphs[i].replay()
                else:
                    step.run()
                kept[i].append((step.out.clone(), step.lse.clone()))
    torch.cuda.synchronize()
    for i in range(3):
        for result in kept[i]:
            assert_same_bits(result, expected[i])


def test_many_layers_in_one_graph() -> None:
    """Workspace memory is used again by each layer of the graph, in order."""
    steps = [Step(seed=seed) for seed in range(8)]
    for step in steps[1:]:
        step.call.cache_seqlens = steps[0].call.cache_seqlens
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = steps[0].call.plan()
        for step in steps:
            step.run(plan)
    for seed, step in enumerate(steps):
        step.fill(STEPS[0], seed)
    graph.replay()
    for step in steps:
        assert_same_bits(step.result(), step.eager())


def cupy_arrays(cupy: Any, call: Problem) -> list[Any]:
    tensors = (call.q, call.k_cache, call.block_table, call.cache_seqlens)
    torch.cuda.synchronize()
    return [cupy.from_dlpack(tensor) for tensor in tensors]


@pytest.mark.parametrize("replan", [True, False], ids=["plans-inside", "plan-given"])
def test_capture_of_a_cupy_stream(replan: bool) -> None:
    cupy = pytest.importorskip("cupy")
    step = Step(dtype=torch.float16)
    arrays = cupy_arrays(cupy, step.call)
    out, lse = cupy.from_dlpack(step.out), cupy.from_dlpack(step.lse)
    plan = flashmla_rtc.get_mla_metadata(arrays[3], 2 * 16, 1)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        if replan:
            plan = flashmla_rtc.get_mla_metadata(arrays[3], 2 * 16, 1)
        flashmla_rtc.flash_mla_with_kvcache(*arrays, 512, *plan, causal=True, out=out, lse=lse)
        graph = stream.end_capture()
    for seed, lengths in enumerate(STEPS):
        step.fill(lengths, seed)
        graph.launch(stream)
        stream.synchronize()
        step.assert_right()
        if replan:
            expected = step.call.plan()
            assert np.array_equal(plan[0].get(), expected[0].cpu().numpy())
            assert np.array_equal(plan[1].get(), expected[1].cpu().numpy())


def test_a_captured_cupy_call_that_plans_by_itself_writes_nowhere_else() -> None:
    """Its plan lives as long as the graph: a replay leaves alone what CuPy hands out later."""
    cupy = pytest.importorskip("cupy")
    step = Step(dtype=torch.float16)
    arrays = cupy_arrays(cupy, step.call)
    out, lse = cupy.from_dlpack(step.out), cupy.from_dlpack(step.lse)
    parts = step.call.plan()[0].shape[0]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        flashmla_rtc.flash_mla_with_kvcache(*arrays, 512, None, causal=True, out=out, lse=lse)
        graph = stream.end_capture()
        shapes = [(parts, 8), (BATCH + 1,)] * 20
        later = [cupy.full(shape, 77, dtype=cupy.int32) for shape in shapes]
    step.fill(STEPS[0], 1)
    graph.launch(stream)
    stream.synchronize()
    step.assert_right()
    assert all(int((array != 77).sum()) == 0 for array in later)
