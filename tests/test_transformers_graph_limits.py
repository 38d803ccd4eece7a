"""Which decode steps are not recorded, how that is told, and how long recordings live."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import prompts, tiny_model  # noqa: E402
from recorded_steps import GREEDY, filled, model_of, recorder, same, steps  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    remove_flash_mla,
    use_flash_mla,
)

pytestmark = pytest.mark.usefixtures("steps_are_recorded")


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
        for _ in range(3):
            with pytest.raises(RuntimeError, match=said):
                steps(model, cache, 1)
        assert cache.get_seq_length() == 30
        assert recorder(model).recorded == 0


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
