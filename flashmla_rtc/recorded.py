"""Decode calls like one that was made before: launched again with other addresses.

Checks, strides and flags depend on what tensors look like, not on where they lie. So a call on
torch tensors is noted under everything that was looked at, and a call that finds its note writes
its addresses into the packed parameters and launches. What has no note, or differs in any way,
takes the long way through every check.

A note holds no tensor: every call is looked at in full. Most calls look like a recent one, which
torch can say of all tensors at once, in a third of the time that it takes to make the key that
notes are kept under.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from . import maps, sm90, torch_shortcuts
from .metadata import FlashMLASchedMeta
from .rtc.kernel import DriverError, on_device
from .sm90 import Launched
from .validation import validation_enabled

ADDRESSES = (
    "k_map",
    "k_tail_map",
    "q_map",
    "k",
    "q",
    "out",
    "lse",
    "block_table",
    "cache_seqlens",
    "plan",
    "partials",
    "merge_states",
)
"""How the parameters of the decode kernel begin: the tensor maps and all addresses."""

_pack_addresses = struct.Struct("<256s128s9Q").pack_into

_NO_MAP = bytes(maps.BYTES)
_MOST_NOTES = 1024
_MOST_ADDRESSES = 256
_MOST_RECENT = 4
_torch: Any = None

Call = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any]
"""The arguments of a decode call as the caller gave them: q, k_cache, block_table, cache_seqlens,
head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale, causal, out, lse.
"""

Tensors = tuple[Any, Any, Any, Any, Any, Any, Any, Any]
"""q, k_cache, block_table, cache_seqlens, plan; then num_splits, out and lse, which may be None."""


class _Local(threading.local):
    """A thread's notes by key, and those whose tensors torch compares, last found first."""

    recent: list[_Note] | None = None

    def __init__(self) -> None:
        self.notes: dict[tuple[Any, ...], _Note] = {}


_local = _Local()


class _Note:
    """What was launched, for one thread. ``maps`` by the cache's address, ``query_maps`` by
    q's, ``places`` by stream.

    is_launching: a signal handler or finalizer that decodes amid a launch leaves the buffer alone.

    looks_same: whether the tensors given to it, as many as ``count``, look like those of the last
        call that was found by its key. It may say no of tensors with the same key. Notes that are
        not among the recent ones do without.
    """

    __slots__ = (
        "buffer",
        "causal",
        "count",
        "current_device",
        "current_stream",
        "empty",
        "forward_ad",
        "head_dim_v",
        "increment_version",
        "index",
        "is_capturing",
        "is_launching",
        "looks_same",
        "made_for",
        "maps",
        "new_lse",
        "new_out",
        "places",
        "query_map",
        "query_maps",
        "replacements",
        "softmax_scale",
    )

    def __init__(self, key: tuple[Any, ...], launched: Launched, made_for: tuple[Any, ...]) -> None:
        self.head_dim_v, self.softmax_scale, self.causal, look_of_q = key[:4]
        (batch, seq_len_q, heads_q, _), _, dtype, self.index = look_of_q
        contiguous = torch_shortcuts.contiguous
        self.new_out = contiguous((batch, seq_len_q, heads_q, self.head_dim_v), dtype)
        self.new_lse = contiguous((batch, heads_q, seq_len_q), _torch.float32)
        self.empty = torch_shortcuts.found()[1] or torch_shortcuts.empty
        self.forward_ad = _torch.autograd.forward_ad
        self.current_device = _torch._C._cuda_getDevice
        self.current_stream = _torch._C._cuda_getCurrentRawStream
        self.increment_version = torch_shortcuts.increment_version()
        self.is_capturing = _torch._C._cuda_isCurrentStreamCapturing
        self.replacements = launched.replacements
        self.buffer = launched.kernel.pack(launched.values)
        self.made_for = made_for
        self.is_launching = False
        self.count: int
        self.looks_same: Callable[..., bool]
        self.maps: dict[int, bytes] = {}
        self.query_map = launched.query_map
        self.query_maps: dict[int, bytes] = {}
        self.places: dict[int, tuple[Callable[[], tuple[Any, ...]], int, int]] = {}

    def map_query(self, at: int) -> bytes:
        """The tensor map of q at address ``at``, kept from now on."""
        if len(self.query_maps) >= _MOST_ADDRESSES:
            self.query_maps.clear()
        found = self.query_map.at(at) if self.query_map else _NO_MAP
        self.query_maps[at] = found
        return found


