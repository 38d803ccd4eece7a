"""What the tests of recorded decode steps run: models, steps, and both ways side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mla_models import prompts, tiny_model
from step_recorder import StepRecorder

from flashmla_rtc.integrations.transformers import MLAPagedCache, use_flash_mla

GREEDY = {"do_sample": False, "return_dict_in_generate": True}


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
