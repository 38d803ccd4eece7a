"""Recording what a function launches, to launch it again: CUDA graphs, as torch makes them."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")

# Nobody may wait for the device while somebody captures.
_one_capture = threading.Lock()


class Recorder(Protocol):
    """Makes and replays the recordings of one model, one at a time."""

    def ready(self) -> bool:
        """Whether work can be recorded or replayed here and now."""

    def turn(self) -> Any:
        """A context for one recording or replay, with the copies before and after it.

        Recordings share memory: the work of one turn follows that of the turn before, whatever
        threads and streams they come from.
        """

    def watch(self) -> Any:
        """A context that gives a list: once it is left, where the host waited for the device."""

    def record(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record a call of ``function``, which need not compute anything now.

        Returns:
            What the call returned, and a function that launches its work again: the tensors are
            those of the first result, with new contents.

        Raises:
            RuntimeError: it does what can't be recorded.
        """


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder of work on ``device``, or None where there is none."""
    return CUDARecorder(device) if device.type == "cuda" else None


class CUDARecorder:
    """Records CUDA graphs. They share a pool of memory, which lasts as long as the recorder does.

    Copies of the tensors that a graph reads belong to a turn too, and so does the reading of what
    it wrote: that is what makes it safe to replay from several threads and streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._stream: Any = None  # on which graphs are captured, never run
        self._pool: Any = None
        self._keeper: Any = None
        self._done: Any = None
        self._last: Any = None  # stream of the turn before

    def ready(self) -> bool:
        """Not while somebody else captures the current stream, or torch compiles."""
        return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See :class:`Recorder`."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._done is None:
                self._done = torch.cuda.Event()
            elif self._last != stream:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
                self._last = stream

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        """See :class:`Recorder`. What torch does not know to wait is not found.

        A capture that fails leaves torch's random numbers and its allocator behind in a bad state,
        so it is better not to begin one.
        """
        places: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            said = str(warning.message)
            if "called a synchronizing CUDA operation" in said:
                places.append(f"{warning.filename}:{warning.lineno}")
            elif "ynchronization debug mode" not in said:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    def record(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """See :class:`Recorder`. Waits for the device."""
        with _one_capture:
            torch.cuda.synchronize(self.device)
            try:
                if self._keeper is None:
                    torch.cuda.empty_cache()  # none can be given back during a capture
                    self._stream = torch.cuda.Stream(self.device)
                    self._pool = torch.cuda.graph_pool_handle()
                    # A pool without a graph is gone, and its handle with it.
                    _, self._keeper = self._capture(self._little)
                result, graph = self._capture(function)
            except _CaptureLost as lost:
                self._repair()
                raise lost.error from None
        return result, graph.replay

    def _capture(self, function: Callable[[], Result]) -> tuple[Result, Any]:
        """torch.cuda.graph, but for two things: it leaves the stream also where a capture fails,
        and no garbage is collected meanwhile, for that may be a graph, which can't be destroyed.
        """
        graph = torch.cuda.CUDAGraph()
        error: BaseException | None = None
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), _no_collection():
            # Other threads may allocate while this one captures.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException as raised:
                error = raised
            try:
                graph.capture_end()
            except RuntimeError as raised:
                raise _CaptureLost(error or raised) from None
        if error is not None:
            raise error
        return result, graph

    def _little(self) -> torch.Tensor:
        return torch.zeros(1, device=self.device)

    def _repair(self) -> None:
        """After a capture that torch could not end, of which its allocator goes on to allocate to
        the pool, and its generator refuses to draw numbers. The next one that ends sets the latter
        right. Graphs that there are keep the old pool.
        """
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        self._pool, self._keeper = torch.cuda.graph_pool_handle(), None
        with suppress(Exception):
            _, self._keeper = self._capture(self._little)


class _CaptureLost(Exception):
    """A capture that could not be ended, and the first error of it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
