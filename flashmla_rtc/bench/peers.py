"""Other kernels of the same function, each called as its own documentation calls it, planned
outside the timed call.

A peer is measured when it can be imported; one that is absent or fails on a shape is said, with its
reason, and the benchmark goes on without it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from .problem import Call, Pool, Problem, pages_of
from .shapes import HEAD_DIM, HEAD_DIM_V, PAGE

Adapter = Callable[[Any, Problem, Pool], list[Call]]
WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that was found. ``calls(problem, pool)`` gives one call for each copy; each returns
    (out, lse).
    """

    name: str
    version: str
    calls: Callable[[Problem, Pool], list[Call]]


@dataclass(frozen=True, slots=True)
class Known:
    """How to find a peer: its module, the distributions that provide it, what to install, and its
    adapter.
    """

    module: str
    distributions: tuple[str, ...]
    install: str
    adapter: Adapter


@dataclass(slots=True)
class Found:
    """Peers to measure, and for each other one a sentence that says why not."""

    peers: list[Peer] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def _flash_mla_calls(module: Any, problem: Problem, pool: Pool) -> list[Call]:
    """FlashMLA: the newest interface plans at its first call, which the warm-up makes; older ones
    plan from lengths.
    """
    shape = problem.shape
    decode = module.flash_mla_with_kvcache
    options: dict[str, Any] = {"causal": True}
    if "use_legacy" in inspect.signature(decode).parameters:
        options["use_legacy"] = True  # the wheel keeps dense decode on SM90 behind this switch
    calls: list[Call] = []
    for query, table in zip(problem.queries, problem.tables, strict=True):
        try:
            plan, num_splits = module.get_mla_metadata()
        except TypeError:
            plan, num_splits = module.get_mla_metadata(
                problem.cache_seqlens, shape.seq_len_q * shape.heads_q, 1
            )

        def call(
            query: Any = query, table: Any = table, plan: Any = plan, splits: Any = num_splits
        ) -> Any:
            return decode(
                query,
                problem.k_cache,
                table,
                problem.cache_seqlens,
                HEAD_DIM_V,
                plan,
                splits,
                **options,
            )

        calls.append(call)
    return calls


def _flashinfer_calls(module: Any, problem: Problem, pool: Pool) -> list[Call]:
    """FlashInfer's paged MLA, FA3 backend: two contiguous caches, ragged queries, outputs that
    exist already.
    """
    import torch

    shape = problem.shape
    device = problem.k_cache.device
    latent, rope = pool.split_cache()
    pages = pages_of(problem.lengths)
    kv_ends = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    q_ends = np.arange(shape.batch + 1, dtype=np.int32) * shape.seq_len_q
    kv_indptr = torch.from_numpy(kv_ends).to(device)
    q_indptr = torch.from_numpy(q_ends).to(device)
    used = torch.from_numpy(np.arange(int(pages.max()))[None, :] < pages[:, None]).to(device)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    tokens = shape.batch * shape.seq_len_q
    calls: list[Call] = []
    for query, table in zip(problem.queries, problem.tables, strict=True):
        # Copies run one after the other in a stream, so they share the workspace of partials.
        wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
        wrapper.plan(
            q_indptr,
            kv_indptr,
            table[used].contiguous(),
            problem.cache_seqlens,
            shape.heads_q,
            HEAD_DIM_V,
            HEAD_DIM - HEAD_DIM_V,
            PAGE,
            shape.seq_len_q > 1,  # causal; one query sees every key
            HEAD_DIM**-0.5,
            query.dtype,
            problem.k_cache.dtype,
        )
        rows = query.view(tokens, shape.heads_q, HEAD_DIM)
        arguments = (
            rows[..., :HEAD_DIM_V].contiguous(),
            rows[..., HEAD_DIM_V:].contiguous(),
            latent,
            rope,
        )
        out = query.new_empty((shape.batch, shape.seq_len_q, shape.heads_q, HEAD_DIM_V))
        flat = out.view(tokens, shape.heads_q, HEAD_DIM_V)
        lse = query.new_empty((tokens, shape.heads_q), dtype=torch.float32)

        def call(
            wrapper: Any = wrapper,
            arguments: Any = arguments,
            out: Any = out,
            flat: Any = flat,
            lse: Any = lse,
        ) -> Any:
            wrapper.run(*arguments, out=flat, lse=lse, return_lse=True)
            return out, lse

        calls.append(call)
    return calls


KNOWN: dict[str, Known] = {
    "flash_mla": Known(
        "flash_mla", ("sgl-flash-mla", "flash-mla"), "sgl-flash-mla==1.0.0", _flash_mla_calls
    ),
    "flashinfer": Known(
        "flashinfer.mla", ("flashinfer-python",), "flashinfer-python==0.5.3", _flashinfer_calls
    ),
}


def find_peers(names: Iterable[str]) -> Found:
    """Import each of ``names`` (keys of ``KNOWN``). Never raises because of what a peer does when
    imported.
    """
    found = Found()
    for name in names:
        known = KNOWN[name]
        try:
            module = importlib.import_module(known.module)
        except ModuleNotFoundError as error:
            missing = error.name or known.module
            if missing.partition(".")[0] == known.module.partition(".")[0]:
                found.absent[name] = f"not installed (pip install {known.install})"
            else:
                found.absent[name] = f"installed, but its dependency {missing} is not"
        except Exception as error:
            found.absent[name] = f"installed, but it cannot be imported: {first_line(error)}"
        else:
            found.peers.append(_peer(name, module, known))
    return found


def _peer(name: str, module: Any, known: Known) -> Peer:
    return Peer(name, _version(known), lambda problem, pool: known.adapter(module, problem, pool))


def _version(known: Known) -> str:
    for distribution in known.distributions:
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def first_line(error: BaseException) -> str:
    """An error in one line, for a sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
