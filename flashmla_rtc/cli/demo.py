"""``demo``: one decode step of DeepSeek-V3's attention on random data, on the best backend of this
machine.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashmla_rtc._version import __version__
from flashmla_rtc.arrays import CPU, Device

from . import CommandError, machine
from .sample import CuPyLibrary, Library, NumPyLibrary, TorchLibrary, compare, decoder, make_batch

# Batch, query heads and longest request; every request is between half of that and all of it.
ON_GPU = (64, 128, 4096)
ON_CPU = (4, 128, 1024)


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the demo runs: which library makes the arrays, which backend takes them, and why."""

    library: Library
    backend: str
    reason: str = ""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up; got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda or cuda:N"
    )
    parser.add_argument("--batch", type=_positive, help="requests")
    parser.add_argument("--heads", type=_positive, help="query heads (128)")
    parser.add_argument("--seqlen", type=_positive, help="keys of the longest request")
    parser.add_argument(
        "--seq-len-q", type=_positive, default=1, help="query tokens of each request (1)"
    )


def run(arguments: argparse.Namespace) -> int:
    choice = choose(arguments.device)
    library = choice.library
    batch_size, heads, longest = ON_GPU if library.device.type == "cuda" else ON_CPU
    batch_size = arguments.batch or batch_size
    heads = arguments.heads or heads
    longest = arguments.seqlen or longest
    lengths = np.random.default_rng(0).integers(
        max(1, longest // 2), longest, batch_size, dtype=np.int32, endpoint=True
    )

    print(f"flashmla_rtc {__version__}: one decode step of DeepSeek-V3's attention, random data")
    _say("backend", f"{_backend(choice)}, {library.dtype} arrays of {library.title}")
    if choice.reason:
        _say("", choice.reason)

    batch = make_batch(library, lengths, arguments.seq_len_q, heads)
    decode = decoder(batch)
    with warnings.catch_warnings():  # that the kernels are not used was said already
        warnings.simplefilter("ignore" if choice.reason else "default")
        out, lse = decode()
    _say("q", f"{tuple(batch.q.shape)}  (batch, seq_len_q, heads_q, head_dim)")
    _say("k_cache", f"{tuple(batch.k_cache.shape)}  (num_blocks, page, heads_k, head_dim)")
    _say("cache_seqlens", f"{lengths.min()} to {lengths.max()} keys, {lengths.sum()} in all")
    _say("out", f"{tuple(out.shape)}  (batch, seq_len_q, heads_q, head_dim_v)")
    _say("lse", f"{tuple(lse.shape)}  (batch, heads_q, seq_len_q)")

    errors = compare(batch, out, lse)
    _say("error of out", f"{errors.out:.2e} relative to float64 (at most {errors.out_bound:.1e})")
    _say("error of lse", f"{errors.lse:.2e} from float64 (at most {errors.lse_bound:.0e})")

    seconds = library.seconds(decode)
    _say("time", f"{_duration(seconds)} a call")
    rates = batch.flops / seconds / 1e12, batch.bytes / seconds / 1e9
    _say("speed", f"{rates[0]:.3g} TFLOPS, {rates[1]:.3g} GB/s")
    if not errors.small:
        raise CommandError("The result is further from float64 than rounding explains.")
    print("The result agrees with float64.")
    return 0


def _backend(choice: Choice) -> str:
    if choice.backend == "sm90":
        return f"the kernels for Hopper on {choice.library.device}"
    if choice.library.device == CPU:
        return "the CPU backend (reference code, without the kernels)"
    return f"the reference backend on {choice.library.device} (without the kernels)"


def _say(name: str, text: str) -> None:
    print(f"  {name:<13}  {text}")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def choose(wanted: str) -> Choice:
    """The best place for ``wanted`` (auto, cpu, cuda, cuda:N): the kernels, else a GPU's reference,
    else the CPU's.

    Raises:
        CommandError: ``wanted`` is no device, or a GPU is asked for that no array library reaches.
    """
    kind, _, index = wanted.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise CommandError(f"--device must be auto, cpu, cuda or cuda:N, but it is {wanted!r}.", 2)
    if kind == "cpu":
        return _on_cpu("--device cpu asked for it.")
    cuda = machine.query_cuda()
    device = Device("cuda", int(index or 0))
    if device.index < len(cuda.devices):
        choice = _on_gpu(device)
        if choice is not None:
            return choice
        reason = f"{cuda.devices[device.index].name} is here, but {_unreachable()}."
    elif cuda.devices:
        reason = f"There is no {device}: this machine has {_count(len(cuda.devices))}."
    else:
        reason = cuda.problem or "This machine has no CUDA device."
    if kind == "cuda":
        raise CommandError(f"--device {wanted} cannot be used. {reason}")
    return _on_cpu(reason)


def _count(devices: int) -> str:
    return "one CUDA device" if devices == 1 else f"{devices} CUDA devices"


def _unreachable() -> str:
    return (
        "neither torch with CUDA nor CuPy can be used here "
        "(pip install 'flashmla_rtc[cu13]', or [cu12] for a driver of CUDA 12)"
    )


def gpu_library(device: Device) -> Library | None:
    """torch if it reaches ``device``, else CuPy if it does, else None."""
    try:
        import torch

        if torch.cuda.is_available() and device.index < torch.cuda.device_count():
            return TorchLibrary(device)
    except Exception:  # an installation that does not fit its driver raises all sorts
        pass
    try:
        import cupy

        if device.index < cupy.cuda.runtime.getDeviceCount():
            return CuPyLibrary(device)
    except Exception:
        pass
    return None


def cpu_library() -> Library:
    """torch if it is installed together with what the reference backend needs of it, else NumPy."""
    makers: list[Callable[[], Library]] = [lambda: TorchLibrary(CPU), NumPyLibrary]
    if machine.package_version("array-api-compat") is None:
        makers = makers[1:]
    for make in makers:
        try:
            return make()
        except Exception:
            continue
    raise CommandError("Neither torch nor NumPy could make an array.")


def _on_cpu(reason: str) -> Choice:
    return Choice(cpu_library(), "reference", reason)


def _on_gpu(device: Device) -> Choice | None:
    from flashmla_rtc import backends

    library = gpu_library(device)
    if library is None:
        return None
    reason = backends.why_not(device)
    return Choice(library, "sm90" if reason is None else "reference", reason or "")
