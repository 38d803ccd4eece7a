"""Edited CUDA in place of the package's: what is compiled and launched, and what comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flashmla_rtc
from flashmla_rtc import edits, overrides, sm90, variants, workspace
from flashmla_rtc.overrides import kernel_sources, override_sources
from flashmla_rtc.rtc import CompileError, CompilerMissing, kernel, nvrtc_version

ROOT = Path(__file__).resolve().parents[1]
FILE = "mla_schedule.cuh"
SCHEDULE = "mla_schedule"

try:
    nvrtc_version()
except CompilerMissing as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
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


def test_inside_the_edit_is_in_use_and_outside_the_original() -> None:
    original, digest = in_use(), variants.sources_digest()
    with override_sources(commented("one"), kernels=[SCHEDULE]) as override:
        assert in_use().endswith("// one\n")
        assert variants.sources_digest() != digest
        assert kernel_sources()[FILE] == in_use()
        assert override.changed == (FILE,)
        assert override.active
        others = {name: text for name, text in kernel_sources().items() if name != FILE}
        assert others == {n: t for n, t in variants._headers().items() if n != FILE}
    assert not override.active
    assert in_use() == original
    assert variants.sources_digest() == digest


def test_an_error_inside_restores_too() -> None:
    original = in_use()
    with pytest.raises(KeyError), override_sources(commented("one"), kernels=[]):
        raise KeyError
    assert in_use() == original


def test_by_hand() -> None:
    original = in_use()
    override = override_sources(commented("one"), kernels=[])
    assert in_use() != original
    assert repr(override) == f"<SourceOverride of {FILE}, in force>"
    override.undo()
    assert in_use() == original
    override.undo()
    assert repr(override) == f"<SourceOverride of {FILE}, undone>"
    with pytest.raises(RuntimeError, match="This override was undone"), override:
        pass


def test_nested_and_undone_in_any_order() -> None:
    other = "ptx/sync.cuh"
    outer = override_sources(commented("outer"), kernels=[])
    inner = override_sources(commented("inner", other), kernels=[])
    assert in_use().endswith("// outer\n")
    assert in_use(other).endswith("// inner\n")
    assert inner.changed == (other,)
    outer.undo()
    assert in_use() == variants._headers()[FILE]
    assert in_use(other).endswith("// inner\n")
    inner.undo()
    first = override_sources(commented("first"), kernels=[])
    with override_sources(commented("second"), kernels=[]):
        assert in_use().endswith("// first\n\n// second\n")
    assert in_use().endswith("// first\n")
    first.undo()


def test_a_folder_with_some_files_or_all(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / FILE).write_text(commented("few")[FILE])
    shutil.copytree(ROOT / "kernels", tmp_path / "all")
    (tmp_path / "all" / "ptx" / "sync.cuh").write_text(
        commented("all", "ptx/sync.cuh")["ptx/sync.cuh"]
    )
    (tmp_path / "all" / "NOTES.md").write_text("no source")
    with override_sources(tmp_path / "few", kernels=[]) as override:
        assert override.changed == (FILE,)
        assert in_use().endswith("// few\n")
    with override_sources(str(tmp_path / "all"), kernels=[]) as override:
        assert override.changed == ("ptx/sync.cuh",)
        assert in_use("ptx/sync.cuh").endswith("// all\n")


def test_a_new_header(tmp_path: Path) -> None:
    edit = replaced('#include "mla_plan.cuh"', '#include "mla_plan.cuh"\n#include "own/new.cuh"')
    edit["own/new.cuh"] = "#pragma once\n__device__ int new_variable;\n"
    with override_sources(edit, kernels=[SCHEDULE]) as override:
        assert override.changed == (FILE, "own/new.cuh")
        built = variants.builder.obtain(variants.by_name(SCHEDULE).source())
        assert b"new_variable" in built.cubin
    assert "own/new.cuh" not in kernel_sources()


@pytest.mark.parametrize(
    "sources, error, words",
    [
        (3, TypeError, "sources must be a folder or a mapping .* but it is of type int"),
        ({FILE: b"text"}, TypeError, "maps 'mla_schedule.cuh' to an object of type bytes"),
        ({}, ValueError, "sources replaces nothing: it holds no .cuh file"),
        ({"a.cuh": ""}, ValueError, "sources replaces nothing: it holds a.cuh, and the package's"),
        ({FILE: "", "mla_decod.cuh": ""}, ValueError, "did you mean 'mla_decode.cuh'"),
        ("/no/such/folder", ValueError, "'/no/such/folder' is not one"),
    ],
)
def test_what_is_no_edit(sources: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        override_sources(sources)


def test_a_folder_above_the_sources_replaces_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    with pytest.raises(ValueError, match="sources replaces nothing: it holds kernels/mla_decode"):
        override_sources(tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"which can't be read: 'utf-8' codec"):
        override_sources(tmp_path)


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="There is no kernel called 'mla'"):
        override_sources(commented("one"), kernels=["mla"])


# -- compiling -------------------------------------------------------------------------------------


def test_a_broken_edit_shows_its_line_and_changes_nothing() -> None:
    edit = replaced("    wait_for_previous_kernel();", "    wait_for_previous_kernel()")
    line = edit[FILE][: edit[FILE].index("wait_for_previous_kernel()")].count("\n") + 1
    before = sm90.replacements
    with pytest.raises(CompileError, match='expected a ";"') as caught:
        override_sources(edit, kernels=[SCHEDULE])
    text = str(caught.value)
    assert f"{FILE}({line + 1}): error" in text
    assert f"\n> {line + 1} |     launch_next_kernel();\n" in text
    assert f"\n  {line} |     wait_for_previous_kernel()\n" in text
    assert sm90.replacements == before


def test_by_default_the_default_kernels_are_compiled_and_lazily_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        variants.builder,
        "obtain_many",
        lambda sources: asked.append([source.name for source in sources]),
    )
    monkeypatch.delenv("FLASHMLA_RTC_COMPILE", raising=False)
    with override_sources(commented("one")):
        pass
    monkeypatch.setenv("FLASHMLA_RTC_COMPILE", "lazy")
    with override_sources(commented("one")), override_sources(commented("two"), kernels=[SCHEDULE]):
        pass
    assert asked == [[v.name for v in variants.default_variants()], [], [SCHEDULE]]


SPILLS = ("__launch_bounds__(THREADS, 1)", "__launch_bounds__(THREADS, 2)")


def test_a_kernel_that_spills_is_refused_unless_it_may(tmp_path: Path) -> None:
    """Two thread blocks of 1024 threads an SM leave 32 registers."""
    edit = replaced(*SPILLS)
    with pytest.raises(CompileError, match="it spills registers"):
        override_sources(edit, kernels=[SCHEDULE])
    with override_sources(edit, kernels=[SCHEDULE], may_spill=True):
        shown = flashmla_rtc.inspect_kernel(SCHEDULE)
        assert shown.spill_bytes > 0
        assert shown.registers == 32
    # What may spill is not found by those who would refuse it, neither in memory nor on disk.
    with pytest.raises(CompileError, match="it spills registers"):
        override_sources(edit, kernels=[SCHEDULE])


# -- launching -------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is loaded on a device that is not there."""
    made: list[Any] = []

    def load(built: Any, device: int, dynamic: int) -> Any:
        made.append(SimpleNamespace(name=built.name, cubin=built.cubin, device=device))
        return made[-1]

    def launcher(one: Any, *_: Any) -> Any:
        return SimpleNamespace(kernel=one)

    monkeypatch.setattr(kernel, "LoadedKernel", load)
    monkeypatch.setattr(sm90, "Launcher", launcher)
    monkeypatch.setattr(sm90, "_check_shared_memory", lambda device: None)
    monkeypatch.setattr(sm90, "_launchers", {})
    monkeypatch.setattr(sm90, "_tables", {})
    return made


