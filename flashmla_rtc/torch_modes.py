"""Which calls torch has to see: of programs that it compiles, differentiates or only imagines.

All others are launched without torch's dispatcher. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from . import torch_shortcuts


def _is_compiling() -> bool:
    """Looks for torch at each call until it has been imported. Where it is imported after this
    package, a program that is compiled before the first plain call is compiled twice.
    """
    global is_compiling
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    known = getattr(compiler, "is_dynamo_compiling", None)
    if known is None:
        return False
    if known():  # torch traces this function: leave globals alone
        return True
    is_compiling = known
    return False


is_compiling: Callable[[], bool] = _is_compiling
"""Whether torch's compiler is reading this very line. When it runs while others are compiled, in
whatever thread, the answer is no.
"""

_is_compiling()  # programs that are compiled before they are run see what later ones see


def sees(*arguments: Any) -> bool:
    """Whether a call on these arguments, q and the cache first, out and lse last, has to go through
    torch's dispatcher: they ask for a gradient, one of them has no elements, q and cache differ in
    precision where autocast is to convert q, or somebody listens to the dispatcher.

    Raises:
        NotImplementedError: they are inside of a transform of functions, or have a tangent.
    """
    torch: Any = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    if not isinstance(tensor, type) or not all(isinstance(one, tensor) for one in arguments[:2]):
        return False
    tensors = [argument for argument in arguments if isinstance(argument, tensor)]
    refuse_transforms(*tensors)
    refuse_tangents(*tensors)
    q, k_cache = arguments[:2]
    results = (result for result in arguments[-2:] if isinstance(result, tensor))
    return (
        asks_for_gradient(q, k_cache, *results)
        or (differ_in_precision(q, k_cache) and torch.is_autocast_enabled(q.device.type))
        or is_listened_to()
        or any(is_fake(tensor) for tensor in tensors)
    )


def differ_in_precision(q: Any, k_cache: Any) -> bool:
    """Whether ``q`` and ``k_cache`` are of different dtypes among those that autocast converts."""
    torch: Any = sys.modules["torch"]
    halves = (torch.bfloat16, torch.float16)
    return (
        q.dtype != k_cache.dtype and q.dtype in (torch.float32, *halves) and k_cache.dtype in halves
    )


def must_see_plan(cache_seqlens: Any) -> bool:
    """The same of a call that plans for these lengths."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if not isinstance(tensor, type) or not isinstance(cache_seqlens, tensor):
        return False
    refuse_transforms(cache_seqlens)
    return is_listened_to() or is_fake(cache_seqlens)


def asks_for_gradient(*tensors: Any) -> bool:
    """Whether torch is to keep what gradients of these tensors need."""
    torch: Any = sys.modules["torch"]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def written(*tensors: Any) -> None:
    """Tell torch that a kernel wrote into tensors: gradients that need what was there ask it."""
    torch_shortcuts.increment_version()(tensors)


def is_listened_to() -> bool:
    """Whether a mode such as that of ``make_fx`` is to see what torch's dispatcher is asked for."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch._C._len_torch_dispatch_stack() > 0


def is_fake(array: Any) -> bool:
    """Whether ``array`` is one of torch's tensors that only have a shape, a dtype and a device."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return isinstance(fake, type) and isinstance(array, fake)


def refuse_transforms(*tensors: Any) -> None:
    """Raises NotImplementedError for tensors inside of a transform of functions."""
    functorch = sys.modules["torch"]._C._functorch
    if any(functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise NotImplementedError(
            "flashmla_rtc can't be transformed by torch.func (grad, vjp, jvp, vmap): it has no "
            "derivatives and no batching rules. Call it outside of the transformed function."
        )


def refuse_tangents(*tensors: Any) -> None:
    """Raises NotImplementedError for tensors with a tangent, which the results would not have."""
    torch: Any = sys.modules["torch"]
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0 or torch.is_inference_mode_enabled():
        return  # in inference mode torch drops tangents itself, and can't be asked for them
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "flash_mla_with_kvcache has no forward-mode derivative, and an argument has a tangent. "
            "Call it outside of torch.autograd.forward_ad.dual_level()."
        )


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
