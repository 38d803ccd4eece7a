"""Who gets which memory for partial results."""

from __future__ import annotations

import contextlib
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

    def __init__(self, library: str, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        Memory.number += 1
        self.library, self.device, self.shape, self.dtype = library, device, shape, dtype
        address = Memory.number << 32
        if library == "torch":
            self.data_ptr = lambda: address
        else:
            self.data = SimpleNamespace(ptr=address)


@pytest.fixture(autouse=True)
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Memory, bool]]:
    """Every array that is made, and whether capture was relaxed when it was."""
    made: list[tuple[Memory, bool]] = []
    relaxed = [False]

    def empty(like: View, shape: tuple[int, ...], dtype: str) -> Memory:
        made.append((Memory(like.library, like.device, shape, dtype), relaxed[0]))
        return made[-1][0]

    @contextlib.contextmanager
    def allowed_while_capturing() -> Iterator[None]:
        relaxed[0] = True
        try:
            yield
        finally:
            relaxed[0] = False

    monkeypatch.setattr(arrays, "empty", empty)
    monkeypatch.setattr(workspace, "allowed_while_capturing", allowed_while_capturing)
    monkeypatch.setattr(workspace, "_kept", {})
    monkeypatch.setattr(workspace, "_captured", [])
    return made


def like(library: str = "torch", index: int = 0) -> View:
    return View(None, library, None, 0, (1,), (1,), "bfloat16", Device("cuda", index))


def partials(library: str = "torch", index: int = 0, stream: int = 7, capture: int = 0):
    return workspace.partials(like(library, index), SMS, stream, capture)


LIBRARIES = ["torch", "cupy", "jax", "dlpack"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_calls_on_one_stream_share_a_workspace(library: str, allocations: list[Any]) -> None:
    first = partials(library)
    assert partials(library) == first
    assert len(allocations) == 2
    assert first[0] != first[1]
    assert first[2] is partials(library)[2]


@pytest.mark.parametrize("library", LIBRARIES)
def test_streams_and_devices_have_their_own(library: str) -> None:
    places = [(index, stream) for index in (0, 1) for stream in (0, 1, 2, 0x7F0000)]
    seen = [partials(library, index, stream)[0] for index, stream in places]
    assert len(set(seen)) == len(places)
    assert seen == [partials(library, index, stream)[0] for index, stream in places]


def test_it_is_made_on_the_device_of_the_arrays(allocations: list[Any]) -> None:
    partials("torch", index=3)
    assert [memory.device for memory, _ in allocations] == [Device("cuda", 3)] * 2


def test_torch_has_its_own_memory_and_all_others_share_cupys() -> None:
    assert partials("torch")[0] != partials("cupy")[0]
    assert partials("cupy")[0] == partials("jax")[0] == partials("dlpack")[0]


def test_shapes_do_not_depend_on_the_call(allocations: list[Any]) -> None:
    partials()
    (out, _), (lse, _) = allocations
    rows = workspace.pieces(SMS)
    assert (out.shape, out.dtype) == ((rows, geometry.HEAD_DIM_V), "float32")
    assert (lse.shape, lse.dtype) == ((rows,), "float32")


@given(
    num_sms=st.integers(1, 300),
    heads_per_group=st.integers(1, 300),
    seq_len_q=st.integers(1, 64),
    heads_k=st.integers(1, 64),
)
def test_it_holds_the_pieces_of_any_call(
    num_sms: int, heads_per_group: int, seq_len_q: int, heads_k: int
) -> None:
    rows = heads_per_group * seq_len_q
    parts = schedule.num_sm_parts(num_sms, rows, heads_k)
    if parts > 1:  # one part is never cut
        assert 2 * parts * heads_k * rows <= workspace.pieces(num_sms)


# -- under capture --------------------------------------------------------------------------------


def test_a_graph_of_torch_takes_memory_from_its_own_pool(allocations: list[Any]) -> None:
    eager = partials()
    first, second = partials(capture=1), partials(capture=1)
    assert len({eager[0], first[0], second[0]}) == 3
    assert partials() == eager  # and leaves the eager one where it was
    assert workspace._captured == []  # the pool owns it
    assert not any(relaxed for _, relaxed in allocations)  # or the pool would not see it


@pytest.mark.parametrize("library", ["cupy", "jax", "dlpack"])
def test_a_graph_of_another_library_keeps_its_memory(library: str, allocations: list[Any]) -> None:
    eager = partials(library)
    first, second = partials(library, capture=5), partials(library, capture=6)
    assert len({eager[0], first[0], second[0]}) == 3
    assert partials(library, capture=5) == first  # the layers of one graph share
    assert partials(library, capture=6) == second
    assert partials(library) == eager
    relaxed = [relaxed for _, relaxed in allocations]
    assert relaxed == [False, False, True, True, True, True]  # or it would end the capture


def test_what_a_graph_took_is_not_given_to_an_eager_call() -> None:
    captured = partials("cupy", capture=1)
    assert partials("cupy")[0] != captured[0]


# -- threads --------------------------------------------------------------------------------------


def test_threads_on_one_stream_get_the_same() -> None:
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(partials()[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
