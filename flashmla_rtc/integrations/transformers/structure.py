"""Noticing that a model is no longer what its recorded steps were made from."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module

# Its hooks do nothing in a forward that is not asked for hidden states or attentions.
_HARMLESS = "transformers.utils.output_capturing"


class Structure:
    """The modules inside of a model, where their tensors lie, and their hooks.

    Looking takes some tens of microseconds for a model of 27 layers: the dictionaries of all
    modules are at hand.

    Args:
        base: the model. Hooks of its own run outside of what is recorded and don't matter.
    """

    def __init__(self, base: Any) -> None:
        modules = list(base.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._tensors = [kind for m in modules for kind in (m._parameters, m._buffers) if kind]
        self._hooks = [h for m in modules[1:] for h in (m._forward_pre_hooks, m._forward_hooks)]
        self._address: Any = torch.Tensor.data_ptr
        try:
            self._list_addresses()
        except RuntimeError:  # tensors that wrap others have no address
            self._address = id
        self._known_children = self._list_children()
        self._known_addresses = self._list_addresses()

    def is_as_it_was(self) -> bool:
        """Whether no module was replaced and no parameter or buffer lies elsewhere.

        What changed in place is as it was. A ``forward`` that was assigned is not noticed.
        """
        return (
            self._list_children() == self._known_children
            and self._list_addresses() == self._known_addresses
        )

    def has_hooks(self) -> bool:
        """Whether hooks inside of the model have to run."""
        if torch_module._has_any_global_hook():
            return True
        return any(self._hooks) and any(
            getattr(hook, "__module__", None) != _HARMLESS
            for hooks in self._hooks
            for hook in hooks.values()
        )

    def _list_children(self) -> list[Any]:
        return [child for children in self._children for child in children.values()]

    def _list_addresses(self) -> list[int]:
        return [
            self._address(tensor)
            for tensors in self._tensors
            for tensor in tensors.values()
            if tensor is not None
        ]
