"""Programs that torch compiles."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import flashmla_rtc

torch = pytest.importorskip("torch")

from torch_programs import HEAD_DIM_V, STEPS, assert_same, make, with_arrays, without_a_plan  # noqa: E402  # which needs torch

BACKENDS = ("eager", "aot_eager", "inductor")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_compiled_program_has_no_break_and_the_same_results(
    step: Callable[..., Any], backend: str
) -> None:
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(2):
        arguments = make(seed=seed)
        assert_same(compiled(*arguments), step(*arguments))


def test_a_plan_object_from_outside_is_filled_once_and_used_on() -> None:
    def step(plan: Any, q: Any, *rest: Any) -> Any:
        first = flashmla_rtc.flash_mla_with_kvcache(q, *rest, plan)
        second = flashmla_rtc.flash_mla_with_kvcache(q * 2, *rest, plan)
        return (*first, *second)

    arguments = make()
    compiled = torch.compile(step, fullgraph=True)
    plan = flashmla_rtc.FlashMLASchedMeta()
    expected = step(flashmla_rtc.FlashMLASchedMeta(), *arguments)
    assert_same(compiled(plan, *arguments), expected)
    filled = plan.tile_scheduler_metadata
    made, splits = flashmla_rtc.get_mla_metadata(arguments[3], 8, 1)
    assert torch.equal(filled, made)
    assert torch.equal(plan.num_splits, splits)
    assert_same(compiled(plan, *arguments), expected)
    assert plan.tile_scheduler_metadata is filled
    assert_same(step(plan, *arguments), expected)  # and by a plain call


@pytest.mark.parametrize("what", ["batch", "queries"])
def test_one_dynamic_program_serves_all_sizes(what: str) -> None:
    compiled = torch.compile(with_arrays, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (3, 5, 7, 11):
            q, *rest = make(size if what == "batch" else 13, seed=size)
            if what == "queries":
                q = torch.randn(13, size, 4, 40)
            assert_same(compiled(q, *rest), with_arrays(q, *rest))


@pytest.mark.parametrize("first", ["plain", "compiled"])
def test_a_plan_object_belongs_to_one_configuration(first: str) -> None:
    def step(plan: Any, *arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, plan)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for second in (step, compiled):
        plan = flashmla_rtc.FlashMLASchedMeta()
        (step if first == "plain" else compiled)(plan, *make(2))
        said = "filled by a call of another configuration: batch 2 then, 5 now"
        kinds = ValueError if second is step else torch._dynamo.exc.Unsupported
        with pytest.raises(kinds, match=said):
            second(plan, *make(5))
        assert_same(second(plan, *make(2, seed=1)), step(None, *make(2, seed=1)))


def test_other_threads_go_on_while_one_compiles() -> None:
    """What they call is not being compiled, though a flag of torch says that something is."""
    arguments = make()
    expected = without_a_plan(*arguments)
    arrays = [array.numpy() if torch.is_tensor(array) else array for array in arguments]
    done, failed = threading.Event(), []

    def call() -> None:
        while not done.is_set():
            try:
                assert_same(without_a_plan(*arguments), expected)
                flashmla_rtc.flash_mla_with_kvcache(*arrays, None)
            except BaseException as error:
                failed.append(error)
                return

    def busy(x: Any) -> Any:
        for _ in range(60):
            x = torch.sin(x) * 2
        return x

    thread = threading.Thread(target=call)
    thread.start()
    torch.compile(busy, backend="aot_eager")(torch.ones(3))
    done.set()
    thread.join()
    assert not failed


def test_a_backend_that_runs_the_program_while_it_compiles_it() -> None:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    arguments = make()
    ran = []

    def backend(graph: Any, _: Any) -> Any:
        with unset_fake_temporarily(), torch.no_grad():
            ran.append(graph(*arguments[:4]))
        return graph

    def step(*arrays: Any) -> Any:
        return without_a_plan(*arrays, HEAD_DIM_V)

    assert_same(torch.compile(step, backend=backend)(*arguments[:4]), step(*arguments[:4]))
    assert_same(ran[0], step(*arguments[:4]))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"indices": 1}, "NotImplementedError"),
        ({"is_fp8_kvcache": True}, "NotImplementedError"),
        ({"softmax_scale": True}, "TypeError"),
        ({"softmax_scale": -1.0}, "ValueError"),
        ({"causal": 1}, "TypeError"),
    ],
    ids=str,
)
def test_options_are_checked_when_a_program_is_compiled(options: Any, error: str) -> None:
    def step(*arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, None, **options)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=error):
        torch.compile(step, fullgraph=True)(*make())


def test_a_wrong_rank_is_an_error_when_a_program_is_compiled() -> None:
    def step(q: Any, *rest: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(q[0], *rest, None)

    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="q must have 4 dimensions"):
        torch.compile(step, fullgraph=True)(*make())


def test_contents_of_a_compiled_program_are_checked_when_it_runs() -> None:
    def step(plan: Any, *arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, plan)

    plan = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tile_scheduler_metadata must have shape \(1, 8\)"):
        torch.compile(step, fullgraph=True)(plan, *make())


def test_numpy_arrays_are_refused_in_a_compiled_program() -> None:
    def step(*arguments: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, None)

    arguments = [array.numpy() if torch.is_tensor(array) else array for array in make()]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="q must be a torch tensor"):
        torch.compile(step, fullgraph=True)(*arguments)


def test_a_plan_object_with_splits_beside_it_is_refused() -> None:
    def step(splits: Any, *arguments: Any) -> Any:
        plan = flashmla_rtc.FlashMLASchedMeta()
        return flashmla_rtc.flash_mla_with_kvcache(*arguments, plan, splits)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="num_splits must be None"):
        torch.compile(step, fullgraph=True)(torch.zeros(4, dtype=torch.int32), *make())


def test_compiling_before_the_first_plain_call_and_importing_torch_last() -> None:
    code = (
        "import flashmla_rtc\n"
        "import torch\n"
        "step = lambda *a: flashmla_rtc.flash_mla_with_kvcache(*a, None)[0]\n"
        "compiled = torch.compile(step, fullgraph=True, backend='eager')\n"
        "ints = dict(dtype=torch.int32)\n"
        "arguments = (torch.randn(1, 1, 4, 40), torch.randn(4, 16, 1, 40),\n"
        "             torch.zeros(1, 2, **ints), torch.ones(1, **ints), 32)\n"
        "first, plain, last = compiled(*arguments), step(*arguments), compiled(*arguments)\n"
        "print(torch.allclose(first, plain) and torch.allclose(plain, last))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "True", result.stderr