def key_of(
    tensors: Tensors, head_dim_v: Any, softmax_scale: Any, causal: Any
) -> tuple[Any, ...] | None:
    """Everything about a call's arrays and numbers except addresses; None if it is not one of torch
    tensors that can be noted.
    """
    if (
        not (causal is True or causal is False)
        or type(head_dim_v) is not int
        or not (softmax_scale is None or type(softmax_scale) is float)
    ):
        return None
    tensor_class = _tensor_class()
    if _torch is not None and _torch._C._len_torch_dispatch_stack():
        return None  # a mode is to see what torch is asked for
    looks: list[Any] = []
    try:
        for tensor in tensors:
            if type(tensor) is tensor_class:
                # Where a tensor is contiguous its shape says all, but for strides never used.
                stride = tensor.is_contiguous() or tensor.stride()
                if tensor.is_neg() or tensor.requires_grad:
                    return None
                looks.append((tensor.shape, stride, tensor.dtype, tensor.get_device()))
            elif tensor is None:
                looks.append(None)
            else:
                return None
    except RuntimeError:  # some layouts have no strides
        return None
    if None in looks[:5]:
        return None
    return head_dim_v, softmax_scale, causal, *looks


def launch_again(call: Call) -> tuple[Any, Any] | None:
    """``(out, lse)`` of a call that was launched from a note; None if it has to take the long way.

    Nothing has been launched then.
    """
    recent = _local.recent
    if recent is None:  # this thread has not noted anything yet
        return None
    q, k_cache, block_table, cache_seqlens = call[:4]
    head_dim_v, plan, num_splits, softmax_scale, causal, out, lse = call[4:]
    holder = None
    if type(plan) is FlashMLASchedMeta:
        if num_splits is not None:
            return None
        holder, plan, num_splits = plan, plan.tile_scheduler_metadata, plan.num_splits

    # torch must not be asked to compare nested tensors or, in old versions, those without elements
    # in memory: it would end the process. The latter raise here.
    try:
        at_q, at_k, at_table = q.data_ptr(), k_cache.data_ptr(), block_table.data_ptr()
        at_lengths, at_plan = cache_seqlens.data_ptr(), plan.data_ptr()
        at_out = 0 if out is None else out.data_ptr()
        at_lse = 0 if lse is None else lse.data_ptr()
        if (
            q.is_nested
            or k_cache.is_nested
            or block_table.is_nested
            or cache_seqlens.is_nested
            or plan.is_nested
            or (num_splits is not None and (num_splits.is_nested or not num_splits.data_ptr()))
            or (out is not None and out.is_nested)
            or (lse is not None and lse.is_nested)
        ):
            return None
    except Exception:  # arrays of other libraries, tensors of unusual kinds
        return None

    # The number of tensors tells which are there. With one result given it would not; such a call
    # is found by its key alone.
    tensors: tuple[Any, ...]
    if out is not None and lse is not None:
        if num_splits is not None:
            tensors = (q, k_cache, block_table, cache_seqlens, plan, num_splits, out, lse)
        else:
            tensors = (q, k_cache, block_table, cache_seqlens, plan, out, lse)
    elif out is lse:
        if num_splits is not None:
            tensors = (q, k_cache, block_table, cache_seqlens, plan, num_splits)
        else:
            tensors = (q, k_cache, block_table, cache_seqlens, plan)
    else:
        tensors = ()
    count = len(tensors)
    for note in recent:
        if (
            note.count == count
            and causal is note.causal
            and (
                head_dim_v is note.head_dim_v
                or (type(head_dim_v) is int and head_dim_v == note.head_dim_v)
            )
            and (
                softmax_scale is note.softmax_scale
                or (type(softmax_scale) is float and softmax_scale == note.softmax_scale)
            )
            and note.looks_same(*tensors)
        ):
            break
    else:
        whole = (q, k_cache, block_table, cache_seqlens, plan, num_splits, out, lse)
        key = key_of(whole, head_dim_v, softmax_scale, causal)
        found = _local.notes.get(key) if key else None
        if found is None:
            return None
        note = found
        _remember(note, tensors, recent)

    if note.forward_ad._current_level >= 0:  # tensors may have tangents
        return None
    if note.is_launching or note.replacements != sm90.replacements or validation_enabled():
        return None
    if holder is not None and (holder._used is not plan or holder._made_for != note.made_for):
        return None
    if note.current_device() != note.index:
        return None
    stream = note.current_stream(note.index)
    if stream > 1 and note.is_capturing():  # 0 and 1 can't be captured
        return None
    try:
        launch, partials, merge_states = note.places[stream]
        k_map = note.maps[at_k]
    except KeyError:
        return None
    are_new = out is None and lse is None
    if out is None:
        out = note.empty(*note.new_out)
        at_out = out.data_ptr()
    if lse is None:
        lse = note.empty(*note.new_lse)
        at_lse = lse.data_ptr()
    if (at_q | at_out | at_plan) & 15 or not (
        at_q and at_out and at_plan and at_lse and at_table and at_lengths
    ):
        return None
    try:
        q_map = note.query_maps.get(at_q) or note.map_query(at_q)
    except DriverError:
        return None
    note.is_launching = True
    try:
        _pack_addresses(
            note.buffer,
            0,
            k_map,
            q_map,
            at_k,
            at_q,
            at_out,
            at_lse,
            at_table,
            at_lengths,
            at_plan,
            partials,
            merge_states,
        )
        if launch()[0]:
            with on_device(note.index):  # this thread has no context yet, or another device's
                if launch()[0]:
                    return None
    finally:
        note.is_launching = False
    if not are_new:
        note.increment_version((out, lse))
    return out, lse


