"""The Hopper backend: planner and decode kernels, on the caller's arrays and stream."""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, NamedTuple

from . import arrays, geometry, maps, schedule, variants, workspace
from .arrays import View
from .checks import DecodeShape
from .geometry import CostModel
from .maps import QueryMap
from .rtc.kernel import DriverError, KernelTable, device_facts, on_device
from .rtc.launch import Launcher
from .variants import Sources

LOG2_E = math.log2(math.e)
# A scale of 0 would turn the -inf of a masked score into NaN. This one gives the same results: no
# product of 16-bit floats that the float32 sums of a score can hold is moved by it.
_LEAST_SCALE = 1e-42


class Launched(NamedTuple):
    """A launch of the decode kernel: how, with which parameters by name, and after how many
    ``replacements`` of the sources in use.
    """

    kernel: Launcher
    grid: tuple[int, int, int]
    stream: int
    captured: bool
    values: dict[str, Any]
    query_map: QueryMap | None
    replacements: int


replacements = 0
"""How often the sources in use were replaced: notes of launches made before are out of date."""

# By sources, then by name and device.
_tables: dict[Sources | None, KernelTable] = {}
_launchers: dict[tuple[str, int, Sources | None], Launcher] = {}
_lock = threading.Lock()


def launcher(name: str, device: int) -> Launcher:
    """The kernel called ``name`` on ``device``, compiled and loaded if it is not yet.

    Raises:
        CompileError, CompilerMissing: it can't be compiled.
        DriverError: it can't be loaded.
    """
    sources = variants.in_use
    found = _launchers.get((name, device, sources))
    if found is not None:
        return found
    _check_shared_memory(device)
    variant = sources.stand_ins.get(name) if sources else None
    variant = variant or variants.by_name(name)
    kernel = variants.builder_of(sources).obtain(variant.source(sources))
    with _lock:
        table = _tables.setdefault(sources, KernelTable())
    loaded = table.load(kernel, device, variant.dynamic_smem_bytes)
    with _lock:
        return _launchers.setdefault(
            (name, device, sources),
            Launcher(loaded, variant.params, variant.threads, variant.cluster),
        )


def use(sources: Sources | None) -> None:
    """Launch kernels of ``sources`` from now on; None: the package's own."""
    global replacements
    variants.in_use = sources
    replacements += 1


def _check_shared_memory(device: int) -> None:
    """The decode kernel's descriptors are constants and count on where shared memory begins."""
    reserved = device_facts(device).reserved_smem_bytes
    if reserved != geometry.SHARED_BASE:
        raise DriverError(
            f"The CUDA driver reserves {reserved} bytes of each block's shared memory on "
            f"cuda:{device}, but the kernels are made for {geometry.SHARED_BASE} "
            "(SHARED_BASE in geometry.py)."
        )


def prepare(device: int) -> None:
    """Load every default kernel on ``device``, so that no later call has to."""
    for variant in variants.default_variants():
        launcher(variant.name, device)


@functools.cache
def num_parts(device: int, rows_per_group: int, heads_k: int) -> int:
    """Rows of a plan on ``device`` for these head counts."""
    return schedule.num_sm_parts(device_facts(device).num_sms, rows_per_group, heads_k)


def plan(cache_seqlens: View, rows_per_group: int, heads_k: int) -> tuple[Any, Any]:
    """Plan on the GPU without waiting for it: new tile_scheduler_metadata and num_splits arrays."""
    parts = num_parts(cache_seqlens.device.index, rows_per_group, heads_k)
    batch = cache_seqlens.shape[0]
    metadata = arrays.empty(cache_seqlens, (parts, geometry.PLAN_COLUMNS), "int32")
    num_splits = arrays.empty(cache_seqlens, (batch + 1,), "int32")
    model = schedule.cost_model(rows_per_group, heads_k)
    plan_into(cache_seqlens, metadata, num_splits, parts, model)
    return metadata, num_splits


def plan_into(
    cache_seqlens: View, metadata: Any, num_splits: Any, parts: int, model: CostModel
) -> None:
    """Plan into arrays of the shapes that :func:`plan` makes."""
    device = cache_seqlens.device.index
    values = {
        "cache_seqlens": cache_seqlens.pointer,
        "plan": arrays.pointer(metadata),
        "num_splits": arrays.pointer(num_splits),
        "batch": cache_seqlens.shape[0],
        "num_parts": parts,
        "segment_cost": model.segment,
        "piece_cost": model.piece,
        "merge_cost": model.merge,
        "merge_longest_cost": model.merge_longest,
        "pooled": model.pooled,
    }
    stream = arrays.current_stream(cache_seqlens)
    with on_device(device):
        launcher("mla_schedule", device).launch((1, 1, 1), stream, values)
        workspace.keep_while_captured(cache_seqlens, stream, metadata, num_splits)
        _keep_inputs(stream, cache_seqlens)


