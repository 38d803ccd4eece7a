"""``FlashMLASchedMeta`` as a notebook shows it: the picture of its plan, or why there is none."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metadata import FlashMLASchedMeta


def plan_html(holder: FlashMLASchedMeta) -> str:
    """Copies plan and lengths to the host, and waits for them."""
    # One block, so that a page of Markdown that holds it leaves it alone.
    return f"<div>{_content(holder)}</div>"


def _content(holder: FlashMLASchedMeta) -> str:
    said = f"<code>{escape(repr(holder))}</code>"
    if holder.tile_scheduler_metadata is None:
        return f"{said}<br>The first <code>flash_mla_with_kvcache</code> makes the plan."
    if holder.planned_lengths is None:
        return (
            f"{said}<br>No call has used this plan yet, so the lengths are not known: "
            "<code>draw_plan(plan, cache_seqlens=…)</code> draws it."
        )
    from .plan_picture import draw_plan

    try:
        picture = draw_plan(holder)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{said}<br>It can't be drawn: {escape(str(error))}"
    return f"{said}{picture._repr_html_()}"
