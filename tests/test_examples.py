"""The example scripts: each one runs here, or says in one sentence what it needs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = [script for script in SCRIPTS if script.stem != "dense_attention"]


def run(script: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs_or_says_what_it_needs(script: Path) -> None:
    result = run(script)
    if result.returncode == 0:
        assert "relative error" in result.stdout or "error=" in result.stdout
        return
    said = result.stderr.strip().splitlines()
    assert said, "the script failed without a word"
    assert said[-1].startswith("This example needs "), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "name, package",
    [
        ("numpy_reference", "numpy"),
        ("torch_first_release_api", "torch"),
        ("torch_newest_api", "torch"),
        ("jax_decode", "jax"),
        ("transformers_generate", "transformers"),
    ],
)
def test_examples_that_need_no_gpu_run_here(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    result = run(ROOT / "examples" / f"{name}.py")
    assert result.returncode == 0, result.stderr
    assert "relative error" in result.stdout


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert SCRIPTS
    for script in SCRIPTS:
        assert f"`{script.name}`" in listed
