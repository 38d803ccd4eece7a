"""A model of DeepSeek-V2-Lite's attention on the kernels, against transformers' own in float32."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.allowed_skip,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
    ),
]

LITE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,  # no experts: choosing them waits for the host
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def lite(model_type: str, attention: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**LITE, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to("cuda").eval()


@pytest.fixture(params=["deepseek_v2", "deepseek_v3"])
def pair(request: pytest.FixtureRequest) -> Any:
    """Two models of the same weights: converted in bfloat16, transformers' own in float32."""
    from flashmla_rtc.integrations.transformers import use_flash_mla

    own = lite(request.param, "eager").to(torch.bfloat16)
    converted = use_flash_mla(copy.deepcopy(own))
    return converted, own.float()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def requests(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    tokens = torch.randint(1, LITE["vocab_size"], (len(lengths), longest), device="cuda")
    starts = longest - torch.tensor(lengths, device="cuda")
    mask = (torch.arange(longest, device="cuda") >= starts[:, None]).long()
    return tokens * mask, mask


def logits(model: Any, tokens: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Of the tokens of forwards over one cache, without those of padding."""
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    past, begin, found = None, 0, []
    for size in sizes:
        end = begin + size
        output = model(
            input_ids=tokens[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids[:, begin:end],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        found.append(output.logits[mask[:, begin:end] == 1].float())
        begin = end
    return torch.cat(found)


def test_logits_are_those_of_float32_up_to_bfloat16(pair: Any) -> None:
    converted, own = pair
    tokens, mask = requests(1100, 700, 64, 3)
    sizes = [1060, 1, 1, 4, 1, 33]
    actual = logits(converted, tokens, mask, sizes)
    expected = logits(own, tokens, mask, sizes)
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.02  # bfloat16 has 8 bits, and rounds many times in two layers
    # Where transformers rounds as often, it is as far away.
    rounded = logits(own.to(torch.bfloat16), tokens, mask, sizes)
    assert error < 1.5 * (rounded - expected).norm() / expected.norm() + 1e-3


def test_generate_works_in_each_of_its_ways(pair: Any) -> None:
    from flashmla_rtc.integrations.transformers import MLAPagedCache

    converted, _ = pair
    tokens, mask = requests(130, 60)
    for arguments in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        result = converted.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=70,
            return_dict_in_generate=True,
            **arguments,
        )
        assert result.sequences.shape == (2, 200)
        assert isinstance(result.past_key_values, MLAPagedCache)
    tokens = tokens[:1].repeat(1, 3)
    result = converted.generate(tokens, max_new_tokens=70, prompt_lookup_num_tokens=5)
    assert result.shape == (1, 460)


def test_greedy_tokens_are_likely_ones_to_float32(pair: Any) -> None:
    """The tokens may differ where two are about as likely; none may be far from the likeliest."""
    converted, own = pair
    tokens, mask = requests(200, 90)
    sequences = converted.generate(tokens, attention_mask=mask, max_new_tokens=100, do_sample=False)
    mask = torch.cat((mask, mask.new_ones(2, 100)), 1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    scores = own(sequences, attention_mask=mask, position_ids=position_ids).logits[:, 199:-1]
    chosen = scores.gather(-1, sequences[:, 200:, None])[..., 0]
    assert ((scores.amax(-1) - chosen) < 0.1 * scores.std()).all()


def test_a_decode_step_does_not_wait_for_the_device(pair: Any) -> None:
    converted, _ = pair
    tokens, mask = requests(126, 50)
    past = converted(tokens, attention_mask=mask, use_cache=True).past_key_values
    step = torch.ones(2, 1, dtype=torch.long, device="cuda")
    positions = mask.sum(1, keepdim=True)
    converted(step, position_ids=positions, past_key_values=past)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 6):  # over the end of a page
            converted(step, position_ids=positions + i, past_key_values=past)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert past.cache_seqlens.tolist() == [132, 56]


@pytest.mark.parametrize(
    "changes, dtype, said",
    [
        ({"kv_lora_rank": 256}, torch.bfloat16, "head_dim 320"),
        ({"qk_rope_head_dim": 32}, torch.bfloat16, "head_dim 544"),
        ({}, torch.float32, "float32"),
    ],
)
def test_what_the_kernels_do_not_take_is_told_when_the_model_is_converted(
    changes: dict[str, Any], dtype: torch.dtype, said: str
) -> None:
    from flashmla_rtc.integrations.transformers import use_flash_mla

    model = lite("deepseek_v3", "sdpa", **changes).to(dtype)
    with pytest.raises(NotImplementedError, match=said):
        use_flash_mla(model)
