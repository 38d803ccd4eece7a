"""Turning a model to paged, absorbed attention, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from flashmla_rtc import flash_mla_with_kvcache

from . import attention
from .cache import MLAPagedCache
from .families import FAMILIES
from .graphs import CudaGraphs, ModelGraphs
from .pages import PAGE_SIZE, check_pages
from .projection import check_projection
from .versions import CACHE, check_version, name_cache

Model = TypeVar("Model", bound=Any)

_FORWARD_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    CACHE,
    "inputs_embeds",
    "use_cache",
)


@dataclass
class _Settings:
    """Kept on the base model as ``_flash_mla``."""

    max_decode_tokens: int
    pages: int | None
    graphs: ModelGraphs
    own_forward: Any  # what was assigned to the model, if anything was
    handles: tuple[Any, Any]


def use_flash_mla(
    model: Model,
    *,
    max_decode_tokens: int = 16,
    pages: int | None = None,
    cuda_graphs: CudaGraphs = "auto",
) -> Model:
    """Turn a model of transformers to absorbed MLA decode over a paged latent cache, in place.

    The forward of every attention module is replaced, and ``generate()`` makes an
    :class:`MLAPagedCache` where it would make a ``DynamicCache``. So does a forward of its own
    with ``use_cache`` and no cache. Weights stay as they are and where they are; no copy is made.

    A forward that records gradients, a model in training mode, a forward without a cache or with
    one of another class all go the model's own way, unchanged.

    Args:
        model: of a type in ``SUPPORTED_MODEL_TYPES``, with or without a head, all of it on one
            device, in evaluation mode when it is to use the pages.
        max_decode_tokens: forwards with up to so many new tokens over a cache that is not empty
            attend through ``flash_mla_with_kvcache``; others expand keys and values.
        pages: pages of each layer of the caches that are made, or None for caches that grow.
        cuda_graphs: whether decode steps are captured in CUDA graphs and replayed. "auto" does so
            on a CUDA device, and warns once and goes on without where a step can't be captured;
            True raises RuntimeError there.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a model of transformers.
        ValueError: it has been turned already; ``max_decode_tokens`` or ``pages`` is not a whole
            number from 1 on; ``cuda_graphs`` is none of the three, or True without a CUDA device.
        NotImplementedError: a version of transformers outside of 5.17 to 5.24; a model type that
            is not supported; ``kv_b_proj`` that is quantised, wrapped, hooked or offloaded;
            weights that are spread over devices; a geometry or dtype that the kernels do not
            take, where the model is on a Hopper GPU.
    """
    check_version()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, but it is a {type(model).__name__}.")
    if type(max_decode_tokens) is not int or max_decode_tokens < 1:
        raise ValueError(
            f"max_decode_tokens must be a whole number from 1 on, but it is {max_decode_tokens!r}."
        )
    check_pages(pages)
    if not (cuda_graphs == "auto" or isinstance(cuda_graphs, bool)):
        raise ValueError(f'cuda_graphs must be "auto", True or False, but it is {cuda_graphs!r}.')
    base: Any = model.base_model
    if hasattr(base, "_flash_mla"):
        raise ValueError("use_flash_mla has turned this model already; see remove_flash_mla.")
    modules = _attention_modules(base)
    for name, module in modules.items():
        _check_weights(name, module)
    _check_geometry(list(modules.values()))
    graphs = ModelGraphs(cuda_graphs)
    device = base.get_input_embeddings().weight.device
    if cuda_graphs is True and graphs.recorder(device) is None:
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, but it is on {device}.")

    for module in modules.values():
        module._flash_mla_own_forward = vars(module).get("forward")
        module.forward = partial(attention.forward, module)
    handles = (
        base.register_forward_pre_hook(_before, with_kwargs=True),
        base.register_forward_hook(_after, with_kwargs=True),
    )
    own_forward = vars(base).get("forward")
    base._flash_mla = _Settings(max_decode_tokens, pages, graphs, own_forward, handles)
    base.forward = partial(_forward, base)
    if hasattr(model, "generate"):
        for function in (_prepare_cache_for_generation, _update_model_kwargs_for_generation):
            setattr(model, function.__name__, partial(function, model))
    return model


def remove_flash_mla(model: Model) -> Model:
    """Undo :func:`use_flash_mla`: the model is as it was, its paged caches of no more use.

    Returns:
        The model.

    Raises:
        ValueError: the model has not been turned.
    """
    base: Any = getattr(model, "base_model", None)
    if not hasattr(base, "_flash_mla"):
        raise ValueError("The model has not been turned by use_flash_mla.")
    for handle in base._flash_mla.handles:
        handle.remove()
    for module in _attention_modules(base).values():
        del module.forward
        if module._flash_mla_own_forward is not None:
            module.forward = module._flash_mla_own_forward
        del module._flash_mla_own_forward
    del base.forward
    if base._flash_mla.own_forward is not None:
        base.forward = base._flash_mla.own_forward
    del base._flash_mla
    for function in (_prepare_cache_for_generation, _update_model_kwargs_for_generation):
        vars(model).pop(function.__name__, None)
    return model


# -- what can be turned ----------------------------------------------------------------------------


def _attention_modules(base: Any) -> dict[str, Any]:
    model_type = base.config.model_type
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"use_flash_mla does not support models of type {model_type!r}; it supports "
            f"{', '.join(FAMILIES)}."
        )
    name = FAMILIES[model_type].attention
    return {path: m for path, m in base.named_modules() if type(m).__name__ == name}


def _check_weights(name: str, module: Any) -> None:
    layer = module.kv_b_proj
    check_projection(f"{name}.kv_b_proj", layer)
    if not layer.weight.dtype.is_floating_point:
        raise NotImplementedError(
            f"{name}.kv_b_proj must be of floating-point weights to be absorbed, but they are "
            f"{layer.weight.dtype}: quantised weights are not supported."
        )
    if layer.weight.is_meta:
        raise NotImplementedError(
            f"{name}.kv_b_proj is on the device meta: offloaded weights are not supported."
        )


def _check_geometry(modules: list[Any]) -> None:
    """One decode call of the model's shape, which raises what real ones would raise."""
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) > 1:
        raise NotImplementedError(
            "A model that is spread over several devices is not supported; its attention is on "
            f"{', '.join(sorted(map(str, devices)))}."
        )
    module = modules[0]
    weight = module.kv_b_proj.weight
    heads = len(weight) // (module.qk_nope_head_dim + module.v_head_dim)
    width = module.kv_lora_rank + module.qk_rope_head_dim
    numbers = torch.zeros(2, dtype=torch.int32, device=weight.device)
    flash_mla_with_kvcache(
        weight.new_zeros(1, 1, heads, width),
        weight.new_zeros(1, PAGE_SIZE, 1, width),
        numbers[:1].view(1, 1),
        numbers[1:],
        module.kv_lora_rank,
        None,
        causal=True,
    )


