"""Skips the tests of a checkout where the package under test is an installed one alone, and holds
the fixtures of several files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "checkout: needs the package's own folder beside tests/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (CHECKOUT / "flashmla_rtc").is_dir():
        return
    skip = pytest.mark.skip(reason="needs the package's own folder beside tests/")
    for item in items:
        if item.get_closest_marker("checkout"):
            item.add_marker(skip)


@pytest.fixture
def package_as_before() -> Iterator[None]:
    """For tests that compile edited sources: none is in use afterwards."""
    from edited_sources import nothing_stays

    from flashmla_rtc.rtc import CompilerMissing, nvrtc_version

    try:
        nvrtc_version()
    except CompilerMissing as error:
        pytest.skip(str(error))
    with nothing_stays():
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """For tests that have torch compile programs: it knows none, and forgets these."""
    import torch

    from flashmla_rtc import torch_modes

    torch_modes.is_compiling()  # torch was imported last: or the first program is compiled twice
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_grad() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decode steps of models are recorded and replayed without CUDA graphs, and any that is not,
    unless the test waits for the warning, fails it.
    """
    from step_recorder import StepRecorder

    from flashmla_rtc.integrations.transformers import graphs

    monkeypatch.setattr(graphs, "recorder_for", StepRecorder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Decode steps run without")
        yield
