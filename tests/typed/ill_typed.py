"""What type checkers refuse, each with mypy's code for it: see tests/test_types.py. Never run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import flashmla_rtc
from flashmla_rtc import flash_mla_with_kvcache as decode
from flashmla_rtc import get_mla_metadata


def wrong(
    q: npt.NDArray[np.float16], cache: npt.NDArray[np.float16], table: npt.NDArray[np.int32]
) -> None:
    lengths = np.ones(1, np.int32)
    decode([[1.0]], cache, table, lengths, 512, None)  # error: call-overload
    decode(q, cache, table, 7, 512, None)  # error: call-overload
    decode(q, cache, table, lengths, "512", None)  # error: call-overload
    decode(q, cache, table, lengths, 512)  # error: call-overload
    decode(q, cache, table, lengths, 512, (1, 2))  # error: call-overload
    decode(q, cache, table, lengths, 512, None, casual=True)  # error: call-overload
    decode(q, cache, table, lengths, 512, None, causal="yes")  # error: call-overload
    decode(q, cache, table, lengths, 512, None, indices=table)  # error: call-overload
    decode(q, cache, table, lengths, 512, None, out=True)  # error: call-overload
    get_mla_metadata(lengths)  # error: call-overload
    get_mla_metadata(lengths, 16)  # error: call-overload
    get_mla_metadata([1, 2], 16, 1)  # error: call-overload
    get_mla_metadata(lengths, 16, 1, topk=64)  # error: call-overload
    get_mla_metadata(lengths, 16, 1, num_heads_per_head_k=16)  # error: call-overload
    plan, _ = get_mla_metadata()
    print(plan.num_splts)  # error: attr-defined
    out, lse = decode(q, cache, table, lengths, 512, plan)
    as_bytes: bytes = out  # error: assignment
    halves: npt.NDArray[np.float16] = lse  # error: assignment
    flashmla_rtc.prepare(1.5)  # error: arg-type
    flashmla_rtc.prefill(q)  # error: attr-defined
    print(as_bytes, halves)
