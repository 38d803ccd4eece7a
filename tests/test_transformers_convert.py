"""use_flash_mla and remove_flash_mla: what they take, what they refuse, what they leave behind."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mla_models import prompts, tiny_model  # noqa: E402

from flashmla_rtc.integrations.transformers import (  # noqa: E402
    MLAPagedCache,
    convert,
    remove_flash_mla,
    use_flash_mla,
)
from flashmla_rtc.integrations.transformers.versions import CACHE, SUPPORTED_VERSIONS  # noqa: E402


def is_as_it_was(model: Any) -> bool:
    names = ("forward", "_flash_mla", "_flash_mla_own_forward", "_prepare_cache_for_generation")
    return not any(
        name in vars(module) for module in model.modules() for name in names
    ) and not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_it_returns_the_model_and_can_be_undone() -> None:
    model = tiny_model()
    expected = model.generate(**prompts(9, 4), max_new_tokens=5, return_dict_in_generate=True)
    assert use_flash_mla(model) is model
    assert not is_as_it_was(model)
    assert remove_flash_mla(model) is model
    assert is_as_it_was(model)
    after = model.generate(**prompts(9, 4), max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(after.past_key_values, transformers.DynamicCache)
    assert torch.equal(after.sequences, expected.sequences)
    use_flash_mla(model)


def test_a_forward_of_somebody_elses_is_put_back() -> None:
    model = tiny_model()
    module = model.model.layers[0].self_attn
    calls: list[int] = []
    own = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    module.forward = watched
    use_flash_mla(model)
    with torch.no_grad():
        model(**prompts(9, 4), use_cache=True)
        assert not calls
        model(**prompts(9, 4), use_cache=False)
    assert len(calls) == 1
    remove_flash_mla(model)
    assert module.forward is watched


def test_a_model_without_a_head() -> None:
    base = tiny_model().model
    with torch.no_grad():
        expected = base(**prompts(9, 4)).last_hidden_state[:, -1]
        result = use_flash_mla(base)(**prompts(9, 4))
    assert isinstance(result.past_key_values, MLAPagedCache)
    assert (result.last_hidden_state[:, -1] - expected).abs().max() < 1e-4
    remove_flash_mla(base)
    assert is_as_it_was(base)


def test_positional_arguments_of_the_base_model() -> None:
    base = use_flash_mla(tiny_model().model)
    inputs = prompts(9, 4)
    with torch.no_grad():
        one = base(inputs["input_ids"], inputs["attention_mask"]).past_key_values
    assert one.cache_seqlens.tolist() == [9, 4]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_cache_is_taken_by_its_name_and_by_the_one_it_had(name: str) -> None:
    model = use_flash_mla(tiny_model())
    cache = MLAPagedCache(model.config)
    step = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        model(**prompts(9, 9), **{name: cache})
        hidden = model.base_model(step, **{name: cache})
        assert cache.cache_seqlens.tolist() == [10, 10]
        assert hidden[CACHE] is cache
    tokens = torch.ones(2, 11, dtype=torch.long)
    model.generate(tokens, max_new_tokens=3, **{name: cache})
    assert cache.cache_seqlens.tolist() == [13, 13]
    with pytest.raises(RuntimeError, match="records no gradients"):
        model.base_model(step, **{name: cache})


@pytest.mark.skipif(CACHE == "past_key_values", reason="this version has one name for the cache")
def test_the_present_name_goes_before_the_old_one() -> None:
    base = use_flash_mla(tiny_model()).base_model
    one, other = MLAPagedCache(base.config), MLAPagedCache(base.config)
    with torch.no_grad(), pytest.warns(FutureWarning, match="ignoring deprecated"):
        assert base(**prompts(9, 4), cache=one, past_key_values=other).cache is one
    assert (one.get_seq_length(), other.get_seq_length()) == (9, 0)


def test_gradients_and_training_go_the_models_own_way() -> None:
    model = tiny_model()
    inputs = prompts(9, 4)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone()
    model.zero_grad()
    use_flash_mla(model)
    output = model(**inputs, labels=inputs["input_ids"], use_cache=True)
    assert isinstance(output.past_key_values, transformers.DynamicCache)
    output.loss.backward()
    actual = model.model.layers[0].self_attn.kv_b_proj.weight.grad
    assert torch.equal(actual, expected)

    cache = MLAPagedCache(model.config)
    said = r"records no gradients: call the model in evaluation mode.*under torch.no_grad\(\)"
    with pytest.raises(RuntimeError, match=said):
        model(**inputs, past_key_values=cache)
    model.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match=said):
        model(**inputs, past_key_values=cache)
    result = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, transformers.DynamicCache)


def test_frozen_weights_need_no_context() -> None:
    model = use_flash_mla(tiny_model()).requires_grad_(False)
    assert isinstance(model(**prompts(9, 4)).past_key_values, MLAPagedCache)


def test_attention_weights_are_not_to_be_had() -> None:
    model = use_flash_mla(tiny_model())
    said = "output_attentions is not supported with an MLAPagedCache"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=said):
        model(**prompts(5), output_attentions=True)
    with torch.no_grad():
        assert len(model(**prompts(5), output_attentions=True, use_cache=False).attentions) == 2


class Linear(torch.nn.Module):
    """An adapter around a layer that goes by the layer's name and shows its weight, as peft's."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.down = torch.nn.Linear(base.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) + self.up(self.down(x))


