"""The distributions, and what importing the package does and does not do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashmla_rtc
from flashmla_rtc import variants

pytestmark = pytest.mark.checkout
ROOT = Path(__file__).resolve().parents[1]
VERSION = flashmla_rtc.__version__


def python(code: str, *paths: Path, cwd: Path, **env: str) -> str:
    """What ``code`` prints in a fresh interpreter that finds ``paths`` first."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def kernels() -> dict[str, bytes]:
    """The CUDA sources of the checkout."""
    found = files_under(ROOT / "kernels")
    assert "mla_decode.cuh" in found
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from the sdist."""
    for tool in ("build", "hatchling"):
        if find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        cwd=folder,  # elsewhere, so that a folder called build cannot stand in for the tool
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Message:
    (folder,) = installed.glob("*.dist-info")
    return Parser().parsestr((folder / "METADATA").read_text())


def test_sdist_holds_the_repository(distributions: tuple[Path, Path]) -> None:
    """Every file that git knows, and none that it ignores: what CI unpacks to test the wheel."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no repository, or git is not installed")
    there = {name for name in said.stdout.split("\0") if name and (ROOT / name).exists()}
    with tarfile.open(distributions[0]) as archive:
        names = {member.name for member in archive.getmembers() if not member.isdir()}
    top = f"flashmla_rtc-{VERSION}"
    assert names == {f"{top}/{name}" for name in there | {"PKG-INFO"}}


def test_sdist_holds_what_is_needed_to_build_and_test(
    distributions: tuple[Path, Path], kernels: dict[str, bytes]
) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = set(archive.getnames())
    top = f"flashmla_rtc-{VERSION}"
    wanted = {f"kernels/{name}" for name in kernels}
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_package.py"}
    assert {f"{top}/{name}" for name in wanted} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_holds_the_kernels_inside_the_package(
    installed: Path, kernels: dict[str, bytes]
) -> None:
    assert files_under(installed / "flashmla_rtc" / "kernels") == kernels
    for name in ("py.typed", "__init__.pyi"):
        assert (installed / "flashmla_rtc" / name).exists()
    top = {path.name for path in installed.iterdir()}
    assert top == {"flashmla_rtc", f"flashmla_rtc-{VERSION}.dist-info"}


def test_wheel_holds_every_module(installed: Path) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "flashmla_rtc").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    there = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    assert here == there


def test_numpy_is_the_only_hard_dependency(metadata: Message) -> None:
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    needs = metadata.get_all("Requires-Dist") or []
    assert [need for need in needs if "extra ==" not in need] == ["numpy>=2.0"]
    extras = {"cu12", "cu13", "torch", "plot", "test", "test-integrations", "docs", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra") or [])
    # Which build of torch fits is the machine's to say, so no extra may pull one in.
    assert not [need for need in needs if re.match(r"torch\b", need)]


def test_no_extra_needs_a_newer_nvrtc_than_torch_pins(metadata: Message) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    oldest = {"nvidia-cuda-nvrtc": "13.0.48", "nvidia-cuda-nvrtc-cu12": "12.9.41"}
    seen = set()
    for need in metadata.get_all("Requires-Dist") or []:
        requirement = requirements.Requirement(need)
        if requirement.name in oldest:
            assert requirement.specifier.contains(oldest[requirement.name]), need
            seen.add(requirement.name)
    assert seen == set(oldest)


def test_installed_package_uses_its_own_kernels(installed: Path, tmp_path: Path) -> None:
    code = (
        "from flashmla_rtc import variants\n"
        "print(variants.kernels_dir()); print(variants.sources_digest())"
    )
    place, digest = python(code, installed, cwd=tmp_path).splitlines()
    assert Path(place) == installed / "flashmla_rtc" / "kernels"
    assert digest == variants.sources_digest(), "the wheel and the checkout differ"


def test_checkout_uses_the_kernels_beside_it(tmp_path: Path) -> None:
    code = "from flashmla_rtc import variants; print(variants.kernels_dir())"
    place = Path(python(code, ROOT, cwd=tmp_path).strip())
    assert place.resolve() == ROOT / "kernels"


def test_nothing_is_written_into_the_package(installed: Path, tmp_path: Path) -> None:
    before = files_under(installed)
    code = (
        "import numpy as np, flashmla_rtc\n"
        "out, lse = flashmla_rtc.flash_mla_with_kvcache(\n"
        "    np.ones((1, 1, 2, 576), np.float32), np.ones((1, 64, 1, 576), np.float32),\n"
        "    np.zeros((1, 1), np.int32), np.ones(1, np.int32), 512, None)\n"
        "assert (out == 1).all()\n"
        "print(flashmla_rtc.__file__)"
    )
    place = python(code, installed, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1").strip()
    assert Path(place).is_relative_to(installed)
    assert files_under(installed) == before
    assert not list(tmp_path.iterdir())


def test_import_loads_no_array_library_but_numpy_and_no_driver(tmp_path: Path) -> None:
    code = (
        "import sys, flashmla_rtc\n"
        "print([name for name in ('torch', 'cupy', 'jax', 'array_api_compat', 'ml_dtypes')\n"
        "       if name in sys.modules])\n"
        "print('libcuda.so' in open('/proc/self/maps').read())"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    libraries, driver = python(code, ROOT, cwd=tmp_path).splitlines()
    assert libraries == "[]"
    assert driver == "False", (
        "importing must not touch the driver, or programs cannot fork after it"
    )


def test_version_is_said_once(metadata: Message) -> None:
    assert VERSION in (ROOT / "CHANGELOG.md").read_text()
    others = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "flashmla_rtc").rglob("*.py")
        if path.name != "_version.py" and re.search(r"__version__\s*=\s*[\"']", path.read_text())
    ]
    assert not others
    assert metadata["Version"] == VERSION


def test_kernels_command_reports_the_digest_of_the_sources(tmp_path: Path) -> None:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "flashmla_rtc", "kernels", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["digest"] == variants.sources_digest()
    assert {kernel["name"] for kernel in report["kernels"]} == {
        variant.name for variant in variants.default_variants()
    }
    assert all(kernel["spill_bytes"] == 0 for kernel in report["kernels"])
