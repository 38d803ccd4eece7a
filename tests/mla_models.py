"""Tiny random models of every supported type, for tests on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Threads that wait for each other take most of the time of models as small as these.
torch.set_num_threads(1)

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # so that greedy decoding does not run into one token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LONGCAT = {
    "num_layers": 1,  # of two attentions each
    "ffn_hidden_size": 32,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 16,
    "head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.8,
    "mscale_all_dim": 0.9,
    "beta_fast": 32,
    "beta_slow": 1,
}
MODEL_TYPES = (
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "longcat_flash",
    "youtu",
)


def tiny_model(
    model_type: str = "deepseek_v3",
    *,
    attention: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A random model in evaluation mode, the same for the same arguments."""
    more: dict[str, Any] = {"longcat_flash": LONGCAT, "youtu": {}}.get(model_type, EXPERTS)
    config = AutoConfig.for_model(model_type, **{**COMMON, **more, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=attention,
            experts_implementation="eager",  # the only one that takes float64
        )
        if changes.get("attention_bias"):
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def prompts(*lengths: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens of requests of these lengths, padded on the left, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of each token, as ``generate`` counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
