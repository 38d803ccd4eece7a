"""The GPU's plans equal those of ``schedule.plan_numpy``, number by number."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from problem import DEVICE

import flashmla_rtc
from flashmla_rtc import arrays, schedule, sm90
from flashmla_rtc.geometry import CostModel

MODELS = [
    CostModel(),
    schedule.cost_model(16, 1),
    schedule.cost_model(128, 1),
    CostModel(segment=0, piece=0, merge=0, merge_longest=0),
    CostModel(segment=16, piece=0, merge=300, merge_longest=0),
    CostModel(segment=500, piece=90, merge=1, merge_longest=20),
    CostModel(segment=1, piece=300, merge=0, merge_longest=7),
]
GARBAGE = -123456789


def batch(rng: random.Random, size: int) -> np.ndarray:
    """Random lengths: of one order of magnitude, of all of them, or odd ones."""
    kind = rng.choice(("alike", "any", "few", "odd", "equal"))
    if kind == "alike":
        longest = rng.choice((64, 1000, 100000))
        lengths = [rng.randint(longest // 2, longest) for _ in range(size)]
    elif kind == "any":
        lengths = [int(2 ** rng.uniform(0, 17)) for _ in range(size)]
    elif kind == "few":
        lengths = [rng.randint(0, 5000) if rng.random() < 0.1 else 0 for _ in range(size)]
    elif kind == "equal":
        lengths = [rng.choice((0, 1, 64, 65, 8192))] * size
    else:
        odd = (0, 1, 63, 64, 65, -1, -(2**31), 2**31 - 1, 2**31 - 64, 131072)
        lengths = [rng.choice(odd) for _ in range(size)]
    return np.array(lengths, dtype=np.int32)


def assert_planned_alike(lengths: np.ndarray, parts: int, model: CostModel) -> None:
    on_gpu = torch.from_numpy(lengths).to(DEVICE)
    metadata = torch.full((parts, 8), GARBAGE, dtype=torch.int32, device=DEVICE)
    num_splits = torch.full((len(lengths) + 1,), GARBAGE, dtype=torch.int32, device=DEVICE)
    sm90.plan_into(arrays.view(on_gpu, "cache_seqlens"), metadata, num_splits, parts, model)
    expected_metadata, expected_splits = schedule.plan_numpy(lengths, parts, model)
    np.testing.assert_array_equal(metadata.cpu().numpy(), expected_metadata)
    np.testing.assert_array_equal(num_splits.cpu().numpy(), expected_splits)
    assert np.array_equal(on_gpu.cpu().numpy(), lengths)


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int, model: CostModel) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        size = int(2 ** rng.uniform(0, 12))
        parts = rng.choice((1, 2, 3, 31, 32, 33, 66, 78, 114, 132, rng.randint(1, 256)))
        assert_planned_alike(batch(rng, size), parts, model)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1023, 1024, 1025, 8191, 8192, 8193, 20000])
def test_batch_sizes(size: int) -> None:
    """Up to 8192 requests the prefix sum is in shared memory, beyond in num_splits."""
    rng = random.Random(size)
    for parts in (132, 256, 1):
        assert_planned_alike(batch(rng, size), parts, CostModel())


@pytest.mark.parametrize("parts", [1, 2, 131, 132, 256])
@pytest.mark.parametrize("lengths", [[2**31 - 1], [2**31 - 1] * 300, [0], [-1], [0] * 300, []])
def test_extreme_lengths(lengths: list[int], parts: int) -> None:
    assert_planned_alike(np.array(lengths, np.int32), parts, CostModel())


@pytest.mark.parametrize("heads_k", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 128, 640, 20000])
def test_get_mla_metadata_gives_the_plan_of_the_head_counts(rows: int, heads_k: int) -> None:
    lengths = np.array([0, 5000, 64, 131072, 1, 777], np.int32)
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    parts = schedule.num_sm_parts(sms, rows, heads_k)
    assert parts * heads_k * -(-rows // 64) <= sms or parts == 1
    on_gpu = torch.from_numpy(lengths).to(DEVICE)
    metadata, num_splits = flashmla_rtc.get_mla_metadata(on_gpu, rows, heads_k)
    expected = schedule.plan_numpy(lengths, parts, schedule.cost_model(rows, heads_k))
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.device == num_splits.device == on_gpu.device
    np.testing.assert_array_equal(metadata.cpu().numpy(), expected[0])
    np.testing.assert_array_equal(num_splits.cpu().numpy(), expected[1])
