"""generate() of converted models against the same call before they were."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import MODEL_TYPES, prompts, tiny_model  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    cache,
    remove_flash_mla,
    use_flash_mla,
)
from flashmla_rtc.integrations.transformers.versions import CACHE  # noqa: E402

GREEDY = {"do_sample": False, "return_dict_in_generate": True}


def both(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What ``generate`` gives before and after the model is converted."""
    torch.manual_seed(7)
    before = model.generate(*args, **kwargs)
    use_flash_mla(model)
    torch.manual_seed(7)
    after = model.generate(*args, **kwargs)
    assert isinstance(after.past_key_values, MLAPagedCache)
    assert not isinstance(before.past_key_values, MLAPagedCache)
    return before, after


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_256_greedy_tokens_of_unequal_prompts_are_the_same(model_type: str) -> None:
    model = tiny_model(model_type)
    before, after = both(model, **prompts(70, 12, 1), max_new_tokens=256, **GREEDY)
    assert torch.equal(after.sequences, before.sequences)
    assert len(after.sequences[0, 70:].unique()) > 5
    lengths = after.past_key_values.cache_seqlens
    assert lengths.tolist() == [70 + 255, 12 + 255, 1 + 255]
    assert lengths.dtype == after.past_key_values.block_table.dtype == torch.int32


def test_no_mask_is_read_in_the_steps_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    seen = cache.MLAPagedCache._new_tokens

    def recorded(self: Any, batch: int, tokens: int, mask: Any) -> Any:
        read.append(mask is not None and mask is not self._known_mask)
        return seen(self, batch, tokens, mask)

    monkeypatch.setattr(cache.MLAPagedCache, "_new_tokens", recorded)
    model = use_flash_mla(tiny_model())
    model.generate(**prompts(9, 5), max_new_tokens=6, do_sample=False)
    assert read == [True, False, False, False, False, False]


def test_sampling_draws_the_same_tokens() -> None:
    model = tiny_model()
    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 40}
    before, after = both(model, **prompts(20, 7), **arguments, return_dict_in_generate=True)
    assert torch.equal(after.sequences, before.sequences)
    assert after.past_key_values.batch_size == 6


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_beams_are_the_same(model_type: str) -> None:
    model = tiny_model(model_type)
    arguments = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 80}
    before, after = both(
        model, **prompts(62, 9), **arguments, **GREEDY, output_scores=True, length_penalty=0.5
    )
    assert torch.equal(after.sequences, before.sequences)
    assert torch.equal(after.beam_indices, before.beam_indices)
    assert (after.sequences_scores - before.sequences_scores).abs().max() < 1e-4
    assert len(set(after.beam_indices.flatten().tolist())) > 4  # they do cross


def test_beams_share_the_pages_of_what_they_have_in_common() -> None:
    model = use_flash_mla(tiny_model())
    arguments = {"num_beams": 4, "max_new_tokens": 100, "pad_token_id": 0}
    result = model.generate(**prompts(30), **arguments, **GREEDY)
    paged = result.past_key_values
    assert paged.requests.allocator.in_use < 4 * 3
    assert len(paged.block_table[:, 0].unique()) < 4


@pytest.mark.parametrize("converted_assistant", [False, True])
def test_assisted_decoding(converted_assistant: bool) -> None:
    model = tiny_model(num_hidden_layers=2)
    plain = model.generate(**prompts(50), max_new_tokens=60, **GREEDY)
    assistant = copy.deepcopy(model)  # one that is right at first, then wrong now and then
    with torch.no_grad():
        assistant.lm_head.weight += 0.05 * torch.randn(assistant.lm_head.weight.shape)
    if converted_assistant:
        use_flash_mla(assistant)
    use_flash_mla(model)
    crops = count_crops(model)
    after = model.generate(**prompts(50), max_new_tokens=60, assistant_model=assistant, **GREEDY)
    assert torch.equal(after.sequences, plain.sequences)
    assert isinstance(after.past_key_values, MLAPagedCache)
    assert any(crops)


def test_prompt_lookup_decoding() -> None:
    model = tiny_model()
    inputs = prompts(20)
    inputs = {name: tensor.repeat(1, 4) for name, tensor in inputs.items()}
    plain = model.generate(**inputs, max_new_tokens=60, **GREEDY)
    use_flash_mla(model)
    crops = count_crops(model)
    after = model.generate(**inputs, max_new_tokens=60, prompt_lookup_num_tokens=5, **GREEDY)
    assert torch.equal(after.sequences, plain.sequences)
    assert any(crops)


def count_crops(model: Any) -> list[int]:
    """Filled with what is taken away from caches that the model is given."""
    crops: list[int] = []

    class Watched(MLAPagedCache):
        def crop(self, tokens_to_remove: int) -> None:
            crops.append(int(tokens_to_remove))
            super().crop(tokens_to_remove)

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        model_kwargs[CACHE] = Watched(model.config)

    model._prepare_cache_for_generation = prepare
    return crops


def test_a_chat_goes_on_from_a_returned_cache() -> None:
    model = tiny_model()

    def chat() -> list[Any]:
        inputs, turns, past = prompts(33, 20), [], None
        for turn in range(3):
            result = model.generate(**inputs, past_key_values=past, max_new_tokens=30, **GREEDY)
            turns.append(result.sequences)
            past = result.past_key_values
            new = prompts(9, 4, seed=10 + turn)  # padded on the left, in the middle of the rows
            answered = torch.ones(2, result.sequences.shape[1] - inputs["input_ids"].shape[1])
            inputs = {
                "input_ids": torch.cat((result.sequences, new["input_ids"]), 1),
                "attention_mask": torch.cat(
                    (inputs["attention_mask"], answered.long(), new["attention_mask"]), 1
                ),
            }
        assert isinstance(past, MLAPagedCache) == hasattr(model.base_model, "_flash_mla")
        return turns

    before = chat()
    use_flash_mla(model)
    for one, other in zip(chat(), before, strict=True):
        assert torch.equal(one, other)


