"""Skips the folder, with one reason, where there is no Hopper GPU; records a full green run.

``pytest tests/gpu`` on a Hopper GPU writes ``verified.json`` when every test of the folder ran and
passed. Nothing else writes it. ``tests/test_verified.py`` compares it with the sources.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from verification import Ledger, why_not

# JAX would take three quarters of the GPU's memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).resolve().parent
REASON = why_not()
LEDGER = pytest.StashKey[Ledger]()

# Without torch the modules can't be imported, not even to be skipped.
collect_ignore_glob = ["test_*.py"] if REASON and "torch is not installed" in REASON else []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "allowed_skip: a full run may skip this test, such as one that needs two GPUs"
    )
    config.stash[LEDGER] = Ledger(HERE)


def _here(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None:
        for item in filter(_here, items):
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in filter(_here, items):
        item.config.stash[LEDGER].deselected += 1


def pytest_collection_finish(session: pytest.Session) -> None:
    ledger = session.config.stash[LEDGER]
    ledger.collected = {item.nodeid: item.path for item in session.items if _here(item)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.config.stash[LEDGER].note(report)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    given = [config.invocation_params.dir / argument for argument in config.args]
    workers = config.getoption("numprocesses", None) or hasattr(config, "workerinput")
    if exitstatus == 0 and REASON is None and not config.option.collectonly and not workers:
        narrowed = bool(config.option.keyword or config.option.markexpr)
        config.stash[LEDGER].write_if_complete(given, narrowed)


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture
def jax_on_gpu() -> Iterator[Any]:
    jax = pytest.importorskip("jax")
    pytest.importorskip("cupy")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU backend here: {error}")
    with jax.default_device(device):
        yield jax
