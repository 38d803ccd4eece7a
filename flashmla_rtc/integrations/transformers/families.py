"""The model types that are supported, and what each does to queries and latents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Rotate = Callable[[Any, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """How the attention of one model type differs from the others'.

    Attributes:
        attention: name of the attention module's class.
        rotate: ``(module, q_pe, k_pe, position_embeddings)`` to the rotated ``(q_pe, k_pe)``, with
            the functions of the model's own file.
        scales_latents: whether queries and latents are multiplied by ``mla_scale_q_lora`` and
            ``mla_scale_kv_lora``.
    """

    attention: str
    rotate: Rotate
    scales_latents: bool = False


def _complex(module: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> Any:
    return _modeling(module).apply_rotary_emb(q_pe, k_pe, embeddings.to(q_pe.device))


def _interleaved(module: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> Any:
    return _modeling(module).apply_rotary_pos_emb_interleave(q_pe, k_pe, *embeddings)


def _as_configured(module: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> Any:
    if module.config.rope_interleave:
        return _interleaved(module, q_pe, k_pe, embeddings)
    return _modeling(module).apply_rotary_pos_emb(q_pe, k_pe, *embeddings)


def _modeling(module: Any) -> Any:
    """The file of transformers that defines the module's class."""
    return sys.modules[type(module).__module__]


FAMILIES = {
    "axk1": Family("AXK1Attention", _as_configured),
    "deepseek_v2": Family("DeepseekV2Attention", _complex),
    "deepseek_v3": Family("DeepseekV3Attention", _as_configured),
    "glm4_moe_lite": Family("Glm4MoeLiteAttention", _as_configured),
    "longcat_flash": Family("LongcatFlashMLA", _interleaved, scales_latents=True),
    "youtu": Family("YoutuAttention", _as_configured),
}
"""By ``config.model_type``. All have a latent of 512 and a k_pe of 64 as published."""
