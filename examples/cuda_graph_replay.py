"""Decoding steps from one CUDA graph: batch, lengths and plan change between replays.

    python examples/cuda_graph_replay.py

The shape of the plan depends on the device and the head counts only, so it can be captured:
either the planner is captured along with the layers and plans anew at each replay
(`graph_with_planner` here), or a plan made outside is copied into the captured arrays
(`graph_with_copied_plan`). The batch is padded: requests of length 0, with -1 in their block
table, cost next to nothing.
"""

from __future__ import annotations

try:
    import torch
except ImportError:
    raise SystemExit("This example needs torch, in a build with CUDA, and a Hopper GPU.") from None
from dense_attention import dense_attention, relative_error

import flashmla_rtc

BATCH, HEADS, HEAD_DIM, HEAD_DIM_V, PAGE, MAX_BLOCKS = 8, 16, 576, 512, 64, 16


class Step:
    """The arrays of one decoding step; a captured graph reads them where they are."""

    def __init__(self) -> None:
        pages = BATCH * MAX_BLOCKS
        self.q = torch.empty(BATCH, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        self.k_cache = torch.randn(pages, PAGE, 1, HEAD_DIM, device="cuda").bfloat16()
        self.block_table = torch.full((BATCH, MAX_BLOCKS), -1, dtype=torch.int32, device="cuda")
        self.cache_seqlens = torch.zeros(BATCH, dtype=torch.int32, device="cuda")
        self.out = torch.empty(BATCH, 1, HEADS, HEAD_DIM_V, dtype=torch.bfloat16, device="cuda")
        self.lse = torch.empty(BATCH, HEADS, 1, dtype=torch.float32, device="cuda")

    def fill(self, lengths: list[int]) -> None:
        """New queries for ``len(lengths)`` requests; the rest of the batch is padding."""
        self.q.normal_()
        pages = torch.randperm(BATCH * MAX_BLOCKS, dtype=torch.int32, device="cuda")
        self.block_table.fill_(-1)
        self.cache_seqlens.zero_()
        for b, length in enumerate(lengths):
            used = -(-length // PAGE)
            self.block_table[b, :used] = pages[b * MAX_BLOCKS : b * MAX_BLOCKS + used]
            self.cache_seqlens[b] = length

    def plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        return flashmla_rtc.get_mla_metadata(self.cache_seqlens, HEADS, 1)

    def attend(self, plan: tuple[torch.Tensor, torch.Tensor]) -> None:
        flashmla_rtc.flash_mla_with_kvcache(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            HEAD_DIM_V,
            *plan,
            causal=True,
            out=self.out,
            lse=self.lse,
        )

    def error(self) -> float:
        expected = dense_attention(
            self.q.double().cpu().numpy(),
            self.k_cache.double().cpu().numpy(),
            self.block_table.cpu().numpy(),
            self.cache_seqlens.cpu().numpy(),
            HEAD_DIM_V,
            causal=True,
        )
        return relative_error(self.out.double().cpu().numpy(), expected)


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(
            "This example needs a Hopper GPU: it captures a CUDA graph of the kernels."
        )
    torch.manual_seed(0)
    flashmla_rtc.prepare()  # loads the kernels now rather than inside the capture
    step = Step()

    graph_with_planner = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph_with_planner):
        step.attend(step.plan())

    captured_plan = step.plan()
    graph_with_copied_plan = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph_with_copied_plan):
        step.attend(captured_plan)

    for lengths in ([1000, 64, 1], [1024] * BATCH, [5]):
        step.fill(lengths)
        graph_with_planner.replay()
        planned_inside = step.error()
        for captured, new in zip(captured_plan, step.plan(), strict=True):
            captured.copy_(new)
        step.out.zero_()
        graph_with_copied_plan.replay()
        planned_outside = step.error()
        print(
            f"{len(lengths)} of {BATCH} requests: relative error {planned_inside:.1e} "
            f"planned inside the graph, {planned_outside:.1e} outside"
        )
        assert max(planned_inside, planned_outside) < 4e-3  # bfloat16 has 8 bits
        assert torch.isposinf(step.lse[len(lengths) :]).all()  # padding has no key


if __name__ == "__main__":
    main()