class Packed(torch.Tensor):
    """A weight that is not what its numbers say."""


def adapt(layer: Any) -> Any:
    return Linear(layer)


def hook(layer: Any) -> Any:
    layer.register_forward_hook(lambda *_: None)
    return layer


def hook_before(layer: Any) -> Any:
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def assign(layer: Any) -> Any:
    layer.forward = lambda x: 2 * torch.nn.functional.linear(x, layer.weight)
    return layer


def pack(layer: Any) -> Any:
    packed = layer.weight.detach().as_subclass(Packed)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return layer


def add_bias(layer: Any) -> Any:
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    return layer


CHANGES = [
    (adapt, r"it is a .*\.Linear: .*adapters \(LoRA\) that are not merged"),
    (hook, "it runs hooks or a forward"),
    (hook_before, "it runs hooks or a forward"),
    (assign, "it runs hooks or a forward"),
    (pack, r"it has a weight of type .*\.Packed"),
    (add_bias, "it has a bias"),
]


@pytest.mark.parametrize("change, said", CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_projection_that_is_more_than_its_weight(change: Callable[[Any], Any], said: str) -> None:
    """Before the conversion, after it, and between two steps over one cache."""

    def changed(model: Any) -> Any:
        attention = model.model.layers[1].self_attn
        attention.kv_b_proj = change(attention.kv_b_proj)
        return model

    model = changed(tiny_model())
    with pytest.raises(NotImplementedError, match=f"layers.1.self_attn.kv_b_proj must.*{said}"):
        use_flash_mla(model)
    assert "_flash_mla" not in vars(model.model)

    model = changed(use_flash_mla(tiny_model()))
    with pytest.raises(NotImplementedError, match=f"kv_b_proj of layer 1 must.*{said}"):
        model.generate(**prompts(9, 4), max_new_tokens=3)

    model = use_flash_mla(tiny_model())
    step = torch.tensor([[5], [7]])
    with torch.no_grad():
        cache = model(**prompts(9, 4)).past_key_values
        with pytest.raises(NotImplementedError, match=f"kv_b_proj of layer 1 must.*{said}"):
            changed(model)(step, past_key_values=cache)
    assert cache.cache_seqlens.tolist() == [9, 4]


def test_an_adapter_that_is_merged_counts() -> None:
    model = use_flash_mla(tiny_model())
    layer = model.model.layers[1].self_attn.kv_b_proj
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    result = model.generate(**prompts(9, 4), max_new_tokens=9, do_sample=False)
    expected = remove_flash_mla(model).generate(**prompts(9, 4), max_new_tokens=9, do_sample=False)
    assert torch.equal(result, expected)


def llama() -> Any:
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def wrapped() -> Any:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    return model


def quantised() -> Any:
    model = tiny_model()
    layer = model.model.layers[0].self_attn.kv_b_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


def offloaded() -> Any:
    model = tiny_model()
    model.model.layers[0].self_attn.kv_b_proj.to("meta")
    return model


def spread() -> Any:
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj.to("meta")
    return model


@pytest.mark.parametrize(
    "make, error, said",
    [
        (
            llama,
            NotImplementedError,
            "models of type 'llama'; it supports axk1, deepseek_v2, deeps",
        ),
        (
            wrapped,
            NotImplementedError,
            "layers.1.self_attn.kv_b_proj must.*is a torch.nn.*Sequential:",
        ),
        (quantised, NotImplementedError, "layers.0.self_attn.kv_b_proj.*they are torch.int8"),
        (offloaded, NotImplementedError, "layers.0.self_attn.kv_b_proj is on the device meta"),
        (spread, NotImplementedError, "several devices is not supported.*cpu, meta"),
        (lambda: torch.nn.Linear(1, 1), TypeError, "must be a PreTrainedModel, but it is a Linear"),
        (lambda: use_flash_mla(tiny_model()), ValueError, "has turned this model already"),
    ],
    ids=["llama", "wrapped", "quantised", "offloaded", "spread", "no_model", "twice"],
)
def test_models_that_are_refused(make: Callable[[], Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        use_flash_mla(make())


@pytest.mark.parametrize("version", ["4.57.1", "5.16.2", "5.25.0.dev0", "5.25.0", "6.0"])
def test_other_versions_of_transformers(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    model = tiny_model()
    monkeypatch.setattr(transformers, "__version__", version)
    said = rf"does not support transformers {re.escape(version)}; it supports .*>=5\.17,<5\.25"
    with pytest.raises(NotImplementedError, match=said):
        use_flash_mla(model)
    assert is_as_it_was(model)


@pytest.mark.parametrize("version", ["5.17.0", "5.20.0.dev0", "5.23.7", "5.24.0"])
def test_versions_of_transformers_that_are_taken(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    use_flash_mla(tiny_model())


@pytest.mark.checkout
def test_all_say_the_same_versions() -> None:
    root = Path(__file__).resolve().parents[1]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'"transformers([<>=][^"]*)"', project)) == {SUPPORTED_VERSIONS}
    bounds = re.fullmatch(r">=(\d+)\.(\d+),<(\d+)\.(\d+)", SUPPORTED_VERSIONS)
    assert bounds is not None
    major, first, same, end = map(int, bounds.groups())
    assert major == same
    said = f"transformers {major}.{first} to {major}.{end - 1}"
    for page in ("README.md", "docs/transformers.md", "examples/transformers_generate.py"):
        assert said in (root / page).read_text(encoding="utf-8"), page


def test_a_cache_for_another_model_is_refused() -> None:
    model = use_flash_mla(tiny_model())
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += 1
    said = "has 3 layers of 32 numbers a token, and the model 2 of 32"
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        model(**prompts(9, 4), **{CACHE: MLAPagedCache(config)})
    config = copy.deepcopy(model.config)
    config.kv_lora_rank += 1
    with torch.no_grad(), pytest.raises(ValueError, match="layers of 33 numbers a token"):
        model(**prompts(9, 4), **{CACHE: MLAPagedCache(config)})
    with pytest.raises(TypeError, match="is a LlamaConfig, which has no kv_lora_rank"):
        MLAPagedCache(transformers.LlamaConfig())
    for no_config in (None, transformers.DeepseekV3Config):
        with pytest.raises(TypeError, match=r"of type (NoneType|type)\."):
            MLAPagedCache(no_config)


def test_a_compiled_model_generates_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    """Forwards over pages go on as they are, and nothing is said of it."""
    model = tiny_model()
    given = {**prompts(9, 4), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**given)
    use_flash_mla(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager")
    model.forward = compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(model.generate(**given), expected)
    assert "Error" not in capfd.readouterr().err
    del model.forward
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["training", "gradients", "no cache"])
def test_what_goes_the_models_own_way_is_compiled_whole(way: str) -> None:
    model = use_flash_mla(tiny_model("youtu"))
    given = {**prompts(9, 9), "use_cache": way != "no cache"}
    model.train(way == "training")
    torch._dynamo.reset()
    with torch.set_grad_enabled(way == "gradients"):
        expected = model(**given).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given).logits, expected)
    torch._dynamo.reset()


def test_settings_that_are_refused() -> None:
    model = tiny_model()
    for tokens in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="max_decode_tokens must be a whole number from 1 on"):
            use_flash_mla(model, max_decode_tokens=tokens)
    for pages in (0, "many", 2.0):
        with pytest.raises(ValueError, match="pages must be None or a whole number from 1 on"):
            use_flash_mla(model, pages=pages)
    with pytest.raises(ValueError, match="has not been turned by use_flash_mla"):
        remove_flash_mla(model)
    assert is_as_it_was(model)


def test_a_geometry_that_the_kernels_refuse_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a call of the model's shape, made before anything is changed."""
    shapes: list[Any] = []

    def refuse(
        q: Any, k_cache: Any, table: Any, lengths: Any, width: int, *_: Any, **__: Any
    ) -> None:
        shapes.append((tuple(q.shape), tuple(k_cache.shape), width, q.dtype))
        raise NotImplementedError("head_dim 32 is not supported")

    monkeypatch.setattr(convert, "flash_mla_with_kvcache", refuse)
    model = tiny_model()
    with pytest.raises(NotImplementedError, match="head_dim 32 is not supported"):
        use_flash_mla(model)
    assert shapes == [((1, 1, 4, 32), (1, 64, 1, 32), 24, torch.float32)]
    assert is_as_it_was(model)


def test_importing_the_package_imports_no_transformers() -> None:
    code = (
        "import sys, flashmla_rtc, flashmla_rtc.integrations\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import flashmla_rtc.integrations.transformers as ours, transformers\n"
        "assert ours is not transformers and hasattr(transformers, 'PreTrainedModel')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
