"""The benchmark without a GPU: what it measures, how it counts, what it writes, and how it treats
peers.

A clock that invents times and peers that are the reference backend stand in for the device.
"""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from flashmla_rtc.bench import ceilings as ceilings_module
from flashmla_rtc.bench import peers as peers_module
from flashmla_rtc.bench import run as run_module
from flashmla_rtc.bench.peers import Found, Peer, find_peers
from flashmla_rtc.bench.problem import Pool, copies_of, own_calls, pages_of
from flashmla_rtc.bench.report import Report, Table, make_row
from flashmla_rtc.bench.run import Grid, host_times
from flashmla_rtc.bench.shapes import (
    KEY_BYTES,
    Shape,
    full_grid,
    geometric_mean,
    parse_pattern,
    quick_grid,
    select,
)
from flashmla_rtc.bench.timing import GraphTimer, Timing, calls_in_graph, host_seconds
from flashmla_rtc.cli import bench as command

SMALL = [Shape(2, 1, 4, 100), Shape(3, 2, 4, 70, varlen=True)]


# The shapes and the accounting


def test_the_full_grid_is_the_64_shapes_of_the_field():
    expected = {
        (batch, seq_len_q, heads, keys, varlen)
        for heads in (16, 32, 64, 128)
        for seq_len_q in (1, 2)
        for batch, keys, varlen in (
            (1, 4096, False),
            (1, 65536, False),
            (8, 8192, False),
            (32, 4096, False),
            (64, 8192, False),
            (128, 4096, False),
            (128, 8192, False),
            (128, 4096, True),
        )
    }
    grid = full_grid()
    assert len(grid) == 64
    assert {(s.batch, s.seq_len_q, s.heads_q, s.seqlen, s.varlen) for s in grid} == expected


def test_the_quick_grid_is_eight_of_the_64():
    assert len(set(quick_grid())) == 8
    assert set(quick_grid("float16")) <= set(full_grid("float16"))


@pytest.mark.parametrize(
    "shape, us, tflops, gbps",
    [  # published rows: the same time must give the same figures
        (Shape(128, 1, 16, 8192), 409.62, 89.12, 2959.86),
        (Shape(128, 2, 128, 8192), 962.2, 607.06, 1329.52),
        (Shape(1, 1, 16, 4096), 23.19, 6.15, 205.02),
    ],
)
def test_operations_and_bytes_are_counted_as_the_field_counts_them(shape, us, tflops, gbps):
    assert shape.flops / (us * 1e-6) / 1e12 == pytest.approx(tflops, rel=1e-3)
    assert shape.bytes / (us * 1e-6) / 1e9 == pytest.approx(gbps, rel=1e-3)


def test_operations_and_bytes_by_hand():
    shape = Shape(2, 3, 5, 7)
    assert shape.flops == 2 * (2 * 7) * (3 * 5) * (576 + 512)
    assert shape.bytes == 2 * (14 * 576 + 2 * 3 * 5 * (576 + 512))


def test_ragged_lengths_are_the_same_every_time_and_never_shorter_than_the_queries():
    shape = Shape(128, 2, 16, 4096, varlen=True)
    lengths = shape.lengths()
    np.testing.assert_array_equal(lengths, shape.lengths())
    assert lengths.dtype == np.int32
    assert lengths.min() >= 2
    assert 3500 < lengths.mean() < 4700
    assert 1500 < lengths.std() < 2600
    assert shape.flops == 2.0 * 16 * 2 * 1088 * int(lengths.sum())


def test_the_limit_is_the_slower_of_bytes_and_operations():
    few, many = Shape(128, 1, 16, 8192), Shape(128, 2, 128, 8192)
    assert few.limit_seconds(3.0, 700.0) == pytest.approx(few.bytes / 3e12)
    assert many.limit_seconds(3.0, 700.0) == pytest.approx(many.flops / 7e14)


def test_every_shape_rotates_past_the_l2_cache():
    for shape in full_grid():
        assert copies_of(shape) * shape.keys * KEY_BYTES >= 200e6


