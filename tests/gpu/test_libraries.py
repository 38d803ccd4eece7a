"""Arrays of torch, CuPy, JAX and anything with DLPack: the same bits, in the caller's library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conversions import (
    CYCLES,
    Boxed,
    assert_torch_bits,
    decode,
    problem,
    raw,
    tensors,
    to_cupy,
    to_jax,
)
from problem import DEVICE, HEAD_DIM_V, assert_matches, assert_same_bits, check, relative_error

import flashmla_rtc

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


@DTYPES
def test_cupy(cupy: Any, dtype: torch.dtype) -> None:
    call = problem(dtype)
    expected = check(call)
    arrays = to_cupy(cupy, call)
    plan = flashmla_rtc.get_mla_metadata(arrays[3], 2 * 16, 1)
    assert all(isinstance(array, cupy.ndarray) for array in plan)
    out, lse = decode(arrays)
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    assert str(out.dtype) == str(arrays[0].dtype)
    assert_torch_bits((out.get(), lse.get()), expected)


@DTYPES
def test_cupy_with_strides_and_results_in_place(cupy: Any, dtype: torch.dtype) -> None:
    call = problem(dtype)
    expected = check(call)
    q, k_cache, table, lengths = to_cupy(cupy, call)
    wide_q = cupy.empty((*q.shape[:-1], q.shape[-1] + 3), dtype=q.dtype)
    raw(wide_q)[..., 1:-2] = raw(q)
    pages = cupy.empty((2 * k_cache.shape[0], *k_cache.shape[1:]), dtype=k_cache.dtype)
    raw(pages)[::2] = raw(k_cache)
    out = cupy.empty((5, 16, 2, HEAD_DIM_V + 8), dtype=q.dtype).transpose(0, 2, 1, 3)[..., :-8]
    lse = cupy.zeros((2, 16, 5, 2), dtype=cupy.float32)[..., 1].transpose(2, 1, 0)
    result = decode((wide_q[..., 1:-2], pages[::2], table, lengths), out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert_torch_bits((out.get(), lse.get()), expected)


def test_cupy_with_a_plan_object(cupy: Any) -> None:
    call = problem(torch.float16)
    plan, _ = flashmla_rtc.get_mla_metadata()
    arrays = to_cupy(cupy, call)
    for _ in range(2):
        out, lse = flashmla_rtc.flash_mla_with_kvcache(*arrays, HEAD_DIM_V, plan, causal=True)
    assert isinstance(plan.tile_scheduler_metadata, cupy.ndarray)
    assert_torch_bits((out.get(), lse.get()), check(call))


def test_cupy_s_current_stream_is_followed(cupy: Any) -> None:
    """Inputs are written late on that stream, so a launch elsewhere would see the old ones."""
    late, early = problem(seed=1), problem(seed=2)
    expected = check(late)
    new, arrays = to_cupy(cupy, late), to_cupy(cupy, early)
    out = cupy.empty(expected[0].shape, dtype=arrays[0].dtype)
    lse = cupy.zeros(expected[1].shape, dtype=cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        decode(arrays, out=out, lse=lse)  # what has to be allocated is there after this
    cupy.cuda.Device().synchronize()
    with stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(CYCLES)
        for array, contents in zip(arrays, new, strict=True):
            cupy.copyto(raw(array), raw(contents))
        decode(arrays, out=out, lse=lse)
    assert not stream.done  # nothing so far has waited
    stream.synchronize()
    assert_torch_bits((out.get(), lse.get()), expected)


def test_two_cupy_streams_at_once(cupy: Any) -> None:
    calls = [problem(seed=seed) for seed in (3, 4)]
    expected = [check(call) for call in calls]
    arrays = [to_cupy(cupy, call) for call in calls]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in calls]
    results: list[list[Any]] = [[], []]
    for _ in range(30):
        for i in (0, 1):
            with streams[i]:
                results[i].append(decode(arrays[i]))
    cupy.cuda.Device().synchronize()
    for i in (0, 1):
        for out, lse in results[i]:
            assert_torch_bits((out.get(), lse.get()), expected[i])


class Namespace:
    """What an array's ``__array_namespace__`` gives, as far as it is needed here."""

    @staticmethod
    def from_dlpack(array: Any) -> BoxedWithNamespace:
        return BoxedWithNamespace(torch.from_dlpack(array))


class BoxedWithNamespace(Boxed):
    def __array_namespace__(self, *, api_version: str | None = None) -> type[Namespace]:
        return Namespace


