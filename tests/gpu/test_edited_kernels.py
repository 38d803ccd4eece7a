"""Edited kernels run on the GPU inside an override, and the package's own outside of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problem import assert_same_bits, check, make

import flashmla_rtc
from flashmla_rtc import kernel_sources, override_sources, recorded, sm90, variants, workspace
from flashmla_rtc.bench.shapes import Shape

DECODE = "mla_decode_bf16_few_rows"  # of up to 32 rows

# lse in base 2: the line that every row's lse comes from.
MERGE = "mla_decode_merge.cuh"
LSE = "(reference_log2 + log2f(sum)) * LN_2"
IN_BASE_2 = "(reference_log2 + log2f(sum))"


def edit(file: str, old: str, new: str) -> dict[str, str]:
    text = kernel_sources()[file]
    assert text.count(old) == 1
    return {file: text.replace(old, new)}


def lse_in_base_2() -> Any:
    return override_sources(edit(MERGE, LSE, IN_BASE_2), kernels=[DECODE])


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert variants.in_use is None


def call(problem: Any, plan: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return flashmla_rtc.flash_mla_with_kvcache(
        problem.q,
        problem.k_cache,
        problem.block_table,
        problem.cache_seqlens,
        512,
        *plan,
        **given,
    )


@pytest.mark.parametrize("lengths", [[40, 130, 64], [9000, 70, 0, 900]], ids=["whole", "cut"])
def test_an_edited_kernel_runs_and_the_original_comes_back(lengths: list[int]) -> None:
    problem = make(lengths)
    plan = problem.plan()
    out, lse = call(problem, plan)
    for _ in range(2):
        with lse_in_base_2():
            for _ in range(3):  # the long way, then from a note
                edited_out, edited_lse = call(problem, plan)
                assert torch.equal(edited_out, out)
                there = torch.isfinite(lse)
                ratio = edited_lse[there].double() / lse[there].double()
                expected = torch.full_like(ratio, 1 / math.log(2.0))
                torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)
                assert torch.equal(torch.isposinf(edited_lse), torch.isposinf(lse))
        for _ in range(3):
            assert_same_bits(call(problem, plan), (out, lse))
    check(problem, plan)


def test_calls_from_notes_before_inside_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hot call is launched from a note of the kernel in use, never of the other."""
    monkeypatch.setattr(recorded, "_local", recorded._Local())
    long_ways: list[int] = []
    decode = sm90.decode

    def counted(*arguments: Any) -> Any:
        long_ways.append(1)
        return decode(*arguments)

    monkeypatch.setattr(sm90, "decode", counted)
    problem = make([3000, 70])
    plan = problem.plan()
    expected = call(problem, plan)
    for _ in range(3):
        assert_same_bits(call(problem, plan), expected)
    assert len(long_ways) == 1
    with lse_in_base_2():
        first = call(problem, plan)
        assert len(long_ways) == 2
        assert not torch.equal(first[1], expected[1])
        for _ in range(3):
            assert_same_bits(call(problem, plan), first)
        assert len(long_ways) == 2
    for _ in range(3):
        assert_same_bits(call(problem, plan), expected)
    assert len(long_ways) == 3


def test_a_graph_keeps_the_kernel_that_it_was_captured_with() -> None:
    problem = make([5000, 300])
    plan = problem.plan()
    expected = call(problem, plan)
    graphs = []
    for edited in (False, True):
        result = problem.poisoned()
        graph = torch.cuda.CUDAGraph()
        override = lse_in_base_2() if edited else None
        call(problem, plan, out=result[0], lse=result[1])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call(problem, plan, out=result[0], lse=result[1])
        if override is not None:
            override.undo()
        graphs.append((graph, result))
    for _ in range(2):
        for (graph, result), in_base_2 in zip(graphs, (False, True), strict=True):
            result[0].fill_(torch.nan)
            result[1].fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(result[0], expected[0])
            factor = 1 / math.log(2.0) if in_base_2 else 1.0
            torch.testing.assert_close(result[1], expected[1] * factor, rtol=1e-5, atol=0)
    check(problem, plan)