def test_only_filters_the_grid_and_takes_a_shape_of_its_own():
    grid = full_grid()
    assert select(grid, []) == grid
    assert len(select(grid, [parse_pattern("128,*,16,*")])) == 6
    assert select(grid, [parse_pattern("8,1,16,8192")]) == [Shape(8, 1, 16, 8192)]
    own = select(grid, [parse_pattern("3, 1, 12, 1000")])
    assert own == [Shape(3, 1, 12, 1000)]
    assert select(grid, [parse_pattern("3,*,12,1000")]) == []


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,1,1,1", "0,1,1,1", "-1,1,1,1"])
def test_a_pattern_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="batch,seq_len_q,heads_q,seqlen"):
        parse_pattern(text)


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))


# The clock, with a device that is made of numbers


class FakeCuda:
    """``torch.cuda`` whose time passes only in replays: each takes what the device needs at the
    moment.
    """

    def __init__(self, seconds_per_call=1e-4, throttle_after=math.inf, slow=2.0):
        self.now = 0.0
        self.busy = 0.0
        self.capturing = None
        self.seconds_per_call = seconds_per_call
        self.throttle_after = throttle_after
        self.slow = slow
        self.replays = []
        cuda = self

        class CUDAGraph:
            def __init__(self):
                self.calls = []

            def replay(self):
                cuda.replays.append(self)
                for _ in self.calls:
                    factor = cuda.slow if cuda.busy >= cuda.throttle_after else 1.0
                    cuda.now += cuda.seconds_per_call * factor
                    cuda.busy += cuda.seconds_per_call * factor

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.time = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.time - self.time) * 1e3

        class Scope:
            def __init__(self, graph=None, stream=None):
                self.graph = graph if isinstance(graph, CUDAGraph) else None

            def __enter__(self):
                cuda.capturing = self.graph

            def __exit__(self, *_):
                cuda.capturing = None

        class Stream:
            def wait_stream(self, other):
                pass

        self.CUDAGraph, self.Event, self.Stream = CUDAGraph, Event, Stream
        self.graph = self.stream = Scope

    def current_stream(self):
        return self.Stream()

    def synchronize(self):
        pass

    def call(self, name, log):
        def call():
            log.append(name)
            if self.capturing is not None:
                self.capturing.calls.append(name)

        return call


def test_a_graph_plays_every_copy_equally_often_and_lasts_long_enough():
    assert calls_in_graph(1, 1e-3) == 8
    assert calls_in_graph(1, 1e-5) == 200
    assert calls_in_graph(43, 1e-5) == 215
    assert calls_in_graph(43, 1.0) == 43
    assert calls_in_graph(1, 0.0) == 512


def test_copies_are_captured_in_turn_after_a_warm_up():
    cuda, log = FakeCuda(), []
    timer = GraphTimer(cuda=cuda)
    recording = timer.record([cuda.call(name, log) for name in "abc"], 1e-3)
    assert log[:6] == list("abcabc")
    assert recording.graph.calls == list("abcabcabc")
    assert recording.calls == 9


def test_burst_is_timed_at_full_clock_and_held_after_it_fell(monkeypatch):
    cuda = FakeCuda(throttle_after=0.05)

    def rest(seconds):
        cuda.busy = 0.0

    monkeypatch.setattr("flashmla_rtc.bench.timing.time.sleep", rest)
    timer = GraphTimer(rounds=3, cuda=cuda)
    first = timer.record([cuda.call("a", [])], 1e-4)
    second = timer.record([cuda.call("b", [])], 1e-4)
    timings = timer.measure({"a": first, "b": second}, 0.5)
    for timing in timings.values():
        assert timing.burst == pytest.approx(1e-4)
        assert timing.held == pytest.approx(2e-4)