@DTYPES
def test_an_object_that_only_speaks_dlpack(cupy: Any, dtype: torch.dtype) -> None:
    """Nobody knows its library, so results are CuPy arrays; ``out=`` is written where it is."""
    call = problem(dtype)
    expected = check(call)
    boxes = tuple(Boxed(tensor) for tensor in tensors(call))
    out, lse = decode(boxes)
    assert isinstance(out, cupy.ndarray)
    assert_torch_bits((out.get(), lse.get()), expected)

    given = [Boxed(tensor) for tensor in call.poisoned()]
    result = decode(boxes, out=given[0], lse=given[1])
    assert result[0] is given[0]
    torch.cuda.synchronize()
    assert_same_bits((given[0].tensor, given[1].tensor), expected)


def test_an_array_library_gets_its_own_arrays_back(cupy: Any) -> None:
    call = problem()
    out, lse = decode(tuple(BoxedWithNamespace(tensor) for tensor in tensors(call)))
    assert isinstance(out, BoxedWithNamespace)
    assert isinstance(lse, BoxedWithNamespace)
    torch.cuda.synchronize()
    assert_same_bits((out.tensor, lse.tensor), check(call))


@pytest.mark.allowed_skip
@DTYPES
def test_jax(jax_on_gpu: Any, dtype: torch.dtype) -> None:
    call = problem(dtype)
    expected = check(call)
    arrays = to_jax(jax_on_gpu, call)
    before = [np.array(array) for array in arrays]
    out, lse = decode(arrays)
    for result in (out, lse):
        assert isinstance(result, jax_on_gpu.Array)
        assert next(iter(result.devices())).platform == "gpu"
    assert out.dtype == arrays[0].dtype
    assert_torch_bits((np.array(out), np.array(lse)), expected)
    for array, contents in zip(arrays, before, strict=True):  # JAX arrays are immutable
        assert np.array_equal(np.array(array).view(np.uint8), contents.view(np.uint8))


@pytest.mark.allowed_skip
def test_jax_arrays_that_are_still_being_computed(jax_on_gpu: Any) -> None:
    """Inputs come from work that JAX has not finished, and the result goes into more of it."""
    numpy = jax_on_gpu.numpy
    call = problem()
    q, k_cache, table, lengths = to_jax(jax_on_gpu, call)
    busy = numpy.ones((8192, 8192), dtype=numpy.float32)
    for _ in range(4):
        busy = busy @ busy * 1e-4
    nothing = (busy.sum() * 0).astype(q.dtype)
    out, lse = decode((q + nothing, k_cache + nothing, table, lengths))
    doubled = out * 2
    expected = check(call)
    assert_torch_bits((np.array(out), np.array(lse)), expected)
    assert np.array_equal(
        np.array(doubled).astype(np.float32), 2 * expected[0].float().cpu().numpy()
    )


@pytest.mark.allowed_skip
def test_jax_arrays_may_be_dropped_while_the_call_still_waits(jax_on_gpu: Any) -> None:
    """JAX would give their memory to the arrays that are made next."""
    numpy = jax_on_gpu.numpy
    call = problem()
    expected = check(call)
    decode(to_jax(jax_on_gpu, call))
    arrays = to_jax(jax_on_gpu, call)
    shapes = [array.shape for array in arrays]
    torch.cuda._sleep(CYCLES)  # on the stream that the kernels will use
    out, lse = decode(arrays)
    del arrays
    others = [numpy.full(shapes[i], 7e4, dtype=numpy.bfloat16) for i in (0, 1) for _ in range(4)]
    for other in others:
        other.block_until_ready()
    assert_torch_bits((np.array(out), np.array(lse)), expected)


def test_numpy_arrays_stay_on_the_cpu() -> None:
    """Through the reference backend, to the same numbers within rounding."""
    call = problem(torch.float16)
    out, lse = decode(tuple(tensor.cpu().numpy() for tensor in tensors(call)))
    assert isinstance(out, np.ndarray)
    assert isinstance(lse, np.ndarray)
    on_gpu = check(call)
    assert_matches(
        (torch.from_numpy(out).to(DEVICE), torch.from_numpy(lse).to(DEVICE)), call.expected()
    )
    assert relative_error(torch.from_numpy(out).to(DEVICE), on_gpu[0].double()) <= 4e-4


def test_torch_tensors_on_the_cpu_stay_there() -> None:
    call = problem()
    out, lse = decode(tuple(tensor.cpu() for tensor in tensors(call)))
    assert out.device.type == lse.device.type == "cpu"
    assert_matches((out.to(DEVICE), lse.to(DEVICE)), call.expected())


def test_subclasses_and_parameters_of_torch_are_tensors() -> None:
    call = problem()
    q = torch.nn.Parameter(call.q, requires_grad=False)
    assert_same_bits(call.but(q=q).run(), call.run())


def test_mixed_libraries_are_refused(cupy: Any) -> None:
    call = problem()
    q, *_ = to_cupy(cupy, call)
    with pytest.raises(TypeError, match="k_cache"):
        decode((q, *tensors(call)[1:]))
