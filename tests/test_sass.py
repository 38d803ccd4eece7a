"""Machine code of a kernel: where the disassembler is looked for, and what is counted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashmla_rtc import __main__ as program
from flashmla_rtc.inspection import inspect_kernel
from flashmla_rtc.rtc import CompilerMissing, nvrtc_version, sass

SCHEDULE = "mla_schedule"

try:
    nvrtc_version()
except CompilerMissing as error:
    pytest.skip(str(error), allow_module_level=True)


LISTING = """
mla_schedule:
.text.mla_schedule:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P2 BRA `(.L_x_0) ;
        /*0020*/             @!UP0 UIADD3 UR4, UR4, -0x1, URZ ;
        /*0030*/               @P0 HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0040*/              @UPT R2UR UR4, R2 ;
.L_x_0:
        /*10050*/                  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*10060*/                  BRA `(.L_x_0);
                                                         /* 0x000fea0003800000 */
"""


def test_instructions_are_counted_without_predicates_and_modifiers() -> None:
    assert sass.count_opcodes(LISTING) == {"LDC": 1, "BRA": 2, "UIADD3": 1, "HGMMA": 2, "R2UR": 1}


def stand_in(folder: Path, script: str) -> Path:
    tool = folder / sass.TOOL
    folder.mkdir(parents=True, exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a disassembler."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)


def test_without_a_disassembler_it_is_said_what_to_install(
    nowhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = inspect_kernel(SCHEDULE)
    words = r"needs NVIDIA's disassembler nvdisasm.*: pip install nvidia-cuda-nvdisasm\."
    with pytest.raises(sass.DisassemblerMissing, match=words):
        _ = kernel.sass
    with pytest.raises(sass.DisassemblerMissing, match=words):
        _ = kernel.opcodes
    assert "pip install nvidia-cuda-nvdisasm" in kernel._repr_html_()
    assert "pip install nvidia-cuda-nvdisasm" in str(kernel.diff(kernel))
    assert "pip install nvidia-cuda-nvdisasm" in kernel.diff(kernel)._repr_html_()
    assert program.main(["kernels", SCHEDULE, "--sass"]) == 1
    captured = capsys.readouterr()
    assert re.search(words, captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_it_is_found_in_a_toolkit(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    tool = stand_in(tmp_path / "cuda" / "bin", "")
    monkeypatch.setenv(variable, str(tmp_path / "cuda"))
    assert sass.find_disassembler() == str(tool)
    first = stand_in(tmp_path / "path", "")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert sass.find_disassembler() == str(first)


@pytest.mark.parametrize(
    "place", ["nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin"]
)
def test_it_is_found_in_python_packages(tmp_path: Path, place: str) -> None:
    tool = stand_in(tmp_path / place, "")
    if place.startswith("triton"):
        (tmp_path / "triton" / "__init__.py").write_text("raise SystemError('imported')")
    code = (
        f"import sys\nsys.path = [{str(tmp_path)!r}] + [p for p in sys.path if 'site-' not in p]\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('sass', {sass.__file__!r})\n"
        "sass = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(sass)\n"
        "print(sass.find_disassembler())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tool)


def test_a_disassembler_that_fails(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = stand_in(tmp_path, "echo 'fatal: no such architecture' >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RuntimeError, match=r"failed with exit status 3: fatal: no such arch"):
        sass.disassemble(inspect_kernel(SCHEDULE).cubin)
    assert str(tool)
