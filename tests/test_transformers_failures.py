"""A forward over a paged cache that fails leaves the cache as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import prompts, tiny_model  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    PagesExhausted,
    use_flash_mla,
)
from flashmla_rtc.integrations.transformers.cache import MLAPagedLayer  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model() -> Any:
    return use_flash_mla(tiny_model())


def fail_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose call of this number, from 1 on, finds no memory."""
    calls = iter(range(1, 1000))

    def failing(*args: Any) -> Any:
        if next(calls) == count:
            raise torch.OutOfMemoryError("no memory")
        return function(*args)

    return failing


@pytest.mark.parametrize("method", ["fit", "copy_pages"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("between", ["nothing", "reorder", "repeat", "crop"])
def test_a_shared_cache_that_finds_no_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch, method: str, layer: int, between: str
) -> None:
    """Pages that were to be copied when memory ran out are copied in the next forward."""
    cache = model(**prompts(70, 50)).past_key_values
    cache.batch_repeat_interleave(3)
    other = copy.deepcopy(cache)
    step = torch.arange(1, 7)[:, None]
    lengths = cache.cache_seqlens.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(MLAPagedLayer, method, fail_at(layer, getattr(MLAPagedLayer, method)))
        with pytest.raises(torch.OutOfMemoryError):
            model(step, past_key_values=cache)
    assert cache.cache_seqlens.tolist() == lengths
    for one in (cache, other):
        if between == "reorder":
            one.reorder_cache(torch.tensor([1, 1, 0, 5, 4, 4]))
        elif between == "repeat":
            one.batch_repeat_interleave(2)
        elif between == "crop":
            one.crop(-3)
    step = torch.arange(1, cache.batch_size + 1)[:, None]
    for _ in range(3):
        result = model(step, past_key_values=cache).logits
        expected = model(step, past_key_values=other).logits
        assert (result - expected).abs().max() < 1e-5


def test_a_cache_that_found_no_memory_can_be_used_for_less(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = model(**prompts(70, 50)).past_key_values
    before = cache.memory()
    with monkeypatch.context() as patch:
        patch.setattr(MLAPagedLayer, "fit", fail_at(1, MLAPagedLayer.fit))
        with pytest.raises(torch.OutOfMemoryError):
            model(prompts(900, 900)["input_ids"], past_key_values=cache)
    assert cache.memory() == before
    model(torch.tensor([[5], [7]]), past_key_values=cache)  # the pages have room for it
    assert cache.memory().allocated == before.allocated


def test_other_prompts_may_follow_those_that_did_not_fit(model: Any) -> None:
    cache = MLAPagedCache(model.config, pages=1)
    with pytest.raises(PagesExhausted):
        model(**prompts(70, 70), past_key_values=cache)
    assert cache.batch_size == -1
    result = model(**prompts(20), past_key_values=cache).logits
    assert (result - model(**prompts(20)).logits).abs().max() < 1e-5
    assert cache.batch_size == 1


def test_a_first_forward_that_fails_in_the_model(model: Any) -> None:
    cache = MLAPagedCache(model.config)
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(fail_at(1, lambda *_: None))
    with pytest.raises(torch.OutOfMemoryError):
        model(**prompts(70, 70), past_key_values=cache)
    handle.remove()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)
    result = model(**prompts(20), past_key_values=cache).logits
    assert (result - model(**prompts(20)).logits).abs().max() < 1e-5


def test_a_mask_that_hides_tokens_in_a_forward_that_does_not_fit(model: Any) -> None:
    cache = MLAPagedCache(model.config, pages=2)
    model(**prompts(64, 64), past_key_values=cache)
    other = copy.deepcopy(cache)
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[0, 63:] = 0
    step = torch.tensor([[5], [7]])
    with pytest.raises(PagesExhausted):
        model(step, attention_mask=mask, past_key_values=cache)
    assert cache.cache_seqlens.tolist() == [64, 64]
    assert torch.equal(cache.block_table, other.block_table)
    for one in (cache, other):
        one.batch_select_indices(torch.tensor([0]))
    result, expected = (model(step[:1], past_key_values=one).logits for one in (cache, other))
    assert torch.equal(result, expected)


def change_nothing(cache: MLAPagedCache) -> None:
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-cache.get_seq_length())


@pytest.mark.parametrize("is_new", [True, False])
def test_a_cache_without_columns_takes_any_number_of_requests(model: Any, is_new: bool) -> None:
    cache = MLAPagedCache(model.config)
    if not is_new:
        model(**prompts(70, 3, 9), past_key_values=cache)
        cache.crop(-70)
        assert (cache.batch_size, cache.memory().used) == (-1, 0)
    change_nothing(cache)
    inputs = prompts(4, 14)
    result = model(**inputs, past_key_values=cache).logits
    assert (result - model(**inputs).logits).abs().max() < 1e-5
    assert cache.cache_seqlens.tolist() == [4, 14]
