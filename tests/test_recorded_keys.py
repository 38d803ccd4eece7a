"""What a note of a call is kept under, and that calls without a note take the long way."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flashmla_rtc import recorded, sm90  # noqa: E402

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


class Kernel:
    """A launcher, as far as a note asks for it."""

    def pack(self, values: dict[str, Any]) -> Any:
        return ctypes.create_string_buffer(256)

    def config(self, grid: tuple[int, int, int], stream: int) -> Any:
        return grid, stream


def test_captured_and_unaligned_calls_are_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = torch.zeros(1, 8, dtype=torch.int32)
    cache = arguments()[1]
    good = dict.fromkeys(("block_table", "partials", "merge_states"), 4)
    good |= {"q": 256, "out": 512, "plan": 1024, "k_map": bytes(128)}  # type: ignore[dict-item]

    def noted(captured: bool = False, plan: Any = plan, **addresses: int) -> bool:
        local = SimpleNamespace()
        monkeypatch.setattr(recorded, "_local", local)
        values = good | addresses
        launched = sm90.Launched(Kernel(), (1, 1, 1), 7, captured, values)  # type: ignore[arg-type]
        recorded.note((), launched, cache, plan, None, ())
        if not hasattr(local, "notes"):
            return False
        note = local.notes[()]
        assert note.maps == {cache.data_ptr(): good["k_map"]}
        assert note.places == {7: (((1, 1, 1), 7), 4, 4)}
        return True

    assert noted()
    assert not noted(captured=True)
    assert not noted(q=258)
    assert not noted(out=8)
    assert not noted(block_table=0)
    assert not noted(plan=plan.numpy())
