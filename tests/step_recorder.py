"""Stands in for CUDA graphs on a CPU: records torch's operations, and runs those alone again.

As in a CUDA graph the recorded tensors and numbers are all there is at a replay: no line of the
model is run, so that what was taken from the host at the time of recording would be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashmla_rtc.integrations.torch as operators
from flashmla_rtc.integrations.transformers import attention

# What needs a number or a shape from the device.
WAITING = ("aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::equal")


class _Seen(TorchDispatchMode):
    """Calls ``see`` with each operation, its arguments and what it returned."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._see(function, args, kwargs or {}, result)
        return result


def _decode(*args: Any, **kwargs: Any) -> Any:
    """flash_mla_with_kvcache as one operation, as a kernel is one launch."""
    *arrays, head_dim_v, metadata = args
    scale, causal = kwargs["softmax_scale"], kwargs["causal"]
    return operators.decode(*arrays, head_dim_v, metadata, None, scale, causal, None, None)


@contextmanager
def seen(see: Callable[..., None]) -> Iterator[None]:
    with mock.patch.object(attention, "flash_mla_with_kvcache", _decode), _Seen(see):
        yield


class StepRecorder:
    """A ``Recorder`` that counts what it does."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.recorded = self.replayed = self.watched = 0
        self.unable: str | None = None  # a name that record() does not take

    def ready(self) -> bool:
        return True

    def turn(self) -> Any:
        return nullcontext()

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        self.watched += 1
        places: list[str] = []

        def see(function: Any, *_: Any) -> None:
            if function.name().partition(".")[0] in WAITING:
                places.append(function.name())

        with seen(see):
            yield places

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        operations: list[Any] = []

        def see(function: Any, args: Any, kwargs: Any, result: Any) -> None:
            name = function.name()
            if name.partition(".")[0] in (*WAITING, self.unable):
                raise RuntimeError(f"{name} can't be recorded")
            operations.append((function, args, kwargs, result))

        with seen(see):
            first = function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for function, args, kwargs, result in operations:
                again = function(*args, **kwargs)
                old, new = tree_leaves(result), tree_leaves(again)
                for one, other in zip(old, new, strict=True):
                    if isinstance(one, torch.Tensor) and one.data_ptr() != other.data_ptr():
                        one.copy_(other)

        return first, replay