def test_what_is_launched(loaded: list[Any]) -> None:
    edit = replaced("    launch_next_kernel();\n", "")
    original = sm90.launcher(SCHEDULE, 0)
    before = sm90.replacements
    with override_sources(edit, kernels=[SCHEDULE]):
        inside = sm90.launcher(SCHEDULE, 0)
        assert inside.kernel.cubin != original.kernel.cubin
        assert sm90.launcher(SCHEDULE, 0) is inside
        assert sm90.replacements > before  # notes of earlier calls are out of date
        during = sm90.replacements
    assert sm90.replacements > during
    assert sm90.launcher(SCHEDULE, 0) is original
    with override_sources(edit, kernels=[SCHEDULE]):
        assert sm90.launcher(SCHEDULE, 0) is inside  # loaded once, however often it is entered
    assert len(loaded) == 2


def test_the_same_text_is_the_original(loaded: list[Any]) -> None:
    original = sm90.launcher(SCHEDULE, 0)
    with override_sources(dict(kernel_sources())) as override:
        assert override.changed == ()
        assert sm90.launcher(SCHEDULE, 0) is original


def test_other_threads_run_the_edited_kernel(loaded: list[Any]) -> None:
    seen: list[Any] = []
    with override_sources(commented("one"), kernels=[SCHEDULE]):
        thread = threading.Thread(target=lambda: seen.append(sm90.launcher(SCHEDULE, 0)))
        thread.start()
        thread.join()
        assert seen[0] is sm90.launcher(SCHEDULE, 0)
    assert seen[0] is not sm90.launcher(SCHEDULE, 0)


