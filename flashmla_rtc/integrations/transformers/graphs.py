"""Which decode steps are recorded and replayed, and which go the plain way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from .cache import MLAPagedCache
from .recorder import Recorder, recorder_for
from .step import Step
from .step_graph import StepGraph
from .structure import Structure
from .versions import CACHE

CudaGraphs = Literal["auto"] | bool

# Other arguments are covered if they ask for nothing.
_KNOWN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    CACHE,
    "use_cache",
    "return_dict",
)


class ModelGraphs:
    """Decides for one model. Copies of a model begin anew.

    The first decode step of a configuration over a cache goes the plain way, which loads what has
    to be loaded; on the first such occasion somebody watches whether it waits for the device. The
    second one is recorded, and from then on it is replayed. Replays make the same launches with the
    same arguments, so results are the same to the bit.

    Args:
        mode: "auto", True or False, as in ``use_flash_mla``.
    """

    def __init__(self, mode: CudaGraphs) -> None:
        self.mode = mode
        self._recorder: tuple[torch.device, Recorder | None] | None = None
        self._structure: Structure | None = None
        self._state = _State()
        self._proven: set[Any] = set()
        self._refused: set[Any] = set()
        self._has_warned = False

    def __reduce__(self) -> Any:
        return ModelGraphs, (self.mode,)

    def are_possible(self, device: torch.device) -> bool:
        """Whether steps on ``device`` may be recorded."""
        return self.mode is not False and self.recorder(device) is not None

    def recorder(self, device: torch.device) -> Recorder | None:
        """The recorder of this model's steps on ``device``."""
        if self._recorder is None or self._recorder[0] != device:
            self._recorder = device, recorder_for(device)
        return self._recorder[1]

    def forward(
        self, base: Any, own: Callable[..., Any], given: dict[str, Any], cache: MLAPagedCache
    ) -> Any:
        """A forward of ``base`` over a cache that has begun it.

        Args:
            own: the model's own forward.
            given: its keywords.

        Raises:
            RuntimeError: a decode step can't be recorded, and ``mode`` is True.
        """
        recorder = None if self.mode is False else self._recorder_of(base, given, cache)
        if recorder is None:
            return own(**given)
        key = _configuration(base, given)
        if key in self._refused:
            return own(**given)
        with recorder.turn():
            cache.graphs.belong_to(self._state)
            graph = cache.graphs.get(key, cache)
            if graph is None and key in cache.graphs.seen:
                try:
                    graph = StepGraph(recorder, own, given, cache)
                except RuntimeError as error:
                    self._refuse(key, str(error).partition("\n")[0].rstrip("."), error)
                else:
                    cache.graphs.put(key, graph, cache)
            if graph is not None:
                return graph.run(given, cache)
        if key in self._refused:
            return own(**given)
        if key in self._proven:
            output = own(**given)
        else:
            with recorder.watch() as places:
                output = own(**given)
            if places:
                self._refuse(key, f"the host waits for the device in {_some(places)}")
                return output
            self._proven.add(key)
        cache.graphs.seen.add(key)
        return output

    def _recorder_of(
        self, base: Any, given: dict[str, Any], cache: MLAPagedCache
    ) -> Recorder | None:
        """The recorder for a step that a recording covers, or None."""
        step = cache.step
        if not isinstance(step, Step) or not step.decode:
            return None
        recorder = self.recorder(step.device)
        if recorder is None or not recorder.ready() or not _is_covered(base, given, step.device):
            return None
        if self._structure is None or not self._structure.is_as_it_was():
            # Weights that are replaced or moved: what was recorded reads the old ones.
            self._structure, self._state = Structure(base), _State()
            self._proven, self._refused = set(), set()
        return None if self._structure.has_hooks() else recorder

    def _refuse(self, key: Any, why: str, error: Exception | None = None) -> None:
        """Say that steps of a configuration are not recorded, in the way that was asked for."""
        if self.mode is True:
            raise RuntimeError(
                f"cuda_graphs=True, but a decode step can't be captured in a CUDA graph: {why}."
            ) from error
        self._refused.add(key)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Decode steps run without CUDA graphs, because they can't be captured: {why}. "
                "If it is how experts are chosen, model.set_experts_implementation('batched_mm') "
                "makes a choice that can, in models that have one. With "
                "use_flash_mla(model, cuda_graphs=False) this is not said.",
                stacklevel=2,
            )


class _State:
    """A model between two changes of its modules or of where its weights lie."""


def _is_covered(base: Any, given: dict[str, Any], device: torch.device) -> bool:
    """Whether the arguments of a decode step are such as a recording can be given."""
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    tokens: Any = embeddings if ids is None else ids
    positions = given.get("position_ids")
    config = base.config
    return (
        (ids is None) != (embeddings is None)
        and tokens.device == device
        and (positions is None or (positions.ndim == 2 and positions.device == device))
        and given.get("return_dict") is not False
        and all(value is None or value is False or name in _KNOWN for name, value in given.items())
        and getattr(config, "return_dict", True)
        and not getattr(config, "output_hidden_states", False)
        and not torch.is_autocast_enabled(device.type)
    )


def _configuration(base: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """What steps must agree in to be replays of one."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    tokens = given["inputs_embeds"] if ids is None else ids
    return (
        ids is None,
        tokens.shape,
        tokens.dtype,
        None if positions is None else (positions.shape, positions.dtype),
        given.get("use_cache"),
        # generate() changes it for its decode steps.
        getattr(base.config, "_experts_implementation", None),
    )


def _some(places: list[str]) -> str:
    distinct = list(dict.fromkeys(places))
    more = f" and {len(distinct) - 2} more places" if len(distinct) > 2 else ""
    return ", ".join(distinct[:2]) + more