def test_candidates_are_interleaved(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("flashmla_rtc.bench.timing.time.sleep", lambda seconds: None)
    timer = GraphTimer(rounds=2, cuda=cuda)
    recordings = {name: timer.record([cuda.call(name, [])], 1e-3) for name in "ab"}
    cuda.replays.clear()
    timer.measure(recordings, None)
    order = [graph.calls[0] for graph in cuda.replays]
    assert order == list("aaabbbaaabbb")  # each burst: one replay that hides the launch, two timed
    cuda.replays.clear()
    timings = timer.measure(recordings, 0.1)
    turns = [graph.calls[0] for graph in cuda.replays[12:]]
    runs = [name for i, name in enumerate(turns) if i == 0 or turns[i - 1] != name]
    assert runs == ["a", "b", "a"]  # a, then b twice, then a
    assert timings["a"].held == pytest.approx(1e-4)


def test_no_held_figure_without_asking(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("flashmla_rtc.bench.timing.time.sleep", lambda seconds: None)
    timer = GraphTimer(cuda=cuda)
    timings = timer.measure({"a": timer.record([cuda.call("a", [])], 1e-3)}, None)
    assert timings["a"].held is None


def test_host_time_counts_calls_and_not_the_wait(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("flashmla_rtc.bench.timing.time.perf_counter", lambda: clock.now)

    turns = []

    def taking(name, seconds):
        def call():
            clock.now += seconds
            turns.append(name)

        return call

    def synchronize():
        clock.now += 1.0

    candidates = {"quick": taking("quick", 2e-5), "slow": taking("slow", 5e-5)}
    times = host_seconds(candidates, synchronize, calls=10, rounds=3)
    assert times == pytest.approx({"quick": 2e-5, "slow": 5e-5})
    assert turns == (["quick"] * 10 + ["slow"] * 10) * 5


# Inputs


@pytest.fixture
def pool():
    pytest.importorskip("torch")
    pytest.importorskip("array_api_compat")
    return Pool([*SMALL], device="cpu", rotate_bytes=5e5)


def test_copies_use_disjoint_pages_of_one_cache(pool):
    for shape in SMALL:
        problem = pool.problem(shape)
        assert problem.copies == copies_of(shape, 5e5) > 1
        assert problem.k_cache.shape[0] == pool.num_pages
        used = []
        for table in problem.tables:
            for row, count in zip(table.tolist(), pages_of(problem.lengths).tolist(), strict=True):
                used += row[:count]
        assert len(used) == len(set(used))
        assert min(used) >= 0
        assert max(used) < pool.num_pages
        assert problem.cache_seqlens.tolist() == shape.lengths().tolist()
        assert problem.queries[0].shape == (shape.batch, shape.seq_len_q, shape.heads_q, 576)
        assert problem.queries[0].is_contiguous()


def test_a_problem_of_one_copy(pool):
    assert pool.problem(SMALL[0], copies=1).copies == 1


def exact(problem, copy=0):
    from flashmla_rtc.reference import attend

    return attend(
        problem.queries[copy],
        problem.k_cache,
        problem.tables[copy],
        problem.cache_seqlens,
        512,
        576**-0.5,
        True,
    )


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.label)
def test_our_call_is_the_causal_decode_of_its_copy(pool, shape):
    problem = pool.problem(shape)
    for copy, call in enumerate(own_calls(problem)):
        out, lse = call()
        expected, expected_lse = exact(problem, copy)
        assert run_module.relative_difference(out, expected) < 5e-3
        assert float((lse - expected_lse).abs().max()) < 1e-4
        assert call()[0] is out  # outputs are made once


# Peers


def test_absent_and_broken_peers_are_a_sentence_each(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)

    def refuse(name):
        if name == "flashinfer.mla":
            raise OSError("undefined symbol: _ZN3foo")
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(peers_module.importlib, "import_module", refuse)
    found = find_peers(["flash_mla", "flashinfer"])
    assert found.peers == []
    assert found.absent["flash_mla"] == "not installed (pip install sgl-flash-mla==1.0.0)"
    assert "undefined symbol" in found.absent["flashinfer"]


def test_a_peer_without_its_dependency_is_not_called_absent(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError("No module named 'tvm_ffi'", name="tvm_ffi")

    monkeypatch.setattr(peers_module.importlib, "import_module", refuse)
    assert find_peers(["flashinfer"]).absent == {
        "flashinfer": "installed, but its dependency tvm_ffi is not"
    }


def test_flash_mla_is_planned_outside_the_call_and_asked_for_dense_decode(pool):
    made, seen = [], []

    def get_mla_metadata():
        made.append(object())
        return made[-1], None

    def flash_mla_with_kvcache(q, k, table, lens, dv, plan, splits, causal, use_legacy=False):
        seen.append((plan, splits, causal, use_legacy, dv))
        return q, None

    module = types.SimpleNamespace(
        get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache
    )
    problem = pool.problem(SMALL[1])
    calls = peers_module._flash_mla_calls(module, problem, pool)
    assert len(calls) == len(made) == problem.copies
    for call in calls:
        call()
    calls[0]()
    assert seen[0] == seen[-1] == (made[0], None, True, True, 512)


def test_an_older_flash_mla_plans_from_the_lengths(pool):
    def get_mla_metadata(cache_seqlens, rows, heads_k):
        return ("plan", rows, heads_k), "splits"

    def flash_mla_with_kvcache(q, k, table, lens, dv, plan, splits, causal=False):
        return plan, splits, causal

    module = types.SimpleNamespace(
        get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache
    )
    call = peers_module._flash_mla_calls(module, pool.problem(SMALL[1]), pool)[0]
    assert call() == (("plan", 2 * 4, 1), "splits", True)


class FlashInferWrapper:
    """What FlashInfer's paged MLA documents of itself, in plain torch, from the arguments it is
    given.
    """

    def __init__(self, workspace, backend):
        assert backend == "fa3"

    def plan(self, q_ends, kv_ends, indices, lens, heads, dv, d_rope, page, causal, scale, dq, dk):
        import torch

        assert all(t.dtype == torch.int32 for t in (q_ends, kv_ends, indices, lens))
        assert (dv, d_rope, page) == (512, 64, 64)
        assert len(indices) == int(kv_ends[-1])
        self.plan_of = (q_ends, kv_ends, indices.long(), lens, causal, scale)

    def run(self, q_nope, q_pe, ckv, kpe, out, lse, return_lse):
        import torch

        q_ends, kv_ends, indices, lens, causal, scale = self.plan_of
        assert ckv.is_contiguous()
        assert kpe.is_contiguous()
        query = torch.cat([q_nope, q_pe], -1).float()
        cache = torch.cat([ckv, kpe], -1).float()
        for request, length in enumerate(lens.tolist()):
            rows = slice(int(q_ends[request]), int(q_ends[request + 1]))
            pages = indices[int(kv_ends[request]) : int(kv_ends[request + 1])]
            keys = cache[pages].reshape(-1, 576)[:length]
            scores = torch.einsum("qhd,kd->hqk", query[rows], keys) * scale
            if causal:
                count = rows.stop - rows.start
                hidden = torch.ones(count, length).tril(length - count) == 0
                scores = scores.masked_fill(hidden, -math.inf)
            out[rows] = torch.einsum("hqk,kd->qhd", scores.softmax(-1), keys[:, :512]).to(out)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.label)
def test_flashinfer_is_given_the_same_problem(pool, shape):
    module = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=FlashInferWrapper)
    problem = pool.problem(shape)
    calls = peers_module._flashinfer_calls(module, problem, pool)
    assert len(calls) == problem.copies
    for copy in (0, problem.copies - 1):
        out, _ = calls[copy]()
        assert run_module.relative_difference(out, exact(problem, copy)[0]) < 5e-3


# The grid and its document


class FakeTimer:
    """Invents times: ours 100 µs, peers 150 and 200, held a quarter slower."""

    def record(self, calls, estimate):
        assert estimate > 0
        for call in calls:
            call()
        return len(calls)

    def measure(self, recordings, held_seconds):
        times = {}
        for name, burst in zip(recordings, (100e-6, 150e-6, 200e-6), strict=False):
            times[name] = Timing(burst, burst * 1.25 if held_seconds else None)
        return times


def reference_peer(name, error=0.0, fail=None):
    def calls(problem, pool):
        if fail is not None:
            raise fail
        out, lse = exact(problem)
        return [lambda: (out * (1 + error), lse)] * problem.copies

    return Peer(name, "1.2.3", calls)


def make_grid(pool, peers, path=None, held=0.5):
    report = Report({"device": "none", "digest": "d"}, path)
    report.ceilings = {"read_TBps": 3.0, "bf16_matmul_TFLOPS": 700.0}
    return Grid(FakeTimer(), pool, peers, report, held)


def test_the_document_has_the_agreed_keys(pool, tmp_path):
    path = tmp_path / "figures.json"
    peers = [reference_peer("flash_mla"), reference_peer("flashinfer")]
    grid = make_grid(pool, peers, path)
    grid.report.host_us, notes = host_times(pool, peers, lambda: None, SMALL[0], calls=1)
    rows = list(grid.play(SMALL))
    grid.report.complete = True
    grid.report.save()

    assert notes == grid.notes == []
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "digest", "ceilings", "rows", "host_us"} <= set(document)
    assert set(document["ceilings"]) >= {"read_TBps", "bf16_matmul_TFLOPS"}
    assert set(document["host_us"]) >= {"call", "call_with_out", "peer_flash_mla"}
    assert all(value > 0 for value in document["host_us"].values())
    assert document["complete"] is True
    assert document["rows"] == rows
    first, second = document["rows"]
    assert {key: first[key] for key in ("b", "s_q", "h_q", "seqlen", "varlen", "dtype")} == {
        "b": 2,
        "s_q": 1,
        "h_q": 4,
        "seqlen": 100,
        "varlen": False,
        "dtype": "bfloat16",
    }
    assert (second["b"], second["varlen"]) == (3, True)
    assert first["us"] == 100.0
    assert first["held_us"] == 125.0
    assert first["peers"] == {"flash_mla": 150.0, "flashinfer": 200.0}
    assert first["peers_held"] == {"flash_mla": 187.5, "flashinfer": 250.0}
    assert first["TFLOPS"] == pytest.approx(SMALL[0].flops / 100e-6 / 1e12, abs=0.01)
    assert first["GBps"] == pytest.approx(SMALL[0].bytes / 100e-6 / 1e9, abs=0.1)
    assert all(value < 5e-3 for value in first["difference"].values())


