"""Edits of the planner's kernel for tests, and that none is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashmla_rtc import overrides, variants
from flashmla_rtc.overrides import kernel_sources

FILE = "mla_schedule.cuh"
SCHEDULE = "mla_schedule"


@contextmanager
def nothing_stays() -> Iterator[None]:
    digest = variants.sources_digest()
    yield
    assert variants.in_use is None
    assert overrides._changes == []
    assert variants.sources_digest() == digest


def commented(text: str, file: str = FILE) -> dict[str, str]:
    """An edit that changes nothing that runs."""
    return {file: f"{kernel_sources()[file]}\n// {text}\n"}


def replaced(old: str, new: str, file: str = FILE) -> dict[str, str]:
    source = kernel_sources()[file]
    assert source.count(old) == 1
    return {file: source.replace(old, new)}


def in_use(file: str = FILE) -> str:
    """The text of ``file`` that kernels are compiled from now."""
    return variants.by_name(SCHEDULE).source().headers[file]
