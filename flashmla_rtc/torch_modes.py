"""Which calls torch has to see: of programs that it compiles, differentiates or only imagines.

All others are launched without torch's dispatcher. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def _is_compiling() -> bool:
    """Looks for torch at each call until it has been imported."""
    global is_compiling
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    known = getattr(compiler, "is_compiling", None)
    if known is None:
        return False
    if known():  # torch traces this function: leave globals alone
        return True
    is_compiling = known
    return False


is_compiling: Callable[[], bool] = _is_compiling
"""Whether torch is reading the program rather than running it."""

_is_compiling()  # programs that are compiled before they are run see what later ones see


def sees(q: Any, k_cache: Any) -> bool:
    """Whether a call on these arrays has to go through torch's dispatcher: they ask for a gradient,
    have no elements, or differ in precision where autocast is to convert one.
    """
    torch: Any = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    if not isinstance(tensor, type) or not all(isinstance(a, tensor) for a in (q, k_cache)):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad):
        return True
    halves = (torch.bfloat16, torch.float16)
    if (
        q.dtype != k_cache.dtype
        and q.dtype in (torch.float32, *halves)
        and k_cache.dtype in halves
        and torch.is_autocast_enabled(q.device.type)
    ):
        return True
    return is_fake(q)


def is_fake(array: Any) -> bool:
    """Whether ``array`` is one of torch's tensors that only have a shape, a dtype and a device."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return isinstance(fake, type) and isinstance(array, fake)


def records_graphs_on(stream: int, device: int) -> bool:
    """Whether ``stream`` is the one on which ``torch.compile`` warms up and records CUDA graphs.

    torch does not document how to ask. Where it can't be asked, the answer is no, and torch itself
    refuses to record a graph in whose memory somebody keeps a workspace.
    """
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device, create_if_none_exists=False)
        return manager is not None and manager.stream.cuda_stream == stream
    except Exception:
        return False
