"""What ``kv_b_proj`` has to be for its weight alone to say what it does."""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = (torch.nn.Parameter, torch.Tensor)


def check_projection(name: str, layer: Any) -> None:
    """Raises NotImplementedError unless ``layer`` multiplies by its weight and does nothing else.

    Absorbed attention reads the weight and never calls the layer, so whatever else a call would do
    would be missing from decode steps. Types are compared for identity: an adapter may be called
    Linear too, and a quantised weight may be a subclass of Tensor. A microsecond, so each forward
    asks again.
    """
    if type(layer) is torch.nn.Linear and type(layer.weight) in _PLAIN and layer.bias is None:
        forward = layer.__dict__.get("forward")
        if not (layer._forward_hooks or layer._forward_pre_hooks) and (
            forward is None or getattr(forward, "__func__", None) is torch.nn.Linear.forward
        ):
            return
        found = "runs hooks or a forward that was assigned to it"
    elif type(layer) is not torch.nn.Linear:
        found = f"is a {type(layer).__module__}.{type(layer).__qualname__}"
    elif layer.bias is not None:
        found = "has a bias"
    else:
        kind = type(layer.weight)
        found = f"has a weight of type {kind.__module__}.{kind.__qualname__}"
    raise NotImplementedError(
        f"{name} must be a torch.nn.Linear with a plain weight and nothing else to be absorbed, "
        f"but it {found}: quantised weights, adapters (LoRA) that are not merged and hooks are not "
        "supported there."
    )
