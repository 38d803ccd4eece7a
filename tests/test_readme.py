"""What the README's examples compute is right, and its commands are those that CI runs.

That its Python runs and its links lead somewhere is tested with the other pages'.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block.code for block in pages.python_blocks(ROOT / "README.md")]


def block_with(text: str) -> str:
    found = [block for block in BLOCKS if text in block]
    assert len(found) == 1, f"{len(found)} blocks of the README contain {text!r}"
    return found[0]


def command(name: str) -> str:
    """The README's command ``name``, as .ci/run takes it: the bash block after its mark."""
    found = re.findall(
        rf"^<!-- command: {name} -->\n```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )
    assert len(found) == 1
    return found[0]


def test_torch_example() -> None:
    torch = pytest.importorskip("torch")
    names: dict[str, Any] = {}
    exec(compile(block_with("import torch"), "README.md (torch)", "exec"), names)
    out, lse = names["out"], names["lse"]
    assert out.shape == (4, 1, 16, 512)
    assert out.dtype is torch.bfloat16
    assert lse.shape == (4, 16, 1)
    assert torch.isfinite(out).all()
    # The third request has one key, so its output is that key's value.
    value = names["k_cache"][names["block_table"][2, 0], 0, 0, :512]
    assert torch.equal(out[2, 0], value.expand(16, 512))


def test_cupy_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU as it stands; elsewhere NumPy, which has the same names, stands in for CuPy."""
    source = block_with("import cupy")
    try:
        import cupy

        has_gpu = cupy.is_available()
    except ImportError:
        has_gpu = False
    if not has_gpu:
        source = source.replace("import cupy", "import numpy as cupy")
    names: dict[str, Any] = {}
    exec(compile(source, "README.md (CuPy)", "exec"), names)
    host = [
        array.get() if has_gpu else array
        for array in (names["out"], names["k_cache"], names["block_table"])
    ]
    out, k_cache, block_table = host
    assert out.shape == (4, 1, 16, 512)
    assert out.dtype == np.float16
    value = k_cache[block_table[2, 0], 0, 0, :512]
    np.testing.assert_array_equal(out[2, 0], np.broadcast_to(value, (16, 512)))


def test_drop_in_import() -> None:
    names: dict[str, Any] = {}
    exec(compile(block_with("as flash_mla"), "README.md (drop-in)", "exec"), names)
    for name in ("flash_mla_with_kvcache", "get_mla_metadata"):
        assert callable(getattr(names["flash_mla"], name))


def test_commands_do_not_install_torch() -> None:
    for name in ("demo", "tests"):
        assert "torch" not in command(name)
    assert "python -m flashmla_rtc demo" in command("demo")
    assert "python -m pytest" in command("tests")


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for name in ("demo", "tests"):
        assert f"run_readme_command {name}" in script
    assert "-m pytest" not in script, "CI must take the clone's test command from the README"


@pytest.mark.checkout
def test_environment_variables_are_the_ones_in_the_code() -> None:
    pattern = r"FLASHMLA_RTC_[A-Z_]+"
    used = {
        name
        for path in (ROOT / "flashmla_rtc").rglob("*.py")
        for name in re.findall(pattern, path.read_text())
    }
    assert set(re.findall(pattern, README)) == used


def test_figures_are_those_of_the_results() -> None:
    """README's table is written by benchmarks/readme_table.py and by nobody else."""
    script = ROOT / "benchmarks" / "readme_table.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
