"""The tensors that a recorded step reads, and how they get their contents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .pages import PagedRequests
from .step import Step


class StepBuffers:
    """To the layers of a recorded step what :class:`Step` is to those of another.

    The numbers of the host lie side by side, so that one copy brings them all.

    Args:
        tokens: input_ids (batch, tokens) or inputs_embeds (batch, tokens, hidden) like those that
            will come.
        position_ids: (batch or 1, tokens) like those that will come, or None, where the number of
            columns seen is to count.
        width: pages of a request that the block table has room for.

    Attributes:
        tokens, position_ids: what the model is given.
        slots, cache_seqlens, block_table, metadata: as in :class:`Step`.
    """

    decode = True
    stores_all = True

    def __init__(self, tokens: torch.Tensor, position_ids: torch.Tensor | None, width: int) -> None:
        batch, count = tokens.shape[:2]
        sizes = (2 * batch * count, 2 * count, batch, batch * width)  # int32; slots are int64
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes]).tolist()
        self._numbers = torch.zeros(ends[-1], dtype=torch.int32, device=tokens.device)
        self._starts = [0, *ends[:-1]]
        slots, positions, lengths, table = (
            self._numbers[start : start + size]
            for start, size in zip(self._starts, sizes, strict=True)
        )
        self.slots = slots.view(torch.int64)
        self.cache_seqlens = lengths
        self.block_table = table.view(batch, width)
        self.tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        if position_ids is None:
            self.position_ids = positions.view(torch.int64).view(1, count)
        else:
            self.position_ids = torch.empty_like(
                position_ids, memory_format=torch.contiguous_format
            )
        self._version: int | None = None  # of the table that is here
        self.metadata: Any = None

    def fill(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None,
        step: Step,
        requests: PagedRequests,
    ) -> None:
        """The contents of a step of the same shapes. The host does not wait."""
        self.tokens.copy_(tokens)
        if position_ids is not None:
            self.position_ids.copy_(position_ids)
        new_table = self._version != requests.version
        size = len(self._numbers) if new_table else self._starts[3]
        host = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=self._numbers.is_cuda)
        numbers = host.numpy()
        slots, positions, lengths, table = self._starts
        batch, count = step.new.shape
        numbers[slots : slots + 2 * batch * count].view(np.int64)[:] = step.reserved.slots
        if position_ids is None:
            first = requests.columns
            numbers[positions : positions + 2 * count].view(np.int64)[:] = range(
                first, first + count
            )
        numbers[lengths : lengths + batch] = step.past + count
        if new_table:
            width = self.block_table.shape[1]
            used = requests.table.shape[1]
            numbers[table : table + batch * width].reshape(batch, width)[:, :used] = requests.table
        self._numbers[:size].copy_(host, non_blocking=True)
        self._version = requests.version