def test_the_command_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("array_api_compat")
    ceilings = {"read_TBps": 3.0, "bf16_matmul_TFLOPS": 700.0, "bf16_matmul_held_TFLOPS": 600.0}
    monkeypatch.setattr(command, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(command, "HOST_SHAPE", SMALL[0])
    monkeypatch.setattr(
        command, "host_times", lambda *_: ({"call": 12.0, "call_with_out": 9.0}, ["A note."])
    )
    found = Found([reference_peer("flash_mla")], {"flashinfer": "not installed"})
    report = Report({"device": "fake", "driver": "580.1"}, tmp_path / "figures.json")
    command.measure(torch, SMALL, found, report, 0.5, FakeTimer(), "cpu")

    printed = capsys.readouterr()
    assert "reads 3.00 TB/s, bf16 matrix product 700 TFLOPS (600 held)" in printed.out
    assert "call 12.0 µs, call with out 9.0 µs" in printed.out
    assert "Time of flash_mla over ours, geometric mean of 2 shapes: burst 1.50×" in printed.out
    assert printed.err == "A note.\n"
    document = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert document["complete"] is True
    assert document["ceilings"] == ceilings
    assert document["host_us"] == {"call": 12.0, "call_with_out": 9.0}
    assert document["notes"] == ["A note."]
    assert [row["seqlen"] for row in document["rows"]] == [100, 70]
    assert all(row["limit_us"] > 0 for row in document["rows"])


def test_ceilings_are_counted_in_bytes_and_operations(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(ceilings_module, "READ_BYTES", 4096)
    monkeypatch.setattr(ceilings_module, "MATRIX", 64)
    found = ceilings_module.measure_ceilings(FakeTimer(), "cpu", 0.5)
    assert found["read_TBps"] == pytest.approx(4096 / 100e-6 / 1e12)
    assert found["bf16_matmul_TFLOPS"] == pytest.approx(2 * 64**3 / 100e-6 / 1e12)
    assert found["bf16_matmul_held_TFLOPS"] == pytest.approx(2 * 64**3 / 125e-6 / 1e12)
    assert "bf16_matmul_held_TFLOPS" not in ceilings_module.measure_ceilings(FakeTimer(), "cpu")


def test_a_run_that_is_killed_leaves_its_rows(pool, tmp_path):
    path = tmp_path / "figures.json"
    rows = make_grid(pool, [], path).play(SMALL)
    next(rows)
    rows.close()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert len(document["rows"]) == 1
    assert document["complete"] is False
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_peer_that_fails_is_noted_and_left_out(pool):
    failing = reference_peer("flash_mla", fail=RuntimeError("no kernel\nfor this"))
    grid = make_grid(pool, [failing, reference_peer("flashinfer")], held=None)
    (row,) = grid.play(SMALL[:1])
    assert set(row["peers"]) == {"flashinfer"}
    assert "held_us" not in row
    assert grid.notes == [
        "flash_mla did not run b 2, s_q 1, heads 4, keys 100: RuntimeError: no kernel"
    ]


def test_a_peer_that_computes_something_else_is_noted(pool):
    grid = make_grid(pool, [reference_peer("flash_mla", error=0.05)])
    (row,) = grid.play(SMALL[:1])
    assert row["difference"]["flash_mla"] == pytest.approx(0.05, rel=0.1)
    assert "differ by 5.0e-02" in grid.notes[0]


def test_our_own_failure_is_not_swallowed(pool, monkeypatch):
    def broken(problem):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(run_module, "own_calls", broken)
    with pytest.raises(RuntimeError, match="launch failed"):
        next(make_grid(pool, []).play(SMALL))


def test_the_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    report = Report({"device": "x"}, path)
    report.save()
    before = path.read_text(encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("flashmla_rtc.bench.report.os.replace", fail)
    report.host_us = {"call": 1.0}
    with pytest.raises(OSError, match="disk full"):
        report.save()
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(before)["rows"] == []


def test_no_file_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Report({}).save()
    assert list(Path().iterdir()) == []


def test_the_table_says_times_shares_of_the_limit_and_ratios():
    shape = Shape(128, 1, 16, 8192)
    own, peer = Timing(500e-6, 600e-6), {"flash_mla": Timing(750e-6, 600e-6)}
    row = make_row(shape, own, peer, {"read_TBps": 3.0, "bf16_matmul_TFLOPS": 700.0}, {})
    table = Table(["flash_mla", "flashinfer"], held=True)
    header, line = table.header(), table.line(row)
    assert len(header) == len(line)
    assert "1.50×" in line
    assert "1.00×" in line
    assert f"{row['limit_us'] / 500:.0%}" in line
    assert line.count("–") == 2  # flashinfer did not run
    (summary,) = table.summary([row, row])
    assert "flash_mla over ours, geometric mean of 2 shapes: burst 1.50×" in summary
    assert "held 1.00×" in summary


def test_a_table_without_held_figures_or_peers():
    shape = Shape(1, 1, 16, 4096, varlen=True)
    row = make_row(shape, Timing(1e-5, None), {}, {}, {})
    table = Table([], held=False)
    assert "~4096" in table.line(row)
    assert "held" not in table.header()
    assert table.summary([row]) == []
