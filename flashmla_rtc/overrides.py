"""Kernels of edited sources in place of the package's, for a while: ``override_sources``, and
``standing_in`` for tools that look into one kernel.

Both put a change on one stack. The sources in use are the package's with all changes of the stack,
each made to those below it. So only the newest is taken off, and what is in use then was before.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from . import edits, sm90, variants, workspace
from .edits import Edits
from .rtc.build import compile_mode
from .rtc.kernel import LoadedKernel
from .variants import Sources, Variant


@dataclass(frozen=True, eq=False)
class _Change:
    headers: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, Variant] = field(default_factory=dict)
    may_spill: bool = False


_lock = threading.RLock()
_changes: list[_Change] = []
# By content: the same change made again finds what was loaded for it.
_known: dict[Any, Sources] = {}
# Where calls leave pieces of cut requests, for the sources that are not in use.
_workspaces: dict[Any, dict[Any, workspace.Workspace]] = {}
_workspace_of: Any = None


def override_sources(
    sources: Edits, *, kernels: Iterable[str] | None = None, may_spill: bool = False
) -> SourceOverride:
    """Compile and launch edited CUDA sources from now on, until the result is left or undone.

        with flashmla_rtc.override_sources({"mla_decode_store.cuh": text}):
            ...  # calls run the edited kernels
        ...  # calls run the package's again

    Nothing is written into the package. Kernels are compiled at once, and if one does not compile,
    nothing has changed. Overrides may be nested, the last one in being the first one out, and come
    on top of what ``FLASHMLA_RTC_KERNELS`` replaces.

    It holds for the whole process: calls of all threads on Hopper GPUs, plans included. Enter and
    undo it while no other thread decodes; inside it threads may decode as always. CUDA graphs keep
    the kernels that they were captured with. The reference backend has no kernels to edit. Edited
    kernels keep pieces of cut requests in memory of their own, so they can't spoil what the
    package's kernels leave there; modules stay loaded until the process ends.

    Args:
        sources: a folder with ``.cuh`` files, a whole copy of ``kernels/`` or some of it, or a
            mapping from names of headers, such as "mla_decode.cuh" or "ptx/sync.cuh", to their
            texts. The package's own are in :func:`kernel_sources`.
        kernels: names of kernels to compile at once, others at their first call. By default the
            default kernels, or none if ``FLASHMLA_RTC_COMPILE`` is "lazy".
        may_spill: take kernels that spill registers too, which are refused otherwise.

    Returns:
        A context manager that is in force already. ``undo()`` does what leaving it does.

    Raises:
        TypeError, ValueError: ``sources`` is no such thing, or replaces nothing; ``kernels`` is no
            list of names, or holds one that no kernel has.
        CompileError: an edited kernel does not compile; the message has the numbered lines.
        CompilerMissing: there is no NVRTC.
    """
    if kernels is not None:
        if isinstance(kernels, str) or not isinstance(kernels, Iterable):
            raise TypeError(
                f'kernels must be a list of names, such as ["mla_schedule"], but it is {kernels!r}.'
            )
        chosen = [variants.named(name) for name in kernels]
    else:
        chosen = list(variants.default_variants()) if compile_mode() == "import" else []
    with _lock:
        now = variants.headers()
        new = edits.replaced(now, sources, "sources")
        change = _Change(
            {name: text for name, text in new.items() if now.get(name) != text},
            may_spill=may_spill,
        )
        if not change.headers and not may_spill:
            warnings.warn(
                "sources changes nothing: each text that it holds is the one in use already. Did "
                "an edit find nothing to replace?",
                RuntimeWarning,
                stacklevel=2,
            )
        planned = _sources([*_changes, change])
        if planned is not None:
            units = [variant.source(planned) for variant in chosen]
            variants.builder_of(planned).obtain_many(units)
        _set([*_changes, change])
    return SourceOverride(change)


def kernel_sources() -> dict[str, str]:
    """The CUDA headers in use, text by name: what ``override_sources`` takes edited copies of."""
    return dict(variants.headers())


class SourceOverride:
    """An override in force: a context manager, or undone by hand.

    changed: names of the headers whose text it changed.
    """

    def __init__(self, change: _Change) -> None:
        self._change = change
        self._in_block = False
        self.changed = tuple(change.headers)

    @property
    def active(self) -> bool:
        """Whether it is in force."""
        return self._change in _changes

    def undo(self) -> None:
        """Take it back. Undoing it again does nothing.

        Raises RuntimeError, and leaves all as it is, if a newer override is in force: that one was
        made on top of this one, and must be undone before.
        """
        _remove(self._change)

    def __enter__(self) -> SourceOverride:
        """Raises RuntimeError if it was undone, or if a ``with`` block holds it already."""
        if not self.active:
            raise RuntimeError("This override was undone; call override_sources again.")
        if self._in_block:
            raise RuntimeError(
                "A with block holds this override already, and would undo it where it ends; call "
                "override_sources again."
            )
        self._in_block = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Like ``undo``. On the way of an exception newer ones are taken back with it: those who
        would have undone them are not reached any more.
        """
        self._in_block = False
        _remove(self._change, and_newer=kind is not None)

    def __repr__(self) -> str:
        names = ", ".join(self.changed) or "nothing"
        return f"<SourceOverride of {names}, {'in force' if self.active else 'undone'}>"


