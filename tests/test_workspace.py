"""Who gets which memory for partial results."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmla_rtc import arrays, geometry, schedule, workspace
from flashmla_rtc.arrays import Device, View

SMS = 132


class Memory:
    """An array on a GPU, as far as anybody looks at it."""

    number = 0

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        Memory.number += 1
        self.device, self.shape, self.dtype = device, shape, dtype
        self.address = Memory.number << 32

    def data_ptr(self) -> int:
        return self.address


class Driver:
    """Memory and streams of the driver; ``log`` has every call, and who relaxed capture."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.relaxed = False
        self.arrays: list[Memory] = []

    def call(self, name: str, *arguments: Any) -> Any:
        self.log.append((name, *arguments, self.relaxed))
        if name == "cuMemAlloc":
            Memory.number += 1
            return Memory.number << 32
        return "private" if name == "cuStreamCreate" else None

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.log if entry[0] == name]


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()

    def empty(like: View, shape: tuple[int, ...], dtype: str) -> Memory:
        assert not made.relaxed  # or the graph's pool would not see it
        made.arrays.append(Memory(like.device, shape, dtype))
        return made.arrays[-1]

    @contextlib.contextmanager
    def allowed_while_capturing() -> Iterator[None]:
        made.relaxed = True
        try:
            yield
        finally:
            made.relaxed = False

    monkeypatch.setattr(arrays, "empty", empty)
    monkeypatch.setattr(workspace, "call", made.call)
    flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    monkeypatch.setattr(workspace, "driver", lambda: SimpleNamespace(CUstream_flags=flags))
    monkeypatch.setattr(workspace, "on_device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(workspace, "allowed_while_capturing", allowed_while_capturing)
    monkeypatch.setattr(workspace, "_kept", {})
    monkeypatch.setattr(workspace, "_captured", [])
    return made


def like(library: str = "torch", index: int = 0) -> View:
    return View(None, library, None, 0, (1,), (1,), "bfloat16", Device("cuda", index))


PLACES = workspace.layout(SMS, 64, "bfloat16")


def room(
    library: str = "torch",
    index: int = 0,
    stream: int = 7,
    capture: int = 0,
    places: workspace.Layout = PLACES,
) -> workspace.Workspace:
    return workspace.room(like(library, index), places, stream, capture)


LIBRARIES = ["torch", "cupy", "jax", "dlpack"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_on_one_stream_share_a_workspace(library: str, driver: Driver) -> None:
    assert room(library) is room(library)
    assert len(driver.arrays) + len(driver.calls("cuMemAlloc")) == 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_streams_and_devices_have_their_own(library: str) -> None:
    uses = [(index, stream) for index in (0, 1) for stream in (0, 1, 2, 0x7F0000)]
    seen = [room(library, index, stream).address for index, stream in uses]
    assert len(set(seen)) == len(uses)
    assert seen == [room(library, index, stream).address for index, stream in uses]


def test_threads_have_their_own_per_thread_default_stream() -> None:
    seen = [room(stream=2).address]
    thread = threading.Thread(target=lambda: seen.append(room(stream=2).address))
    thread.start()
    thread.join()
    assert len(set(seen)) == 2


def test_it_is_made_on_the_device_of_the_arrays(driver: Driver) -> None:
    room("torch", index=3)
    assert [memory.device for memory in driver.arrays] == [Device("cuda", 3)]


def test_graphs_of_compiled_programs_share_memory_outside_their_pool(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_manager(device: int, create_if_none_exists: bool) -> Any:
        assert not create_if_none_exists
        return SimpleNamespace(stream=SimpleNamespace(cuda_stream=7)) if device == 0 else None

    trees = SimpleNamespace(get_manager=get_manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    warm_up, *captured = (room(stream=7, capture=number) for number in (0, 1, 2))
    assert captured == [warm_up, warm_up]
    assert warm_up.owner is None
    assert not driver.arrays
    assert room(stream=8, capture=3).owner is not None  # as ever
    assert room(index=1, stream=7, capture=3).owner is not None

    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace())
    assert room(index=2, stream=7, capture=3).owner is not None  # torch has changed


def test_torch_has_its_own_memory_and_all_others_share() -> None:
    assert room("torch").address != room("cupy").address
    assert room("cupy") is room("jax") is room("dlpack")


def test_it_is_zero_before_the_first_call(driver: Driver) -> None:
    """torch's in the order of the caller's stream, others' before anything goes on."""
    mine = room("torch")
    assert driver.calls("cuMemsetD8Async") == [(mine.address, 0, mine.size, 7, False)]
    theirs = room("cupy")
    names = [entry[0] for entry in driver.log[1:]]
    assert names == [
        "cuStreamCreate",
        "cuMemAlloc",
        "cuMemsetD8Async",
        "cuStreamSynchronize",
        "cuStreamDestroy",
    ]
    assert driver.calls("cuMemsetD8Async")[1][:3] == (theirs.address, 0, theirs.size)


def test_calls_that_divide_it_in_another_way_have_their_own() -> None:
    """A word's phase is known for a strip of one size at one place."""
    kinds = [(16, "bfloat16"), (32, "bfloat16"), (48, "float16"), (64, "bfloat16"), (64, "float16")]
    seen = [room(places=workspace.layout(SMS, rows, dtype)).address for rows, dtype in kinds]
    assert len(set(seen)) == len(kinds)
    assert room(places=workspace.layout(SMS, 128, "bfloat16")).address == seen[3]
    assert room(places=workspace.layout(SMS, 16, "float16")).address == seen[0]


@given(
    num_sms=st.integers(1, 300),
    heads_per_group=st.integers(1, 300),
    seq_len_q=st.integers(1, 64),
    heads_k=st.integers(1, 64),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)
def test_it_holds_the_pieces_of_any_call(
    num_sms: int, heads_per_group: int, seq_len_q: int, heads_k: int, dtype: str
) -> None:
    rows = heads_per_group * seq_len_q
    parts = schedule.num_sm_parts(num_sms, rows, heads_k)
    if parts > 1:  # one part is never cut
        tiles = 2 * parts * heads_k * -(-rows // geometry.BLOCK_ROWS)
        strips = min(-(-rows // 16) * 2, 8)
        halves = dtype == "bfloat16" and rows > 32
        strip = (32 * 512 >> halves) + 256
        places = workspace.layout(num_sms, rows, dtype)
        assert places.partials >= tiles * geometry.TILE_STATE_BYTES
        assert places.partials % 16 == 0
        assert places.size >= places.partials + tiles * strips * strip


# -- under capture --------------------------------------------------------------------------------


def test_a_graph_of_torch_takes_memory_from_its_own_pool(driver: Driver) -> None:
    eager = room()
    first = room(capture=1)
    assert room(capture=1) is first  # the layers of one graph share
    assert room(stream=8, capture=1).address != first.address
    assert len({eager.address, first.address}) == 2
    assert room() is eager  # and leaves the eager one where it was
    assert workspace._captured == []  # the pool owns it
    zeroed = [entry[0] for entry in driver.calls("cuMemsetD8Async")]
    assert zeroed.count(first.address) == 1  # a node of the graph, before its first call


def test_a_graph_of_torch_gives_its_memory_back_when_the_next_is_captured() -> None:
    """To the pool, which may give it to anything between replays: each zeroes it again."""
    eager = room()
    first = room(capture=1)
    second = room(capture=2)
    assert first not in workspace._kept.values()
    assert {eager, second} <= set(workspace._kept.values())
    other = room(capture=2, places=workspace.layout(SMS, 16, "bfloat16"))
    assert {eager, second, other} <= set(workspace._kept.values())


@pytest.mark.parametrize("library", ["cupy", "jax", "dlpack"])
def test_a_graph_of_another_library_keeps_its_memory(library: str, driver: Driver) -> None:
    eager = room(library)
    first, second = room(library, capture=5), room(library, capture=6)
    assert len({eager.address, first.address, second.address}) == 3
    assert room(library, capture=5) is first  # the layers of one graph share
    assert room(library, capture=6) is second
    assert room(library) is eager
    assert all(entry[-1] for entry in driver.log)  # relaxed, or it would end the capture


# -- threads --------------------------------------------------------------------------------------


def test_threads_on_one_stream_get_the_same() -> None:
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(room().address)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
