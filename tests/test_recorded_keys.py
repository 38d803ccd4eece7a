"""What a note of a call is found by, and what takes the long way although there is a note.

On the CPU: torch's tensors and its comparison of them are real, the launcher only listens.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from flashmla_rtc import recorded, sm90, torch_shortcuts, validation  # noqa: E402
from flashmla_rtc.geometry import DECODE_PARAMS  # noqa: E402
from flashmla_rtc.metadata import FlashMLASchedMeta  # noqa: E402
from flashmla_rtc.rtc.kernel import DriverError  # noqa: E402

TENSORS = ("q", "k_cache", "block_table", "cache_seqlens", "plan", "num_splits", "out", "lse")
ARGUMENTS = (
    *TENSORS[:4],
    "head_dim_v",
    "plan",
    "num_splits",
    "softmax_scale",
    "causal",
    "out",
    "lse",
)
MADE_FOR = (2, 1, 4, 1, "cuda:0")


def given(**changed: Any) -> dict[str, Any]:
    """A call of this look; ``TENSORS`` are new every time."""
    return {
        "q": torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16),
        "k_cache": CACHE,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.zeros(2, dtype=torch.int32),
        "head_dim_v": 512,
        "plan": torch.zeros(66, 8, dtype=torch.int32),
        "num_splits": torch.zeros(3, dtype=torch.int32),
        "softmax_scale": None,
        "causal": False,
        "out": None,
        "lse": None,
    } | changed


CACHE = torch.zeros(6, 64, 1, 576, dtype=torch.bfloat16)  # one, since notes know caches by address
OUT = torch.zeros(2, 1, 4, 512, dtype=torch.bfloat16)
LSE = torch.zeros(2, 4, 1)
WIDE = torch.zeros(2, 1, 4, 600, dtype=torch.bfloat16)
RESULTS = {"out": OUT, "lse": LSE}


def key_of(call: dict[str, Any]) -> tuple[Any, ...] | None:
    tensors: Any = tuple(call[name] for name in TENSORS)
    return recorded.key_of(tensors, call["head_dim_v"], call["softmax_scale"], call["causal"])


DIFFERING = [
    {"q": torch.zeros(2, 2, 4, 576, dtype=torch.bfloat16)},
    {"q": WIDE[..., :576]},
    {"q": torch.zeros(2, 1, 4, 576, dtype=torch.float16)},
    {"k_cache": torch.zeros(7, 64, 1, 576, dtype=torch.bfloat16)},
    {"k_cache": torch.zeros(6, 128, 1, 576, dtype=torch.bfloat16)[:, ::2]},
    {"block_table": torch.zeros(2, 4, dtype=torch.int32)},
    {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
    {"cache_seqlens": torch.zeros(4, dtype=torch.int32)[::2]},
    {"plan": torch.zeros(65, 8, dtype=torch.int32)},
    {"plan": torch.zeros(66, 8, dtype=torch.int64)},
    {"plan": torch.zeros(8, 66, dtype=torch.int32).t()},
    {"num_splits": torch.zeros(4, dtype=torch.int32)},
    {"num_splits": torch.zeros(6, dtype=torch.int32)[::2]},
    {"num_splits": None},
    {"head_dim_v": 256},
    {"softmax_scale": 0.5},
    {"causal": True},
    {"out": OUT},
    {"out": OUT[:1], "lse": LSE},
    {"lse": LSE},
    {"out": OUT, "lse": LSE.transpose(0, 1)},
    {"out": LSE, "lse": OUT},
]

EQUAL_ONLY = [
    {"q": np.zeros((2, 1, 4, 576), np.float16)},
    {"q": torch.nn.Parameter(torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16))},
    {"k_cache": None},
    {"block_table": [[0, 0, 0]]},
    {"cache_seqlens": (1, 2)},
    {"plan": None},
    {"plan": np.zeros((66, 8), np.int32)},
    {"num_splits": [0, 1, 2]},
    {"head_dim_v": 512.0},
    {"softmax_scale": True},
    {"softmax_scale": np.float32(1)},
    {"causal": 0},
    {"causal": np.False_},
    {"out": [1.0]},
    {"lse": LSE.numpy()},
]


def names(changed: dict[str, Any]) -> str:
    return ",".join(
        f"{name}={tuple(value.shape) if hasattr(value, 'shape') else value}"
        for name, value in changed.items()
    )


# -- keys -----------------------------------------------------------------------------------------


def test_calls_that_look_the_same_have_one_key() -> None:
    assert key_of(given()) == key_of(given())
    hash(key_of(given()))
    assert key_of(given(**RESULTS)) == key_of(given(out=OUT.clone(), lse=LSE.clone()))


@pytest.mark.parametrize("changed", DIFFERING, ids=names)
def test_whatever_the_checks_look_at_is_in_the_key(changed: dict[str, Any]) -> None:
    key = key_of(given(**changed))
    assert key is not None
    assert key != key_of(given())
    assert key != key_of(given(**RESULTS))


@pytest.mark.parametrize("changed", [*EQUAL_ONLY, {"head_dim_v": True}], ids=names)
def test_what_only_equals_good_input_is_never_noted(changed: dict[str, Any]) -> None:
    """1 == True and 512 == 512.0, but the long way has a word to say about them."""
    assert key_of(given(**changed)) is None


# -- calls ----------------------------------------------------------------------------------------


def first_fields(buffer: Any) -> dict[str, Any]:
    fields = struct.unpack_from("<128s128s128s9Q", buffer)
    return dict(zip(recorded.ADDRESSES, fields, strict=True))


class Listener:
    """A launcher, as far as a note asks for it. ``launches``: what was told of addresses."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.status = 0
        self.needs_context = False  # refuses all launches but those under on_device

    def pack(self, values: dict[str, Any]) -> Any:
        buffer = ctypes.create_string_buffer(DECODE_PARAMS.size)
        DECODE_PARAMS.pack_into(buffer, values)
        return buffer

    def again(self, grid: tuple[int, int, int], stream: int, buffer: Any) -> Callable[[], Any]:
        def launch() -> tuple[int]:
            status = 201 if self.needs_context else self.status
            if not status:
                self.launches.append({**first_fields(buffer), "grid": grid, "stream": stream})
            return (status,)

        return launch


