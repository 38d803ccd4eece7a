"""The split plan as users hold it: two arrays, or an object that is filled at the first call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import (
    arrays,
    backends,
    option_checks,
    plan_checks,
    schedule,
    sm90,
    torch_modes,
)
from .arrays import Device, View
from .checks import DecodeShape

# A CPU works through requests one after the other: one part.
CPU_PARTS = 1


_CONFIGURATION = ("batch", "seq_len_q", "heads_q", "heads_k", "device")


@dataclass(repr=False, eq=False)
class FlashMLASchedMeta:
    """A plan that ``flash_mla_with_kvcache`` fills at its first call and uses again at the next.
    In a notebook it shows itself.

    One object serves every layer of a step. The calls that share it must agree in batch, seq_len_q,
    head counts and device; another call raises ValueError. Lengths may change in place: a plan made
    for others stays correct and merely balances worse.

    Attributes:
        tile_scheduler_metadata: int32 (num_sm_parts, 8), or None before the first call. May be
            assigned.
        num_splits: int32 (batch + 1,), or None before the first call. May be assigned.
    """

    tile_scheduler_metadata: Any = None
    num_splits: Any = None
    # The plan that calls have used so far, the configuration that they had, and the lengths that
    # the first of them gave, which a picture of the plan needs.
    _used: Any = field(default=None)
    _made_for: tuple[Any, ...] = field(default=())
    _lengths: Any = field(default=None)

    def plan_for(self, shape: DecodeShape, cache_seqlens: View) -> Any:
        """The plan's array for a call of this shape, made now if there is none.

        Raises:
            ValueError: the plan was made for another batch, seq_len_q, head count or device.
        """
        now = made_for(shape, cache_seqlens.device)
        if self.tile_scheduler_metadata is None:
            self.tile_scheduler_metadata, self.num_splits = make_plan(
                cache_seqlens, shape.rows_per_group, shape.heads_k
            )
        else:
            self.check(now)
        self.use(now, cache_seqlens.source)
        return self.tile_scheduler_metadata

    def use(self, now: tuple[Any, ...], cache_seqlens: Any) -> None:
        """A call of the configuration ``now`` uses the plan that is there."""
        if self._used is not self.tile_scheduler_metadata:
            self._lengths = cache_seqlens
        self._used, self._made_for = self.tile_scheduler_metadata, now

    def check(self, now: tuple[Any, ...]) -> None:
        """Raises ValueError if a call used this plan for another configuration than ``now``."""
        if self._used is not self.tile_scheduler_metadata or self._made_for == now:
            return
        differing = [
            f"{name} {before} then, {value} now"
            for name, before, value in zip(_CONFIGURATION, self._made_for, now, strict=True)
            if before != value
        ]
        raise ValueError(
            "tile_scheduler_metadata was filled by a call of another configuration: "
            f"{'; '.join(differing)}. Make a new one with get_mla_metadata()."
        )

    @property
    def planned_lengths(self) -> Any:
        """``cache_seqlens`` of the first call that used this plan, or None before it."""
        return self._lengths if self._used is self.tile_scheduler_metadata else None

    def __repr__(self) -> str:
        if self.tile_scheduler_metadata is None:
            return "FlashMLASchedMeta(no plan yet)"
        facts = []
        try:  # what was assigned is looked at by the call
            facts.append(f"num_sm_parts={len(self.tile_scheduler_metadata)}")
            if self.num_splits is not None:
                facts.append(f"requests={len(self.num_splits) - 1}")
        except TypeError:
            return f"FlashMLASchedMeta({self.tile_scheduler_metadata!r}, {self.num_splits!r})"
        if self.planned_lengths is not None:
            facts += [f"{n}={v}" for n, v in zip(_CONFIGURATION, self._made_for, strict=True)]
        return f"FlashMLASchedMeta({', '.join(facts)})"

    def _repr_html_(self) -> str:
        from .plan_html import plan_html

        return plan_html(self)


def made_for(shape: DecodeShape, device: Device) -> tuple[Any, ...]:
    """What the calls that share a :class:`FlashMLASchedMeta` must agree in."""
    return shape.batch, shape.seq_len_q, shape.heads_q, shape.heads_k, device


def num_sm_parts(device: Any, num_q_tokens_per_head_k: int, num_heads_k: int) -> int:
    """Rows of the plans that ``get_mla_metadata`` makes on ``device``, whatever the batch.

    For buffers that are made before there are lengths, such as those of a captured graph.

    Args:
        device: as in :func:`flashmla_rtc.prepare`.
        num_q_tokens_per_head_k: query rows of one KV head: seq_len_q * heads_q // heads_k.
        num_heads_k: KV heads.

    Raises:
        TypeError, ValueError: see the message.
    """
    plan_checks.check_counts(num_q_tokens_per_head_k, num_heads_k)
    if torch_modes.is_compiling():
        from .integrations import torch as operators
        from .integrations import torch_constants

        sms = torch_constants.num_sms(device)
        return operators.num_parts(sms, num_q_tokens_per_head_k, num_heads_k)
    where = arrays.device_named(device)
    return num_parts(where, int(num_q_tokens_per_head_k), int(num_heads_k))


def num_parts(device: Device, rows_per_group: int, heads_k: int) -> int:
    """Rows of a plan on ``device``."""
    if backends.choose(device) == "sm90":
        return sm90.num_parts(device.index, rows_per_group, heads_k)
    return CPU_PARTS


def make_plan(cache_seqlens: View, rows_per_group: int, heads_k: int) -> tuple[Any, Any]:
    """``(tile_scheduler_metadata, num_splits)``: the caller's library, device and stream."""
    if backends.choose(cache_seqlens.device) == "sm90":
        metadata, num_splits = sm90.plan(cache_seqlens, rows_per_group, heads_k)
        return (
            arrays.from_native(cache_seqlens, metadata),
            arrays.from_native(cache_seqlens, num_splits),
        )
    model = schedule.cost_model(rows_per_group, heads_k)
    plan, splits = schedule.plan_numpy(arrays.to_numpy(cache_seqlens), CPU_PARTS, model)
    return arrays.from_numpy(cache_seqlens, plan), arrays.from_numpy(cache_seqlens, splits)


