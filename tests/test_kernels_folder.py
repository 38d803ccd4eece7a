"""``FLASHMLA_RTC_KERNELS``: edited CUDA in place of the package's from a program's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edited_sources import FILE, SCHEDULE, commented

from flashmla_rtc import variants
from flashmla_rtc.rtc import CompilerMissing, nvrtc_version

ROOT = Path(__file__).resolve().parents[1]

try:
    nvrtc_version()
except CompilerMissing as error:
    pytest.skip(str(error), allow_module_level=True)


def run(code: str, folder: object, *arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "flashmla_rtc"]
    return subprocess.run(
        [*command, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FLASHMLA_RTC_COMPILE": "lazy",
            "FLASHMLA_RTC_KERNELS": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_text(commented("from a folder")[FILE])
    return tmp_path


CODE = """
from flashmla_rtc import kernel_sources, override_sources, variants
print(kernel_sources()["mla_schedule.cuh"].splitlines()[-1])
print(variants.sources_digest())
with override_sources({"mla_plan.cuh": kernel_sources()["mla_plan.cuh"] + "//"}) as override:
    print(override.changed, kernel_sources()["mla_schedule.cuh"].splitlines()[-1])
"""


def test_the_folder_of_the_environment_is_used(folder: Path) -> None:
    result = run(CODE, folder)
    assert result.returncode == 0, result.stderr
    line, digest, nested = result.stdout.splitlines()
    assert line == "// from a folder"
    assert digest != variants.sources_digest()
    assert nested == "('mla_plan.cuh',) // from a folder"
    assert run(CODE, "").stdout.splitlines()[1] == variants.sources_digest()
    assert run(CODE, ROOT / "kernels").stdout.splitlines()[1] == variants.sources_digest()


def test_the_folder_of_the_environment_is_what_the_command_line_compiles(folder: Path) -> None:
    result = run("", folder, "kernels", SCHEDULE, "--source")
    assert result.returncode == 0, result.stderr
    assert "// from a folder" in result.stdout


def test_doctor_tells_that_sources_are_edited(folder: Path) -> None:
    told = run("", folder, "doctor", "--no-try").stdout
    assert "EDITED by FLASHMLA_RTC_KERNELS" in told
    assert f": {FILE}\n" in told
    assert f"FLASHMLA_RTC_KERNELS={folder}" in told
    assert "unset it for those that were tested" in told
    same = run("", ROOT / "kernels", "doctor", "--no-try").stdout
    assert "FLASHMLA_RTC_KERNELS is set and changes nothing" in same
    assert "EDITED" not in same
    plain = run("", "", "doctor", "--no-try").stdout
    assert f"{variants.kernels_dir()}, digest {variants.sources_digest()[:12]}\n" in plain


def test_a_bad_folder_in_the_environment_waits_for_the_first_kernel(tmp_path: Path) -> None:
    code = """
import flashmla_rtc
try:
    flashmla_rtc.inspect_kernel("mla_schedule")
except ValueError as error:
    print(error)
"""
    for place, words in (
        (tmp_path / "nowhere", "is not one."),
        (tmp_path, "FLASHMLA_RTC_KERNELS replaces nothing: it holds no .cuh file"),
    ):
        result = run(code, place, FLASHMLA_RTC_COMPILE="import")
        assert (result.returncode, result.stderr) == (0, "")
        assert words in result.stdout
        told = run("", place, "kernels")
        assert told.returncode == 2
        assert words in told.stderr
