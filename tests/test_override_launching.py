"""Edited kernels as they are loaded and launched, on a device that is not there."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from edited_sources import SCHEDULE, commented, replaced

from flashmla_rtc import overrides, sm90, variants, workspace
from flashmla_rtc.overrides import kernel_sources, override_sources
from flashmla_rtc.rtc import CompileError, kernel

pytestmark = pytest.mark.usefixtures("package_as_before")


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
    with pytest.warns(RuntimeWarning, match="Did an edit find nothing to replace"):
        override = override_sources(dict(kernel_sources()))
    with override:
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
