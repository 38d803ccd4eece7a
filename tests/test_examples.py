"""The example scripts: each one runs here, or says in one sentence what it needs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = [
    script
    for script in SCRIPTS
    if script.stem not in ("dense_attention", "decode_problem", "run_notebooks")
]
LIBRARIES = ["torch", "cupy", "jax", "numpy"]


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
        ("decode_numpy", "numpy"),
        ("decode_torch", "torch"),
        ("torch_first_release_api", "torch"),
        ("torch_newest_api", "torch"),
        ("decode_jax", "jax"),
        ("transformers_generate", "transformers"),
    ],
)
def test_examples_that_need_no_gpu_run_here(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    result = run(ROOT / "examples" / f"{name}.py")
    assert result.returncode == 0, result.stderr
    assert "relative error" in result.stdout


def test_the_same_step_runs_in_every_library() -> None:
    """The same calls in the sources, and the same shapes and errors in what is printed."""
    calls, printed = {}, {}
    for library in LIBRARIES:
        script = ROOT / "examples" / f"decode_{library}.py"
        calls[library] = [
            ast.unparse(node).replace("step.", "")
            for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and "flashmla_rtc." in ast.unparse(node.func)
        ]
        result = run(script)
        if result.returncode == 0:
            layers = r"layer (\d): \w+ \(([\d, ]+)\) on \S+, relative error (\S+)"
            printed[library] = re.findall(layers, result.stdout)
    assert all(made == calls["numpy"] for made in calls.values())
    assert len(calls["numpy"]) == 2
    assert [line[:2] for line in printed["numpy"]] == [(str(i), "4, 1, 16, 512") for i in range(3)]
    for lines in printed.values():
        assert [line[:2] for line in lines] == [line[:2] for line in printed["numpy"]]
        assert all(1e-5 < float(error) < 4e-4 for *_, error in lines)  # of rounding to float16


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert SCRIPTS
    for script in [*SCRIPTS, *(ROOT / "examples").glob("*.ipynb")]:
        assert f"`{script.name}`" in listed