def get_mla_metadata(
    cache_seqlens: Any = None,
    num_q_tokens_per_head_k: Any = None,
    num_heads_k: Any = None,
    num_heads_q: Any = None,
    is_fp8_kvcache: bool = False,
    topk: Any = None,
    *,
    num_heads_per_head_k: Any = None,
) -> tuple[Any, Any]:
    """Plan how ``flash_mla_with_kvcache`` splits its work, in any of FlashMLA's three forms.

    - ``get_mla_metadata()`` returns ``(FlashMLASchedMeta(), None)``, which the first decode call
      fills.
    - ``get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k)`` and
      ``get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None)``
      plan now, on the device and current stream of ``cache_seqlens``, without waiting for them.

    Args:
        cache_seqlens: int32 (batch,), keys of each request.
        num_q_tokens_per_head_k: query rows of one KV head: seq_len_q * heads_q // heads_k.
        num_heads_k: KV heads.
        num_heads_q: query heads; only checked against num_heads_k.
        is_fp8_kvcache, topk: not supported yet.
        num_heads_per_head_k: the first release's name of ``num_q_tokens_per_head_k``.

    Returns:
        ``tile_scheduler_metadata`` int32 (num_sm_parts, 8) and ``num_splits`` int32 (batch + 1,).
        num_sm_parts depends on the device and the head counts alone, so both can be updated in
        place under a captured graph.

    Raises:
        TypeError, ValueError: see the message; nothing has been launched.
        NotImplementedError: fp8 caches and top-k indices.
    """
    if is_fp8_kvcache is not False and option_checks.check_flag(is_fp8_kvcache, "is_fp8_kvcache"):
        raise NotImplementedError("is_fp8_kvcache=True: an fp8 KV cache is not supported yet.")
    if topk is not None:
        raise NotImplementedError("topk: sparse attention over indices is not supported yet.")
    if num_heads_per_head_k is not None:
        if num_q_tokens_per_head_k is not None:
            raise TypeError(
                "num_heads_per_head_k is the old name of num_q_tokens_per_head_k; give one of "
                "them, not both."
            )
        num_q_tokens_per_head_k = num_heads_per_head_k
    if (
        cache_seqlens is None
        and num_q_tokens_per_head_k is None
        and num_heads_k is None
        and num_heads_q is None
    ):
        return FlashMLASchedMeta(), None
    for name, value in (
        ("cache_seqlens", cache_seqlens),
        ("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        ("num_heads_k", num_heads_k),
    ):
        if value is None:
            raise TypeError(
                "get_mla_metadata takes no arguments, or cache_seqlens, num_q_tokens_per_head_k "
                f"and num_heads_k together; {name} is missing."
            )
    if torch_modes.is_compiling() or torch_modes.must_see_plan(cache_seqlens):
        from .integrations import torch as operators

        plan_checks.check_counts(num_q_tokens_per_head_k, num_heads_k, num_heads_q)
        return operators.plan(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    return plan_here(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q)


def plan_here(
    cache_seqlens: Any,
    num_q_tokens_per_head_k: Any,
    num_heads_k: Any,
    num_heads_q: Any = None,
) -> tuple[Any, Any]:
    """:func:`get_mla_metadata` on what it is given, whatever torch has to see."""
    lengths = arrays.view(cache_seqlens, "cache_seqlens")
    plan_checks.check_planning(lengths, num_q_tokens_per_head_k, num_heads_k, num_heads_q)
    return make_plan(lengths, int(num_q_tokens_per_head_k), int(num_heads_k))
