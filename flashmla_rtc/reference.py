"""Paged MLA decode in plain array code.

It is the backend of the CPU and of GPUs that have no kernels, and the oracle of the tests. One
implementation serves NumPy, torch, CuPy and JAX arrays, written over the functions that the Python
array API standard gives to all of them. It is meant to be read, and to be right, before it is fast:

* There is no mask anywhere. The keys that a query sees are always the first ``n`` keys of its
  request, so a query attends to a slice. What lies past the slice is never multiplied, so NaN or
  inf in a slot that a query may not see cannot reach its result, not even as ``0 * NaN``.
* A page outside the cache holds no key. It is left out when the pages are gathered; the keys that
  remain keep their order, so what a query sees is still a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np


def attend(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    *,
    compute_dtype: str = "float32",
    out_dtype: str | None = None,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """Attend every query to the pages of its request.

    The arguments are arrays of one library on one device, already checked, with any strides.
    ``cache_seqlens`` and ``block_table`` are read on the host, so this waits for the device.
    Nothing is recorded for gradients.

    Args:
        q: (batch, seq_len_q, heads_q, head_dim), floating point.
        k_cache: (num_blocks, page_block_size, heads_k, head_dim), of any sizes. A value is the
            first ``head_dim_v`` elements of its key. Query head ``h`` reads key head
            ``h // (heads_q // heads_k)``.
        block_table: (batch, max_blocks), integer page numbers. Entries past the used ones are not
            looked at; a used entry outside ``[0, num_blocks)`` stands for a page without keys.
        cache_seqlens: (batch,), integer counts of keys, each clamped to
            ``[0, max_blocks * page_block_size]``.
        head_dim_v: width of a value, at most ``head_dim``.
        softmax_scale: factor on ``q . k`` before the softmax.
        causal: whether query ``i`` of a request sees only the keys below
            ``seqlen - seq_len_q + i + 1``: aligned to the bottom right, the last query sees all.
        compute_dtype: "float32" or "float64", the precision of everything between reading and
            writing. float64 queries are always computed in float64.
        out_dtype: name of the dtype of an ``out`` made here; None takes q's.
        out, lse: arrays to write in place, of any strides and of the shapes returned. None makes
            new ones. JAX arrays cannot be written, so with JAX both must be None.

    Returns:
        ``(out, lse)``. out is (batch, seq_len_q, heads_q, head_dim_v). lse is (batch, heads_q,
        seq_len_q), the natural logarithm of the sum of exponentials, in float32, or in float64 when
        ``compute_dtype`` and ``out_dtype`` both are "float64". A query that sees no key has out 0
        and lse +inf. A query that sees a NaN has NaN.

    Raises:
        ImportError: q is a torch or CuPy array and array-api-compat is not installed.
    """
    xp = namespace(q)
    batch, seq_len_q, heads_q, _ = q.shape
    if str(q.dtype).rpartition(".")[2] == "float64":
        compute_dtype = "float64"
    lse_dtype = "float64" if compute_dtype == out_dtype == "float64" else "float32"
    result_dtype = q.dtype if out_dtype is None else _dtype(xp, out_dtype)

    with _settings(xp, q):
        lengths = cache_seqlens.tolist()
        requests = (
            _attend_request(
                xp,
                q[request, ...],
                k_cache,
                block_table[request, ...],
                int(lengths[request]),
                head_dim_v,
                float(softmax_scale),
                causal,
                _dtype(xp, compute_dtype),
            )
            for request in range(batch)
        )
        out_shape = (batch, seq_len_q, heads_q, head_dim_v)
        lse_shape = (batch, heads_q, seq_len_q)
        if _is_jax(xp):
            return _stack(xp, requests, out_shape, lse_shape, result_dtype, _dtype(xp, lse_dtype))
        if out is None:
            out = xp.empty(out_shape, dtype=result_dtype, device=q.device)
        if lse is None:
            lse = xp.empty(lse_shape, dtype=_dtype(xp, lse_dtype), device=q.device)
        for request, (request_out, request_lse) in enumerate(requests):
            out[request, ...] = _cast(request_out, out.dtype)
            lse[request, ...] = _cast(request_lse, lse.dtype)
        return out, lse


def _attend_request(
    xp: ModuleType,
    q: Any,  # (seq_len_q, heads_q, head_dim)
    k_cache: Any,
    table: Any,  # (max_blocks,)
    length: int,
    head_dim_v: int,
    scale: float,
    causal: bool,
    dtype: Any,  # of the computation and of what is returned
) -> tuple[Any, Any]:
    """One request: out (seq_len_q, heads_q, head_dim_v), lse (heads_q, seq_len_q)."""
    seq_len_q, heads_q, head_dim = q.shape
    num_blocks, page_block_size, heads_k, _ = k_cache.shape
    group = heads_q // heads_k

    length = max(0, min(length, table.shape[0] * page_block_size))
    entries = np.asarray(table[: -(-length // page_block_size)].tolist(), dtype=np.int64)
    present = (entries >= 0) & (entries < num_blocks)

    def keys_below(limit: int) -> int:
        """How many of the gathered keys lie at positions below ``limit``."""
        starts = np.arange(len(entries)) * page_block_size
        return int(np.clip(limit - starts, 0, page_block_size)[present].sum())

    count = keys_below(length)
    if count:
        pages = xp.asarray(entries[present], device=k_cache.device)
        keys = xp.reshape(xp.take(k_cache, pages, axis=0), (-1, heads_k, head_dim))
        keys = _cast(keys[:count, ...], dtype)
    else:
        keys = xp.zeros((0, heads_k, head_dim), dtype=dtype, device=k_cache.device)
    keys = xp.permute_dims(keys, (1, 0, 2))  # (heads_k, keys, head_dim)

    # (heads_k, seq_len_q, group, head_dim): the query heads that share a key head lie together.
    rows = xp.reshape(_cast(q, dtype), (seq_len_q, heads_k, group, head_dim))
    rows = xp.permute_dims(rows, (1, 0, 2, 3))

    # Queries that see the same keys are computed in one go: all of them, unless the mask is causal.
    if causal and seq_len_q > 1:
        spans = [(i, i + 1, keys_below(length - seq_len_q + i + 1)) for i in range(seq_len_q)]
    else:
        spans = [(0, seq_len_q, count)]
    outs, lses = [], []
    for first, last, visible in spans:
        shape = (heads_k, last - first, group)
        some = xp.reshape(rows[:, first:last, ...], (heads_k, (last - first) * group, head_dim))
        span_out, span_lse = _softmax_rows(xp, some, keys[:, :visible, :], head_dim_v, scale)
        outs.append(xp.reshape(span_out, (*shape, head_dim_v)))
        lses.append(xp.reshape(span_lse, shape))
    out = outs[0] if len(outs) == 1 else xp.concat(outs, axis=1)
    lse = lses[0] if len(lses) == 1 else xp.concat(lses, axis=1)
    return (
        xp.reshape(xp.permute_dims(out, (1, 0, 2, 3)), (seq_len_q, heads_q, head_dim_v)),
        xp.reshape(xp.permute_dims(lse, (0, 2, 1)), (heads_q, seq_len_q)),
    )


def _softmax_rows(
    xp: ModuleType, rows: Any, keys: Any, head_dim_v: int, scale: float
) -> tuple[Any, Any]:
    """Attention of rows (heads_k, rows, head_dim) to all of keys (heads_k, keys, head_dim).

    Returns out (heads_k, rows, head_dim_v) and lse (heads_k, rows).
    """
    heads_k, num_rows, _ = rows.shape
    if keys.shape[1] == 0:
        like = {"dtype": rows.dtype, "device": rows.device}
        return (
            xp.zeros((heads_k, num_rows, head_dim_v), **like),
            xp.full((heads_k, num_rows), math.inf, **like),
        )
    scores = xp.matmul(rows, xp.permute_dims(keys, (0, 2, 1))) * scale
    top = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.exp(scores - top)
    total = xp.sum(weights, axis=-1, keepdims=True)
    out = xp.matmul(weights, keys[..., :head_dim_v]) / total
    return out, (xp.log(total) + top)[..., 0]


def _stack(
    xp: ModuleType,
    requests: Iterator[tuple[Any, Any]],
    out_shape: tuple[int, ...],
    lse_shape: tuple[int, ...],
    out_dtype: Any,
    lse_dtype: Any,
) -> tuple[Any, Any]:
    """The results of all requests as new arrays, for a library whose arrays cannot be written."""
    pairs = [(_cast(out, out_dtype), _cast(lse, lse_dtype)) for out, lse in requests]
    if not pairs:
        return xp.zeros(out_shape, dtype=out_dtype), xp.zeros(lse_shape, dtype=lse_dtype)
    outs, lses = zip(*pairs, strict=True)
    return xp.stack(outs), xp.stack(lses)


# -- what differs between array libraries ----------------------------------------------------------


def namespace(array: Any) -> ModuleType:
    """The array API functions for ``array``: NumPy's and JAX's own, array-api-compat's for others.

    Raises:
        ImportError: array-api-compat is needed and not installed.
    """
    if isinstance(array, np.ndarray):
        return np
    library = type(array).__module__.partition(".")[0]
    if library in ("jax", "jaxlib"):
        import jax.numpy

        numpy: ModuleType = jax.numpy
        return numpy
    try:
        import array_api_compat
    except ImportError as error:
        extra = "[cu13]' (or [cu12] for CUDA 12)" if library == "cupy" else "[torch]'"
        raise ImportError(
            f"The reference backend computes on {library} arrays through the package "
            f"array-api-compat, which is not installed: pip install 'flashmla_rtc{extra}.",
            name="array_api_compat",
        ) from error
    found: ModuleType = array_api_compat.array_namespace(array)
    return found


@contextmanager
def _settings(xp: ModuleType, q: Any) -> Iterator[None]:
    """Full float32 products, no gradients, q's device, no warning where NaN in gives NaN out."""
    if xp is np:
        with np.errstate(invalid="ignore", over="ignore"):
            yield
    elif _is_jax(xp):
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif xp.__name__.endswith("torch"):
        import torch

        with torch.no_grad():
            yield
    elif hasattr(q.device, "__enter__"):  # CuPy computes on the current device, not on q's
        with q.device:
            yield
    else:
        yield


def _is_jax(xp: ModuleType) -> bool:
    return xp.__name__ == "jax.numpy"


def _dtype(xp: ModuleType, name: str) -> Any:
    """The dtype called ``name``; NumPy and CuPy know bfloat16 through ml_dtypes only."""
    if hasattr(xp, name):
        return getattr(xp, name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def _cast(array: Any, dtype: Any) -> Any:
    """``array`` as ``dtype``; itself where it is so already. (NumPy 2.0 has no function astype.)"""
    if hasattr(array, "astype"):
        return array.astype(dtype, copy=False)
    return array.to(dtype)