def decode(
    shape: DecodeShape,
    q: View,
    k_cache: View,
    block_table: View,
    cache_seqlens: View,
    metadata: View,
    softmax_scale: float,
    causal: bool,
    out: View,
    lse: View,
) -> Launched:
    """Decode into ``out`` and ``lse`` by the plan ``metadata``, on the caller's current stream.

    Everything has been checked. Shapes and dtypes as in ``flash_mla_with_kvcache``.
    """
    device = q.device.index
    parts = metadata.shape[0]
    rows = shape.rows_per_group
    stream = arrays.current_stream(q)
    seen = replacements
    with on_device(device):
        q_is_aligned, out_is_aligned = _rows_aligned(q), _rows_aligned(out)
        query_map = maps.query_map(shape, q.strides) if q_is_aligned and out_is_aligned else None
        name = variants.decode_name(shape.dtype, rows, plain=query_map is not None)
        kernel = launcher(name, device)
        capture = workspace.capture_of(stream)
        places = workspace.layout(device_facts(device).num_sms, rows, shape.dtype)
        room = workspace.room(q, places, stream, capture) if parts > 1 else workspace.NOTHING
        k_map, k_tail_map = maps.cache_maps(shape, k_cache, metadata)
        values = {
            "k_map": k_map,
            "k_tail_map": k_tail_map,
            "q_map": query_map.at(q.pointer) if query_map else bytes(maps.BYTES),
            "k": k_cache.pointer,
            "k_stride_page": k_cache.strides[0],
            "k_stride_row": k_cache.strides[1],
            "k_stride_head": k_cache.strides[2],
            "q": q.pointer,
            "q_stride_batch": q.strides[0],
            "q_stride_seq": q.strides[1],
            "q_stride_head": q.strides[2],
            "out": out.pointer,
            "out_stride_batch": out.strides[0],
            "out_stride_seq": out.strides[1],
            "out_stride_head": out.strides[2],
            "lse": lse.pointer,
            "lse_stride_batch": lse.strides[0],
            "lse_stride_head": lse.strides[1],
            "lse_stride_seq": lse.strides[2],
            "block_table": block_table.pointer,
            "block_table_stride": block_table.strides[0],
            "cache_seqlens": cache_seqlens.pointer,
            "plan": metadata.pointer,
            "partials": room.address + places.partials,
            "merge_states": room.address,
            "batch": shape.batch,
            "seq_len_q": shape.seq_len_q,
            "heads_k": shape.heads_k,
            "heads_per_group": shape.heads_per_group,
            "rows_per_group": rows,
            "num_blocks": shape.num_blocks,
            "max_blocks": shape.max_blocks,
            "causal": causal,
            "q_map_heads": query_map.extents[1] if query_map else 1,
            "q_map_rows": query_map.box[1] * query_map.box[2] if query_map else 0,
            "q_is_aligned": q_is_aligned,
            "out_is_aligned": out_is_aligned,
            "scale_log2": max(softmax_scale * LOG2_E, _LEAST_SCALE),
        }
        grid = (-(-rows // geometry.BLOCK_ROWS), shape.heads_k, parts)
        kernel.launch(grid, stream, values)
        _keep_inputs(stream, q, k_cache, block_table, cache_seqlens, metadata)
    return Launched(kernel, grid, stream, bool(capture), values, query_map, seen)


def _keep_inputs(stream: int, *views: View) -> None:
    """A graph's inputs are for whoever captures it to keep; those of an eager call are ours."""
    if views[0].library in ("jax", "dlpack") and not workspace.capture_of(stream):
        arrays.keep_until_done(stream, *views)


def _rows_aligned(array: View) -> bool:
    """Whether every row of a 16-bit array begins at a multiple of 16 bytes."""
    if array.pointer % 16:
        return False
    return all(
        stride % 8 == 0 or extent == 1
        for stride, extent in zip(array.strides[:3], array.shape[:3], strict=True)
    )
