"""The clock: CUDA graphs replayed in a burst and held, candidates in turn; and the host's time of
one call.

Two figures for everything, because Hopper is limited by power. *Burst* is a few milliseconds after
idling, at full clock. *Held* is back to back until the clock has settled at the power limit, which
is how a busy server runs. A kernel that wastes energy looks the same in a burst and slower when
held. Candidates are interleaved in one process, since clocks, temperature and machines drift.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .problem import Call

GRAPH_SECONDS = 2e-3  # long enough that an event's half microsecond is nothing
MIN_GRAPH_CALLS, MAX_GRAPH_CALLS = 8, 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: the median burst, and held (None when it was not asked for)."""

    burst: float
    held: float | None


@dataclass(slots=True)
class Recording:
    """A captured graph of ``calls`` calls. ``keep`` holds what the graph's addresses belong to."""

    graph: Any
    calls: int
    keep: Any


class Timer(Protocol):
    """What the grid needs of a clock; tests bring one without a GPU."""

    def record(self, calls: Sequence[Call], estimate: float) -> Any:
        """Prepare ``calls``, one for each copy, expected to take ``estimate`` seconds each."""

    def measure(
        self, recordings: Mapping[str, Any], held_seconds: float | None
    ) -> dict[str, Timing]:
        """Time all candidates, interleaved."""


def calls_in_graph(copies: int, estimate: float) -> int:
    """Calls to capture: every copy equally often, and about two milliseconds of work."""
    wanted = min(max(GRAPH_SECONDS / max(estimate, 1e-9), MIN_GRAPH_CALLS), MAX_GRAPH_CALLS)
    return copies * max(1, math.ceil(wanted / copies))


class GraphTimer:
    """Times CUDA graphs of torch's current device, through ``torch.cuda`` or what stands for it."""

    def __init__(self, rounds: int = 5, idle_seconds: float = 0.02, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda = cuda
        self._rounds = rounds
        self._idle_seconds = idle_seconds
        self._stream = cuda.Stream()

    def record(self, calls: Sequence[Call], estimate: float) -> Recording:
        """Warm up and capture. Whatever ``calls`` allocate at their first use exists before the
        capture begins.
        """
        cuda = self._cuda
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            for _ in range(2):
                for call in calls:
                    call()
        cuda.synchronize()
        count = calls_in_graph(len(calls), estimate)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self._stream):
            for index in range(count):
                calls[index % len(calls)]()
        graph.replay()
        cuda.synchronize()
        return Recording(graph, count, calls)

    def measure(
        self, recordings: Mapping[str, Recording], held_seconds: float | None
    ) -> dict[str, Timing]:
        """Burst: median of the rounds. Held: two turns each, the second in the opposite order."""
        bursts: dict[str, list[float]] = {name: [] for name in recordings}
        for _ in range(self._rounds):
            for name, recording in recordings.items():
                bursts[name].append(self._burst(recording))
        burst = {name: statistics.median(times) for name, times in bursts.items()}
        held: dict[str, list[float]] = {name: [] for name in recordings}
        if held_seconds:
            for name in [*recordings, *reversed(list(recordings))]:
                held[name].append(self._hold(recordings[name], burst[name], held_seconds / 2))
        return {
            name: Timing(burst[name], statistics.fmean(held[name]) if held[name] else None)
            for name in recordings
        }

    def _burst(self, recording: Recording) -> float:
        """Two replays after an idle moment, behind one that hides the launch."""
        time.sleep(self._idle_seconds)
        recording.graph.replay()
        return self._replay(recording, 2)

    def _hold(self, recording: Recording, burst: float, seconds: float) -> float:
        """Back to back for ``seconds``, of which the second half is timed: by then the clock has
        settled.
        """
        half = max(2, math.ceil(seconds / 2 / (burst * recording.calls)))
        for _ in range(half):
            recording.graph.replay()
        return self._replay(recording, half)

    def _replay(self, recording: Recording, replays: int) -> float:
        begin = self._cuda.Event(enable_timing=True)
        end = self._cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            recording.graph.replay()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3 / (replays * recording.calls)


def host_seconds(
    candidates: Mapping[str, Call],
    synchronize: Callable[[], Any],
    calls: int = 200,
    rounds: int = 15,
) -> dict[str, float]:
    """Host time of one asynchronous call of each: the median over rounds of ``calls`` calls into
    an empty queue. All have a turn in every round, since the host's clock rises and falls too.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, call in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls)
    synchronize()
    return {name: statistics.median(measured[2:]) for name, measured in times.items()}