def test_an_edited_planner_plans() -> None:
    """Pairs are never tried: the plan is that of the line, and results are right all the same."""
    problem = make(Shape(128, 1, 64, 1024, varlen=True).lengths().tolist(), heads_q=64)
    own = problem.plan()
    assert (own[0][:, 7] > 0).any()
    old = "if (batch > useful_parts / 2 && batch <= 2 * useful_parts) {"
    with override_sources(edit("mla_schedule.cuh", old, "if (false) {"), kernels=["mla_schedule"]):
        edited = problem.plan()
        assert not torch.equal(edited[0], own[0])
        assert (edited[0][:, 7] == 0).all()
    check(problem, edited)
    for now, before in zip(problem.plan(), own, strict=True):
        assert torch.equal(now, before)


def test_edited_kernels_have_workspaces_of_their_own() -> None:
    """So that nothing they leave there is taken for what the package's kernels left."""
    problem = make([20_000, 9000, 300])
    plan = problem.plan()
    assert (plan[1][1:] - plan[1][:-1]).max() > 1  # cut
    expected = call(problem, plan)
    before = dict(workspace._kept)
    own = {room.address for room in before.values()}
    assert own
    with lse_in_base_2():
        call(problem, plan)
        edited = {room.address for room in workspace._kept.values()}
        assert edited
        assert not edited & own
    assert workspace._kept == before
    assert_same_bits(call(problem, plan), expected)
    check(problem, plan)


@pytest.mark.parametrize("name", ["mla_schedule", "mla_decode_bf16", DECODE])
def test_the_driver_agrees_with_the_limits(name: str) -> None:
    on_gpu, computed = (flashmla_rtc.inspect_kernel(name, device) for device in (0, "cpu"))
    assert on_gpu.blocks_per_sm == computed.blocks_per_sm
    assert torch.cuda.get_device_name() in on_gpu.occupancy_found
    assert "computed" in computed.occupancy_found


def test_time_of_an_edited_kernel() -> None:
    before = flashmla_rtc.time_decode(8, 2048, 16)
    assert 1e-6 < before.seconds < 1e-2
    assert before.row["us"] == pytest.approx(before.seconds * 1e6, abs=0.01)
    # Exponentials that take their time: the scorers are slower, and so is the call.
    old = '    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));\n'
    text = kernel_sources()["ptx/convert.cuh"]
    assert text.count(old) == 1
    wait = '    asm volatile("nanosleep.u32 2000;");\n'
    slow = {"ptx/convert.cuh": text.replace(old, wait + old)}
    with override_sources(slow, kernels=[DECODE]):
        assert flashmla_rtc.time_decode(8, 2048, 16).seconds > 1.2 * before.seconds
    after = flashmla_rtc.time_decode(8, 2048, 16)
    assert after.seconds < 1.2 * before.seconds


def test_pictures_of_plans_on_the_gpu() -> None:
    problem = make([5000, 300, 0, 64])
    meta, _ = flashmla_rtc.get_mla_metadata()
    for library in ("torch", "cupy"):
        lengths, plan, splits = problem.cache_seqlens, *problem.plan()
        if library == "cupy":
            cupy = pytest.importorskip("cupy")
            lengths, plan, splits = (cupy.asarray(part) for part in (lengths, plan, splits))
        facts = flashmla_rtc.draw_plan(plan, splits, lengths).facts
        assert (facts.requests, facts.blocks) == (4, 79 + 5 + 1)
        assert facts.parts == plan.shape[0]
    call(problem, (meta, None))
    drawn = flashmla_rtc.draw_plan(meta)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    made_here = flashmla_rtc.plan_for(problem.cache_seqlens, 16, num_sms=num_sms)
    assert drawn.svg == flashmla_rtc.draw_plan(*made_here, problem.cache_seqlens).svg
    assert drawn.svg in meta._repr_html_()


def test_a_folder_does_what_a_mapping_does(tmp_path: Path) -> None:
    for name, text in edit(MERGE, LSE, IN_BASE_2).items():
        (tmp_path / name).write_text(text)
    problem = make([700])
    plan = problem.plan()
    with lse_in_base_2():
        expected = call(problem, plan)
    with override_sources(tmp_path, kernels=[DECODE]):
        assert_same_bits(call(problem, plan), expected)
