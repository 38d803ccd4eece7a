"""The decode call: check, plan, launch; nothing else."""

from __future__ import annotations

from typing import Any

from . import (
    arrays,
    backends,
    checks,
    messages,
    metadata,
    option_checks,
    plan_checks,
    recorded,
    reference,
    sm90,
    torch_modes,
)
from .arrays import View
from .recorded import Call


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    *,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """Absorbed multi-head latent attention of a few queries a request over a paged KV cache.

    A key's first ``head_dim_v`` numbers are its value. Arrays may come from torch, CuPy, JAX, NumPy
    or anything that speaks DLPack, all from one library; results come back in it. On a Hopper GPU
    the kernels run on the arrays' device and the library's current stream, without waiting for
    either; elsewhere the reference backend computes the same. In a program that torch compiles the
    call is one operator (``flashmla_rtc.integrations.torch``).

    Args:
        q: (batch, seq_len_q, heads_q, head_dim), bfloat16 or float16; last dimension contiguous.
        k_cache: (num_blocks, page_block_size, heads_k, head_dim), q's dtype; last dimension
            contiguous. Query head h reads KV head h // (heads_q // heads_k). The kernels take
            head_dim 576 and pages of 64.
        block_table: int32 (batch, max_blocks), page numbers. What lies past a request's last page
            is never used; a used number outside [0, num_blocks) is a page without keys.
        cache_seqlens: int32 (batch,), keys of each request, clamped to its table. A request without
            keys gives out 0 and lse +inf.
        head_dim_v: width of a value; the kernels take 512.
        tile_scheduler_metadata: from ``get_mla_metadata``, either the int32 (num_sm_parts, 8) array
            or the ``FlashMLASchedMeta`` object; None plans for this call alone.
        num_splits: the second result of ``get_mla_metadata``; int32, requests + 1.
        softmax_scale: factor on q . k; default head_dim ** -0.5.
        causal: query i of a request sees keys below seqlen - seq_len_q + i + 1.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
            extra_topk_length: not supported yet.
        out: where to write the output instead of a new array; any strides, last dimension
            contiguous.
        lse: where to write lse instead of a new array; float32, any strides.

    Returns:
        out (batch, seq_len_q, heads_q, head_dim_v) in q's dtype, and lse (batch, heads_q,
        seq_len_q) float32, the natural logarithm of the sum of exponentials.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which, what came and what was
            expected. Nothing has been launched.
        NotImplementedError: a feature that is not there yet, by name. There is no backward pass:
            it is raised when one runs, and a RuntimeError already here where ``out`` or ``lse`` is
            given and torch would have to follow what is written into it.
    """
    call = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        out,
        lse,
    )
    is_compiling = torch_modes.is_compiling()
    if (
        not is_compiling
        and is_fp8_kvcache is False
        and indices is None
        and attn_sink is None
        and extra_k_cache is None
        and extra_indices_in_kvcache is None
        and topk_length is None
        and extra_topk_length is None
    ):
        done = recorded.launch_again(call)
        if done is not None:
            return done
    option_checks.reject_unsupported(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if is_compiling or torch_modes.sees(*call):
        from .integrations import torch as operators

        return operators.decode(*call)
    return _decode(call)


def decode_here(call: Call) -> tuple[Any, Any]:
    """:func:`flash_mla_with_kvcache` whatever torch has to see: what its operators do."""
    return recorded.launch_again(call) or _decode(call)


def _decode(call: Call) -> tuple[Any, Any]:
    q, k_cache, block_table, cache_seqlens = call[:4]
    head_dim_v, given_plan, num_splits, given_scale, given_causal, out, lse = call[4:]
    causal = option_checks.check_flag(given_causal, "causal")
    q_view = arrays.view(q, "q")
    k_view = arrays.view(k_cache, "k_cache")
    table_view = arrays.view(block_table, "block_table")
    lengths_view = arrays.view(cache_seqlens, "cache_seqlens")
    out_view = None if out is None else arrays.view(out, "out")
    lse_view = None if lse is None else arrays.view(lse, "lse")
    shape = checks.check_decode(
        q_view, k_view, table_view, lengths_view, head_dim_v, out_view, lse_view
    )
    scale = option_checks.check_scale(given_scale, shape.head_dim)

    on_hopper = backends.choose(q_view.device) == "sm90"
    if on_hopper:
        checks.check_kernel_limits(shape, q_view, k_view)
    plan = _plan_view(given_plan, num_splits, shape, lengths_view)
    if checks.validation_enabled():
        checks.validate_contents(shape, table_view, lengths_view)

    if not on_hopper:
        result = reference.attend(
            q_view.native,
            k_view.native,
            table_view.native,
            lengths_view.native,
            shape.head_dim_v,
            scale,
            causal,
            out=None if out_view is None else out_view.native,
            lse=None if lse_view is None else lse_view.native,
        )
        return _to_caller(q_view, result[0], out), _to_caller(q_view, result[1], lse)

    if out_view is None:
        out_shape = (shape.batch, shape.seq_len_q, shape.heads_q, shape.head_dim_v)
        out_view = arrays.view(arrays.empty(q_view, out_shape, shape.dtype), "out")
    if lse_view is None:
        lse_shape = (shape.batch, shape.heads_q, shape.seq_len_q)
        lse_view = arrays.view(arrays.empty(q_view, lse_shape, "float32"), "lse")
    if shape.batch > 0:
        launched = sm90.decode(
            shape, q_view, k_view, table_view, lengths_view, plan, scale, causal, out_view, lse_view
        )
        if q_view.library == "torch" and not (out is None and lse is None):
            torch_modes.written(out_view.native, lse_view.native)
        if not checks.validation_enabled():
            recorded.note(launched, metadata.made_for(shape, q_view.device), call)
    return _to_caller(q_view, out_view.native, out), _to_caller(q_view, lse_view.native, lse)


def _plan_view(plan: Any, num_splits: Any, shape: checks.DecodeShape, cache_seqlens: View) -> View:
    """The plan's array, made now where the caller left it to us, and checked where not."""
    if plan is None:
        if num_splits is not None:
            raise ValueError(
                "num_splits belongs to a plan of arrays, but tile_scheduler_metadata is None."
            )
        plan = metadata.make_plan(cache_seqlens, shape.rows_per_group, shape.heads_k)[0]
    elif isinstance(plan, metadata.FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(
                "num_splits must be None when tile_scheduler_metadata is a FlashMLASchedMeta, "
                "which holds its own."
            )
        holder = plan
        plan, num_splits = holder.plan_for(shape, cache_seqlens), holder.num_splits
    if isinstance(plan, tuple):
        raise TypeError(
            "tile_scheduler_metadata must be a plan's array, a FlashMLASchedMeta or None, but it "
            "is a tuple. get_mla_metadata returns two: plan, num_splits = get_mla_metadata(...)."
        )
    view = arrays.view(plan, "tile_scheduler_metadata")
    splits_view = None if num_splits is None else arrays.view(num_splits, "num_splits")
    parts = metadata.num_parts(cache_seqlens.device, shape.rows_per_group, shape.heads_k)
    plan_checks.check_metadata(view, splits_view, shape, parts, cache_seqlens.device)
    if cache_seqlens.library != "dlpack":  # whose plans may be CuPy's or NumPy's
        for name, part in (("tile_scheduler_metadata", view), ("num_splits", splits_view)):
            if part is not None and part.library != cache_seqlens.library:
                raise messages.mixed_libraries(cache_seqlens, **{name: part})
    return view


def _to_caller(like: View, native: Any, given: Any) -> Any:
    return arrays.from_native(like, native) if given is None else given


def prepare(device: Any = None) -> None:
    """Load every default kernel on a device now, so that the first call is as fast as the next.

    A call that finds them not loaded loads them, also while a CUDA graph is captured. On a device
    without the kernels this does nothing.

    Args:
        device: index of a CUDA device, an object with ``type`` and ``index`` such as
            ``torch.device("cuda:1")``, a name such as "cuda:1", or None for device 0.

    Raises:
        TypeError, ValueError: ``device`` is none of these.
        CompileError, CompilerMissing, DriverError: the kernels can't be compiled or loaded.
    """
    where = arrays.device_named(device)
    if backends.why_not(where) is None:
        sm90.prepare(where.index)