VALUES: dict[str, Any] = dict.fromkeys((name for _, name in DECODE_PARAMS.fields), 1) | {
    "k_map": b"\7" * 128,
    "k_tail_map": b"\6" * 128,
    "q_map": bytes(128),
    "k": 128,
    "q": 256,
    "out": 512,
    "plan": 1024,
    "block_table": 4,
    "partials": 0xABC0,
    "merge_states": 0xDEF0,
}


class QueryMaps:
    """The map of a q but for its address. ``encoded``: the addresses it was made for, in order."""

    def __init__(self, mark: bytes = b"q") -> None:
        self.mark = mark
        self.encoded: list[int] = []

    def at(self, pointer: int) -> bytes:
        self.encoded.append(pointer)
        return self.expected(pointer)

    def expected(self, pointer: int) -> bytes:
        return self.mark + pointer.to_bytes(127, "little")


class Machine:
    """torch's side of a GPU, and a launcher."""

    def __init__(self) -> None:
        self.kernel = Listener()
        self.device = -1  # what get_device says of the CPU
        self.stream = 0
        self.capturing = False
        self.query_map: QueryMaps | None = None

    def note(
        self,
        call: dict[str, Any],
        captured: bool = False,
        replacements: int | None = None,
        **values: Any,
    ) -> None:
        """What the long way does at its end."""
        launched = sm90.Launched(
            self.kernel,  # type: ignore[arg-type]
            (1, 1, 66),
            self.stream,
            captured,
            VALUES | values,
            self.query_map,  # type: ignore[arg-type]
            sm90.replacements if replacements is None else replacements,
        )
        recorded.note(launched, MADE_FOR, tuple(call[name] for name in ARGUMENTS))

    def call(self, call: dict[str, Any]) -> Any:
        return recorded.launch_again(tuple(call[name] for name in ARGUMENTS))

    def settle(self, call: dict[str, Any]) -> None:
        """Until calls like this one are found in the fastest way there is."""
        self.note(call)
        for _ in range(2):
            assert self.call(call) is not None
        self.kernel.launches.clear()


