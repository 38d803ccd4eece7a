"""Each library's own stream is the one that is used, and no other library's; JAX waits by itself.

What a stream does is held up by a kernel that sleeps on it: work that went elsewhere shows as a
result that is there while the stream still sleeps, or as one that is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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
    tensors,
    to_cupy,
    to_jax,
)
from problem import assert_same_bits, check

from flashmla_rtc.integrations.jax import release

ROOT = Path(__file__).resolve().parents[2]


def sleep_on(cupy_stream: Any) -> None:
    with torch.cuda.stream(torch.cuda.ExternalStream(cupy_stream.ptr)):
        torch.cuda._sleep(CYCLES)


def test_torch_s_stream_does_not_move_cupy_arrays(cupy: Any) -> None:
    call = problem()
    expected = check(call)
    arrays = to_cupy(cupy, call)
    ours = cupy.cuda.Stream(non_blocking=True)
    with ours:
        decode(arrays)  # what has to be allocated is there after this
    torch.cuda.synchronize()
    theirs = torch.cuda.Stream()
    with torch.cuda.stream(theirs):
        torch.cuda._sleep(CYCLES)
        with ours:
            out, lse = decode(arrays)
            result = out.get(), lse.get()  # waits for CuPy's stream
    assert not theirs.query(), "the call waited for torch's stream"
    assert_torch_bits(result, expected)
    torch.cuda.synchronize()


def test_cupy_s_stream_does_not_move_torch_tensors(cupy: Any) -> None:
    call = problem()
    expected = check(call)
    result = call.poisoned()
    ours, theirs = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(ours):
        plan = call.plan()
        call.run(plan, *result)
    torch.cuda.synchronize()
    with theirs:
        sleep_on(theirs)
        with torch.cuda.stream(ours):
            call.run(plan, *result)
        ours.synchronize()
    assert not theirs.done, "the call waited for CuPy's stream"
    assert_same_bits(result, expected)
    torch.cuda.synchronize()


def test_cupy_arrays_on_a_stream_of_torch(cupy: Any) -> None:
    """How to run both libraries in one order: CuPy is given torch's stream."""
    call = problem()
    expected = check(call)
    arrays = to_cupy(cupy, call)
    stream = torch.cuda.Stream()
    with cupy.cuda.ExternalStream(stream.cuda_stream):
        decode(arrays)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
    with cupy.cuda.ExternalStream(stream.cuda_stream):
        out, lse = decode(arrays)
    assert not stream.query()
    stream.synchronize()
    assert_torch_bits((out.get(), lse.get()), expected)


def test_cupy_s_per_thread_default_stream(cupy: Any) -> None:
    call = problem()
    expected = check(call)
    arrays = to_cupy(cupy, call)
    with cupy.cuda.Stream.ptds:
        for _ in range(3):
            out, lse = decode(arrays)
        result = out.get(), lse.get()
    assert_torch_bits(result, expected)


def test_dlpack_objects_go_to_cupy_s_stream(cupy: Any) -> None:
    call = problem()
    expected = check(call)
    boxes = tuple(Boxed(tensor) for tensor in tensors(call))
    given = [Boxed(tensor) for tensor in call.poisoned()]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        decode(boxes)
    torch.cuda.synchronize()
    sleep_on(stream)
    with stream:
        decode(boxes, out=given[0], lse=given[1])
    assert not stream.done
    stream.synchronize()
    assert_same_bits((given[0].tensor, given[1].tensor), expected)


@pytest.mark.allowed_skip
def test_jax_arrays_on_a_stream_of_cupy(cupy: Any, jax_on_gpu: Any) -> None:
    """The kernels run there, and who reads the JAX result waits for them without being told."""
    call = problem()
    expected = check(call)
    arrays = to_jax(jax_on_gpu, call)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        decode(arrays)
    torch.cuda.synchronize()
    sleep_on(stream)
    with stream:
        out, lse = decode(arrays)
    assert not stream.done, "the call itself waited"
    doubled = out * 2
    result = np.array(out), np.array(lse)
    assert stream.done, "the result was read before its stream had come to it"
    assert_torch_bits(result, expected)
    assert np.array_equal(
        np.array(doubled).astype(np.float32), 2 * expected[0].float().cpu().numpy()
    )


@pytest.mark.allowed_skip
def test_a_cache_can_be_donated_when_no_call_reads_it(cupy: Any, jax_on_gpu: Any) -> None:
    """``donate_argnums`` lets JAX write into the cache, which a call may still have to read."""
    jax = jax_on_gpu
    call = problem()
    expected = check(call)
    overwrite = jax.jit(lambda cache: cache * 0 + 7, donate_argnums=0)
    overwrite(to_jax(jax, call)[1]).block_until_ready()  # compiled now
    decode(to_jax(jax, call))
    q, k_cache, table, lengths = to_jax(jax, call)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    sleep_on(stream)
    with stream:
        out, lse = decode((q, k_cache, table, lengths))
    with pytest.raises(ValueError, match="external reference"):
        overwrite(k_cache)
    release()
    new = overwrite(k_cache)
    assert float(new[0, 0, 0, 0]) == 7
    assert_torch_bits((np.array(out), np.array(lse)), expected)


@pytest.mark.allowed_skip
def test_jax_refuses_to_hold_results_and_to_be_traced(jax_on_gpu: Any) -> None:
    call = problem()
    arrays = to_jax(jax_on_gpu, call)
    out, lse = decode(arrays)
    before = np.array(out), np.array(lse)
    for given in ({"out": out}, {"lse": lse}):
        with pytest.raises(TypeError, match="is a JAX array, which is immutable"):
            decode(arrays, **given)
    with pytest.raises(TypeError, match=r"^q is a JAX tracer"):
        jax_on_gpu.jit(lambda q: decode((q, *arrays[1:])))(arrays[0])
    for array, contents in zip((out, lse), before, strict=True):
        assert np.array_equal(np.array(array).view(np.uint8), contents.view(np.uint8))


BFLOAT16_WITHOUT_ML_DTYPES = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name == "ml_dtypes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch, flashmla_rtc

class Boxed:
    def __init__(self, tensor):
        self.tensor = tensor
    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

zeros = lambda *shape, dtype: torch.zeros(*shape, dtype=dtype, device="cuda")
call = [zeros(1, 1, 16, 576, dtype=torch.bfloat16), zeros(1, 64, 1, 576, dtype=torch.bfloat16),
        zeros(1, 1, dtype=torch.int32), zeros(1, dtype=torch.int32)]
flashmla_rtc.flash_mla_with_kvcache(*call, 512, None)  # torch knows bfloat16 by itself
try:
    flashmla_rtc.flash_mla_with_kvcache(*map(Boxed, call), 512, None)
except TypeError as error:
    print(error)
"""


def test_bfloat16_without_ml_dtypes_says_what_to_install(cupy: Any) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BFLOAT16_WITHOUT_ML_DTYPES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("q could not be taken over DLPack: ")
    assert "CuPy needs the package ml_dtypes and NumPy >= 2.1.2 for bfloat16." in result.stdout
