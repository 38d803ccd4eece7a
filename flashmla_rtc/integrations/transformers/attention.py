"""The forward that replaces an attention module's own, over a paged cache.

A few new tokens attend in absorbed form. The key of a head is ``W_UK @ latent``, so
``q_nope . key`` is ``(q_nope @ W_UK) . latent``: queries are taken to the latents once, and every
head reads the same 576 numbers of a token, which the kernels do page by page. What comes back is
a mean of latents, which ``W_UV`` takes to the head's values. Both matrices are views of
``kv_b_proj.weight``.

Many new tokens attend in expanded form, as in the model's own forward: with as many queries as keys
the products over 192 and 128 numbers a head cost less than those over 576 and 512.
"""

from __future__ import annotations

from typing import Any

import torch

from flashmla_rtc import flash_mla_with_kvcache

from .cache import MLAPagedCache
from .expanded import attend_expanded
from .families import FAMILIES
from .projection import check_projection
from .versions import CACHE


def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """``forward`` of a converted module; its own one where the cache is not paged.

    The keywords are those of the model's own forward. Returns (batch, tokens, hidden) and, in place
    of attention weights, None.

    Raises:
        NotImplementedError: ``kv_b_proj`` is no longer the plain layer that was converted.
    """
    cache = kwargs.get(CACHE)
    if not isinstance(cache, MLAPagedCache) or cache.step is None:
        own = self._flash_mla_own_forward
        result: tuple[torch.Tensor, None] = (
            type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        )
        return result
    check_projection(f"kv_b_proj of layer {self.layer_idx}", self.kv_b_proj)
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    q_nope, q_pe, latent, k_pe = project(self, hidden_states, kwargs["position_embeddings"])
    pages = cache.append(self.layer_idx, latent, k_pe)
    if cache.step.decode:
        out = attend_absorbed(self, q_nope, q_pe, pages, cache.step)
    else:
        out = attend_expanded(self, torch.cat((q_nope, q_pe), -1), pages, cache.step)
    return self.o_proj(out.flatten(2)), None


def project(
    module: Any, hidden_states: torch.Tensor, position_embeddings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and what is stored of new tokens (batch, tokens, hidden), as the model makes them.

    Returns:
        q_nope (batch, tokens, heads, qk_nope_head_dim), q_pe (batch, tokens, heads,
        qk_rope_head_dim) rotated, latent (batch, tokens, kv_lora_rank) after its norm, k_pe (batch,
        tokens, qk_rope_head_dim) rotated.
    """
    family = FAMILIES[module.config.model_type]
    if module.q_lora_rank is None:
        q = module.q_proj(hidden_states)
    else:
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
    q = q.unflatten(-1, (-1, module.qk_head_dim))
    compressed = module.kv_a_proj_with_mqa(hidden_states)
    latent, k_pe = compressed.split((module.kv_lora_rank, module.qk_rope_head_dim), -1)
    latent = module.kv_a_layernorm(latent)
    if family.scales_latents:
        q, latent = q * module.mla_scale_q_lora, latent * module.mla_scale_kv_lora
    q_nope, q_pe = q.split((module.qk_nope_head_dim, module.qk_rope_head_dim), -1)
    # Rotating functions take (batch, heads, tokens, rope).
    q_pe, k_pe = family.rotate(module, q_pe.transpose(1, 2), k_pe.unsqueeze(1), position_embeddings)
    return q_nope, q_pe.transpose(1, 2), latent, k_pe.squeeze(1)


def attend_absorbed(
    module: Any, q_nope: torch.Tensor, q_pe: torch.Tensor, pages: torch.Tensor, step: Any
) -> torch.Tensor:
    """Attention over pages (capacity, 64, 1, kv_lora_rank + rope) that hold the new tokens already.

    Takes queries as :func:`project` gives them and returns (batch, tokens, heads, v_head_dim).
    """
    batch, tokens, heads, nope = q_nope.shape
    rank, width = module.kv_lora_rank, module.v_head_dim
    weight = module.kv_b_proj.weight.view(heads, nope + width, rank)
    q = q_nope.new_empty(batch, tokens, heads, pages.shape[-1])
    by_head = q.view(batch * tokens, heads, -1).transpose(0, 1)
    torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), weight[:, :nope], out=by_head[..., :rank])
    q[..., rank:] = q_pe
    mean, _ = flash_mla_with_kvcache(
        q,
        pages,
        step.block_table,
        step.cache_seqlens,
        rank,
        step.metadata,
        softmax_scale=module.scaling,
        causal=True,
    )
    values = torch.bmm(mean.flatten(0, 1).transpose(0, 1), weight[:, nope:].transpose(1, 2))
    return values.transpose(0, 1).unflatten(0, (batch, tokens))
