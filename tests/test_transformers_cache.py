"""The paged cache by itself: memory, crop, selection, growth, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import COMMON, prompts, tiny_model  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    PagesExhausted,
    use_flash_mla,
)

WIDTH = COMMON["kv_lora_rank"] + COMMON["qk_rope_head_dim"]
PAGE = 64 * WIDTH * 4 * 2  # bytes, float32, two layers


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model() -> Any:
    return use_flash_mla(tiny_model())


def filled(model: Any, *lengths: int, pages: int | None = None) -> MLAPagedCache:
    cache = MLAPagedCache(model.config, pages=pages)
    model(**prompts(*lengths), past_key_values=cache)
    return cache


def goes_on_like(model: Any, cache: Any, other: Any) -> None:
    """Both give the same logits for the same next tokens."""
    tokens = prompts(*[3] * cache.batch_size, seed=9)["input_ids"]
    one = model(tokens, past_key_values=cache).logits
    two = model(tokens, past_key_values=other).logits
    assert (one - two).abs().max() < 1e-4


def test_memory_is_exact_to_the_byte(model: Any) -> None:
    empty = MLAPagedCache(model.config)
    assert empty.memory().allocated == empty.memory().used == 0
    cache = filled(model, 130, 64, 1)
    memory = cache.memory()
    assert memory.used == (3 + 1 + 1) * PAGE
    tensors = [layer.pages for layer in cache.layers]
    assert memory.allocated == sum(t.untyped_storage().nbytes() for t in tensors)
    assert memory.allocated == cache.requests.allocator.capacity * PAGE

    plain = tiny_model()
    dynamic = plain(**prompts(130, 64, 1), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in dynamic.layers for t in (layer.keys, layer.values))
    assert memory.dynamic_cache == held

    sizes: list[int] = []
    for layer in plain.model.layers:
        expand = layer.self_attn.expand_kv

        def counted(*args: Any, expand: Any = expand) -> Any:
            keys, values = expand(*args)
            sizes.append(keys.numel() * 4 + values.numel() * 4)
            return keys, values

        layer.self_attn.expand_kv = counted
    plain(**prompts(130, 64, 1), use_cache=True)
    assert memory.expanded == sum(sizes)


def test_a_cache_of_fixed_size_is_allocated_at_once_and_can_be_full(model: Any) -> None:
    cache = filled(model, 64, 100, pages=3)
    assert cache.memory().allocated == cache.memory().used == 3 * PAGE
    tokens = torch.ones(2, 1, dtype=torch.long)
    for _ in range(2):  # a forward that found no room changed nothing
        with pytest.raises(PagesExhausted, match=r"has 3 pages of 64 tokens.*needs 1 more"):
            model(tokens, past_key_values=cache)
    cache.crop(-1)
    model(tokens, past_key_values=cache)
    goes_on = MLAPagedCache(model.config)
    inputs = prompts(64, 100)
    inputs["input_ids"][:, -1] = 1
    model(**inputs, past_key_values=goes_on)
    cache.crop(-20)
    goes_on.crop(-20)
    goes_on_like(model, cache, goes_on)


def test_use_flash_mla_sets_the_pages_of_the_caches_it_makes() -> None:
    model = use_flash_mla(tiny_model(), pages=5)
    for past in (
        model(**prompts(9, 3), use_cache=True).past_key_values,
        model.generate(
            **prompts(9, 3), max_new_tokens=2, return_dict_in_generate=True
        ).past_key_values,
    ):
        assert past.memory().allocated == 5 * PAGE


def test_crop_goes_back_to_what_was(model: Any) -> None:
    inputs = prompts(150, 70)
    longer, shorter = filled(model, 150, 70), MLAPagedCache(model.config)
    head = {name: tensor[:, :100] for name, tensor in inputs.items()}
    model(**head, past_key_values=shorter)
    longer.crop(-50)
    assert longer.get_seq_length() == 100
    assert longer.cache_seqlens.tolist() == [100, 20]
    assert longer.memory().used == 3 * PAGE
    goes_on_like(model, longer, shorter)


def test_crop_with_other_signs(model: Any) -> None:
    cache = filled(model, 30)
    cache.crop(0)
    cache.crop(40)
    assert cache.get_seq_length() == 30
    cache.crop(10)  # as transformers reads it
    assert cache.get_seq_length() == 10
    with pytest.raises(ValueError, match=r"from 0 to 10 tokens.*but 11 were asked for"):
        cache.crop(-11)


def test_selecting_and_repeating_requests(model: Any) -> None:
    lengths = (130, 20, 64)
    for change, order in (
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2]),
    ):
        cache = filled(model, *lengths)
        change(cache)
        assert cache.batch_size == len(order)
        other = MLAPagedCache(model.config)
        inputs = prompts(*lengths)
        model(**{name: tensor[order] for name, tensor in inputs.items()}, past_key_values=other)
        for _ in range(2):
            goes_on_like(model, cache, other)
        assert cache.cache_seqlens.tolist() == other.cache_seqlens.tolist()
        assert cache.memory().used <= other.memory().used
    with pytest.raises(IndexError, match="has 3 requests, and there is no 3"):
        cache.reorder_cache(torch.tensor([0, 1, 3]))


def test_reset_frees_pages_and_takes_another_batch(model: Any) -> None:
    cache = filled(model, 130, 20)
    allocated = cache.memory().allocated
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.memory().used) == (-1, 0, 0)
    assert cache.memory().allocated == allocated
    model(**prompts(70, 60, 5), past_key_values=cache)
    goes_on_like(model, cache, filled(model, 70, 60, 5))


def test_what_other_code_asks_of_a_cache(model: Any) -> None:
    cache = filled(model, 12, 5)
    assert len(cache) == 2
    assert cache.get_mask_sizes(4, 0) == (16, 0)
    assert cache.get_max_length() == -1
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.is_sliding == [False, False]
    assert cache.is_initialized or not any(layer.supports_early_init for layer in cache.layers)
    assert cache.block_table.shape == (2, 1)
    cache.activate_past_recording()


def test_nan_in_free_slots_reaches_nobody(model: Any) -> None:
    cache = filled(model, 130, 20)
    for layer in cache.layers:
        layer.pages.fill_(float("nan"))
    cache.reset()
    model(**prompts(70, 60), past_key_values=cache)
    goes_on_like(model, cache, filled(model, 70, 60))


def test_a_forward_that_fails_leaves_the_cache_as_it_was(model: Any) -> None:
    cache = filled(model, 64, 30)
    tokens = prompts(2, 2, seed=4)["input_ids"]
    norm = model.model.layers[1].input_layernorm
    handle = norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens, past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 64
    goes_on_like(model, cache, filled(model, 64, 30))


def test_masks_that_do_not_fit(model: Any) -> None:
    cache = filled(model, 12, 5)
    tokens = torch.ones(2, 1, dtype=torch.long)

    def forward(*shape: int, tokens: Any = tokens) -> None:
        model(tokens, attention_mask=torch.ones(shape), past_key_values=cache)

    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 13\).*shape is \(2, 1\)"):
        forward(2, 1)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(2, 13\).*shape is \(2, 13, 1\)"
    ):
        forward(2, 13, 1)
    with pytest.raises(ValueError, match="shows column 0 of request 1, which was padding"):
        forward(2, 13)
    with pytest.raises(ValueError, match=r"must end in \(1, 13\).*its shape is \(2, 1, 1, 12\)"):
        forward(2, 1, 1, 12)
    with pytest.raises(NotImplementedError, match="A 4D attention_mask over a cache whose prompts"):
        forward(2, 1, 1, 13)
    with pytest.raises(ValueError, match="holds 2 requests, and the model was given 3"):
        forward(3, 13, tokens=torch.ones(3, 1, dtype=torch.long))
    mask = torch.cat((prompts(12, 5)["attention_mask"], torch.ones(2, 1)), 1)
    mask[0, 3] = 0
    with pytest.raises(NotImplementedError, match="hides tokens that are in the cache and lie bef"):
        model(tokens, attention_mask=mask, past_key_values=cache)
    goes_on_like(model, cache, filled(model, 12, 5))


def test_another_dtype_than_before(model: Any) -> None:
    cache = filled(model, 12)
    model.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"holds torch.float32 on cpu.*gives torch.bfloat16 on cpu"
    ):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_what_a_layer_does_not_do(model: Any) -> None:
    cache = filled(model, 12)
    layer = cache.layers[0]
    with pytest.raises(NotImplementedError, match="Offloading the layers of an MLAPagedCache"):
        cache.offload(0)
    with pytest.raises(NotImplementedError, match="Offloading"):
        layer.prefetch()
    for change in (layer.reset, lambda: layer.reorder_cache(torch.tensor([0]))):
        with pytest.raises(
            NotImplementedError, match="The layers of an MLAPagedCache change toget"
        ):
            change()


def test_a_model_that_was_not_converted_says_so() -> None:
    plain = tiny_model()
    cache = MLAPagedCache(plain.config)
    with pytest.raises(RuntimeError, match=r"attention does not read pages. Call use_flash_mla"):
        plain(**prompts(5), past_key_values=cache)
