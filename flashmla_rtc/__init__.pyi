# The types of the public functions, for type checkers and editors: what comes back for which
# arguments. That arrays are of one library is not told here: mixed ones pass as `_Array`. The
# functions themselves take `Any`, because what they are given is looked at when they are called.
# tests/test_types.py holds the two together.
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from numpy import float32, generic, int32, integer
from numpy.typing import NDArray

from ._version import __version__ as __version__
from .bench.decode_time import DecodeTime as DecodeTime
from .bench.decode_time import time_decode as time_decode
from .inspection import KernelDifference as KernelDifference
from .inspection import KernelInspection as KernelInspection
from .inspection import inspect_kernel as inspect_kernel
from .inspection import kernel_names as kernel_names
from .metadata import FlashMLASchedMeta as FlashMLASchedMeta
from .overrides import SourceOverride as SourceOverride
from .overrides import kernel_sources as kernel_sources
from .overrides import override_sources as override_sources
from .plan_picture import PlanPicture as PlanPicture
from .plan_picture import draw_plan as draw_plan
from .plan_reading import PlanFacts as PlanFacts
from .plan_reading import plan_for as plan_for

__all__ = [
    "DecodeTime",
    "FlashMLASchedMeta",
    "KernelDifference",
    "KernelInspection",
    "PlanFacts",
    "PlanPicture",
    "SourceOverride",
    "__version__",
    "draw_plan",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "inspect_kernel",
    "kernel_names",
    "kernel_sources",
    "num_sm_parts",
    "override_sources",
    "plan_for",
    "prepare",
    "time_decode",
]

class _Array(Protocol):
    """torch.Tensor, cupy.ndarray, jax.Array, numpy.ndarray and whatever else speaks DLPack."""

    @property
    def __dlpack__(self) -> Callable[..., Any]: ...
    @property
    def __dlpack_device__(self) -> Callable[..., Any]: ...

class _TorchDevice(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def index(self) -> int | None: ...

class _CupyDevice(Protocol):
    @property
    def id(self) -> int: ...

# Results are of the library of a call's arrays. Of NumPy's the dtypes are known.
_A = TypeVar("_A", bound=_Array)
_Float = TypeVar("_Float", bound=generic)  # bfloat16 is not among NumPy's own

@overload
def flash_mla_with_kvcache(
    q: NDArray[_Float],
    k_cache: NDArray[_Float],
    block_table: NDArray[int32],
    cache_seqlens: NDArray[int32],
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | NDArray[int32] | None,
    num_splits: NDArray[int32] | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: None = None,
    attn_sink: None = None,
    extra_k_cache: None = None,
    extra_indices_in_kvcache: None = None,
    topk_length: None = None,
    extra_topk_length: None = None,
    *,
    out: NDArray[_Float] | None = None,
    lse: NDArray[float32] | None = None,
) -> tuple[NDArray[_Float], NDArray[float32]]: ...
@overload
def flash_mla_with_kvcache(
    q: _A,
    k_cache: _A,
    block_table: _A,
    cache_seqlens: _A,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | _Array | None,
    num_splits: _Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: None = None,
    attn_sink: None = None,
    extra_k_cache: None = None,
    extra_indices_in_kvcache: None = None,
    topk_length: None = None,
    extra_topk_length: None = None,
    *,
    out: _A | None = None,
    lse: _A | None = None,
) -> tuple[_A, _A]: ...
@overload
def get_mla_metadata() -> tuple[FlashMLASchedMeta, None]: ...
@overload
def get_mla_metadata(
    cache_seqlens: _A,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: None = None,
) -> tuple[_A, _A]: ...
@overload
def get_mla_metadata(
    cache_seqlens: _A,
    *,
    num_heads_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: None = None,
) -> tuple[_A, _A]: ...

_Device = int | integer[Any] | str | _TorchDevice | _CupyDevice | None

def num_sm_parts(device: _Device, num_q_tokens_per_head_k: int, num_heads_k: int) -> int: ...
def prepare(device: _Device = None) -> None: ...