def note(launched: Launched | None, made_for: tuple[Any, ...], call: Call) -> None:
    """Remember a call that was checked and launched. ``made_for`` is the plan's. ``launched`` is
    None for a call that was not launched.
    """
    if launched is None or launched.captured:
        return
    values = launched.values
    if (values["q"] | values["out"] | values["plan"]) & 15 or not values["block_table"]:
        return
    q, k_cache, block_table, cache_seqlens = call[:4]
    head_dim_v, plan, num_splits, softmax_scale, causal, out, lse = call[4:]
    if type(plan) is FlashMLASchedMeta:
        plan, num_splits = plan.tile_scheduler_metadata, plan.num_splits
    tensors = (q, k_cache, block_table, cache_seqlens, plan, num_splits, out, lse)
    key = key_of(tensors, head_dim_v, softmax_scale, causal)
    if key is None:
        return
    notes = _local.notes
    found = notes.get(key)
    if found is None or found.replacements != launched.replacements:
        if len(notes) >= _MOST_NOTES:
            notes.clear()
        _local.recent = []  # what was noted under the same key is not to be found any more
        found = notes[key] = _Note(key, launched, made_for)
    if len(found.maps) >= _MOST_ADDRESSES:
        found.maps.clear()
    found.maps[k_cache.data_ptr()] = values["k_map"] + values["k_tail_map"]
    again = launched.kernel.again(launched.grid, launched.stream, found.buffer)
    found.places[launched.stream] = (again, values["partials"], values["merge_states"])


def _remember(note: _Note, tensors: tuple[Any, ...], recent: list[_Note]) -> None:
    """Have torch compare the tensors of the next calls with these, which have the note's key."""
    guards = torch_shortcuts.found()[0]
    if guards is None or not tensors:
        return
    if note in recent:
        recent.remove(note)
    note.count = len(tensors)
    note.looks_same = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    recent.insert(0, note)
    del recent[_MOST_RECENT:]


def _tensor_class() -> Any:
    global _torch
    if _torch is None:
        _torch = sys.modules.get("torch")
    return getattr(_torch, "Tensor", None) or _Missing


class _Missing:
    """Stands for torch's tensor class where torch has not been imported."""
