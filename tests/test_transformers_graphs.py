"""Decode steps that are recorded and replayed, against the plain way, on a CPU.

``StepRecorder`` stands in for CUDA graphs; tests/gpu/test_transformers_graphs.py has real ones.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import MODEL_TYPES, prompts, tiny_model  # noqa: E402
from step_recorder import StepRecorder  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    PagesExhausted,
    graphs,
    remove_flash_mla,
    use_flash_mla,
)

GREEDY = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def _recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "recorder_for", StepRecorder)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Decode steps run without")
        yield


def model_of(model_type: str = "deepseek_v3", **changes: Any) -> Any:
    """With experts that need nothing from the device, if it has any."""
    model = tiny_model(model_type, **changes)
    if model_type != "youtu":
        model.set_experts_implementation("batched_mm")
    return model


def recorder(model: Any) -> StepRecorder:
    found: StepRecorder = model.base_model._flash_mla.graphs.recorder(torch.device("cpu"))
    return found


def both(run: Callable[[Any], Any], model: Any = None, **settings: Any) -> tuple[Any, Any]:
    """What ``run`` gives on the plain way, and with recorded steps."""
    model = model_of() if model is None else model
    plain = use_flash_mla(copy.deepcopy(model), cuda_graphs=False)
    torch.manual_seed(7)
    expected = run(plain)
    recorded = use_flash_mla(model, cuda_graphs=True, **settings)
    torch.manual_seed(7)
    with torch.no_grad():
        actual = run(recorded)
    assert recorder(recorded).replayed > 0
    return expected, actual


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


def steps(model: Any, cache: Any, count: int, batch: int = 2, tokens: int = 1, **more: Any) -> Any:
    """Logits of steps after one another; tokens from a generator, so the same at each call."""
    generator = torch.Generator().manual_seed(cache.get_seq_length())
    found = []
    for _ in range(count):
        ids = torch.randint(1, 97, (batch, tokens), generator=generator)
        found.append(model(ids, past_key_values=cache, **more).logits)
    return torch.cat(found, 1)


def filled(model: Any, *lengths: int, **arguments: Any) -> MLAPagedCache:
    cache = MLAPagedCache(model.config, **arguments)
    model(**prompts(*lengths), past_key_values=cache)
    return cache


def same(run: Callable[[Any], list[Any]], **settings: Any) -> Any:
    """Asserts that ``run`` gives the same tensors either way, and returns the recorded model."""
    model = model_of()
    with torch.no_grad():
        expected, actual = both(run, model, **settings)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    return model


def test_positions_may_be_left_to_the_model() -> None:
    """It counts columns then, which a recording must not keep."""
    same(lambda m: [steps(m, filled(m, 62, 9), 6)])


def test_a_cache_that_grows_is_recorded_again() -> None:
    model = same(lambda m: [steps(m, filled(m, 60), 1100, batch=1)])
    assert 2 <= recorder(model).recorded <= 3


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
            logits_of_many(model, cache, 990),
            steps(model, cache, 80, batch=1),
        ]

    model = same(run)
    assert recorder(model).recorded == 2


def logits_of_many(model: Any, cache: Any, count: int) -> Any:
    return steps(model, cache, 1, batch=cache.batch_size, tokens=count)


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


# -- what is not recorded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"output_hidden_states": True}, {"return_dict": False}, {"other": 1}],
    ids=["hidden_states", "tuple", "unknown"],
)
def test_arguments_that_are_not_covered_go_the_plain_way(arguments: dict[str, Any]) -> None:
    model = use_flash_mla(model_of(), cuda_graphs=True)
    with torch.no_grad():
        cache = filled(model.base_model, 30, 9)
        token = torch.ones(2, 1, dtype=torch.long)
        for _ in range(4):
            output = model.base_model(token, past_key_values=cache, **arguments)
        assert recorder(model).watched == recorder(model).recorded == 0
        if "output_hidden_states" in arguments:
            assert len(output.hidden_states) == 3
            steps(model, cache, 3)  # the hooks that transformers left behind do nothing
            assert recorder(model).replayed == 2


def test_hooks_run() -> None:
    model = use_flash_mla(model_of(), cuda_graphs=True)
    calls: list[int] = []
    with torch.no_grad():
        cache = filled(model, 30, 9)
        steps(model, cache, 3)
        replayed = recorder(model).replayed
        inside = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
        steps(model, cache, 3)
        assert (len(calls), recorder(model).replayed) == (3, replayed)
        inside.remove()
        around = model.model.register_forward_hook(lambda *_: calls.append(2))
        steps(model, cache, 3)
        assert (calls[3:], recorder(model).replayed) == ([2, 2, 2], replayed + 3)
        around.remove()


def test_autocast_goes_the_plain_way() -> None:
    model = use_flash_mla(model_of(dtype=torch.bfloat16), cuda_graphs=True)
    with torch.no_grad():
        cache = filled(model, 30, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps(model, cache, 3)
        assert recorder(model).recorded == 0
        steps(model, cache, 3)
        assert recorder(model).recorded == 1


def test_weights_that_change_in_place_move_or_are_replaced() -> None:
    def run(model: Any) -> list[Any]:
        cache, found = filled(model, 30, 9), []
        layer = model.model.layers[0].self_attn.o_proj
        found.append(steps(model, cache, 3))
        layer.weight.mul_(1.5)
        found.append(steps(model, cache, 3))
        layer.weight.data = layer.weight.data * 1.5
        found.append(steps(model, cache, 3))
        layer.weight = torch.nn.Parameter(layer.weight * 1.5)
        found.append(steps(model, cache, 3))
        new = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.weight.copy_(layer.weight * 1.5)
        model.model.layers[0].self_attn.o_proj = new
        found.append(steps(model, cache, 3))
        return found

    model = same(run)
    assert recorder(model).recorded == 4


@pytest.mark.parametrize("model_type", ["deepseek_v3", "longcat_flash"])
def test_experts_that_wait_for_the_device_are_told_once(model_type: str) -> None:
    model = tiny_model(model_type)  # looks for the experts that were chosen
    expected = use_flash_mla(copy.deepcopy(model), cuda_graphs=False).generate(
        **prompts(20, 9), max_new_tokens=10, **GREEDY
    )
    use_flash_mla(model)
    with pytest.warns(
        UserWarning, match=r"can't be captured: the host waits for the device in aten"
    ):
        actual = model.generate(**prompts(20, 9), max_new_tokens=10, **GREEDY)
    assert torch.equal(actual.sequences, expected.sequences)
    again = model.generate(**prompts(20, 9), max_new_tokens=10, **GREEDY)  # without a warning
    assert torch.equal(again.sequences, expected.sequences)
    assert (recorder(model).watched, recorder(model).recorded) == (1, 0)

    if model_type == "longcat_flash":  # has no other
        return
    model.set_experts_implementation("batched_mm")
    model.generate(**prompts(20, 9), max_new_tokens=10)
    assert recorder(model).recorded == 1


def test_true_raises_where_a_step_can_not_be_captured() -> None:
    model = use_flash_mla(tiny_model(), cuda_graphs=True)
    said = r"cuda_graphs=True, but a decode step can't be captured in a CUDA graph: the host waits"
    with torch.no_grad():
        cache = filled(model, 30, 9)
        with pytest.raises(RuntimeError, match=said):
            steps(model, cache, 1)
        assert cache.get_seq_length() == 30


def test_a_recording_that_fails_leaves_all_as_it_was() -> None:
    expected = use_flash_mla(model_of(), cuda_graphs=False).generate(
        **prompts(20, 9), max_new_tokens=10, **GREEDY
    )
    model = use_flash_mla(model_of())
    recorder(model).unable = "aten::index_copy_"
    with pytest.warns(UserWarning, match=r"captured: aten::index_copy_ can't be recorded\. If"):
        actual = model.generate(**prompts(20, 9), max_new_tokens=10, **GREEDY)
    assert torch.equal(actual.sequences, expected.sequences)

    strict = use_flash_mla(model_of(), cuda_graphs=True)
    recorder(strict).unable = "aten::index_copy_"
    with torch.no_grad():
        cache = filled(strict, 20, 9)
        steps(strict, cache, 1)
        with pytest.raises(RuntimeError, match="captured in a CUDA graph: aten::index_copy_ can't"):
            steps(strict, cache, 1)
        assert cache.get_seq_length() == 21


def test_false_records_nothing() -> None:
    model = use_flash_mla(model_of(), cuda_graphs=False)
    model.generate(**prompts(20, 9), max_new_tokens=10)
    assert recorder(model).watched == recorder(model).recorded == 0


# -- how long things live --------------------------------------------------------------------------


def test_a_cache_keeps_few_recordings_and_is_freed_at_once() -> None:
    model = use_flash_mla(model_of(), max_decode_tokens=40)
    with torch.no_grad():
        cache = filled(model, 3, pages=40)
        for tokens in range(1, 21):
            steps(model, cache, 2, batch=1, tokens=tokens)
        assert (recorder(model).recorded, len(cache.graphs)) == (20, cache.graphs.LIMIT)
        gone = weakref.ref(cache)
        gc.disable()
        try:
            del cache
            assert gone() is None  # pages are gigabytes
        finally:
            gc.enable()


def test_a_model_that_is_copied_or_turned_anew_records_anew() -> None:
    model = use_flash_mla(model_of(), cuda_graphs=True)
    with torch.no_grad():
        cache = filled(model, 30, 9)
        steps(model, cache, 3)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        same_tokens = copy.deepcopy(cache)
        plain = use_flash_mla(remove_flash_mla(copy.deepcopy(other)), cuda_graphs=False)
        expected = steps(plain, copy.deepcopy(cache), 4)
        assert torch.equal(steps(other, cache, 4), expected)  # the cache that has recordings
        assert torch.equal(steps(other, same_tokens, 4), expected)
        remove_flash_mla(model)
        assert "forward" not in vars(model.model)


@pytest.mark.parametrize("end, pages", [(None, 2 * (1 + 16)), (129, 2 * 3), (300, 2 * 5)])
def test_growing_ahead_of_need_stops_where_generate_will(end: int | None, pages: int) -> None:
    model = use_flash_mla(model_of())
    with torch.no_grad():
        cache = MLAPagedCache(model.config)
        if end is not None:
            cache.expect(end)
        model(**prompts(30, 30), past_key_values=cache)
    assert cache.requests.allocator.capacity == pages


def test_generate_allocates_no_more_than_it_can_fill() -> None:
    model = use_flash_mla(model_of())
    result = model.generate(**prompts(30, 30), max_new_tokens=60, **GREEDY)
    assert result.past_key_values.requests.allocator.capacity == 2 * 2
    assert recorder(model).recorded == 1


def test_settings_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("always", 1, None):
        with pytest.raises(ValueError, match='cuda_graphs must be "auto", True or False, but it'):
            use_flash_mla(model_of(), cuda_graphs=value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="needs a model on a CUDA device, but it is on cpu"):
        use_flash_mla(model_of(), cuda_graphs=True)
    model = use_flash_mla(model_of())
    model.generate(**prompts(20, 9), max_new_tokens=5)  # on the plain way, and nothing is said