@contextmanager
def standing_in(variant: Variant, name: str, device: int) -> Iterator[LoadedKernel]:
    """Launch ``variant``, which may spill, for a while wherever the kernel called ``name`` is asked
    for; as it is loaded on ``device``. Not for use beside other threads' calls.
    """
    change = _Change(stand_ins={name: variant}, may_spill=True)
    with _lock:
        _set([*_changes, change])
    try:
        yield sm90.launcher(name, device).kernel
    except BaseException:
        _remove(change, and_newer=True)
        raise
    _remove(change)


def _remove(change: _Change, and_newer: bool = False) -> None:
    """Take ``change`` off the stack, if it is there."""
    with _lock:
        if change not in _changes:
            return
        place = _changes.index(change)
        newer = _changes[place + 1 :]
        if newer and not and_newer:
            names = ", ".join([*newer[-1].headers, *newer[-1].stand_ins])
            last = f"that of {names}" if names else "the newest, which changes nothing,"
            raise RuntimeError(
                "Overrides are undone in the opposite order of their making, and this is not the "
                f"newest in force: undo {last} first."
            )
        _set(_changes[:place])


def _sources(changes: list[_Change]) -> Sources | None:
    """The package's with ``changes``; None if there are none."""
    if not changes:
        return None
    headers = dict(variants._headers())
    stand_ins: dict[str, Variant] = {}
    for change in changes:
        headers.update(change.headers)
        stand_ins.update(change.stand_ins)
    may_spill = any(change.may_spill for change in changes)
    if headers == variants._headers() and not stand_ins and not may_spill:
        return None
    made = Sources(dict(sorted(headers.items())), stand_ins, may_spill)
    content = tuple(made.headers.items()), tuple(stand_ins.items()), may_spill
    return _known.setdefault(content, made)


def _set(changes: list[_Change]) -> None:
    sources = _sources(changes)
    _changes[:] = changes
    _change_workspace(tuple(sources.headers.items()) if sources else None)
    sm90.use(sources)


def _change_workspace(owner: Any) -> None:
    """Give the sources ``owner`` the memory that they alone have written to.

    What a call leaves in a workspace tells the next what is new there. An edited kernel may leave
    anything. torch takes the memory of edited kernels back when they are left.
    """
    global _workspace_of
    own = tuple(variants._headers().items())
    owner = None if owner == own else owner
    if owner == _workspace_of:
        return
    with workspace._lock:
        kept = dict(workspace._kept)
        if _workspace_of is not None:
            kept = {key: room for key, room in kept.items() if room.owner is None}
        _workspaces[_workspace_of] = kept
        workspace._kept.clear()
        workspace._kept.update(_workspaces.pop(owner, {}))
        _workspace_of = owner
