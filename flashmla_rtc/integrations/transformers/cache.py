"""A cache of transformers whose layers are pages of latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .pages import PAGE_SIZE, PageAllocator, PagedRequests
from .step import DeviceTable, Step, upload
from .step_buffers import StepBuffers
from .step_graph import CacheGraphs

_LEAST_SPARE = 16  # pages of a request: 1024 tokens


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of a cache over all layers, beside what other caches take for the same tokens.

    Attributes:
        used: pages that hold tokens.
        allocated: all pages, free ones included: what the cache's tensors take.
        dynamic_cache: transformers' ``DynamicCache``, which stores the same latents, those of
            padding included.
        expanded: keys and values of every head, padding included: a cache that stores them, or
            what transformers' own attention expands in the course of a step, one layer at a time.
    """

    used: int
    allocated: int
    dynamic_cache: int
    expanded: int


def _width(config: Any) -> int:
    """Numbers of a token in a layer."""
    return int(config.kv_lora_rank + config.qk_rope_head_dim)


class MLAPagedLayer(CacheLayerMixin):
    """The pages of one layer. What they hold is known to the cache, for all layers at once.

    Attributes:
        pages: (capacity, 64, 1, kv_lora_rank + qk_rope_head_dim), a token's latent after its norm
            and its rotated k_pe in each slot; None before the first forward.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, requests: PagedRequests) -> None:
        super().__init__()
        self.requests = requests
        self.pages: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Pages for tokens like these: (batch, tokens, kv_lora_rank), (batch, tokens, rope)."""
        width = key_states.shape[-1] + value_states.shape[-1]
        shape = (self.requests.allocator.capacity, PAGE_SIZE, 1, width)
        self.pages = self._empty(shape, key_states)
        self.is_initialized = True

    def fit(self) -> None:
        """Grow to as many pages as have been handed out numbers for."""
        capacity = self.requests.allocator.capacity
        if self.pages is not None and len(self.pages) < capacity:
            grown = self._empty((capacity, *self.pages.shape[1:]), self.pages)
            grown[: len(self.pages)] = self.pages
            self.pages = grown

    @staticmethod
    def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        # Under inference_mode too a tensor that later forwards may write into without it.
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy the pages ``sources`` to the pages ``targets``, int64 (n,) both."""
        if self.pages is not None:
            self.pages[targets] = self.pages[sources]

    def append(
        self, latent: torch.Tensor, k_pe: torch.Tensor, step: Step | StepBuffers
    ) -> torch.Tensor:
        """Store the tokens of a step: (batch, tokens, kv_lora_rank), (batch, tokens, rope).

        Returns:
            All pages.

        Raises:
            ValueError: the tokens are of another dtype or on another device than those before.
        """
        if self.pages is None:
            self.lazy_initialization(latent, k_pe)
        pages: Any = self.pages
        if (pages.dtype, pages.device) != (latent.dtype, latent.device):
            raise ValueError(
                f"The cache holds {pages.dtype} on {pages.device}, and the model now gives "
                f"{latent.dtype} on {latent.device}. Make a new cache."
            )
        tokens = torch.cat((latent, k_pe), -1).flatten(0, 1)
        if isinstance(step, Step) and not step.stores_all:
            tokens = tokens[step.rows]
        pages.view(-1, pages.shape[-1]).index_copy_(0, step.slots, tokens)
        return pages

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Called by attention that knows nothing of pages.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "An MLAPagedCache was given to a model whose attention does not read pages. Call "
            "use_flash_mla(model) first."
        )

    def offload(self) -> NoReturn:
        """Raises NotImplementedError: pages stay on the device."""
        raise NotImplementedError("Offloading the layers of an MLAPagedCache is not supported.")

    prefetch = offload

    def reset(self) -> NoReturn:
        """Raises NotImplementedError: a layer has no tokens of its own."""
        raise NotImplementedError(
            "The layers of an MLAPagedCache change together: call the cache's method."
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Raises NotImplementedError: a layer has no tokens of its own."""
        self.reset()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after ``query_length`` more, 0)."""
        return self.requests.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.requests.columns

    def get_max_length(self) -> int:
        """-1: it grows, or how far it reaches depends on what the other requests take."""
        return -1


class MLAPagedCache(Cache):
    """Pages of latents for a model that ``use_flash_mla`` has turned to paged attention.

    Every layer has pages of 64 slots, a slot holds one token: its latent of ``kv_lora_rank``
    numbers after its norm, and its rotated ``k_pe`` of ``qk_rope_head_dim``. Padding is not
    stored, so each request has its own length; ``get_seq_length()`` nevertheless counts columns,
    padding included, as ``generate()`` expects.

    Args:
        config: the model's configuration.
        pages: the number of pages of each layer, for all requests together; None grows as needed.

    Raises:
        TypeError: ``config`` is not that of a model with latents.
        ValueError: ``pages`` is neither None nor a whole number from 1 on.
    """

    def __init__(self, config: Any, *, pages: int | None = None) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a model's, but it is of type {type(config).__name__}.")
        config = config.get_text_config(decoder=True)
        if not (hasattr(config, "kv_lora_rank") and hasattr(config, "qk_rope_head_dim")):
            raise TypeError(
                "config must be that of a model with latents, but it is a "
                f"{type(config).__name__}, which has no kv_lora_rank and qk_rope_head_dim."
            )
        self.requests = PagedRequests(PageAllocator(pages))
        super().__init__(
            layers=[MLAPagedLayer(self.requests) for _ in range(config.num_hidden_layers)]
        )
        latent = _width(config)
        head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        self._width, self._expanded_width = latent, config.num_attention_heads * head
        self.step: Step | StepBuffers | None = None
        self.graphs = CacheGraphs()
        self._table = DeviceTable(self.requests)
        self._end: int | None = None  # columns that generate() will not go beyond
        self._known_mask: torch.Tensor | None = None
        self._copies: list[tuple[int, int]] = []  # pages that are to be copied, (from, to)

    def check_made_for(self, config: Any) -> None:
        """Raises ValueError if this is the cache of a model of another shape."""
        config = config.get_text_config(decoder=True)
        ours, models = (len(self.layers), self._width), (config.num_hidden_layers, _width(config))
        if ours != models:
            raise ValueError(
                f"The cache has {ours[0]} layers of {ours[1]} numbers a token, and the model "
                f"{models[0]} of {models[1]}: make it with MLAPagedCache(model.config)."
            )

    # -- a forward ---------------------------------------------------------------------------------

    def begin(
        self,
        batch: int,
        tokens: int,
        attention_mask: torch.Tensor | None,
        device: torch.device,
        max_decode_tokens: int,
        *,
        ahead: bool = False,
    ) -> None:
        """Make room for the tokens of a forward and say how they attend.

        Args:
            batch, tokens: shape of the new columns.
            attention_mask: (batch, columns), the new ones included, 0 for padding; or 4D, (batch
                or 1, heads or 1, tokens, columns), bool or additive; None if nothing is padding.
                A 2D mask is copied to the host, which waits for it, unless it is the one that
                ``generate`` has made by appending ones to the last.
            device: where the model is.
            max_decode_tokens: with more new tokens, keys and values are expanded.
            ahead: if the cache has to grow, let it be by many steps' worth, so that recorded steps
                last: they are of no use once pages have moved.

        Raises:
            ValueError: a mask of a wrong shape, or that shows tokens that were not stored; another
                batch than before.
            NotImplementedError: a mask that hides stored tokens before others, or a 4D mask over a
                cache without its padding.
            PagesExhausted: the cache has a fixed number of pages, and too few are free.

        Whatever is raised, the cache goes on as if this forward had not been asked for.
        """
        requests = self.requests
        if requests.columns > 0 and requests.batch != batch:
            raise ValueError(
                f"The cache holds {requests.batch} requests, and the model was given {batch}."
            )
        self._copy_pages(device)  # if a forward failed before they were
        new, seen = self._new_tokens(batch, tokens, attention_mask)
        spare = self._spare(batch, tokens) if ahead else 0
        reserved = requests.reserve(new, spare, seen=seen, make_pages=self._fit)
        self._copies = reserved.copies
        self._copy_pages(device)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        decode = requests.columns > 0 and tokens <= max_decode_tokens and mask is None
        self.step = Step(
            new=new,
            past=requests.lengths,
            reserved=reserved,
            mask=mask,
            decode=decode and bool(new.all()),
            device=device,
            table=self._table,
        )

    def end(self) -> None:
        """The forward is through: its tokens count as stored."""
        if isinstance(self.step, Step):
            self.requests.commit(self.step.new)
        self.step = None

    def append(self, layer_idx: int, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """Store the new tokens of a layer, and return its pages. See :class:`MLAPagedLayer`."""
        assert self.step is not None, "append outside of a forward"
        pages: torch.Tensor = self.layers[layer_idx].append(latent, k_pe, self.step)
        return pages

    def expect_mask(self, attention_mask: torch.Tensor | None) -> None:
        """The next forward's mask if it is this object: the last one with ones appended."""
        self._known_mask = attention_mask

    def expect(self, columns: int) -> None:
        """Growing ahead of need stops at so many columns, while there are fewer."""
        self._end = columns

    def _spare(self, batch: int, tokens: int) -> int:
        """Pages to grow by beside those that are needed: a quarter, or 16 a request."""
        columns = self.requests.columns + tokens
        pages = -(-columns // PAGE_SIZE)
        spare = max(pages // 4, _LEAST_SPARE)
        if self._end is not None and self._end > columns:
            spare = min(spare, -(-self._end // PAGE_SIZE) - pages)
        return batch * spare

    def _fit(self) -> None:
        for layer in self.layers:
            layer.fit()

    def _copy_pages(self, device: torch.device) -> None:
        """Copy what is to be copied. It stays so until it is done in all layers."""
        if self._copies:
            sources, targets = upload(np.array(self._copies, np.int64).T.copy(), device)
            for layer in self.layers:
                layer.copy_pages(sources, targets)
            self._copies = []

    def _new_tokens(
        self, batch: int, tokens: int, mask: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Which of the new columns are stored, and which of those before the mask shows, or None
        where it is not asked.
        """
        requests, columns = self.requests, self.requests.columns + tokens
        if mask is None:
            return np.ones((batch, tokens), bool), None
        if mask.ndim == 4:
            if mask.shape[-2:] != (tokens, columns):
                raise ValueError(
                    f"A 4D attention_mask must end in ({tokens}, {columns}), the new tokens and "
                    f"all columns, but its shape is {tuple(mask.shape)}."
                )
            if not requests.kept.all():
                raise NotImplementedError(
                    "A 4D attention_mask over a cache whose prompts were padded is not supported: "
                    "padding is not stored."
                )
            return np.ones((batch, tokens), bool), None
        if mask.shape != (batch, columns):
            raise ValueError(
                f"attention_mask must be ({batch}, {columns}), one number for each token in the "
                f"cache and each new one, or 4D, but its shape is {tuple(mask.shape)}."
            )
        if mask is self._known_mask:
            return np.ones((batch, tokens), bool), None
        seen = mask.detach().to("cpu").numpy() != 0
        return seen[:, requests.columns :], seen[:, : requests.columns]

    # -- what the kernels read ---------------------------------------------------------------------

    @property
    def block_table(self) -> torch.Tensor:
        """int32 (batch, pages), on the device of the pages; 0 past each request's last page."""
        return self._table.on(self._device())

    @property
    def cache_seqlens(self) -> torch.Tensor:
        """int32 (batch,), tokens stored of each request, on the device of the pages."""
        return upload(self.requests.lengths.astype(np.int32), self._device())

    def _device(self) -> torch.device:
        for layer in self.layers:
            if layer.pages is not None:
                device: torch.device = layer.pages.device
                return device
        return torch.device("cpu")

    # -- what generate() asks of a cache -----------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Requests it holds; -1 without columns, when the next forward brings any number."""
        return self.requests.batch if self.requests.columns and self.requests.batch else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns of every request.

        A positive number is the number of columns to keep, which newer versions of transformers
        refuse for theirs; if there are no more than that, nothing happens.

        Raises:
            ValueError: the cache has fewer columns than are to be forgotten.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.requests.columns, 0)
        self.requests.crop(-int(tokens_to_remove))
        self._known_mask = None

    def reset(self) -> None:
        """Forget everything. Pages stay allocated and are all free."""
        self.requests.reset()
        self._copies = []
        self._known_mask = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Request ``i`` goes on as request ``beam_idx[i]`` was. Reads ``beam_idx`` on the host.

        Requests that come from one share its pages; a page is copied when one of them is about
        to write into it.

        Raises:
            IndexError: there is no such request.
        """
        self.requests.take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these requests, in this order: int64 (n,) or bool (batch,). Reads it on the host.

        Raises:
            IndexError: there is no such request.
        """
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.requests.take(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every request ``repeats`` times, side by side; they share their pages."""
        self.requests.take([i for i in range(self.requests.batch or 0) for _ in range(repeats)])

    def memory(self) -> CacheMemory:
        """What the cache takes, to the byte, and what others would."""
        tensors = [layer.pages for layer in self.layers if layer.pages is not None]
        size = sum(pages.element_size() for pages in tensors)  # of one number in each layer
        requests = self.requests
        columns = (requests.batch or 0) * requests.columns
        return CacheMemory(
            used=requests.allocator.in_use * PAGE_SIZE * self._width * size,
            allocated=sum(pages.nbytes for pages in tensors),
            dynamic_cache=columns * self._width * size,
            expanded=columns * self._expanded_width * size,
        )
