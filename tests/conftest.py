"""Skips the tests of a checkout where the package under test is an installed one alone."""

from __future__ import annotations

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
