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
