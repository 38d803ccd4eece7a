"""Logits of converted models against transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mla_models import MODEL_TYPES, VOCABULARY, YARN, positions, prompts, tiny_model  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    SUPPORTED_MODEL_TYPES,
    MLAPagedCache,
    attention,
    remove_flash_mla,
    use_flash_mla,
)

# Eager attention takes its softmax in float32 whatever the model's dtype. In float64 it gives NaN
# for padding, since the lowest number of float64 is -inf to float32. sdpa does neither.
EAGER32 = ("eager", torch.float32, 2e-5)
EAGER64 = ("eager", torch.float64, 2e-6)
SDPA64 = ("sdpa", torch.float64, 1e-11)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn_v2": ("deepseek_v2", {"rope_parameters": YARN}),
    "yarn_v3": ("deepseek_v3", {"rope_parameters": YARN}),
    "halves": ("deepseek_v3", {"rope_interleave": False}),
    "bias": ("deepseek_v3", {"attention_bias": True}),
    "no_q_lora_v2": ("deepseek_v2", {"q_lora_rank": None}),
    "no_q_lora_v3": ("deepseek_v3", {"q_lora_rank": None}),
    "wide_values": ("glm4_moe_lite", {"v_head_dim": 20}),
}


pytestmark = pytest.mark.usefixtures("no_grad")


def steps(model: Any, inputs: dict[str, Any], sizes: list[int]) -> list[Any]:
    """Logits of forwards over one cache, ``sizes`` tokens each, the first with padding."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, begin, logits = None, 0, []
    for size in sizes:
        end = begin + size
        seen = mask[:, :end]
        output = model(
            input_ids=tokens[:, begin:end],
            attention_mask=seen,
            position_ids=positions(seen)[:, begin:],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits[seen[:, begin:] == 1])
        begin = end
    assert begin == tokens.shape[1]
    return logits


def compare(model: Any, inputs: dict[str, Any], sizes: list[int], tolerance: float) -> Any:
    expected = steps(model, inputs, sizes)
    use_flash_mla(model)
    actual = steps(model, inputs, sizes)
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max()
        assert scale > 0.5
        assert (one - other).abs().max() < tolerance * scale
    return model


@pytest.mark.parametrize("kind", [EAGER32, EAGER64, SDPA64], ids=["eager32", "eager64", "sdpa64"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prefill_and_decode_of_every_type(model_type: str, kind: tuple[str, Any, float]) -> None:
    own, dtype, tolerance = kind
    model = tiny_model(model_type, attention=own, dtype=dtype)
    sizes = [75, 1, 1, 5, 1, 30, 1]  # a forward of 30 is more than the kernels are given
    lengths = (114, 114, 114) if kind is EAGER64 else (114, 100, 43)
    compare(model, prompts(*lengths), sizes, tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_configurations(variant: str) -> None:
    model_type, changes = VARIANTS[variant]
    model = tiny_model(model_type, attention="sdpa", dtype=torch.float64, **changes)
    compare(model, prompts(90, 77), [86, 1, 3], 1e-11)


def test_yarn_changes_the_softmax_scale() -> None:
    """So that the test above would notice one that is left out."""
    model = tiny_model("deepseek_v3", rope_parameters=YARN)
    scaling = model.model.layers[0].self_attn.scaling
    assert abs(scaling / 20**-0.5 - 1) > 0.1


def test_every_supported_type_is_tested() -> None:
    assert tuple(sorted(SUPPORTED_MODEL_TYPES)) == MODEL_TYPES


def test_decode_goes_through_the_kernels_with_one_plan_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, Any]] = []
    decode = attention.flash_mla_with_kvcache

    def recorded(q: Any, pages: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((q.shape[1], args[3]))
        return decode(q, pages, *args, **kwargs)

    monkeypatch.setattr(attention, "flash_mla_with_kvcache", recorded)
    model = use_flash_mla(tiny_model(), max_decode_tokens=4)
    steps(model, prompts(19, 19), [8, 1, 4, 5, 1])
    assert [tokens for tokens, _ in calls] == [1, 1, 4, 4, 1, 1]  # two layers
    assert calls[0][1] is calls[1][1]
    assert calls[1][1] is not calls[2][1]


def test_a_mask_with_holes_and_padding_on_the_right() -> None:
    """Tokens are taken in order, whatever lies between them."""
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    inputs = prompts(40, 40)
    mask = inputs["attention_mask"]
    mask[0, 25:30] = 0
    mask[1, 3:11] = 0
    mask[0, 34] = 0  # one that a forward of a single token brings
    mask[1, 37] = 0  # one among four
    compare(model, inputs, [30, 4, 1, 4, 1], 1e-11)


def test_without_a_mask_all_tokens_count() -> None:
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    tokens = prompts(30, 30)["input_ids"]
    expected = model(tokens).logits
    use_flash_mla(model)
    first = model(tokens[:, :20], use_cache=True)
    second = model(tokens[:, 20:], past_key_values=first.past_key_values)
    actual = torch.cat((first.logits, second.logits), 1)
    assert (actual - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("additive", [False, True])
def test_a_4d_mask_is_followed(additive: bool) -> None:
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    tokens = prompts(24, 24)["input_ids"]
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 1, 24, 24, generator=generator) < 0.7
    mask = mask.tril() | torch.eye(24, dtype=torch.bool)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)

    def logits() -> Any:
        first = model(tokens[:, :20], attention_mask=mask[:, :, :20, :20], use_cache=True)
        second = model(
            tokens[:, 20:],
            attention_mask=mask[:, :, 20:],
            past_key_values=first.past_key_values,
        )
        return torch.cat((first.logits, second.logits), 1)

    expected = logits()
    use_flash_mla(model)
    assert (logits() - expected).abs().max() < 1e-11 * expected.abs().max()


def test_many_new_tokens_over_a_long_past() -> None:
    """More queries than share one mask."""
    model = tiny_model(attention="sdpa", dtype=torch.float64, max_position_embeddings=4096)
    compare(model, prompts(2500, 1400), [1200, 1300], 1e-11)


def test_embeddings_in_place_of_tokens() -> None:
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    tokens = prompts(10)["input_ids"]
    expected = model(tokens).logits
    use_flash_mla(model)
    actual = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=True)
    assert isinstance(actual.past_key_values, MLAPagedCache)
    assert (actual.logits - expected).abs().max() < 1e-11 * expected.abs().max()


def test_hidden_states_are_the_models_own() -> None:
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    tokens = prompts(10)["input_ids"]
    expected = model(tokens, output_hidden_states=True).hidden_states
    use_flash_mla(model)
    actual = model(tokens, output_hidden_states=True, use_cache=True).hidden_states
    assert len(actual) == len(expected) == 3
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-11 * other.abs().max()


def test_weights_are_neither_copied_nor_changed() -> None:
    model = tiny_model()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    use_flash_mla(model)
    model.generate(**prompts(9, 5), max_new_tokens=3, do_sample=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], value)


def test_changed_weights_are_used_at_once() -> None:
    model = tiny_model(attention="sdpa", dtype=torch.float64)
    use_flash_mla(model)
    inputs = prompts(12)
    steps(model, inputs, [10, 1, 1])
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.weight.mul_(1.5)
    actual = steps(model, inputs, [10, 1, 1])
    expected = steps(remove_flash_mla(model), inputs, [10, 1, 1])
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-11 * other.abs().max()


def test_the_last_token_of_a_vocabulary_fits() -> None:
    assert int(prompts(500)["input_ids"].max()) == VOCABULARY - 1
