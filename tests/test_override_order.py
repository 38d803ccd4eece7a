"""Overrides are a stack: how they are entered, nested and undone, and in which order alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from edited_sources import FILE, SCHEDULE, commented, in_use, replaced

from flashmla_rtc import overrides, sm90, variants
from flashmla_rtc.overrides import override_sources

pytestmark = pytest.mark.usefixtures("package_as_before")


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


def test_the_last_in_is_the_first_out() -> None:
    other = "ptx/sync.cuh"
    original = in_use()
    outer = override_sources(commented("outer"), kernels=[])
    inner = override_sources(commented("inner", other), kernels=[])
    assert inner.changed == (other,)
    before = sm90.replacements
    with pytest.raises(RuntimeError, match=r"not the newest in force: undo that of ptx/sync\.cuh"):
        outer.undo()
    assert outer.active
    assert sm90.replacements == before
    assert in_use().endswith("// outer\n")
    assert in_use(other).endswith("// inner\n")
    inner.undo()
    assert in_use(other) == variants._headers()[other]
    assert in_use().endswith("// outer\n")
    outer.undo()
    assert in_use() == original


def test_the_same_text_twice_stays_until_both_are_undone() -> None:
    """The second changes nothing, and yet what it was asked for is in use while it is in force."""
    edit = commented("twice")
    first = override_sources(edit, kernels=[])
    with pytest.warns(RuntimeWarning, match="sources changes nothing"):
        second = override_sources(edit, kernels=[])
    assert second.changed == ()
    with pytest.raises(RuntimeError, match="undo the newest, which changes nothing, first"):
        first.undo()
    assert in_use() == edit[FILE]
    second.undo()
    assert in_use() == edit[FILE]
    first.undo()


def test_a_header_stays_as_long_as_what_includes_it() -> None:
    """So what is in use after an undo was compiled when it came in use."""
    edit = replaced('#include "mla_plan.cuh"', '#include "mla_plan.cuh"\n#include "new.cuh"')
    outer = override_sources({**edit, "new.cuh": "#pragma once\n"}, kernels=[SCHEDULE])
    inner = override_sources(commented("includes it"), kernels=[SCHEDULE])
    with pytest.raises(RuntimeError, match=f"undo that of {FILE} first"):
        outer.undo()
    variants.builder.obtain(variants.by_name(SCHEDULE).source())
    inner.undo()
    variants.builder.obtain(variants.by_name(SCHEDULE).source())
    outer.undo()


def test_edits_of_the_same_file_in_blocks() -> None:
    with override_sources(commented("first"), kernels=[]):
        with override_sources(commented("second"), kernels=[]):
            assert in_use().endswith("// first\n\n// second\n")
        assert in_use().endswith("// first\n")


def test_a_block_left_before_what_was_made_in_it() -> None:
    with pytest.raises(RuntimeError, match="not the newest in force"):  # noqa: SIM117
        with override_sources(commented("outer"), kernels=[]) as outer:
            inner = override_sources(commented("inner"), kernels=[])
    assert outer.active
    assert inner.active
    inner.undo()
    outer.undo()


def test_an_exception_takes_back_what_was_made_in_the_block_too() -> None:
    original = in_use()
    with pytest.raises(KeyError), override_sources(commented("outer"), kernels=[]) as outer:
        inner = override_sources(commented("inner"), kernels=[])
        raise KeyError
    assert not outer.active
    assert not inner.active
    assert in_use() == original
    inner.undo()


def test_an_exception_takes_back_what_was_made_while_a_variant_stood_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sm90, "launcher", lambda *_: SimpleNamespace(kernel=None))
    other = variants.by_name(SCHEDULE).but("other")
    outer = override_sources(commented("outer"), kernels=[])
    with pytest.raises(KeyError), overrides.standing_in(other, SCHEDULE, 0):
        override_sources(commented("inner"), kernels=[])
        with pytest.raises(RuntimeError, match="not the newest"):
            outer.undo()
        raise KeyError
    assert in_use().endswith("// outer\n")
    outer.undo()


def test_a_variant_standing_in_is_named() -> None:
    outer = override_sources(commented("outer"), kernels=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90, "launcher", lambda *_: SimpleNamespace(kernel=None))
        other = variants.by_name(SCHEDULE).but("other")
        words = f"undo that of {SCHEDULE} first"
        with overrides.standing_in(other, SCHEDULE, 0), pytest.raises(RuntimeError, match=words):
            outer.undo()
    outer.undo()


def test_one_block_an_override() -> None:
    with override_sources(commented("one"), kernels=[]) as override:
        with pytest.raises(RuntimeError, match="A with block holds this override"), override:
            pytest.fail("it was entered")
        assert override.active
        assert in_use().endswith("// one\n")
    with pytest.raises(RuntimeError, match="This override was undone"), override:
        pass


def test_undone_inside_its_block() -> None:
    with override_sources(commented("one"), kernels=[]) as override:
        override.undo()
        assert in_use() == variants._headers()[FILE]
