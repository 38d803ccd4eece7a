"""The operators of torch, and programs that are exported or traced to them."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest

import flashmla_rtc

torch = pytest.importorskip("torch")

from torch_programs import HEAD_DIM_V, assert_same, make, with_arrays, without_a_plan  # noqa: E402  # which needs torch

operators = importlib.import_module("flashmla_rtc.integrations.torch")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def operator_calls() -> list[Any]:
    q, k_cache, table, lengths, width = make()
    plan = flashmla_rtc.get_mla_metadata(lengths, 8, 1)
    strided = torch.randn(3, 2, 4, 50)[..., :40]
    results = {"out": torch.empty(3, 2, 4, width), "lse": torch.empty(3, 4, 2)}
    call = (q, k_cache, table, lengths, width)
    ops = torch.ops.flashmla_rtc
    return [
        pytest.param(ops.mla_decode, call, {}, id="decode"),
        pytest.param(ops.mla_decode, (*call, *plan, 0.3, True), {}, id="decode-planned"),
        pytest.param(ops.mla_decode, (strided, *call[1:]), {}, id="decode-strided"),
        pytest.param(
            ops.mla_decode, make(dtype=torch.bfloat16), {"causal": True}, id="decode-bfloat16"
        ),
        pytest.param(ops.mla_decode_out, call, results, id="out"),
        pytest.param(ops.mla_decode_out, (*call, *plan, 0.3, True), results, id="out-planned"),
        pytest.param(ops.mla_metadata, (lengths, 8, 1), {}, id="metadata"),
    ]


@pytest.mark.parametrize("operator, arguments, options", operator_calls())
def test_opcheck(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.library.opcheck(operator, arguments, options)


def test_operators_compute_what_the_calls_do() -> None:
    arguments = make()
    ops = torch.ops.flashmla_rtc
    plan = ops.mla_metadata(arguments[3], 8, 1)
    assert_same(plan, flashmla_rtc.get_mla_metadata(arguments[3], 8, 1))
    expected = flashmla_rtc.flash_mla_with_kvcache(*arguments, *plan, causal=True)
    assert_same(ops.mla_decode(*arguments, *plan, causal=True), expected)
    out, lse = (torch.full_like(result, torch.nan) for result in expected)
    assert ops.mla_decode_out(*arguments, *plan, causal=True, out=out, lse=lse) is None
    assert_same((out, lse), expected)


def test_an_exported_program() -> None:
    class Step(torch.nn.Module):
        def forward(self, q: Any, k_cache: Any, table: Any, lengths: Any) -> Any:
            return with_arrays(q, k_cache, table, lengths, HEAD_DIM_V)

    arguments = make()[:4]
    program = torch.export.export(Step(), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("flashmla_rtc.mla_decode.default") == 2
    assert targets.count("flashmla_rtc.mla_metadata.default") == 1
    assert_same(program.module()(*arguments), Step()(*arguments))


def test_a_module_with_a_plan_object_is_as_good_after_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = flashmla_rtc.FlashMLASchedMeta()

        def forward(self, *arrays: Any) -> Any:
            return flashmla_rtc.flash_mla_with_kvcache(*arrays, HEAD_DIM_V, self.plan)

    arguments = make()[:4]
    expected = without_a_plan(*make())
    for strict in (False, True):
        layer = Layer()
        program = torch.export.export(layer, arguments, strict=strict)
        for result in (program.module()(*arguments), layer(*arguments)):
            assert_same((result[0] * 2, result[1]), expected)


def test_a_plan_that_was_assigned_is_not_changed_by_export() -> None:
    q, k_cache, table, lengths, width = make()
    meta = flashmla_rtc.FlashMLASchedMeta(*flashmla_rtc.get_mla_metadata(lengths, 8, 1))

    class Step(torch.nn.Module):
        def forward(self, q: Any, lengths: Any) -> Any:
            return flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, width, meta)

    program = torch.export.export(Step(), (q, lengths), strict=False)
    assert meta.planned_lengths is None
    assert_same(program.module()(q, lengths), Step()(q, lengths))
    assert meta.planned_lengths is lengths
    assert torch.equal(copy.deepcopy(meta).planned_lengths, lengths)


def test_make_fx_writes_operators() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k_cache, table, lengths, width = make()
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(
            lambda q, lengths: with_arrays(q, k_cache, table, lengths, width)[0],
            tracing_mode=mode,
            _allow_non_fake_inputs=True,
        )(q, lengths)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("flashmla_rtc.mla_decode.default") == 2
        other = lengths.flip(0) // 2
        expected = with_arrays(q * 2, k_cache, table, other, width)[0]
        assert_same((graph(q * 2, other),), (expected,))


def test_modes_that_listen_hear_of_calls() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        heard: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.heard.append(str(func))
            return func(*args, **(kwargs or {}))

    arguments = make()
    expected = with_arrays(*arguments)
    with Listener() as listener:
        assert_same(with_arrays(*arguments), expected)
    assert listener.heard.count("flashmla_rtc.mla_decode.default") == 2
    assert "flashmla_rtc.mla_metadata.default" in listener.heard


def test_fake_tensors_give_fake_results() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    arguments = make()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
        results = with_arrays(*fake)
    for result, expected in zip(results, with_arrays(*arguments), strict=True):
        assert isinstance(result, FakeTensor)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.stride() == expected.stride()


def test_parts_of_a_plan_are_known_without_lengths() -> None:
    plan, _ = flashmla_rtc.get_mla_metadata(make()[3], 8, 1)
    for device in ("cpu", torch.device("cpu")):
        assert flashmla_rtc.num_sm_parts(device, 8, 1) == plan.shape[0]
    with pytest.raises(ValueError, match="num_heads_k must be at least 1, but it is 0"):
        flashmla_rtc.num_sm_parts("cpu", 8, 0)
    with pytest.raises(TypeError, match="num_q_tokens_per_head_k"):
        flashmla_rtc.num_sm_parts("cpu", 8.0, 1)


def sms_of(device: Any) -> int:
    """As if it asked the driver: nothing that a compiled program can do."""
    with open(os.devnull, "rb") as file:
        file.read()
    return 132


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_programs_know_the_parts_too(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "num_sms", sms_of)
    assert operators.num_parts(sms_of("cpu"), 64, 1) == 132

    def step(q: Any) -> Any:
        return q.new_zeros(flashmla_rtc.num_sm_parts(q.device, q.shape[1] * 64, 1), 8)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="eager")
    for queries, parts in ((1, 132), (2, 66), (3, 44)):
        assert compiled(torch.empty(1, queries)).shape == (parts, 8)


def test_tensors_on_meta_are_planned_for_without_a_warning() -> None:
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, splits = torch.ops.flashmla_rtc.mla_metadata(lengths, 8, 1)
    assert (plan.shape, splits.shape, plan.is_meta) == ((1, 8), (4,), True)


def test_the_operators_do_not_load_the_compiler() -> None:
    """Which takes a second, of a first call with a gradient for instance."""
    code = """
import sys, torch
import flashmla_rtc.integrations.torch
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "FLASHMLA_RTC_COMPILE": "lazy"}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)