# -- around a forward of the base model ------------------------------------------------------------
#
# torch.compile leaves forwards over pages alone: their numbers come from the host, anew each step.
# All others it compiles as it compiles those of a model that is not turned.


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make the cache if there is none, and give it the mask."""
    given = name_cache(dict(zip(_FORWARD_ARGUMENTS, args, strict=False)) | kwargs)
    cache = given.get(CACHE)
    if _own_way(base, given):
        if isinstance(cache, MLAPagedCache):
            raise RuntimeError(
                "An MLAPagedCache records no gradients: call the model in evaluation mode, "
                "model.eval(), and under torch.no_grad(), or without this cache."
            )
        return None
    use_cache = given.get("use_cache")
    if cache is None and not (base.config.use_cache if use_cache is None else use_cache):
        return None
    if not (cache is None or isinstance(cache, MLAPagedCache)):
        return None
    return _begin(base, given, cache)


@torch.compiler.disable
def _begin(base: Any, given: dict[str, Any], cache: MLAPagedCache | None) -> Any:
    """Have the cache begin a forward of ``given``; None if there is nothing to go forward with."""
    settings: _Settings = base._flash_mla
    if cache is None:
        cache = MLAPagedCache(base.config, pages=settings.pages)
    if given.get("output_attentions") or getattr(base.config, "output_attentions", False):
        raise NotImplementedError(
            "output_attentions is not supported with an MLAPagedCache: no weights are formed."
        )
    cache.check_made_for(base.config)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None  # the model says what is missing
    mask = given.get("attention_mask")
    device = base.get_input_embeddings().weight.device
    cache.begin(
        tokens.shape[0],
        tokens.shape[1],
        mask,
        device,
        settings.max_decode_tokens,
        ahead=settings.graphs.are_possible(device),
    )
    given[CACHE] = cache
    # The cache has the mask. A 4D one is passed on as it is, so none is built or looked at.
    given["attention_mask"] = torch.empty(0, 1, 1, 1, device=device)
    return (), given


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    settings: _Settings = self._flash_mla
    own = settings.own_forward
    if own is None:
        own = partial(type(self).forward, self)
    cache = kwargs.get(CACHE)
    if not isinstance(cache, MLAPagedCache) or cache.step is None:
        return own(*args, **kwargs)
    return _forward_over_pages(settings.graphs, self, own, kwargs, cache)


@torch.compiler.disable
def _forward_over_pages(graphs: ModelGraphs, *arguments: Any) -> Any:
    return graphs.forward(*arguments)


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get(CACHE)
    if isinstance(cache, MLAPagedCache):
        _end(cache)


@torch.compiler.disable
def _end(cache: MLAPagedCache) -> None:
    cache.end()


def _own_way(base: Any, given: dict[str, Any]) -> bool:
    """Whether the model may have to differentiate or drop out."""
    if base.training:
        return True
    embeddings = given.get("inputs_embeds")
    return torch.is_grad_enabled() and (
        any(parameter.requires_grad for parameter in base.parameters())
        or (embeddings is not None and embeddings.requires_grad)
    )


# -- in place of generate()'s own ------------------------------------------------------------------


def _prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    if (
        model_kwargs.get(CACHE) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation in (None, "dynamic")
        and not self.training
    ):
        settings: _Settings = self.base_model._flash_mla
        model_kwargs[CACHE] = MLAPagedCache(self.config, pages=settings.pages)
    else:
        type(self)._prepare_cache_for_generation(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    cache = model_kwargs.get(CACHE)
    if isinstance(cache, MLAPagedCache):
        cache.expect(max_cache_length)


def _update_model_kwargs_for_generation(
    self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Tell the cache which mask comes next, so that nobody has to read it."""
    updated: dict[str, Any] = type(self)._update_model_kwargs_for_generation(
        self, outputs, model_kwargs, *args, **kwargs
    )
    cache = updated.get(CACHE)
    if isinstance(cache, MLAPagedCache):
        cache.expect_mask(updated.get("attention_mask"))
    return updated
