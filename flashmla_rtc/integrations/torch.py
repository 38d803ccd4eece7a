"""The calls as operators of torch: for ``torch.compile``, ``torch.export``, autograd and autocast.

Nobody has to call them. ``flash_mla_with_kvcache`` and ``get_mla_metadata`` become these operators
wherever torch compiles a program, works with fake tensors or keeps track of gradients; a plain call
is launched without torch's dispatcher, in less host time. Programs that were exported name them, so
import this module before such a program is loaded.

* ``flashmla_rtc::mla_decode``: ``flash_mla_with_kvcache`` with new results.
* ``flashmla_rtc::mla_decode_out``: the same into ``out`` and ``lse``.
* ``flashmla_rtc::mla_metadata``: ``get_mla_metadata`` of lengths and head counts.

Results are repeatable to the bit, so that they are the same with
``torch.use_deterministic_algorithms``. In a region of ``torch.autocast`` queries take the dtype of
the cache, which is never converted. There is no backward pass: asking for one raises
NotImplementedError.
"""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(
        "flashmla_rtc.integrations.torch needs the build of torch that fits your machine "
        f"(pip install torch): {error}."
    ) from error

from .. import arrays, backends, interface, messages, metadata, option_checks, schedule, torch_modes
from ..rtc.kernel import device_facts

_library = torch.library.Library("flashmla_rtc", "DEF")

_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, SymInt head_dim_v, "
    "Tensor? tile_scheduler_metadata=None, Tensor? num_splits=None, float? softmax_scale=None, "
    "bool causal=False"
)
# Inputs have to keep the strides that they have in the program: the last dimension is contiguous.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def _define(schema: str) -> Any:
    """Makes a function the operator of this schema, on every device."""

    def register(function: Any) -> Any:
        _library.define(schema, tags=_TAGS)
        name = schema.partition("(")[0]
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.flashmla_rtc, name).default

    return register


# -- operators -------------------------------------------------------------------------------------


@_define(f"mla_decode({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
def mla_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    return interface.decode_here((*_all(*arguments), None, None))


@_define(f"mla_decode_out({_ARGUMENTS}, *, Tensor(a!) out, Tensor(b!) lse) -> ()")
def mla_decode_out(*arguments: Any, out: Tensor, lse: Tensor) -> None:
    interface.decode_here((*_all(*arguments), out, lse))


@_define(
    "mla_metadata(Tensor cache_seqlens, SymInt rows_per_group, SymInt heads_k) -> (Tensor, Tensor)"
)
def mla_metadata(cache_seqlens: Tensor, rows_per_group: int, heads_k: int) -> tuple[Tensor, Tensor]:
    return metadata.plan_here(cache_seqlens, rows_per_group, heads_k)


@_define("mla_decode_backward(Tensor gradient, Tensor q, Tensor k_cache) -> (Tensor, Tensor)")
def mla_decode_backward(gradient: Tensor, q: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(
        "flash_mla_with_kvcache has no backward pass: it decodes, and gradients were asked for "
        "through it. Call it under torch.no_grad(), or train with an attention that has one."
    )


def _all(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor | None = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any]:
    """All arguments of an operator, for torch leaves out those that have their defaults."""
    inputs = q, k_cache, block_table, cache_seqlens
    return *inputs, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale, causal


# -- what they make, for tensors without elements --------------------------------------------------


@torch.library.register_fake("flashmla_rtc::mla_decode", lib=_library)
def _(q: Tensor, k_cache: Tensor, _table: Any, _lengths: Any, head_dim_v: int, *_: Any) -> Any:
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions, but its shape is {tuple(tensor.shape)}."
            )
    batch, seq_len_q, heads_q, _ = q.shape
    out = q.new_empty((batch, seq_len_q, heads_q, head_dim_v))
    return out, q.new_empty((batch, heads_q, seq_len_q), dtype=torch.float32)


@torch.library.register_fake("flashmla_rtc::mla_decode_out", lib=_library)
def _(*arguments: Any, **results: Any) -> None:
    return None


@torch.library.register_fake("flashmla_rtc::mla_metadata", lib=_library)
def _(cache_seqlens: Tensor, rows_per_group: int, heads_k: int) -> tuple[Tensor, Tensor]:
    parts = num_parts(num_sms(cache_seqlens.device), rows_per_group, heads_k)
    plan = cache_seqlens.new_empty((parts, 8), dtype=torch.int32)
    return plan, cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,), dtype=torch.int32)


@torch.library.register_fake("flashmla_rtc::mla_decode_backward", lib=_library)
def _(gradient: Tensor, q: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache)


# -- gradients and autocast ------------------------------------------------------------------------


