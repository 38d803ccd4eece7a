"""Forking, preparing, devices: what the package does to a process."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from interpreter import python
from problem import DEVICE, assert_same_bits, check, make

import flashmla_rtc
from flashmla_rtc import arrays, sm90, variants, workspace
from flashmla_rtc.rtc import kernel

FORK = """
import os
import flashmla_rtc
from problem import check, make  # imports torch, touches no device

def work(seed):
    check(make([700, 0, 64, 5000], seed=seed, causal=True, seq_len_q=2))

children = []
for seed in range(2):
    child = os.fork()
    if child == 0:
        try:
            work(seed)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(child)
for child in children:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("child", status)
work(2)  # the parent has a device of its own
print("parent", 0)
"""


def test_children_forked_after_import_and_their_parent_use_the_gpu() -> None:
    assert python(FORK).split("\n")[:3] == ["child 0", "child 0", "parent 0"]


PREPARE = """
import flashmla_rtc
from flashmla_rtc import sm90, variants
from flashmla_rtc.rtc import kernel

assert not sm90._launchers and kernel.driver.cache_info().currsize == 0
flashmla_rtc.prepare()
names = {variant.name for variant in variants.default_variants()}
assert sm90._launchers.keys() == {(name, 0, None) for name in names}
loaded = dict(sm90._launchers)

import torch
from problem import assert_matches, make

# The very first call of the process is captured: everything is loaded already.
step = make([700, 0, 64, 5000])
result = step.poisoned()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step.run(None, *result)
graph.replay()
torch.cuda.synchronize()
assert_matches(result, step.expected())
assert sm90._launchers == loaded
print("ok")
"""


def test_prepare_loads_everything_that_a_captured_first_call_needs() -> None:
    assert python(PREPARE) == "ok\n"


@pytest.mark.parametrize("device", [None, 0, torch.device("cuda:0"), torch.device("cuda")], ids=str)
def test_prepare_takes_devices_in_every_form(device: Any) -> None:
    flashmla_rtc.prepare(device)
    assert {(v.name, 0, None) for v in variants.default_variants()} <= set(sm90._launchers)


def test_a_thread_without_a_current_context_can_call() -> None:
    call = make([900, 64])
    expected = check(call)
    result = call.poisoned()
    plan = call.plan()
    torch.cuda.synchronize()
    thread = threading.Thread(target=call.run, args=(plan, *result))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_same_bits(result, expected)


def on_device(index: int) -> arrays.View:
    view = arrays.view(torch.empty(1, device=DEVICE), "q")
    view.device = arrays.Device("cuda", index)
    return view


def test_workspaces_are_kept_by_device_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1)

    def make(like: arrays.View, size: int, _: int) -> workspace.Workspace:
        return workspace.Workspace(next(numbers) << 32, size, like)

    monkeypatch.setattr(workspace, "_from_torch", make)
    monkeypatch.setattr(workspace, "_kept", {})
    places = workspace.layout(132, 16, "bfloat16")
    uses = [(0, 0), (1, 0), (0, 7), (1, 7)]
    kept = {(d, s): workspace.room(on_device(d), places, s, 0).address for d, s in uses}
    assert len(set(kept.values())) == len(uses)
    for (device, stream), address in kept.items():
        assert workspace.room(on_device(device), places, stream, 0).address == address
        assert workspace.room(on_device(device), places, stream, 1).address != address


def test_kernels_are_kept_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(compiled: Any, device: int, dynamic_smem_bytes: int) -> object:
        loaded.append((compiled.name, device))
        return object()

    monkeypatch.setattr(kernel, "LoadedKernel", load)
    table = kernel.KernelTable()
    compiled = variants.builder.obtain(variants.by_name("mla_schedule").source())
    first, second = table.load(compiled, 0, 0), table.load(compiled, 1, 0)
    assert first is not second
    assert table.load(compiled, 1, 0) is second
    assert table.get(compiled.name, 0) is first
    assert loaded == [(compiled.name, 0), (compiled.name, 1)]


two_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"
)


@pytest.mark.allowed_skip
@two_gpus
@pytest.mark.parametrize("current", [0, 1])
def test_a_call_runs_on_its_arrays_device_whichever_is_current(current: int) -> None:
    second = torch.device("cuda:1")
    torch.cuda.set_device(current)
    try:
        on_first = make([900, 64, 3000])
        on_second = make([900, 64, 3000], device=second)
        flashmla_rtc.prepare(second)
        first, other = check(on_first), check(on_second)
        assert other[0].device == second
        assert torch.cuda.current_device() == current
        moved = tuple(array.cpu() for array in first)
        assert_same_bits(moved, tuple(array.cpu() for array in other))
    finally:
        torch.cuda.set_device(0)


@pytest.mark.allowed_skip
@two_gpus
def test_two_devices_work_at_once() -> None:
    calls = [make([5000, 64, 2000], device=torch.device(f"cuda:{i}")) for i in (0, 1)]
    expected = [check(call) for call in calls]
    results = [[call.poisoned() for _ in range(30)] for call in calls]
    for turn in range(30):
        for i in (0, 1):
            calls[i].run(None, *results[i][turn])
    for i in (0, 1):
        torch.cuda.synchronize(i)
        for result in results[i]:
            assert_same_bits(result, expected[i])
