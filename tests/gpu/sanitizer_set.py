"""A few small calls of every kind, for compute-sanitizer.

    PYTHONPATH=. compute-sanitizer --tool memcheck python tests/gpu/sanitizer_set.py

and the same with ``--tool racecheck`` and ``--tool synccheck``. Data and the formula stay on the
CPU, so that next to nothing but the package's kernels runs on the device. Prints a line a call and
ends with status 1 if one is wrong.
"""

from __future__ import annotations

import sys

import plans
import torch
from problem import DEVICE, Problem, make, relative_error

import flashmla_rtc
from flashmla_rtc import arrays, schedule, sm90

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


def on_gpu(call: Problem) -> Problem:
    return call.but(
        q=call.q.to(DEVICE),
        k_cache=call.k_cache.to(DEVICE),
        block_table=call.block_table.to(DEVICE),
        cache_seqlens=call.cache_seqlens.to(DEVICE),
    )


def say(right: bool, what: str) -> bool:
    print("ok" if right else "WRONG", what, flush=True)
    return right


def decode(
    name: str, call: Problem, cuts: list[tuple[int, int]] | None = None, odd: bool = False
) -> bool:
    """Run one call, cut as ``cuts`` say or as planned, with results at odd addresses or not."""
    true_out, true_lse = call.expected()
    device_call = on_gpu(call)
    plan = device_call.plan() if cuts is None else plans.from_cuts(device_call, cuts)
    batch, seq_len_q, heads_q, _ = call.q.shape
    memory = torch.empty(true_out.numel() + 1, dtype=call.q.dtype).to(DEVICE)
    out = memory[1:] if odd else memory[:-1]
    out = out.view(true_out.shape)
    lse = torch.empty(batch, heads_q, seq_len_q).to(DEVICE)
    device_call.run(plan, out, lse)
    host_out, host_lse = out.cpu(), lse.cpu()
    keys = ~torch.isposinf(true_lse)
    error = relative_error(host_out, true_out)
    lse_error = (host_lse.double() - true_lse)[keys].abs().max().item()
    empty = bool(torch.isposinf(host_lse[~keys]).all())
    right = error < 4e-3 and lse_error < 1e-4 and empty
    return say(right, f"{name}: error {error:.1e}, lse {lse_error:.1e}")


def planner(name: str, lengths: list[int], parts: int) -> bool:
    """Plan on the GPU and in NumPy."""
    host = torch.tensor(lengths, dtype=torch.int32)
    device = host.to(DEVICE)
    metadata = torch.empty(parts, 8, dtype=torch.int32).to(DEVICE)
    num_splits = torch.empty(len(lengths) + 1, dtype=torch.int32).to(DEVICE)
    model = schedule.cost_model(16, 1)
    sm90.plan_into(arrays.view(device, "cache_seqlens"), metadata, num_splits, parts, model)
    expected = schedule.plan_numpy(host.numpy(), parts, model)
    right = bool(
        (metadata.cpu().numpy() == expected[0]).all()
        and (num_splits.cpu().numpy() == expected[1]).all()
    )
    return say(right, name)


def main() -> int:
    flashmla_rtc.prepare()
    nan = torch.nan
    results = [
        planner("planner, 3 requests", [700, 0, 64], 132),
        planner("planner, 9000 requests", [1, 500, 64] * 3000, 132),
        planner("planner, pairs", [1 + i * 997 % 6000 for i in range(128)], 66),
        planner("planner, pairs with cuts", [1 + i * 997 % 6000 for i in range(128)], 132),
        decode(
            "bf16, whole requests, partial pages, NaN past the end",
            make([130, 0, 64, 1], dtype=BF16, poison=nan, device=CPU),
            cuts=[(1, 0), (2, 0)],
        ),
        decode(
            "fp16, cut in three, odd addresses",
            make([450], dtype=FP16, heads_q=5, poison=nan, device=CPU),
            cuts=[(0, 2), (0, 5)],
            odd=True,
        ),
        decode(
            "bf16, causal tail over two pages, two row blocks",
            make([130, 70], heads_q=20, seq_len_q=4, causal=True, poison=nan, device=CPU),
        ),
        decode(
            "fp16, 128 heads, planned",
            make([200, 65], dtype=FP16, heads_q=128, causal=True, poison=nan, device=CPU),
        ),
        decode(
            "bf16, four KV heads, odd addresses",
            make([190, 3], heads_q=8, heads_k=4, seq_len_q=2, device=CPU),
            odd=True,
        ),
        decode(
            "bf16, 40 pieces",
            make([40 * 64], heads_q=3, device=CPU),
            cuts=[(0, i) for i in range(1, 40)],
        ),
        decode(
            "bf16, requests in pairs",
            make([1 + i * 997 % 300 for i in range(140)], heads_q=16, device=CPU),
        ),
    ]
    pairs = make([1 + i * 997 % 300 for i in range(100)], heads_q=12, seq_len_q=2, device=CPU)
    gathered = pairs.but(q=pairs.q.transpose(1, 2).contiguous().transpose(1, 2))
    results.append(decode("bf16, pairs with cuts, queries that have no map", gathered))
    hidden = make([300, 64], heads_q=16, seq_len_q=3, causal=True, device=CPU)
    hidden.block_table[0, 2] = -1
    results.append(decode("bf16, a page out of range", hidden))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
