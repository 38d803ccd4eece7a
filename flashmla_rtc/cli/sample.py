"""Random decode batches in NumPy, torch or CuPy, their check against float64, and their time.

``demo`` shows one, ``doctor`` tries a small one on every device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flashmla_rtc.arrays import CPU, Device
from flashmla_rtc.bench.shapes import ELEMENT_BYTES, HEAD_DIM, HEAD_DIM_V, PAGE

# What a right result may differ from float64 by: out relatively (rounding P and the result), lse
# absolutely.
OUT_BOUNDS = {"bfloat16": 2.1e-3, "float16": 2.6e-4}
LSE_BOUND = 5e-6


class Library(Protocol):
    """An array library on one device. ``dtype`` is that of queries and keys."""

    title: str
    dtype: str
    device: Device

    def normal(self, *shape: int) -> Any:
        """Standard normal numbers in ``dtype``."""

    def integers(self, values: npt.NDArray[np.int32]) -> Any:
        """``values`` on the device, int32."""

    def oracle(self, array: Any) -> Any:
        """``array`` where float64 arithmetic is to run: in place, or copied to the host."""

    def to_numpy(self, array: Any) -> npt.NDArray[np.float64]:
        """Any array of the library, or of its oracle, as float64 on the host."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """The time of one call."""


def _host_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class NumPyLibrary:
    """NumPy, in float16: NumPy alone has no bfloat16."""

    def __init__(self, dtype: str = "float16") -> None:
        self.title = f"NumPy {np.__version__}"
        self.dtype = dtype
        self.device = CPU
        self._random = np.random.default_rng(0)

    def normal(self, *shape: int) -> Any:
        return self._random.standard_normal(shape, dtype=np.float32).astype(self.dtype)

    def integers(self, values: npt.NDArray[np.int32]) -> Any:
        return values

    def oracle(self, array: Any) -> Any:
        return array

    def to_numpy(self, array: Any) -> npt.NDArray[np.float64]:
        return np.asarray(array, dtype=np.float64)

    def seconds(self, call: Callable[[], Any]) -> float:
        return _host_time(call)


class TorchLibrary:
    """torch on the CPU or on a GPU, in bfloat16.

    Raises:
        ImportError: torch is not installed.
    """

    def __init__(self, device: Device, dtype: str = "bfloat16") -> None:
        import torch

        self._torch = torch
        self.title = f"torch {torch.__version__}"
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator(str(device)).manual_seed(0)

    def normal(self, *shape: int) -> Any:
        torch = self._torch
        values = torch.empty(shape, dtype=getattr(torch, self.dtype), device=str(self.device))
        return values.normal_(generator=self._generator)

    def integers(self, values: npt.NDArray[np.int32]) -> Any:
        return self._torch.from_numpy(values).to(str(self.device))

    def oracle(self, array: Any) -> Any:
        return array

    def to_numpy(self, array: Any) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = array.double().cpu().numpy()
        return values

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cpu":
            return _host_time(call)
        cuda = self._torch.cuda
        with cuda.device(self.device.index):
            return _event_time(
                call,
                lambda: cuda.Event(enable_timing=True),
                lambda begin, end: begin.elapsed_time(end),
            )


class CuPyLibrary:
    """CuPy on a GPU, in float16: its bfloat16 depends on further packages.

    Numbers are drawn and float64 is computed by NumPy on the host, so that no kernel of CuPy's own
    is needed, which would have to be compiled or come with further CUDA libraries.

    Raises:
        ImportError: CuPy is not installed.
    """

    def __init__(self, device: Device) -> None:
        import cupy

        self._cupy = cupy
        self._host = NumPyLibrary()
        self.title = f"CuPy {cupy.__version__}"
        self.dtype = self._host.dtype
        self.device = device

    def normal(self, *shape: int) -> Any:
        return self._upload(self._host.normal(*shape))

    def integers(self, values: npt.NDArray[np.int32]) -> Any:
        return self._upload(values)

    def _upload(self, values: npt.NDArray[Any]) -> Any:
        with self._cupy.cuda.Device(self.device.index):
            return self._cupy.asarray(values)

    def oracle(self, array: Any) -> Any:
        return array.get()

    def to_numpy(self, array: Any) -> npt.NDArray[np.float64]:
        host = array.get() if hasattr(array, "get") else array
        return np.asarray(host, dtype=np.float64)

    def seconds(self, call: Callable[[], Any]) -> float:
        cuda = self._cupy.cuda
        with cuda.Device(self.device.index):
            return _event_time(call, cuda.Event, cuda.get_elapsed_time)


def _event_time(
    call: Callable[[], Any],
    event: Callable[[], Any],
    milliseconds: Callable[[Any, Any], float],
    calls: int = 20,
    rounds: int = 5,
) -> float:
    """Median over rounds of the device time of one call, between two events around ``calls`` of
    them.
    """
    times = []
    for _ in range(rounds + 1):
        begin, end = event(), event()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(milliseconds(begin, end) / 1e3 / calls)
    return statistics.median(times[1:])


@dataclass(frozen=True, slots=True)
class Batch:
    """One decode step: q (batch, seq_len_q, heads_q, 576), k_cache (num_blocks, 64, 1, 576), table
    and lengths.
    """

    library: Library
    lengths: npt.NDArray[np.int32]
    q: Any
    k_cache: Any
    block_table: Any
    cache_seqlens: Any

    @property
    def rows(self) -> int:
        """Query rows over the whole batch."""
        batch, seq_len_q, heads_q, _ = self.q.shape
        return int(batch * seq_len_q * heads_q)

    @property
    def flops(self) -> float:
        per_key = 2.0 * self.rows / len(self.lengths) * (HEAD_DIM + HEAD_DIM_V)
        return per_key * float(self.lengths.sum(dtype=np.int64))

    @property
    def bytes(self) -> float:
        keys = float(self.lengths.sum(dtype=np.int64)) * HEAD_DIM
        return (keys + self.rows * (HEAD_DIM + HEAD_DIM_V)) * ELEMENT_BYTES


def make_batch(
    library: Library, lengths: npt.NDArray[np.int32], seq_len_q: int, heads_q: int
) -> Batch:
    """Random queries and keys for requests of ``lengths`` keys, their pages scattered over the
    cache.
    """
    pages = -(-lengths.astype(np.int64) // PAGE)
    num_blocks = int(pages.sum())
    order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    table = np.full((len(lengths), int(pages.max())), -1, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(pages)])
    for request, count in enumerate(pages.tolist()):
        table[request, :count] = order[starts[request] : starts[request] + count]
    return Batch(
        library=library,
        lengths=lengths,
        q=library.normal(len(lengths), seq_len_q, heads_q, HEAD_DIM),
        k_cache=library.normal(num_blocks, PAGE, 1, HEAD_DIM),
        block_table=library.integers(table),
        cache_seqlens=library.integers(lengths),
    )


def decoder(batch: Batch) -> Callable[[], tuple[Any, Any]]:
    """The public call on ``batch``, planned once."""
    from flashmla_rtc import flash_mla_with_kvcache, get_mla_metadata

    _, seq_len_q, heads_q, _ = batch.q.shape
    metadata, num_splits = get_mla_metadata(batch.cache_seqlens, seq_len_q * heads_q, 1)

    def decode() -> tuple[Any, Any]:
        return flash_mla_with_kvcache(
            batch.q,
            batch.k_cache,
            batch.block_table,
            batch.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            causal=True,
        )

    return decode


@dataclass(frozen=True, slots=True)
class Errors:
    """Distance from float64: ‖out − exact‖ / ‖exact‖, and the largest |lse − exact|, with what each
    may be.
    """

    out: float
    lse: float
    out_bound: float
    lse_bound: float = LSE_BOUND

    @property
    def small(self) -> bool:
        return self.out <= self.out_bound and self.lse <= self.lse_bound


def compare(batch: Batch, out: Any, lse: Any) -> Errors:
    """Compare a result with the same attention in float64."""
    from flashmla_rtc.reference import attend

    library = batch.library
    exact, exact_lse = (
        library.to_numpy(array)
        for array in attend(
            library.oracle(batch.q),
            library.oracle(batch.k_cache),
            library.oracle(batch.block_table),
            library.oracle(batch.cache_seqlens),
            HEAD_DIM_V,
            HEAD_DIM**-0.5,
            True,
            compute_dtype="float64",
            out_dtype="float64",
        )
    )
    gap = np.linalg.norm(library.to_numpy(out) - exact) / np.linalg.norm(exact)
    lse_values = library.to_numpy(lse)
    empty = np.isposinf(lse_values) & np.isposinf(exact_lse)  # queries that see no key
    lse_gap = np.abs(np.where(empty, 0.0, lse_values) - np.where(empty, 0.0, exact_lse)).max()
    return Errors(float(gap), float(lse_gap), OUT_BOUNDS[library.dtype])
