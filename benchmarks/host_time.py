"""The host's time of a decode call, by the way in which torch makes it.

python benchmarks/host_time.py RESULTS.json

Needs torch and a Hopper GPU. A call has four requests and 16 heads. A step
is 27 of them in a row on one plan, as many as DeepSeek-V2-Lite has layers, each fed the result of
the one before. Times are of the host alone, into an empty queue: medians, in microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flashmla_rtc
import flashmla_rtc.integrations.torch  # which defines the operators
from flashmla_rtc import variants
from flashmla_rtc.bench.timing import host_seconds
from flashmla_rtc.cli.machine import driver_version

LAYERS = 27
HEADS, HEAD_DIM, HEAD_DIM_V, PAGE = 16, 576, 512, 64
Call = Callable[[], Any]


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of ``call``."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compiled(call: Callable[..., Any], arguments: tuple[Any, ...], mode: str) -> Call:
    """``call`` after torch has compiled it, and recorded it where the mode asks for that."""
    program = torch.compile(call, fullgraph=True, mode=mode)

    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return program(*arguments)

    for _ in range(5):
        run()
    return run


def measure() -> dict[str, dict[str, float]]:
    """Microseconds of a call and of a step, by way."""
    torch.manual_seed(0)
    q = torch.randn(4, 1, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k_cache = torch.randn(64, PAGE, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    table = torch.arange(64, device="cuda", dtype=torch.int32).view(4, 16)
    lengths = torch.tensor([1000, 64, 1, 777], device="cuda", dtype=torch.int32)
    plan, splits = flashmla_rtc.get_mla_metadata(lengths, HEADS, 1)
    operators = torch.ops.flashmla_rtc

    def decode(q: Any, k_cache: Any, table: Any, lengths: Any, plan: Any, splits: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(
            q, k_cache, table, lengths, HEAD_DIM_V, plan, splits
        )

    def step(q: Any, *rest: Any) -> Any:
        for _ in range(LAYERS):
            out, _ = decode(q, *rest)
            q = torch.nn.functional.pad(out, (0, HEAD_DIM - HEAD_DIM_V))
        return q

    arguments = (q, k_cache, table, lengths, plan, splits)
    out, lse = decode(*arguments)
    inputs = (q, k_cache, table, lengths, HEAD_DIM_V, plan, splits)
    calls = {
        "plain": lambda: flashmla_rtc.flash_mla_with_kvcache(*inputs),
        "plain, out= and lse=": lambda: flashmla_rtc.flash_mla_with_kvcache(
            *inputs, out=out, lse=lse
        ),
        "operator": lambda: operators.mla_decode(*inputs),
        "operator into out and lse": lambda: operators.mla_decode_out(*inputs, out=out, lse=lse),
        "torch.compile": compiled(decode, arguments, "default"),
        "torch.compile, reduce-overhead": compiled(decode, arguments, "reduce-overhead"),
        "CUDA graph": captured(lambda: decode(*arguments)),
    }
    steps = {
        "plain": lambda: step(*arguments),
        "torch.compile": compiled(step, arguments, "default"),
        "torch.compile, reduce-overhead": compiled(step, arguments, "reduce-overhead"),
        "CUDA graph": captured(lambda: step(*arguments)),
    }
    return {
        "call": in_microseconds(host_seconds(calls, torch.cuda.synchronize)),
        "step": in_microseconds(host_seconds(steps, torch.cuda.synchronize, calls=10)),
    }


def in_microseconds(times: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e6, 2) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("This benchmark needs a Hopper GPU.")
    with torch.inference_mode():
        times = measure()
    document = {
        "device": torch.cuda.get_device_name(),
        "digest": variants.sources_digest(),
        "kernels_digest": variants.kernels_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "layers": LAYERS,
        "host_us": times,
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for kind, by_way in times.items():
        for way, time in by_way.items():
            print(f"{kind:5} {way:32} {time:9.2f} µs")


if __name__ == "__main__":
    main()