@pytest.fixture(params=[True, False], ids=["compared by torch", "by key"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setattr(recorded, "_local", recorded._Local())
    c = torch._C
    monkeypatch.setattr(c, "_cuda_getDevice", lambda: made.device, raising=False)
    monkeypatch.setattr(c, "_cuda_getCurrentRawStream", lambda index: made.stream, raising=False)
    monkeypatch.setattr(c, "_cuda_isCurrentStreamCapturing", lambda: made.capturing, raising=False)

    @contextmanager
    def on_device(index: int) -> Iterator[None]:
        assert index == made.device
        needed, made.kernel.needs_context = made.kernel.needs_context, False
        yield
        made.kernel.needs_context = needed

    monkeypatch.setattr(recorded, "on_device", on_device)
    guards = None
    if request.param:
        recorded._tensor_class()
        guards, _ = torch_shortcuts.found()
        if guards is None:
            pytest.skip("This torch does not compare tensors as it is asked to.")

    def empty(shape: Any, strides: Any, dtype: Any) -> Any:
        return torch.empty_strided(shape, strides, dtype=dtype)

    monkeypatch.setattr(torch_shortcuts, "found", lambda: (guards, empty))
    yield made
    validation.validation_enabled.cache_clear()


def test_a_call_without_a_note_takes_the_long_way(machine: Machine) -> None:
    assert machine.call(given()) is None
    machine.settle(given())
    recorded._local.notes.clear()
    recorded._local.recent = []
    assert machine.call(given()) is None


def test_a_call_like_one_before_is_launched_with_its_own_addresses(machine: Machine) -> None:
    machine.settle(given())
    call = given()
    out, lse = machine.call(call)
    assert (out.shape, out.stride(), out.dtype) == (OUT.shape, OUT.stride(), OUT.dtype)
    assert (lse.shape, lse.stride(), lse.dtype) == (LSE.shape, LSE.stride(), LSE.dtype)
    given_arrays = call | {"k": call["k_cache"], "out": out, "lse": lse}
    addresses = {name: given_arrays[name].data_ptr() for name in recorded.ADDRESSES[3:10]}
    assert machine.kernel.launches == [
        addresses
        | {name: VALUES[name] for name in (*recorded.ADDRESSES[:3], *recorded.ADDRESSES[10:])}
        | {"grid": (1, 1, 66), "stream": 0}
    ]


def test_the_map_of_q_goes_with_its_address(machine: Machine) -> None:
    """Encoded once for each address, whatever address the note was made with."""
    machine.query_map = maps = QueryMaps()
    calls = [given() for _ in range(3)]
    machine.settle(calls[0])
    maps.encoded.clear()
    for i in (1, 2, 1, 0, 2, 0):
        assert machine.call(calls[i]) is not None
    addresses = [calls[i]["q"].data_ptr() for i in range(3)]
    assert maps.encoded == addresses[1:]
    assert [(launch["q"], launch["q_map"]) for launch in machine.kernel.launches] == [
        (addresses[i], maps.expected(addresses[i])) for i in (1, 2, 1, 0, 2, 0)
    ]


def test_the_maps_of_the_cache_go_with_its_address(machine: Machine) -> None:
    calls = [given(), given(k_cache=CACHE.clone())]
    made = [{"k_map": bytes([i]) * 128, "k_tail_map": bytes([i + 9]) * 128} for i in (1, 2)]
    for call, one in zip(calls, made, strict=True):
        machine.note(call, **one)
    for i in (0, 1, 1, 0):
        assert machine.call(calls[i]) is not None
        launch = machine.kernel.launches[-1]
        assert {name: launch[name] for name in made[i]} == made[i]
    assert len(machine.kernel.launches) == 4


def test_two_looks_of_q_at_one_address_have_two_maps(machine: Machine) -> None:
    q = given()["q"]
    calls = [given(q=q), given(q=q.view(2, 2, 2, 576), out=None)]
    looks = [QueryMaps(b"a"), QueryMaps(b"b")]
    for call, machine.query_map in zip(calls, looks, strict=True):
        machine.note(call)
    for i in (0, 1, 0, 1):
        assert machine.call(calls[i]) is not None
        assert machine.kernel.launches[-1]["q_map"] == looks[i].expected(q.data_ptr())
    assert [look.encoded for look in looks] == [[q.data_ptr()]] * 2


def test_a_layout_without_a_map_carries_zeros(machine: Machine) -> None:
    machine.settle(given())
    for _ in range(3):
        assert machine.call(given()) is not None
    assert {launch["q_map"] for launch in machine.kernel.launches} == {bytes(128)}


def test_results_are_written_where_the_caller_says(machine: Machine) -> None:
    machine.settle(given(**RESULTS))
    out, lse = OUT.clone(), LSE.clone()
    assert machine.call(given(out=out, lse=lse)) == (out, lse)
    (launch,) = machine.kernel.launches
    assert (launch["out"], launch["lse"]) == (out.data_ptr(), lse.data_ptr())


@pytest.mark.parametrize("form", [{}, {"num_splits": None}, RESULTS, {"out": OUT}, {"lse": LSE}])
def test_every_form_of_a_call_is_launched_again(machine: Machine, form: dict[str, Any]) -> None:
    machine.settle(given(**form))
    for _ in range(3):
        assert machine.call(given(**form)) is not None


@pytest.mark.parametrize("form", [{}, RESULTS], ids=["new results", "given results"])
@pytest.mark.parametrize("changed", [*DIFFERING, *EQUAL_ONLY], ids=names)
def test_a_call_that_differs_takes_the_long_way(
    machine: Machine, changed: dict[str, Any], form: dict[str, Any]
) -> None:
    call = given(**form)
    machine.settle(call)
    same = all(value is call[name] for name, value in changed.items())
    assert (machine.call(call | changed) is not None) is same
    assert len(machine.kernel.launches) == same
    assert machine.call(given(**form)) is not None


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": lambda tensor: tensor.reshape(len(tensor), -1).to_sparse_csr(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[:1]]),
    "mkldnn": lambda tensor: tensor.float().to_mkldnn(),
    "meta": lambda tensor: tensor.to("meta"),
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "without memory": lambda tensor: emptied(tensor),
    "negated": lambda tensor: torch._neg_view(tensor),
}


def emptied(tensor: Any) -> Any:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore")  # torch says of some kinds that they are prototypes
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_unusual_kinds_take_the_long_way(machine: Machine, name: str, kind: str) -> None:
    machine.settle(given(**RESULTS))
    call = given(**RESULTS)
    try:
        call[name] = UNUSUAL[kind](call[name])
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch can't make one: {error}")
    assert machine.call(call) is None
    assert machine.kernel.launches == []


def test_a_call_amid_a_launch_leaves_the_addresses_alone(machine: Machine) -> None:
    """A signal handler may run after the addresses are written and before the launch reads them."""
    machine.settle(given(**RESULTS))
    outer, inner = given(**RESULTS), given(out=OUT.clone(), lse=LSE.clone())
    results = []

    class Interrupted(Listener):
        def again(self, *launch: Any) -> Callable[[], Any]:
            proceed = super().again(*launch)

            def interrupted() -> Any:
                results.append(machine.call(inner))
                return proceed()

            return interrupted

    kernel = Interrupted()
    (note,) = recorded._local.notes.values()
    note.places[0] = (kernel.again((1, 1, 66), 0, note.buffer), *note.places[0][1:])
    for _ in range(2):
        assert machine.call(outer) is not None
    assert results == [None, None]
    assert [launch["out"] for launch in kernel.launches] == [OUT.data_ptr()] * 2

    inner |= {"causal": True}  # another note, with a buffer of its own
    results.clear()
    kernel.launches.clear()
    machine.settle(inner)
    for _ in range(2):
        assert machine.call(outer) is not None
    assert [result[0] is inner["out"] for result in results] == [True, True]
    assert [launch["out"] for launch in machine.kernel.launches] == [inner["out"].data_ptr()] * 2
    assert [launch["out"] for launch in kernel.launches] == [OUT.data_ptr()] * 2


def test_a_plan_that_was_changed_in_place_is_looked_at(machine: Machine) -> None:
    call = given()
    machine.settle(call)
    plan = call["plan"]
    for change, back in (
        (lambda: plan.resize_(65, 8), lambda: plan.resize_(66, 8)),
        (lambda: plan.t_(), lambda: plan.t_()),
        (
            lambda: plan.set_(torch.zeros(2, 8, dtype=torch.int32)),
            lambda: plan.set_(torch.zeros(66, 8, dtype=torch.int32)),
        ),
    ):
        change()
        assert machine.call(call) is None
        back()
        assert machine.call(call) is not None


def test_notes_keep_no_tensor_alive(machine: Machine) -> None:
    call = given(**RESULTS)
    call |= {"out": OUT.clone(), "lse": LSE.clone(), "k_cache": CACHE.clone()}
    machine.settle(call)
    machine.note(call)
    kept = [weakref.ref(call[name]) for name in TENSORS]
    del call
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(TENSORS)


def test_validation_that_is_switched_on_later_is_heeded(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(validation.VARIABLE, raising=False)
    validation.validation_enabled.cache_clear()
    machine.settle(given())
    for value, launched in (("1", False), ("0", True)):
        monkeypatch.setenv(validation.VARIABLE, value)
        validation.validation_enabled.cache_clear()
        assert (machine.call(given()) is not None) is launched
    monkeypatch.setenv(validation.VARIABLE, "yes")
    validation.validation_enabled.cache_clear()
    with pytest.raises(ValueError, match="must be 1 or 0"):
        machine.call(given())


def test_several_looks_in_turn(machine: Machine) -> None:
    calls = [given(causal=causal, **form) for causal in (True, False) for form in ({}, RESULTS)]
    calls += [given(softmax_scale=scale) for scale in (0.1, 0.2)]
    for call in calls:
        machine.note(call)
    for _ in range(4):
        for call in calls:
            assert machine.call(call) is not None
    assert len(machine.kernel.launches) == 4 * len(calls)
    assert len(recorded._local.recent or []) <= recorded._MOST_RECENT


def test_equal_numbers_need_not_be_the_same_object(machine: Machine) -> None:
    machine.settle(given(softmax_scale=0.125))
    assert machine.call(given(softmax_scale=float("0.125"), head_dim_v=int("512"))) is not None
    assert machine.call(given(softmax_scale=0.25)) is None


def test_inside_inference_mode_and_outside(machine: Machine) -> None:
    machine.settle(given())
    for _ in range(2):
        with torch.inference_mode():
            for _ in range(3):
                assert machine.call(given()) is not None
        for _ in range(3):
            assert machine.call(given()) is not None
    assert len(recorded._local.recent or [0]) == 1  # one look, however torch compares it


def test_where_and_when_it_is_launched_counts(machine: Machine) -> None:
    call = given()
    machine.settle(call)
    machine.stream = 7
    assert machine.call(call) is None  # no workspace is known there
    machine.note(call)
    assert machine.call(call) is not None
    machine.capturing = True
    assert machine.call(call) is None
    machine.stream = 0  # which is never captured
    assert machine.call(call) is not None
    machine.device = 1
    assert machine.call(call) is None
    machine.device = -1
    assert machine.call(call | {"k_cache": CACHE.clone()}) is None  # has no tensor map yet
    machine.kernel.status = 400
    assert machine.call(call) is None
    machine.kernel.status = 0
    assert machine.call(call) is not None
    machine.kernel.launches.clear()
    machine.kernel.needs_context = True  # as in a thread that has not used CUDA yet
    for launches in (1, 2):
        assert machine.call(call) is not None
        assert len(machine.kernel.launches) == launches


def test_addresses_that_are_not_aligned_any_more(machine: Machine) -> None:
    machine.settle(given(**RESULTS))
    room = torch.zeros(OUT.numel() + 1, dtype=OUT.dtype)
    assert machine.call(given(out=room[:-1].view_as(OUT), lse=LSE)) is not None
    assert machine.call(given(out=room[1:].view_as(OUT), lse=LSE)) is None


def test_a_driver_that_refuses_a_map_of_q(machine: Machine) -> None:
    """The long way says what is wrong."""

    class Refused:
        def at(self, pointer: int) -> bytes:
            raise DriverError("refused")

    call = given()
    machine.settle(call)
    for note in recorded._local.notes.values():
        note.query_map, note.query_maps = Refused(), {}  # type: ignore[assignment]
    assert machine.call(call) is None


def test_a_kernel_that_was_replaced_is_not_launched(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = given()
    machine.settle(call)
    monkeypatch.setattr(sm90, "replacements", sm90.replacements + 1)
    assert machine.call(call) is None
    machine.kernel = Listener()
    machine.settle(call)
    assert machine.call(call) is not None
    assert len(machine.kernel.launches) == 1


def test_a_kernel_that_was_replaced_amid_a_call_is_not_launched_again(machine: Machine) -> None:
    call = given()
    machine.note(call, replacements=sm90.replacements - 1)
    assert machine.call(call) is None
    machine.settle(call)
    machine.note(call, replacements=sm90.replacements - 1)
    assert machine.call(call) is None


@pytest.mark.parametrize("name", ["q", "k_cache"])
def test_a_call_that_asks_for_a_gradient_is_not_repeated(machine: Machine, name: str) -> None:
    call = given()
    machine.settle(call)
    asking = call | {name: call[name].clone().requires_grad_()}
    assert key_of(asking) is None
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert machine.call(asking) is None
            assert machine.call(call) is not None


def test_a_call_that_somebody_listens_to_is_not_repeated(machine: Machine) -> None:
    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    call = given()
    machine.settle(call)
    with Listener():
        assert key_of(call) is None
        assert machine.call(call) is None
    assert machine.call(call) is not None


def test_a_call_in_forward_mode_is_not_repeated(machine: Machine) -> None:
    call = given()
    machine.settle(call)
    with torch.autograd.forward_ad.dual_level():
        assert machine.call(call) is None
    assert machine.call(call) is not None


def test_a_plan_object(machine: Machine) -> None:
    call = given()
    machine.settle(call)
    plan, splits = call["plan"], call["num_splits"]

    def with_object(used: Any = plan, made_for: Any = MADE_FOR, num_splits: Any = None) -> Any:
        holder = FlashMLASchedMeta(plan, splits)
        holder._used, holder._made_for = used, made_for
        return machine.call(call | {"plan": holder, "num_splits": num_splits})

    assert with_object() is not None
    assert with_object(used=None) is None  # assigned, and not seen by any call
    assert with_object(made_for=(3, *MADE_FOR[1:])) is None
    assert with_object(num_splits=splits) is None
    empty = FlashMLASchedMeta()
    assert machine.call(call | {"plan": empty, "num_splits": None}) is None


def test_captured_and_unaligned_calls_are_not_noted(machine: Machine) -> None:
    def noted(captured: bool = False, plan: Any = None, **addresses: int) -> bool:
        recorded._local = recorded._Local()
        call = given() if plan is None else given(plan=plan)
        machine.note(call, captured, **addresses)
        if not recorded._local.notes:
            return False
        (note,) = recorded._local.notes.values()
        assert note.maps == {CACHE.data_ptr(): VALUES["k_map"] + VALUES["k_tail_map"]}
        assert [*note.places] == [0]
        return True

    assert noted()
    assert not noted(captured=True)
    assert not noted(q=258)
    assert not noted(out=8)
    assert not noted(block_table=0)
    assert not noted(plan=given()["plan"].numpy())


def test_notes_do_not_grow_without_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_MOST_NOTES", 8)
    for pages in range(1, 30):
        call = given(block_table=torch.zeros(2, pages, dtype=torch.int32))
        call["k_cache"] = CACHE.clone()
        machine.note(call)
        assert machine.call(call) is not None
    assert len(recorded._local.notes) <= 8


def test_maps_of_q_do_not_grow_without_end(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_MOST_ADDRESSES", 8)
    machine.query_map = maps = QueryMaps()
    machine.settle(given())
    (note,) = recorded._local.notes.values()
    calls = [given() for _ in range(30)]
    for call in calls:
        assert machine.call(call) is not None
        assert machine.kernel.launches[-1]["q_map"] == maps.expected(call["q"].data_ptr())
    assert len(note.query_maps) <= 8


def test_addresses_lie_where_the_kernel_reads_them() -> None:
    names = tuple(name for _, name in DECODE_PARAMS.fields)
    assert names[: len(recorded.ADDRESSES)] == recorded.ADDRESSES
    buffer = ctypes.create_string_buffer(DECODE_PARAMS.size)
    DECODE_PARAMS.pack_into(buffer, VALUES)
    before = bytes(buffer)
    fields = [VALUES[name] for name in recorded.ADDRESSES]
    recorded._pack_addresses(buffer, 0, fields[0] + fields[1], *fields[2:])
    assert bytes(buffer) == before


# -- what is borrowed from torch's compiler -------------------------------------------------------


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """What is made of ``torch._C._dynamo.guards`` if it is the object given."""

    def look(guards: Any) -> Any:
        torch_shortcuts.found.cache_clear()
        monkeypatch.setattr(torch._C._dynamo, "guards", guards)
        return torch_shortcuts.found()

    yield look
    torch_shortcuts.found.cache_clear()


def test_only_shortcuts_that_do_what_they_should_are_taken(
    shortcuts: Callable[[Any], Any],
) -> None:
    def always(answer: Any) -> Any:
        return lambda *tensors, **options: SimpleNamespace(check=lambda *others: answer)

    def empty(shape: Any, strides: Any, dtype: Any) -> Any:
        return torch.empty_strided(shape, strides, dtype=dtype)

    def other(shape: Any, strides: Any) -> Any:
        return empty(shape, strides, torch.float32)

    cuda = object()
    assert shortcuts(SimpleNamespace()) == (None, None)
    for answer in (True, False, None):
        tools = SimpleNamespace(
            TensorGuards=always(answer), _empty_strided_cpu=other, _empty_strided_cuda=cuda
        )
        assert shortcuts(tools) == (None, None)
    tools = SimpleNamespace(_empty_strided_cpu=empty, _empty_strided_cuda=cuda)
    assert shortcuts(tools) == (None, cuda)
    assert shortcuts(SimpleNamespace(_empty_strided_cpu=empty)) == (None, None)


@pytest.mark.parametrize("known", [True, False], ids=["borrowed", "documented"])
def test_tensors_are_told_that_they_were_written_into(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # as in a torch that takes one tensor alone
        monkeypatch.setattr(torch._C, "_increment_version", one_tensor(torch._C._increment_version))
    torch_shortcuts.increment_version.cache_clear()
    try:
        tell = torch_shortcuts.increment_version()
        assert (tell is torch._C._increment_version) is known
        tensors = torch.empty(2), torch.empty(3)
        with torch.inference_mode():
            without = torch.empty(1)
        tell((tensors[0], without, tensors[1]))
        assert [tensor._version for tensor in tensors] == [1, 1]
    finally:
        torch_shortcuts.increment_version.cache_clear()


def one_tensor(increment: Any) -> Any:
    def alone(tensors: Any) -> None:
        if len(tensors) != 1:
            raise TypeError("expect a Tensor as input")
        increment(tensors)

    return alone