def test_an_answer_that_ended_early_may_be_hidden_in_the_next_turn() -> None:
    """``generate`` takes the padding after an answer for padding when it makes the mask itself."""
    model = tiny_model(eos_token_id=None)
    free = model.generate(**prompts(20, 20), max_new_tokens=24, **GREEDY).sequences
    end = int(free[0, 28])  # ends the first request's answer early
    only_one = end not in free[1, 20:].tolist()
    assert only_one
    arguments = {**GREEDY, "max_new_tokens": 24, "eos_token_id": end, "pad_token_id": 0}
    new = prompts(6, 6, seed=5)["input_ids"]

    def second_turn() -> Any:
        first = model.generate(**prompts(20, 20), **arguments)
        tokens = torch.cat((first.sequences, new), 1)
        assert (tokens[0] == 0).any()
        past = first.past_key_values
        return model.generate(input_ids=tokens, past_key_values=past, **arguments)

    before = second_turn()
    use_flash_mla(model)
    after = second_turn()
    assert torch.equal(after.sequences, before.sequences)
    # 23 of the answer are stored, the next forward brings the 24th beside the new ones.
    hidden = int((before.sequences[0, : 20 + 24] == 0).sum())
    assert hidden > 0
    lengths = after.past_key_values.cache_seqlens.tolist()
    assert lengths[1] - lengths[0] == hidden


def test_a_prompt_that_is_kept_serves_several_questions() -> None:
    model = tiny_model()
    prompt = prompts(70)["input_ids"]
    questions = [prompts(8, seed=seed)["input_ids"] for seed in (3, 4)]
    joined = [torch.cat((prompt, question), 1) for question in questions]
    ones = [torch.ones_like(tokens) for tokens in joined]
    before = [
        model.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False)
        for tokens, mask in zip(joined, ones, strict=True)
    ]
    use_flash_mla(model)
    kept = MLAPagedCache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=kept)
    for tokens, mask, expected in zip(joined, ones, before, strict=True):
        past = copy.deepcopy(kept)
        answer = model.generate(
            tokens, attention_mask=mask, past_key_values=past, max_new_tokens=20, do_sample=False
        )
        assert torch.equal(answer, expected)
        assert kept.get_seq_length() == 70
    kept.batch_repeat_interleave(2)
    assert kept.requests.allocator.in_use == 2
    answers = model.generate(
        torch.cat(joined),
        attention_mask=torch.cat(ones),
        past_key_values=kept,
        max_new_tokens=20,
        do_sample=False,
    )
    assert torch.equal(answers, torch.cat(before))


def test_a_cache_that_is_given_is_used_and_one_of_another_class_too() -> None:
    model = tiny_model()
    expected = model.generate(**prompts(20, 9), max_new_tokens=10, do_sample=False)
    use_flash_mla(model)
    for past in (MLAPagedCache(model.config, pages=2), transformers.DynamicCache()):
        tokens = model.generate(
            **prompts(20, 9), past_key_values=past, max_new_tokens=10, do_sample=False
        )
        assert torch.equal(tokens, expected)
        assert past.get_seq_length() == 20 + 9


def test_prefill_in_chunks() -> None:
    model = tiny_model()
    before, after = both(
        model, **prompts(100, 71), max_new_tokens=20, prefill_chunk_size=32, **GREEDY
    )
    assert torch.equal(after.sequences, before.sequences)


def test_without_a_cache_and_with_a_static_one_the_model_goes_its_own_way() -> None:
    model = use_flash_mla(tiny_model())
    expected = model.generate(**prompts(12, 9), max_new_tokens=10, do_sample=False)
    for arguments in ({"use_cache": False}, {"cache_implementation": "static"}):
        tokens = model.generate(
            **prompts(12, 9), max_new_tokens=10, do_sample=False, disable_compile=True, **arguments
        )
        assert torch.equal(tokens, expected)


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_converted_model_is_converted_and_independent(
    copied: Callable[[Any], Any],
) -> None:
    model = use_flash_mla(tiny_model())
    other = copied(model)
    expected = model.generate(**prompts(12, 9), max_new_tokens=10, **GREEDY)
    remove_flash_mla(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    after = other.generate(**prompts(12, 9), max_new_tokens=10, **GREEDY)
    assert torch.equal(after.sequences, expected.sequences)
    assert isinstance(after.past_key_values, MLAPagedCache)
    remove_flash_mla(other)
    plain = other.generate(**prompts(12, 9), max_new_tokens=10, **GREEDY)
    assert not isinstance(plain.past_key_values, MLAPagedCache)
    assert torch.equal(plain.sequences, expected.sequences)


def test_inference_mode_may_come_and_go() -> None:
    model = use_flash_mla(tiny_model())
    tokens = prompts(90)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=True).logits
    with torch.inference_mode():
        past = model(tokens[:, :60], use_cache=True).past_key_values
    with torch.no_grad():
        model(tokens[:, 60:80], past_key_values=past)
    with torch.inference_mode():
        actual = model(tokens[:, 80:], past_key_values=past).logits
    assert (actual - expected[:, 80:]).abs().max() < 1e-4
