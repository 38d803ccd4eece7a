"""A decode step that is recorded once and replayed, and those that a cache keeps."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flashmla_rtc import get_mla_metadata

from .recorder import Recorder
from .step import Step
from .step_buffers import StepBuffers
from .versions import CACHE

if TYPE_CHECKING:
    from .cache import MLAPagedCache

_LEAST_WIDTH = 16  # pages of a request, 1024 tokens


class StepGraph:
    """One decode step of a model over one cache, recorded.

    It reads and writes the pages of the cache where they are, so it is of no use once they have
    moved. Keeps neither the cache nor the model alive.

    Args:
        recorder: which records it.
        forward: the model's own forward.
        given: its keywords, of a step like those that will come.
        cache: in the midst of such a step.

    Raises:
        RuntimeError: the step can't be recorded, or gives more than hidden states.
    """

    def __init__(
        self,
        recorder: Recorder,
        forward: Callable[..., Any],
        given: dict[str, Any],
        cache: MLAPagedCache,
    ) -> None:
        self._name = "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        tokens, position_ids = given[self._name], given.get("position_ids")
        self._growths = cache.requests.allocator.growths
        columns = cache.requests.table.shape[1]
        self._width = max(_LEAST_WIDTH, 1 << columns.bit_length())
        owner = weakref.ref(cache)
        # What inference_mode makes can't be written into without it.
        with torch.inference_mode(False), torch.no_grad():
            buffers = self._buffers = StepBuffers(tokens, position_ids, self._width)
            self._fill(given, cache)
            arguments = {**given, self._name: buffers.tokens, "position_ids": buffers.position_ids}
            del arguments[CACHE]

            def step() -> Any:
                over = owner()
                assert over is not None
                real = over.step
                # Planned inside, so that each replay plans for the lengths that it finds.
                buffers.metadata = get_mla_metadata()[0]
                over.step = buffers
                try:
                    return forward(**arguments, **{CACHE: over})
                finally:
                    over.step, buffers.metadata = real, None

            output, self._replay = recorder.record(step)
        unknown = set(output) - {"last_hidden_state", CACHE}
        if unknown:
            raise RuntimeError(f"the model's forward returns {', '.join(sorted(unknown))} as well")
        self._hidden: torch.Tensor = output.last_hidden_state
        self._output = type(output)
        self._returns_cache = getattr(output, CACHE) is not None

    def fits(self, cache: MLAPagedCache) -> bool:
        """Whether the pages are where they were, and no request has more than there is room for."""
        requests = cache.requests
        return (
            requests.allocator.growths == self._growths and requests.table.shape[1] <= self._width
        )

    def run(self, given: dict[str, Any], cache: MLAPagedCache) -> Any:
        """A step of the same configuration: what the model's forward would return."""
        self._fill(given, cache)
        self._replay()
        return self._output(
            last_hidden_state=self._hidden.clone(),  # the next step writes over it
            **{CACHE: cache if self._returns_cache else None},
        )

    def _fill(self, given: dict[str, Any], cache: MLAPagedCache) -> None:
        assert isinstance(cache.step, Step)
        tokens, position_ids = given[self._name], given.get("position_ids")
        self._buffers.fill(tokens, position_ids, cache.step, cache.requests)


class CacheGraphs:
    """The recorded steps of one cache, by configuration; the least recently used make room.

    They belong to one model in one state. Copies of a cache begin with none.
    """

    LIMIT = 16
    """Steps that are kept: one for each number of tokens that the kernels take by default."""

    def __init__(self) -> None:
        self._owner: weakref.ref[Any] | None = None
        self._graphs: OrderedDict[Any, StepGraph] = OrderedDict()
        self.seen: set[Any] = set()
        """Configurations that have been met, so that the next step of one is recorded."""

    def __reduce__(self) -> Any:
        return CacheGraphs, ()

    def belong_to(self, owner: Any) -> None:
        """Forget what was recorded of another."""
        if self._owner is None or self._owner() is not owner:
            self._owner = weakref.ref(owner)
            self._graphs.clear()
            self.seen.clear()

    def get(self, key: Any, cache: MLAPagedCache) -> StepGraph | None:
        """The recorded step of a configuration, if there is one that still fits."""
        graph = self._graphs.get(key)
        if graph is None or not graph.fits(cache):
            return None
        self._graphs.move_to_end(key)
        return graph

    def put(self, key: Any, graph: StepGraph, cache: MLAPagedCache) -> None:
        """Keep a step, and those of the others that still fit."""
        for old in [k for k, other in self._graphs.items() if not other.fits(cache)]:
            del self._graphs[old]
        self._graphs[key] = graph
        while len(self._graphs) > self.LIMIT:
            self._graphs.popitem(last=False)

    def __len__(self) -> int:
        return len(self._graphs)
