"""A DeepSeek model of transformers, decoded through the paged kernels by generate() itself.

    python examples/transformers_generate.py

The model is a tiny one with random weights, in float32 and of a geometry that only the reference
backend takes, so this runs on a CPU and downloads nothing. With a real model on a Hopper GPU the
same two lines do: use_flash_mla(model), then model.generate(...).
"""

from __future__ import annotations

try:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError:
    raise SystemExit("This example needs torch and transformers 5.17 to 5.24.") from None
from dense_attention import relative_error

from flashmla_rtc.integrations.transformers import remove_flash_mla, use_flash_mla


def main() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()

    # Two prompts of 100 and 30 tokens, the shorter one padded on the left.
    attention_mask = (torch.arange(100) >= torch.tensor([[0], [70]])).long()
    input_ids = torch.randint(1, 100, (2, 100)) * attention_mask
    arguments = {
        "max_new_tokens": 40,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    use_flash_mla(model)
    result = model.generate(input_ids, attention_mask=attention_mask, **arguments)
    cache = result.past_key_values  # also result.cache, from transformers 5.24 on
    memory = cache.memory()
    print(f"{type(cache).__name__} of requests of {cache.cache_seqlens.tolist()} tokens:")
    print(f"{memory.used} bytes in pages; expanded keys and values would take {memory.expanded}")

    remove_flash_mla(model)
    expected = model.generate(input_ids, attention_mask=attention_mask, **arguments)
    assert torch.equal(result.sequences, expected.sequences)
    error = relative_error(torch.stack(result.logits).numpy(), torch.stack(expected.logits).numpy())
    print(f"the same {2 * 40} tokens as transformers' own attention; relative error {error:.1e}")
    assert error < 1e-4


if __name__ == "__main__":
    main()
