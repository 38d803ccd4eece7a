"""Plays a grid of shapes: ours and every peer, interleaved, and checked against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .peers import Peer, first_line
from .problem import Call, Pool, Problem, own_calls
from .report import Report, Row, make_row
from .shapes import HEAD_DIM_V, Shape
from .timing import Timer, host_seconds

OWN = "flashmla_rtc"
AGREEMENT = 1e-2  # two bf16 kernels that compute the same differ by about 3e-3
TYPICAL_READ, TYPICAL_MATMUL = 3.0, 700.0  # TB/s and TFLOPS, to guess how many calls fill a graph
LAUNCH_SECONDS = 8e-6


@dataclass(slots=True)
class Grid:
    """A benchmark in progress. ``notes`` are sentences on what could not be measured, in order."""

    timer: Timer
    pool: Pool
    peers: Sequence[Peer]
    report: Report
    held_seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    release: Callable[[], Any] = lambda: None

    def play(self, shapes: Sequence[Shape]) -> Iterator[Row]:
        """Measure the shapes in order. A row is saved before it is yielded."""
        for shape in shapes:
            row = self.measure(shape)
            self.report.rows.append(row)
            self.report.save()
            yield row
            self.release()

    def measure(self, shape: Shape) -> Row:
        """One row. A peer that fails is noted and left out; our own failure is the caller's."""
        problem = self.pool.problem(shape)
        estimate = shape.limit_seconds(TYPICAL_READ, TYPICAL_MATMUL) + LAUNCH_SECONDS
        own = own_calls(problem)
        expected = own[0]()[0]
        recordings = {OWN: self.timer.record(own, estimate)}
        difference: dict[str, float] = {}
        for peer in self.peers:
            try:
                calls = peer.calls(problem, self.pool)
                difference[peer.name] = relative_difference(calls[0]()[0], expected)
                recordings[peer.name] = self.timer.record(calls, estimate)
            except Exception as error:
                difference.pop(peer.name, None)
                self.notes.append(f"{peer.name} did not run {shape.label}: {first_line(error)}")
                continue
            if not difference[peer.name] < AGREEMENT:
                self.notes.append(
                    f"{peer.name} and {OWN} differ by {difference[peer.name]:.1e} at {shape.label}."
                )
        timings = self.timer.measure(recordings, self.held_seconds)
        own_timing = timings.pop(OWN)
        return make_row(shape, own_timing, timings, self.report.ceilings, difference)


def relative_difference(result: Any, expected: Any) -> float:
    """‖result − expected‖ / ‖expected‖ of two torch tensors, in float32; NaN where either holds
    one.
    """
    reference = expected.float()
    norm = float(reference.norm())
    gap = float((result.float().reshape(reference.shape) - reference).norm())
    return gap / norm if norm else (0.0 if gap == 0 else math.inf)


HOST_SHAPE = Shape(4, 1, 128, 1024)


def host_times(
    pool: Pool,
    peers: Sequence[Peer],
    synchronize: Callable[[], Any],
    shape: Shape = HOST_SHAPE,
    calls: int = 200,
) -> tuple[dict[str, float], list[str]]:
    """Microseconds of host time that one asynchronous call takes, and notes on what did not run.

    ``call`` allocates its outputs; ``call_with_out`` is given them; ``plan`` is
    ``get_mla_metadata``; and ``peer_<name>`` is each peer's call.
    """
    from flashmla_rtc import flash_mla_with_kvcache, get_mla_metadata

    problem: Problem = pool.problem(shape, copies=1)
    rows = shape.seq_len_q * shape.heads_q
    seqlens = problem.cache_seqlens
    metadata, num_splits = get_mla_metadata(seqlens, rows, 1)

    def call() -> Any:
        return flash_mla_with_kvcache(
            problem.queries[0],
            problem.k_cache,
            problem.tables[0],
            seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            causal=True,
        )

    candidates: dict[str, Call] = {
        "call": call,
        "call_with_out": own_calls(problem)[0],
        "plan": lambda: get_mla_metadata(seqlens, rows, 1),
    }
    notes = []
    for peer in peers:
        try:
            peer_call = peer.calls(problem, pool)[0]
            peer_call()
        except Exception as error:
            notes.append(f"{peer.name}'s host time was not measured: {first_line(error)}")
        else:
            candidates[f"peer_{peer.name}"] = peer_call
    times = host_seconds(candidates, synchronize, calls)
    return {name: seconds * 1e6 for name, seconds in times.items()}, notes
