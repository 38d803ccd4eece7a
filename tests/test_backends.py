"""Which backend computes where, and what is said where it is not the kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest

from flashmla_rtc import arrays, backends, geometry
from flashmla_rtc.arrays import CPU, Device
from flashmla_rtc.rtc import CompilerMissing
from flashmla_rtc.rtc.kernel import DeviceFacts, DriverError

GPU = Device("cuda", 0)
H100 = DeviceFacts(0, "NVIDIA H100 80GB HBM3", 132, (9, 0), 1024)
OTHERS = [
    DeviceFacts(0, "NVIDIA A100-SXM4-80GB", 108, (8, 0), 1024),
    DeviceFacts(0, "NVIDIA L40S", 142, (8, 9), 1024),
    DeviceFacts(0, "NVIDIA B200", 148, (10, 0), 1024),
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is remembered of devices is that of one test alone."""
    backends.why_not.cache_clear()
    backends._warn_once.cache_clear()
    yield
    backends.why_not.cache_clear()
    backends._warn_once.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    facts: DeviceFacts | Exception = H100,
    nvrtc: tuple[int, int] | Exception = (13, 0),
) -> list[int]:
    """Any machine. The list grows by an index each time that a device is asked."""
    asked: list[int] = []

    def device_facts(index: int) -> DeviceFacts:
        asked.append(index)
        if isinstance(facts, Exception):
            raise facts
        return facts

    def nvrtc_version() -> tuple[int, int]:
        if isinstance(nvrtc, Exception):
            raise nvrtc
        return nvrtc

    monkeypatch.setattr(backends, "device_facts", device_facts)
    monkeypatch.setattr(backends, "nvrtc_version", nvrtc_version)
    return asked


def test_hopper_gets_the_kernels_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(GPU) == "sm90"
    assert backends.why_not(GPU) is None


def test_the_cpu_gets_the_reference_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, DriverError("no driver"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(CPU) == "reference"
    assert asked == []  # and no driver is asked about it
    reason = backends.why_not(CPU)
    assert reason is not None
    assert "CPU" in reason
    assert "H100" in reason


@pytest.mark.parametrize("facts", OTHERS, ids=lambda facts: facts.name)
def test_another_gpu_is_named_with_its_capability(
    monkeypatch: pytest.MonkeyPatch, facts: DeviceFacts
) -> None:
    pretend(monkeypatch, facts)
    reason = backends.why_not(GPU)
    assert reason is not None
    major, minor = facts.capability
    for word in ("cuda:0", facts.name, f"{major}.{minor}", "Hopper (9.0)"):
        assert word in reason
    assert reason.endswith(".")


def test_reasons_are_the_sentences_of_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, DriverError("The CUDA driver could not be loaded."))
    assert backends.why_not(GPU) == "The CUDA driver could not be loaded."
    backends.why_not.cache_clear()
    pretend(monkeypatch, nvrtc=CompilerMissing("Install NVRTC."))
    assert backends.why_not(GPU) == "Install NVRTC."


@pytest.mark.parametrize("kind", ["xpu", "mps", "meta", "hip"])
def test_devices_of_other_makers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked = pretend(monkeypatch)
    reason = backends.why_not(Device(kind, 1))
    assert reason is not None
    assert f"{kind}:1" in reason
    assert reason.endswith(".")
    assert asked == []


def test_a_gpu_without_the_kernels_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, OTHERS[0])
    with pytest.warns(RuntimeWarning, match="reference backend") as said:
        assert [backends.choose(GPU) for _ in range(3)] == ["reference"] * 3
    (warning,) = said
    text = str(warning.message)
    assert "cuda:0" in text
    assert "correct but slow" in text
    assert "A100" in text
    assert text.endswith(".")


def test_every_gpu_is_told_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, OTHERS[0])
    with pytest.warns(RuntimeWarning) as said:
        assert {backends.choose(Device("cuda", index)) for index in (0, 1, 0, 1)} == {"reference"}
    assert [str(warning.message).split(" with ")[0] for warning in said] == [
        "flashmla_rtc computes on cuda:0",
        "flashmla_rtc computes on cuda:1",
    ]


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch)
    for index in (0, 1, 0, 1, 0):
        assert backends.choose(Device("cuda", index)) == "sm90"
    assert asked == [0, 1]


# Where the warning points: at the line that called the package, where a filter can name it.

Call = Callable[[], object]


def _decode() -> object:
    import numpy as np

    from flashmla_rtc import flash_mla_with_kvcache

    return flash_mla_with_kvcache(
        np.ones((1, 1, 1, 576), np.float32),
        np.ones((1, 64, 1, 576), np.float32),
        np.zeros((1, 1), np.int32),
        np.ones(1, np.int32),
        512,
        None,
    )


def _plan() -> object:
    import numpy as np

    from flashmla_rtc import get_mla_metadata

    return get_mla_metadata(np.ones(1, np.int32), 1, 1)


@pytest.mark.parametrize("reserved", [1024, 2048])
def test_kernels_are_refused_where_shared_memory_begins_elsewhere(
    monkeypatch: pytest.MonkeyPatch, reserved: int
) -> None:
    """Their descriptors are constants, and a wrong one would end in a launch failure."""
    from flashmla_rtc import sm90

    facts = DeviceFacts(0, "NVIDIA H100 80GB HBM3", 132, (9, 0), reserved)
    monkeypatch.setattr(sm90, "device_facts", lambda index: facts)
    if reserved == geometry.SHARED_BASE:
        sm90._check_shared_memory(0)
    else:
        with pytest.raises(DriverError, match=r"reserves 2048 bytes .* made for 1024"):
            sm90._check_shared_memory(0)


@pytest.mark.parametrize("call", [_decode, _plan], ids=["decode", "plan"])
def test_the_warning_points_at_the_caller(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    pretend(monkeypatch, OTHERS[0])
    # NumPy arrays that say they are on a GPU: enough for the choice, and the reference computes.
    honest = arrays._view_numpy

    def on_gpu(*arguments: object) -> arrays.View:
        seen = honest(*arguments)  # type: ignore[arg-type]
        seen.device = GPU
        return seen

    monkeypatch.setattr(arrays, "_view_numpy", on_gpu)
    monkeypatch.setattr(arrays, "to_numpy", lambda like: like.native)
    monkeypatch.setattr(arrays, "from_numpy", lambda like, values: values)
    with pytest.warns(RuntimeWarning, match="reference backend") as said:
        call()
    (warning,) = said
    lines = {line for _, _, line in call.__code__.co_lines()}
    assert (warning.filename, warning.lineno in lines) == (__file__, True)