class _Decode(torch.autograd.Function):
    """Results that ask for ``mla_decode_backward`` when a gradient reaches them. It is an operator
    of its own, so that a program with a backward pass can be compiled; only running that pass is an
    error.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:2])
        ctx.others = len(arguments) - 2
        with torch._C._AutoDispatchBelowAutograd():
            return mla_decode(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        of_inputs = mla_decode_backward(gradients[0], *ctx.saved_tensors)
        return (*of_inputs, *[None] * ctx.others)


def _followed(*arguments: Any) -> tuple[Tensor, Tensor]:
    torch_modes.refuse_tangents(*arguments[:2])
    if torch_modes.asks_for_gradient(*arguments[:2]):
        torch_modes.refuse_transforms(*arguments[:2])  # others take a call as a constant
        return _Decode.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return mla_decode(*arguments)


def _followed_out(*arguments: Any, **results: Tensor) -> None:
    torch_modes.refuse_tangents(*arguments[:2], *results.values())
    _refuse_gradients(*arguments[:2], *results.values())
    with torch._C._AutoDispatchBelowAutograd():
        mla_decode_out(*arguments, **results)


_library.impl("mla_decode", _followed, "Autograd")
_library.impl("mla_decode_out", _followed_out, "Autograd")


def _like_the_cache(operator: Any, key: str) -> None:
    """Have ``operator`` take queries of another precision where autocast is on."""
    without = torch._C._ExcludeDispatchKeyGuard
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(q: Tensor, k_cache: Tensor, *arguments: Any, **results: Any) -> Any:
        if torch_modes.differ_in_precision(q, k_cache):
            q = q.to(k_cache.dtype)
        with without(keys):
            return operator(q, k_cache, *arguments, **results)

    _library.impl(operator.name().partition("::")[2], call, key)


for _operator in (mla_decode, mla_decode_out):
    for _key in ("AutocastCUDA", "AutocastCPU"):
        _like_the_cache(_operator, _key)


# -- the plain calls, where torch has to see them --------------------------------------------------


def plan(cache_seqlens: Any, rows_per_group: int, heads_k: int) -> tuple[Tensor, Tensor]:
    """``get_mla_metadata`` where torch has to see it."""
    _check_tensors(cache_seqlens=cache_seqlens)
    return mla_metadata(cache_seqlens, rows_per_group, heads_k)


def num_parts(sms: int, rows_per_group: int, heads_k: int) -> int:
    """Rows of a plan on a device with so many SMs, 0 if the kernels do not run there. The counts
    may be symbols.
    """
    return schedule.num_sm_parts(sms, rows_per_group, heads_k) if sms else metadata.CPU_PARTS


def num_sms(device: Any) -> int:
    """SMs of a device that the kernels run on, 0 of another."""
    where = arrays.device_named(device)
    return device_facts(where.index).num_sms if backends.why_not(where) is None else 0


def decode(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: Any,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: Any,
    causal: bool,
    out: Any,
    lse: Any,
) -> tuple[Tensor, Tensor]:
    """``flash_mla_with_kvcache`` where torch has to see it.

    Raises:
        TypeError, ValueError: what an operator can't be given; what is in it, the operator checks.
        RuntimeError: ``out`` or ``lse`` is given, and a gradient is asked for of it or an input.
    """
    _check_tensors(
        q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens, out=out, lse=lse
    )
    causal = option_checks.check_flag(causal, "causal")
    if type(head_dim_v) not in (int, torch.SymInt):
        head_dim_v = messages.integer(head_dim_v, "head_dim_v")
    if softmax_scale is not None:
        softmax_scale = option_checks.check_scale(softmax_scale, 1)
    if isinstance(tile_scheduler_metadata, metadata.FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(
                "num_splits must be None when tile_scheduler_metadata is a FlashMLASchedMeta, "
                "which holds its own."
            )
        tile_scheduler_metadata, num_splits = _held(
            tile_scheduler_metadata, q, k_cache, cache_seqlens
        )
    _check_tensors(tile_scheduler_metadata=tile_scheduler_metadata, num_splits=num_splits)
    inputs = (q, k_cache, block_table, cache_seqlens, head_dim_v)
    options = (tile_scheduler_metadata, num_splits, softmax_scale, causal)
    if out is None and lse is None:
        return mla_decode(*inputs, *options)
    _refuse_gradients(q, k_cache, *(tensor for tensor in (out, lse) if tensor is not None))
    batch, seq_len_q, heads_q, _ = q.shape
    if out is None:
        out = q.new_empty((batch, seq_len_q, heads_q, head_dim_v), dtype=k_cache.dtype)
    if lse is None:
        lse = q.new_empty((batch, heads_q, seq_len_q), dtype=torch.float32)
    mla_decode_out(*inputs, *options, out=out, lse=lse)
    return out, lse


def _held(holder: Any, q: Tensor, k_cache: Tensor, cache_seqlens: Tensor) -> tuple[Any, Any]:
    """The plan that a ``FlashMLASchedMeta`` holds for this call, made now if there is none."""
    batch, seq_len_q, heads_q, _ = q.shape
    heads_k = k_cache.shape[2]
    now = batch, seq_len_q, heads_q, heads_k, arrays.device_named(q.device)
    if holder.tile_scheduler_metadata is None:
        made = mla_metadata(cache_seqlens, seq_len_q * heads_q // heads_k, heads_k)
        if type(made[0]) is not Tensor:  # of no use to later calls
            return made
        holder.tile_scheduler_metadata, holder.num_splits = made
    else:
        holder.check(now)
    if type(cache_seqlens) is Tensor:  # others are of no use to those who look at the plan
        holder.use(now, cache_seqlens)
    return holder.tile_scheduler_metadata, holder.num_splits


def _check_tensors(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor where torch has to see the call (compiled and "
                "traced programs, gradients, autocast, dispatch modes), but it is of type "
                f"{type(value).__name__}."
            )


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch_modes.asks_for_gradient(*tensors):
        raise RuntimeError(
            "out and lse can't be given when they, q or k_cache require a gradient: torch can't "
            "follow what is written into a tensor that is there. Leave them out, or call under "
            "torch.no_grad()."
        )
