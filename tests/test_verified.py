"""The GPU kernels were tested as they are: the records of the GPU runs belong to these sources.

Machines without a Hopper GPU can't run ``tests/gpu``; here they see that someone did, after the
last change of the kernels and of the Python that launches them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashmla_rtc import variants

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"
RUN = "Run `python -m pytest tests/gpu` on a Hopper GPU and commit tests/gpu/verified.json."


def pytest_run(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [path, str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "FLASHMLA_RTC_COMPILE": "lazy"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def verified() -> dict[str, Any]:
    """The record of the last full green run."""
    path = GPU_TESTS / "verified.json"
    assert path.is_file(), f"{path.name} is missing. {RUN}"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_the_gpu_tests_passed_with_these_sources(verified: dict[str, Any]) -> None:
    assert verified["digest"] == variants.sources_digest(), (
        f"The sources have changed since the GPU tests passed on {verified['date']}. {RUN}"
    )


def test_the_record_says_where(verified: dict[str, Any]) -> None:
    for key in ("device", "driver", "nvrtc", "torch", "date"):
        assert isinstance(verified[key], str)
        assert verified[key]


def test_as_many_gpu_tests_passed_as_there_are_functions(verified: dict[str, Any]) -> None:
    functions = sum(
        isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for path in GPU_TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    assert functions > 0
    assert verified["passed"] >= functions - verified["skipped"], RUN
    assert verified["skipped"] == len(verified["skipped_tests"])


@pytest.mark.skipif(find_spec("torch") is None, reason="collecting the GPU tests needs torch")
def test_every_gpu_test_that_is_there_was_run(verified: dict[str, Any]) -> None:
    result = pytest_run("tests/gpu", "--collect-only", cwd=ROOT)
    assert result.returncode == 0, result.stdout
    collected = sum(line.startswith("tests/gpu/") for line in result.stdout.splitlines())
    assert verified["passed"] + verified["skipped"] == collected, RUN


def older(name: str, notes: str, kernels: str) -> str | None:
    """The digest of older sources with which the notes say that these results were measured.

    Those of the H100 may be older in the Python alone, so the notes have to name the digest of the
    kernels too, and it has to be that of today's, ``kernels``.
    """
    place = (
        rf"`benchmarks/results/{re.escape(name)}`[^)]*digest `([0-9a-f]{{8,}})`"
        r"(?: of the kernels `([0-9a-f]{8,})`)?"
    )
    said = re.search(place, " ".join(notes.split()))
    if said is None or (said[2] and not kernels.startswith(said[2])):
        return None
    return said[1] if said[2] or not ("h100" in name or "timeline" in name) else None


def test_only_results_that_the_notes_say_are_older_may_be() -> None:
    notes = (
        "(`benchmarks/results/h200.json`, measured with older sources,\ndigest `0123abcd`), "
        "(`benchmarks/results/h100.json`, digest `89abcdef`), (`benchmarks/results/h20.json`), "
        "(`benchmarks/results/h100-2.json`, digest `89abcdef` of the kernels `0000abcd`), "
        "(`benchmarks/results/timeline-1.json`, digest `89abcdef` of the kernels `0000abce`)"
    )
    names = ("h200.json", "h100.json", "h20.json", "h100-2.json", "timeline-1.json", "h800.json")
    expected = ["0123abcd", None, None, "89abcdef", None, None]
    assert [older(name, notes, "0000abcdef") for name in names] == expected


def test_benchmark_figures_were_taken_with_these_sources() -> None:
    """Or with older ones, where docs/performance.md says so."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files, "benchmarks/results holds no figures."
    notes = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for path in files:
        digest = json.loads(path.read_text(encoding="utf-8"))["digest"]
        said = older(path.name, notes, variants.kernels_digest())
        if said is not None:
            assert digest.startswith(said)
            assert digest != variants.sources_digest()
            continue
        assert digest == variants.sources_digest(), (
            f"{path.name} was measured with other sources. Run "
            f"`python -m flashmla_rtc bench --json benchmarks/results/{path.name}` on that GPU."
        )


# -- when the record is written -------------------------------------------------------------------

TORCH = """
__version__ = "0.0"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_capability = staticmethod(lambda: (9, 0))
    get_device_name = staticmethod(lambda: "a Hopper GPU that is not there")
"""
TESTS = {
    "test_first.py": "def test_a(): pass\ndef test_b(): pass\n",
    "test_second.py": (
        "import pytest\ndef test_c(): pass\n"
        "@pytest.mark.allowed_skip\ndef test_d(): pytest.skip('one GPU')\n"
    ),
}
FAILS = {"test_third.py": "def test_e(): assert False\n"}
SKIPS = {"test_third.py": "import pytest\ndef test_e(): pytest.skip('who knows')\n"}
FAILS_AS_EXPECTED = {
    "test_third.py": "import pytest\n@pytest.mark.xfail\ndef test_e(): assert False\n"
}
FAILS_AFTERWARDS = """
import pytest
@pytest.fixture
def fixture():
    yield
    assert False
def test_e(fixture): pass
"""
TEARDOWN_FAILS = {"test_third.py": FAILS_AFTERWARDS}

RUNS: dict[str, tuple[dict[str, str], list[str], bool]] = {
    "the whole folder": ({}, ["gpu"], True),
    "a folder above": ({}, ["."], True),
    "one file": ({}, ["gpu/test_first.py"], False),
    "every file by name": ({}, ["gpu/test_first.py", "gpu/test_second.py"], False),
    "a choice by keyword": ({}, ["gpu", "-k", "test"], False),
    "a test left out": ({}, ["gpu", "--deselect", "gpu/test_first.py::test_a"], False),
    "a file left out": ({}, ["gpu", "--ignore", "gpu/test_first.py"], False),
    "collecting only": ({}, ["gpu", "--collect-only"], False),
    "a failure": (FAILS, ["gpu"], False),
    "a failure after others, stopped": (FAILS, ["gpu", "-x"], False),
    "a failing teardown": (TEARDOWN_FAILS, ["gpu"], False),
    "a skip without leave": (SKIPS, ["gpu"], False),
    "an expected failure": (FAILS_AS_EXPECTED, ["gpu"], False),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any] | None]:
    """What each of ``RUNS`` leaves, with a stand-in for torch and a handful of tests."""

    # Not in the threads: several that ask pytest for a folder at once may go without.
    places = {name: tmp_path_factory.mktemp("run") for name in RUNS}

    def run(name: str) -> dict[str, Any] | None:
        extra, arguments, _ = RUNS[name]
        place = places[name]
        (place / "torch.py").write_text(TORCH, encoding="utf-8")
        (place / "gpu").mkdir()
        files = {**TESTS, **extra}
        for helper in ("conftest.py", "verification.py"):
            files[helper] = (GPU_TESTS / helper).read_text(encoding="utf-8")
        for file, text in files.items():
            (place / "gpu" / file).write_text(text, encoding="utf-8")
        result = pytest_run(*arguments, cwd=place, path=str(place))
        assert "passed" in result.stdout or "collected" in result.stdout, result.stdout
        record = place / "gpu" / "verified.json"
        return json.loads(record.read_text(encoding="utf-8")) if record.exists() else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_only_a_full_green_run_is_recorded(
    name: str, written: dict[str, dict[str, Any] | None]
) -> None:
    record = written[name]
    assert (record is not None) == RUNS[name][2]
    if record is not None:
        assert record["digest"] == variants.sources_digest()
        assert record["device"] == "a Hopper GPU that is not there"
        assert (record["passed"], record["skipped"]) == (3, 1)
        (reason,) = record["skipped_tests"].values()
        assert "one GPU" in reason
