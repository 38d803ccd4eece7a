"""What is borrowed from torch's compiler, since it is faster than what torch documents."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def found() -> tuple[Any, Any]:
    """What the programs that torch compiles use: ``TensorGuards``, which compares many tensors with
    others at once, and an allocation without ceremony. None in place of one that is not there.

    Neither is documented, so each has to show here that it does what is asked of it. Both are
    looked at on the CPU, where the second has a sibling.
    """
    import torch

    guards = allocate = None
    try:
        tools = torch._C._dynamo.guards
        make = functools.partial(torch.empty, device="cpu", dtype=torch.float32)
        check = tools.TensorGuards(
            make(2, 3), make(4), dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        others = (
            make(3, 2),
            make(2, 3, 1),
            make(3, 2).t(),
            make(2, 3, dtype=torch.int32),
            make(2, 3, device="meta"),
            make(2, 3, requires_grad=True),
            torch.nn.Parameter(make(2, 3), requires_grad=False),
        )
        if check(make(2, 3), make(4)) is True and not any(
            check(other, make(4)) is not False for other in others
        ):
            guards = tools.TensorGuards
    except Exception:
        guards = None
    try:
        made = tools._empty_strided_cpu((2, 3), (3, 1), torch.float16)
        if (made.shape, made.stride(), made.dtype) == ((2, 3), (3, 1), torch.float16):
            allocate = tools._empty_strided_cuda
    except Exception:
        allocate = None
    return guards, allocate


@functools.cache
def increment_version() -> Any:
    """What tells torch that tensors, a tuple of them, were written into. Those that were made in
    inference mode have no version, and are passed over.

    torch documents a function for one tensor, and in new versions for several. The one below it
    takes half the time, if it shows here that it does the same.
    """
    import torch

    def one_by_one(tensors: tuple[Any, ...]) -> None:
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

    try:
        first, second = torch.empty(1, device="cpu"), torch.empty(1, device="cpu")
        with torch.inference_mode():
            without = torch.empty(1, device="cpu")
        before = first._version, second._version
        torch._C._increment_version((first, without, second))
        if (first._version, second._version) == (before[0] + 1, before[1] + 1):
            return torch._C._increment_version
    except Exception:
        pass
    return one_by_one


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
    """A new tensor on the current device."""
    import torch

    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def contiguous(shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    """The arguments of ``empty`` for a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.insert(0, step)
        step *= extent
    return shape, tuple(strides), dtype
