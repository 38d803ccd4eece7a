"""``time_decode``: what it hands to the clock, and what it makes of the answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import flashmla_rtc
from flashmla_rtc.bench import decode_time
from flashmla_rtc.bench.problem import Pool
from flashmla_rtc.bench.timing import Timing


class Clock:
    """Notes what it is given, runs each call once, and says what it was told to."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.shapes: list[tuple[int, ...]] = []
        self.held: list[float | None] = []

    def record(self, calls: Sequence[Any], estimate: float) -> str:
        assert 8e-6 < estimate < 1e-3
        self.shapes = [tuple(call()[0].shape) for call in calls]
        return "recording"

    def measure(
        self, recordings: Mapping[str, Any], held_seconds: float | None
    ) -> dict[str, Timing]:
        assert list(recordings.values()) == ["recording"]
        self.held.append(held_seconds)
        return dict.fromkeys(recordings, self.timing)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(decode_time, "_hopper", lambda: "a device")
    monkeypatch.setattr(
        decode_time, "Pool", lambda shapes, dtype: Pool(shapes, "cpu", dtype, rotate_bytes=3e5)
    )


def test_what_is_timed_and_what_is_said(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(Timing(20e-6, 25e-6))
    monkeypatch.setattr(decode_time, "GraphTimer", lambda: clock)
    taken = flashmla_rtc.time_decode(2, 70, 3, 2, held=0.5)
    assert set(clock.shapes) == {(2, 2, 3, 512)}
    assert len(clock.shapes) > 1
    assert clock.held == [0.5]
    assert (taken.seconds, taken.held_seconds, taken.device) == (20e-6, 25e-6, "a device")
    assert taken.tflops == pytest.approx(2 * 3 * 2 * (576 + 512) * 140 / 20e-6 / 1e12)
    moved = 140 * 576 * 2 + 2 * 2 * 3 * (576 + 512) * 2
    assert taken.gbps == pytest.approx(moved / 20e-6 / 1e9)
    assert taken.row["us"] == 20.0
    assert taken.row["held_us"] == 25.0
    assert taken.row["peers"] == {}
    assert str(taken).startswith("b 2, s_q 2, heads 3, keys 70 on a device: 20.0, held 25.0 µs, ")


def test_ragged_lengths_of_fp16(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_time, "GraphTimer", lambda: Clock(Timing(1e-5, None)))
    taken = flashmla_rtc.time_decode(3, 100, 1, ragged=True, dtype="float16")
    assert taken.shape.varlen
    assert taken.row["dtype"] == "float16"
    assert len(set(taken.shape.lengths().tolist())) > 1
    assert "held" not in str(taken)


@pytest.mark.parametrize("name", ["batch", "keys", "heads_q", "seq_len_q"])
def test_numbers_below_one(name: str) -> None:
    arguments = {"batch": 1, "keys": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but it is 0"):
        flashmla_rtc.time_decode(**arguments)  # type: ignore[arg-type]


def test_another_dtype() -> None:
    with pytest.raises(ValueError, match='"bfloat16" or "float16", but it is \'float32\''):
        flashmla_rtc.time_decode(1, 1, dtype="float32")


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="torch can't be imported"):
        flashmla_rtc.time_decode(1, 64)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="Timing needs a Hopper GPU, and torch sees no CUDA"):
        flashmla_rtc.time_decode(1, 64)


def test_with_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("flashmla_rtc.backends.why_not", lambda device: "It is an old one.")
    with pytest.raises(RuntimeError, match=r"Hopper GPU and its kernels\. It is an old one\."):
        flashmla_rtc.time_decode(1, 64)
