"""What all layers of one forward share: where new tokens go, and how they attend."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flashmla_rtc import get_mla_metadata

from .pages import PagedRequests, Reserved


class DeviceTable:
    """The block table of a cache on a device, uploaded when it is asked for and has changed."""

    def __init__(self, requests: PagedRequests) -> None:
        self._requests = requests
        self._made: tuple[int, torch.Tensor] | None = None  # of which version

    def on(self, device: torch.device) -> torch.Tensor:
        """int32 (batch, pages)."""
        version = self._requests.version
        if self._made is None or self._made[0] != version or self._made[1].device != device:
            self._made = version, upload(self._requests.table, device)
        return self._made[1]


@dataclass
class Step:
    """One forward over a paged cache; made by ``MLAPagedCache.begin``.

    Attributes:
        new: bool (batch, tokens) on the host, which of the new tokens are stored.
        past: int64 (batch,) on the host, tokens that were stored before.
        reserved: where the new tokens go.
        mask: a 4D mask (batch or 1, heads or 1, tokens, columns) of the caller's, or None.
        decode: whether the paged kernels take it; otherwise keys and values are expanded.
        device: where the cache lies.
        table: the cache's block table.
    """

    new: np.ndarray
    past: np.ndarray
    reserved: Reserved
    mask: torch.Tensor | None
    decode: bool
    device: torch.device
    table: DeviceTable
    metadata: Any = field(default_factory=lambda: get_mla_metadata()[0])
    """The plan, made by the first layer's call and used by the others."""

    @property
    def block_table(self) -> torch.Tensor:
        """int32 (batch, pages) on the device."""
        return self.table.on(self.device)

    @cached_property
    def stores_all(self) -> bool:
        """Whether every new token is stored."""
        return len(self.reserved.rows) == self.new.size

    @cached_property
    def counts(self) -> list[int]:
        """New tokens stored of each request."""
        return [int(count) for count in self.new.sum(1)]

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64 (stored,) on the device, which of the batch * tokens new tokens are stored."""
        return upload(self.reserved.rows, self.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 (stored,) on the device, the slot of each."""
        return upload(self.reserved.slots, self.device)

    @cached_property
    def cache_seqlens(self) -> torch.Tensor:
        """int32 (batch,) on the device, keys of each request, the new ones included."""
        return upload((self.past + self.new.sum(1)).astype(np.int32), self.device)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on the device. The host does not wait for it."""
    if device.type == "cuda":
        return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
    return torch.tensor(array, device=device)