def test_standing_in(loaded: list[Any]) -> None:
    """Another variant under the name of the first, on top of an override."""
    original = sm90.launcher(SCHEDULE, 0)
    other = variants.by_name(SCHEDULE).but("mla_schedule_small", MAX_PARTS=128)
    before = sm90.replacements
    with overrides.standing_in(other, SCHEDULE, 0) as one:
        assert one.name == "mla_schedule_small"
        assert sm90.launcher(SCHEDULE, 0).kernel is one
        assert sm90.replacements > before
        with override_sources(commented("one"), kernels=[]):
            assert sm90.launcher(SCHEDULE, 0).kernel.name == "mla_schedule_small"
        assert sm90.launcher(SCHEDULE, 0).kernel is one
    assert sm90.launcher(SCHEDULE, 0) is original


def test_standing_in_for_a_kernel_that_does_not_compile(loaded: list[Any]) -> None:
    original = sm90.launcher(SCHEDULE, 0)
    broken = variants.by_name(SCHEDULE).but("broken", SCHEDULE_THREADS=-1)
    with pytest.raises(CompileError), overrides.standing_in(broken, SCHEDULE, 0):
        pytest.fail("it was entered")
    assert sm90.launcher(SCHEDULE, 0) is original


def test_edited_kernels_have_workspaces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, lasting = (workspace.Workspace(n, 1, owner) for n, owner in ((1, object()), (2, None)))
    edited, edited_lasting = (
        workspace.Workspace(n, 1, owner) for n, owner in ((3, object()), (4, None))
    )
    kept: dict[Any, workspace.Workspace] = {"torch": torchs, "other": lasting}
    monkeypatch.setattr(workspace, "_kept", kept)
    with override_sources(commented("one"), kernels=[]):
        assert kept == {}
        kept.update({"torch": edited, "other": edited_lasting})
        with override_sources(commented("two"), kernels=[]):
            assert kept == {}
        assert kept == {"other": edited_lasting}  # torch has its memory back
    assert kept == {"torch": torchs, "other": lasting}
    other = variants.by_name(SCHEDULE).but("other")
    monkeypatch.setattr(sm90, "launcher", lambda *_: SimpleNamespace(kernel=None))
    with overrides.standing_in(other, SCHEDULE, 0):  # the package's own code
        assert kept == {"torch": torchs, "other": lasting}


# -- FLASHMLA_RTC_KERNELS --------------------------------------------------------------------------


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
    assert f"{ROOT / 'kernels'}, digest {variants.sources_digest()[:12]}\n" in plain


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


def test_includes_are_found() -> None:
    text = '#include "a.cuh"\n  # include  "b/c.cuh" // why\n// #include "d.cuh"\n#include <e>\n'
    assert edits.included_in(text) == ["a.cuh", "b/c.cuh"]
