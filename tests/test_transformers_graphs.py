"""Decode steps that are recorded and replayed, against the plain way, on a CPU.

``StepRecorder`` stands in for CUDA graphs; tests/gpu/test_transformers_steps.py has real ones.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import MODEL_TYPES, prompts  # noqa: E402
from recorded_steps import GREEDY, both, filled, model_of, recorder, same, steps  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    PagesExhausted,
    use_flash_mla,
)

pytestmark = pytest.mark.usefixtures("steps_are_recorded")


# -- generate(), in each of its ways ---------------------------------------------------------------


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "longcat_flash"])
def test_256_greedy_tokens_of_unequal_prompts(model_type: str) -> None:
    model = model_of(model_type)
    expected, actual = both(
        lambda m: m.generate(
            **prompts(70, 12, 1),
            max_new_tokens=256,
            output_scores=True,
            output_logits=True,
            **GREEDY,
        ),
        model,
    )
    assert torch.equal(actual.sequences, expected.sequences)
    scores = zip(actual.scores + actual.logits, expected.scores + expected.logits, strict=True)
    for one, other in scores:
        assert torch.equal(one, other)  # to the bit, and none written over by a later step
    made = recorder(model)
    assert (made.watched, made.recorded, made.replayed) == (1, 1, 254)
    assert actual.past_key_values.cache_seqlens.tolist() == [70 + 255, 12 + 255, 1 + 255]
    pages = [cache.past_key_values.layers[0].pages for cache in (expected, actual)]
    tables = [cache.past_key_values.block_table for cache in (expected, actual)]
    stored = [p[t.long()].flatten(1, 2) for p, t in zip(pages, tables, strict=True)]
    for request, length in enumerate([70 + 255, 12 + 255, 1 + 255]):
        assert torch.equal(stored[0][request, :length], stored[1][request, :length])


def test_sampling() -> None:
    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 40}
    expected, actual = both(lambda m: m.generate(**prompts(20, 7), **arguments))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_beams(model_type: str) -> None:
    arguments = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 80}
    expected, actual = both(
        lambda m: m.generate(**prompts(62, 9), **arguments, **GREEDY, output_scores=True),
        model_of(model_type),
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    assert torch.equal(actual.sequences_scores, expected.sequences_scores)


def test_assisted_decoding_with_crops() -> None:
    model = model_of()
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += 0.05 * torch.randn(assistant.lm_head.weight.shape)

    def run(converted: Any) -> Any:
        helper = use_flash_mla(copy.deepcopy(assistant), cuda_graphs=converted is model)
        return converted.generate(
            **prompts(50), max_new_tokens=60, assistant_model=helper, **GREEDY
        )

    expected, actual = both(run, model)
    assert torch.equal(actual.sequences, expected.sequences)
    assert recorder(model).recorded > 1  # of several numbers of tokens


def test_a_chat_that_goes_on_from_a_returned_cache() -> None:
    def chat(model: Any) -> list[Any]:
        inputs, turns, past = prompts(33, 20), [], None
        for turn in range(3):
            result = model.generate(**inputs, past_key_values=past, max_new_tokens=30, **GREEDY)
            turns.append(result.sequences)
            past = result.past_key_values
            new = prompts(9, 4, seed=10 + turn)
            answered = torch.ones(2, result.sequences.shape[1] - inputs["input_ids"].shape[1])
            inputs = {
                "input_ids": torch.cat((result.sequences, new["input_ids"]), 1),
                "attention_mask": torch.cat(
                    (inputs["attention_mask"], answered.long(), new["attention_mask"]), 1
                ),
            }
        return turns

    expected, actual = both(chat)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# -- steps of one's own ----------------------------------------------------------------------------


def test_positions_may_be_left_to_the_model() -> None:
    """It counts columns then, which a recording must not keep."""
    same(lambda m: [steps(m, filled(m, 62, 9), 6)])


def test_a_cache_that_grows_is_recorded_again() -> None:
    model = same(lambda m: [steps(m, filled(m, 60), 1100, batch=1)])
    assert 2 <= recorder(model).recorded <= 3


def test_steps_are_recorded_again_after_growth_that_failed_half_way() -> None:
    """The first layer's pages have moved, though the cache is no larger than before."""

    def run(model: Any) -> list[Any]:
        cache = filled(model, 60)
        found = [steps(model, cache, 4, batch=1)]
        layer = cache.layers[1]
        layer.fit = mock.Mock(side_effect=torch.OutOfMemoryError("no memory"))
        with pytest.raises(torch.OutOfMemoryError):
            steps(model, cache, 1, batch=1, tokens=2000)
        del layer.fit
        found.append(steps(model, cache, 4, batch=1))
        found.append(steps(model, cache, 1, batch=1, tokens=20))  # reads what those have written
        return found

    model = same(run)
    assert recorder(model).recorded == 2


