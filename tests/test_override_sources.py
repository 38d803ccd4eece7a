"""Edited CUDA in place of the package's: what is taken, what is compiled, and what comes back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from edited_sources import FILE, SCHEDULE, commented, in_use, replaced

import flashmla_rtc
from flashmla_rtc import edits, sm90, variants
from flashmla_rtc.overrides import kernel_sources, override_sources
from flashmla_rtc.rtc import CompileError

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("package_as_before")


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
        ("#pragma once\n", ValueError, 'but it is a text of 13 .* meant: {"mla_decode.cuh": text}'),
        ("x = y; " * 1000, ValueError, r'a text of 7,000 .* meant: {"mla_decode\.cuh": text}'),
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


@pytest.mark.parametrize("kernels", [SCHEDULE, "mla", 3])
def test_kernels_that_are_no_list(kernels: Any) -> None:
    words = re.escape(f'such as ["mla_schedule"], but it is {kernels!r}.')
    with pytest.raises(TypeError, match=words):
        override_sources(commented("one"), kernels=kernels)


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


def test_includes_are_found() -> None:
    text = '#include "a.cuh"\n  # include  "b/c.cuh" // why\n// #include "d.cuh"\n#include <e>\n'
    assert edits.included_in(text) == ["a.cuh", "b/c.cuh"]
