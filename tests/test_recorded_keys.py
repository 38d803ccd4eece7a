"""What a note of a call is kept under, and that calls without a note take the long way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flashmla_rtc import recorded  # noqa: E402

ARGUMENTS = (
    "q",
    "k_cache",
    "block_table",
    "cache_seqlens",
    "head_dim_v",
    "softmax_scale",
    "causal",
    "out",
    "lse",
)


def arguments(**changed: Any) -> list[Any]:
    given = {
        "q": torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16),
        "k_cache": torch.zeros(6, 64, 1, 576, dtype=torch.bfloat16),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.zeros(2, dtype=torch.int32),
        "head_dim_v": 512,
        "softmax_scale": None,
        "causal": False,
        "out": None,
        "lse": None,
    }
    return [{**given, **changed}[name] for name in ARGUMENTS]


def test_calls_that_look_the_same_have_one_key() -> None:
    assert recorded.key_of(*arguments()) == recorded.key_of(*arguments())
    hash(recorded.key_of(*arguments()))


OUT = torch.zeros(2, 1, 4, 512, dtype=torch.bfloat16)
LSE = torch.zeros(2, 4, 1)
WIDE = torch.zeros(2, 1, 4, 600, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": torch.zeros(2, 2, 4, 576, dtype=torch.bfloat16)},
        {"q": WIDE[..., :576]},
        {"q": torch.zeros(2, 1, 4, 576, dtype=torch.float16)},
        {"k_cache": torch.zeros(7, 64, 1, 576, dtype=torch.bfloat16)},
        {"k_cache": torch.zeros(6, 128, 1, 576, dtype=torch.bfloat16)[:, ::2]},
        {"block_table": torch.zeros(2, 4, dtype=torch.int32)},
        {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
        {"cache_seqlens": torch.zeros(4, dtype=torch.int32)[::2]},
        {"head_dim_v": 256},
        {"softmax_scale": 0.5},
        {"causal": True},
        {"out": OUT},
        {"out": OUT[:1]},
        {"lse": LSE},
        {"lse": LSE.transpose(0, 1)},
    ],
    ids=str,
)
def test_whatever_the_checks_look_at_is_in_the_key(changed: dict[str, Any]) -> None:
    key = recorded.key_of(*arguments(**changed))
    assert key is not None
    assert key != recorded.key_of(*arguments())


@pytest.mark.parametrize(
    "changed",
    [
        {"q": np.zeros((2, 1, 4, 576), np.float16)},
        {"q": torch.nn.Parameter(torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16))},
        {"k_cache": None},
        {"block_table": [[0, 0, 0]]},
        {"cache_seqlens": (1, 2)},
        {"head_dim_v": 512.0},
        {"head_dim_v": True},
        {"softmax_scale": True},
        {"softmax_scale": np.float32(1)},
        {"causal": 0},
        {"causal": np.False_},
        {"out": [1.0]},
        {"lse": LSE.numpy()},
    ],
    ids=str,
)
def test_what_only_equals_good_input_is_never_noted(changed: dict[str, Any]) -> None:
    """1 == True and 512 == 512.0, but the long way has a word to say about them."""
    assert recorded.key_of(*arguments(**changed)) is None


def test_a_call_without_a_note_takes_the_long_way() -> None:
    given = arguments()
    key = recorded.key_of(*given)
    assert key is not None
    plan = torch.zeros(1, 8, dtype=torch.int32)
    assert recorded.launch_again(key, *given[:4], plan, None, None, None) is None


def test_captured_and_unaligned_calls_are_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_local", SimpleNamespace())
    plan = torch.zeros(1, 8, dtype=torch.int32)
    cache = arguments()[1]
    good = {"q": 256, "out": 512, "plan": 1024, "block_table": 4}

    def note(captured: bool = False, plan: Any = plan, **addresses: int) -> bool:
        launched = SimpleNamespace(
            kernel=None, grid=(1, 1, 1), stream=0, captured=captured, values=good | addresses
        )
        try:
            recorded.note((), launched, cache, plan, None, ())  # type: ignore[arg-type]
        except AttributeError:  # the kernel that is missing here: it would have been noted
            return True
        return False

    assert note()
    assert not note(captured=True)
    assert not note(q=258)
    assert not note(out=8)
    assert not note(plan=4)
    assert not note(plan=plan.numpy())
    assert not note(block_table=0)