def test_a_cache_of_fixed_size_is_recorded_once_and_can_be_full() -> None:
    model = same(lambda m: [steps(m, filled(m, 60, pages=6), 300, batch=1)])
    assert recorder(model).recorded == 1
    with torch.no_grad():
        cache = filled(model, 60, pages=1)
        before = steps(model, cache, 3, batch=1)
        assert before.shape[1] == 3
        steps(model, cache, 1, batch=1)
        for _ in range(2):
            with pytest.raises(PagesExhausted):
                steps(model, cache, 1, batch=1)
        cache.crop(-2)
        assert cache.cache_seqlens.tolist() == [62]
        steps(model, cache, 2, batch=1)


def test_a_table_wider_than_it_was_recorded_for() -> None:
    """Without the cache having grown."""

    def run(model: Any) -> list[Any]:
        cache = filled(model, 20, pages=40)
        return [
            steps(model, cache, 4, batch=1),
            steps(model, cache, 1, batch=1, tokens=990),
            steps(model, cache, 80, batch=1),
        ]

    model = same(run)
    assert recorder(model).recorded == 2


def test_two_caches_in_turn() -> None:
    def run(model: Any) -> list[Any]:
        one, two = filled(model, 30, 9), filled(model, 5, 77)
        return [steps(model, cache, 3) for cache in (one, two, one, two, one)]

    assert recorder(same(run)).recorded == 2


def test_copies_of_a_cache_are_independent() -> None:
    def run(model: Any) -> list[Any]:
        one = filled(model, 30, 9)
        found = [steps(model, one, 4)]
        two = copy.deepcopy(one)
        found += [steps(model, one, 5), steps(model, two, 3, tokens=2), steps(model, one, 2)]
        return [*found, steps(model, two, 3)]

    same(run)


def test_other_batches_and_numbers_of_tokens() -> None:
    def run(model: Any) -> list[Any]:
        cache = filled(model, 30, 9, 50)
        found = [steps(model, cache, 3, 3), steps(model, cache, 3, 3, tokens=4)]
        cache.batch_select_indices(torch.tensor([2, 0]))
        found += [steps(model, cache, 3), steps(model, cache, 3, tokens=4)]
        cache.batch_repeat_interleave(2)
        found += [steps(model, cache, 3, 4), steps(model, cache, 1, 4, tokens=30)]
        cache.crop(-20)
        found += [steps(model, cache, 3, 4)]
        cache.reset()
        model(**prompts(70, 3, 3), past_key_values=cache)
        return [*found, steps(model, cache, 3, 3)]

    model = same(run)
    assert recorder(model).recorded == 5  # the last uses the first again


def test_embeddings_in_place_of_tokens() -> None:
    def run(model: Any) -> list[Any]:
        cache, found = filled(model, 30, 9), []
        for seed in range(4):
            ids = prompts(1, 1, seed=seed)["input_ids"]
            embeddings = model.get_input_embeddings()(ids)
            found.append(model(inputs_embeds=embeddings, past_key_values=cache).logits)
        return found

    same(run)


def test_a_model_without_a_head() -> None:
    def run(model: Any) -> list[Any]:
        base = model.base_model
        cache = filled(base, 30, 9)
        output = [base(torch.full((2, 1), i + 1), past_key_values=cache) for i in range(5)]
        assert all(type(o) is type(output[0]) and o.past_key_values is cache for o in output)
        return [o.last_hidden_state for o in output]

    same(run)


def test_padding_in_a_step_goes_the_plain_way_between_recorded_ones() -> None:
    def run(model: Any) -> list[Any]:
        cache = filled(model, 30, 9)
        found = [steps(model, cache, 3)]
        mask = torch.cat((prompts(30, 9)["attention_mask"], torch.ones(2, 4).long()), 1)
        mask[0, -1] = 0
        found.append(
            model(torch.ones(2, 1).long(), attention_mask=mask, past_key_values=cache).logits[1:]
        )
        return [*found, steps(model, cache, 3)]

    same(run)


def test_inference_mode_may_come_and_go() -> None:
    def run(model: Any) -> list[Any]:
        cache = filled(model, 30, 9)
        found = []
        for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with context():
                found.append(steps(model, cache, 3))
        return found

    same(run)
