"""Calls like one before are launched from notes: the same answers, the same errors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from problem import DEVICE, assert_same_bits, check, make

import flashmla_rtc
from flashmla_rtc import recorded, sm90, torch_shortcuts, validation


@pytest.fixture(autouse=True)
def no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_local", recorded._Local())


@pytest.fixture(params=[True, False], ids=["compared by torch", "by key"], autouse=True)
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is borrowed from torch's compiler, and as where torch does not have it."""
    if not request.param:
        monkeypatch.setattr(torch_shortcuts, "found", lambda: (None, None))


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call that takes the long way."""
    taken: list[int] = []
    decode = sm90.decode

    def counted(*arguments: Any) -> Any:
        taken.append(1)
        return decode(*arguments)

    monkeypatch.setattr(sm90, "decode", counted)
    return taken


def call(problem: Any, plan: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return flashmla_rtc.flash_mla_with_kvcache(
        problem.q,
        problem.k_cache,
        problem.block_table,
        problem.cache_seqlens,
        512,
        *plan,
        causal=problem.causal,
        **given,
    )


def test_the_second_call_is_launched_from_a_note(long_ways: list[int]) -> None:
    problem = make([3000, 70, 0, 900], heads_q=16, causal=True)
    plan = problem.plan()
    results = [call(problem, plan) for _ in range(4)]
    assert len(long_ways) == 1
    assert len({out.data_ptr() for out, _ in results}) == len(results)
    for out, lse in results[1:]:
        assert_same_bits((out, lse), results[0])
        for made, first in zip((out, lse), results[0], strict=True):
            assert (made.shape, made.stride()) == (first.shape, first.stride())
            assert (made.dtype, made.device) == (first.dtype, first.device)
            assert (made.requires_grad, made.is_inference()) == (False, False)
    check(problem, plan)


@pytest.mark.parametrize("given", ["out", "lse"])
def test_gradients_hear_of_what_is_written_over(given: str) -> None:
    problem = make([3000, 70, 0, 900], heads_q=16)
    plan = problem.plan()
    result = dict(zip(("out", "lse"), call(problem, plan), strict=True))[given]
    for _ in range(3):  # the long way, by key, compared by torch
        weight = torch.ones((), device=DEVICE, dtype=result.dtype, requires_grad=True)
        product = (result * weight).sum()
        call(problem, plan, **{given: result})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():  # whose tensors have no version
        call(problem, plan, **{given: torch.empty_like(result)})
        call(problem, plan, **{given: torch.empty_like(result)})


def test_the_shortcuts_are_there(comparison: None, request: pytest.FixtureRequest) -> None:
    """Not a promise of torch's, but what the figures of the host's time are measured with."""
    problem = make([300], heads_q=16)
    call(problem, problem.plan())
    expected = "compared by torch" in request.node.name
    assert all(tool is not None for tool in torch_shortcuts.found()) is expected


def test_inference_mode(long_ways: list[int]) -> None:
    problem = make([300, 400], heads_q=16)
    plan = problem.plan()
    expected = call(problem, plan)
    with torch.inference_mode():
        for _ in range(4):
            result = call(problem, plan)
            assert_same_bits(result, expected)
            assert result[0].is_inference()
    for _ in range(3):
        assert not call(problem, plan)[0].is_inference()
    assert len(long_ways) == 1


def test_layers_and_steps_in_turn(long_ways: list[int]) -> None:
    """Six shapes, each with two caches, in the order in which a program meets them."""
    lengths = [[500] * n for n in range(1, 7)]
    steps = [[make(one, heads_q=16, seed=seed) for seed in (1, 2)] for one in lengths]
    plans = [step[0].plan() for step in steps]
    expected = [
        [call(layer, plan) for layer in step] for step, plan in zip(steps, plans, strict=True)
    ]
    assert len(long_ways) == 12
    for _ in range(3):
        for step, plan, results in zip(steps, plans, expected, strict=True):
            for layer, result in zip(step, results, strict=True):
                assert_same_bits(call(layer, plan), result)
    assert len(long_ways) == 12


@pytest.mark.parametrize("heads_q", [16, 128])
def test_other_arrays_of_the_same_shapes(long_ways: list[int], heads_q: int) -> None:
    one, other = (make([4000, 300], heads_q=heads_q, seed=seed) for seed in (1, 2))
    assert not torch.equal(one.q, other.q)
    plans = one.plan(), other.plan()
    expected = call(one, plans[0]), call(other, plans[1])
    assert len(long_ways) == 2  # another cache: a tensor map that has not been made yet
    for _ in range(3):
        assert_same_bits(call(one, plans[0]), expected[0])
        assert_same_bits(call(other, plans[1]), expected[1])
    assert len(long_ways) == 2


def test_results_are_written_where_the_caller_says(long_ways: list[int]) -> None:
    problem = make([500, 600], heads_q=64)
    plan = problem.plan()
    expected = call(problem, plan)
    out = torch.full_like(expected[0], torch.nan)
    lse = torch.full_like(expected[1], torch.nan)
    for _ in range(2):
        given = call(problem, plan, out=out.fill_(torch.nan), lse=lse.fill_(torch.nan))
        assert given[0] is out
        assert given[1] is lse
        assert_same_bits((out, lse), expected)
    assert len(long_ways) == 2


def test_lengths_and_tables_are_read_when_the_kernel_runs(
    long_ways: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make([4000, 4000], heads_q=16)
    plan = problem.plan()
    call(problem, plan)
    problem.cache_seqlens.copy_(torch.tensor([100, 3990], dtype=torch.int32))
    problem.block_table.copy_(problem.block_table.flip(0).clone())
    seen = call(problem, plan)
    assert len(long_ways) == 1
    monkeypatch.setattr(recorded, "_local", recorded._Local())
    assert_same_bits(call(problem, plan), seen)
    assert len(long_ways) == 2


def test_a_plan_object_and_a_plan_of_other_arrays(long_ways: list[int]) -> None:
    problem = make([4000, 4000], heads_q=16)
    holder, _ = flashmla_rtc.get_mla_metadata()
    first = call(problem, (holder, None))
    assert_same_bits(call(problem, (holder, None)), first)
    assert_same_bits(call(problem, problem.plan()), first)
    assert len(long_ways) == 1
    with pytest.raises(ValueError, match="num_splits must be None"):
        call(problem, (holder, holder.num_splits))
    smaller = make([4000], heads_q=16)
    with pytest.raises(ValueError, match="another configuration"):
        call(smaller, (holder, None))


def test_bad_input_is_refused_after_a_good_call() -> None:
    problem = make([300, 400], heads_q=16)
    metadata, splits = problem.plan()
    call(problem, (metadata, splits))
    with pytest.raises(ValueError, match="tile_scheduler_metadata must have shape"):
        call(problem, (metadata[:-1], splits))
    with pytest.raises(TypeError, match="tile_scheduler_metadata"):
        call(problem, (metadata.long(), splits))
    with pytest.raises(ValueError, match="num_splits must have between"):
        call(problem, (metadata, torch.cat([splits, splits])))
    with pytest.raises(TypeError, match="causal"):
        flashmla_rtc.flash_mla_with_kvcache(
            problem.q,
            problem.k_cache,
            problem.block_table,
            problem.cache_seqlens,
            512,
            metadata,
            splits,
            causal=0,  # type: ignore[arg-type]
        )
    with pytest.raises((TypeError, ValueError), match="tile_scheduler_metadata"):
        call(problem, (metadata.cpu(), splits))
    with pytest.raises(TypeError, match="cache_seqlens must be a dense tensor"):
        call(problem.but(cache_seqlens=problem.cache_seqlens.to_sparse()), (metadata, splits))
    with pytest.raises(TypeError, match="tile_scheduler_metadata must be a dense tensor"):
        call(problem, (metadata.to_sparse(), splits))
    with pytest.raises(TypeError, match="num_splits must be a dense tensor"):
        call(problem, (metadata, splits.to_sparse()))
    call(problem, (metadata, splits))


def test_a_plan_that_was_changed_in_place_is_refused(long_ways: list[int]) -> None:
    problem = make([300, 400], heads_q=16)
    metadata, splits = problem.plan()
    expected = [call(problem, (metadata, splits)) for _ in range(3)][-1]
    parts = len(metadata)
    metadata.resize_(parts - 1, 8)
    with pytest.raises(ValueError, match="tile_scheduler_metadata must have shape"):
        call(problem, (metadata, splits))
    metadata.resize_(parts, 8)
    assert_same_bits(call(problem, (metadata, splits)), expected)
    assert len(long_ways) == 1


def test_validation_that_is_switched_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make([300, 400], heads_q=16)
    plan = problem.plan()
    for _ in range(3):
        call(problem, plan)
    problem.cache_seqlens.fill_(-1)
    monkeypatch.setenv(validation.VARIABLE, "1")
    validation.validation_enabled.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"cache_seqlens\[0\] must be at least 0"):
            call(problem, plan)
    finally:
        monkeypatch.delenv(validation.VARIABLE)
        validation.validation_enabled.cache_clear()


def test_rows_that_are_not_aligned_any_more(long_ways: list[int]) -> None:
    problem = make([300, 400], heads_q=16)
    plan = problem.plan()
    expected = call(problem, plan)
    room = torch.empty(expected[0].numel() + 1, dtype=expected[0].dtype, device=DEVICE)
    aligned, odd = room[:-1].view_as(expected[0]), room[1:].view_as(expected[0])
    call(problem, plan, out=aligned)
    assert len(long_ways) == 2
    call(problem, plan, out=odd)
    assert len(long_ways) == 3
    assert torch.equal(odd, expected[0])


def test_streams_threads_and_graphs(long_ways: list[int]) -> None:
    problem = make([5000, 300], heads_q=128)
    plan = problem.plan()
    expected = call(problem, plan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_stream = [call(problem, plan) for _ in range(2)]
    stream.synchronize()
    assert len(long_ways) == 2
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(call(problem, plan) for _ in range(2)))
    thread.start()
    thread.join()
    assert len(long_ways) == 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call(problem, plan) for _ in range(2)]
    assert len(long_ways) == 5  # a capture has memory of its own
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for result in (*on_stream, *results, *captured):
            assert_same_bits(result, expected)
    assert_same_bits(call(problem, plan), expected)
    assert len(long_ways) == 5
