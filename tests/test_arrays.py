"""Views of arrays of every library, and new arrays in the caller's own."""

from __future__ import annotations

import sys
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashmla_rtc import arrays
from flashmla_rtc.arrays import CPU, Device, View, view
from flashmla_rtc.integrations.jax import release


class Exported:
    """An array of a library that nobody knows, with the two methods that the standard asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class ExportedWithNamespace(Exported):
    """... and a namespace that can import."""

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: ExportedWithNamespace(array))


class OnDevice:
    """An array that lives on some DLPack device and can't be read."""

    def __init__(self, kind: int, index: int = 0) -> None:
        self.device = (kind, index)

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("nobody may ask for the contents")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


# -- Device ---------------------------------------------------------------------------------------


def test_devices_have_short_names_and_can_be_keys() -> None:
    assert str(CPU) == "cpu"
    assert str(Device("cuda", 0)) == "cuda:0"
    assert str(Device("cuda", 3)) == "cuda:3"
    assert {Device("cuda", 1): "x"}[Device("cuda", 1)] == "x"
    assert Device("cpu", 0) == CPU


# -- NumPy ----------------------------------------------------------------------------------------


def test_a_numpy_array() -> None:
    array = np.zeros((2, 3, 4), np.float32)
    seen = view(array, "q")
    assert seen.source is array
    assert seen.native is array
    assert seen.library == "numpy"
    assert seen.pointer == array.ctypes.data
    assert seen.shape == (2, 3, 4)
    assert seen.strides == (12, 4, 1)
    assert seen.ndim == 3
    assert seen.dtype == "float32"
    assert seen.device == CPU


def test_strides_count_elements_and_the_pointer_is_that_of_element_0() -> None:
    base = np.zeros((6, 8, 10), np.float16)
    part = base[1:, ::2, 4:]
    seen = view(part, "k_cache")
    assert seen.strides == (80, 20, 1)
    assert seen.pointer == base.ctypes.data + 2 * (80 + 4)
    assert view(base.transpose(2, 0, 1), "q").strides == (1, 80, 10)
    assert view(np.broadcast_to(base[0, 0], (7, 10)), "q").strides == (0, 1)
    backwards = view(base[::-1], "q")
    assert backwards.strides == (-80, 10, 1)
    assert backwards.pointer == base.ctypes.data + 2 * 5 * 80


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_arrays_without_elements_or_axes(shape: tuple[int, ...]) -> None:
    seen = view(np.zeros(shape, np.int32), "cache_seqlens")
    assert seen.shape == shape
    assert seen.ndim == len(shape) == len(seen.strides)
    assert seen.dtype == "int32"


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]
)
def test_numpy_dtype_names(dtype: str) -> None:
    assert view(np.zeros(3, dtype), "q").dtype == dtype


def test_numpy_dtypes_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert view(np.zeros(3, ml_dtypes.bfloat16), "q").dtype == "bfloat16"
    assert view(np.zeros(3, ml_dtypes.float8_e4m3fn), "q").dtype == "float8_e4m3fn"


def test_a_numpy_subclass_is_a_numpy_array() -> None:
    class Special(np.ndarray):
        pass

    array = np.zeros((2, 2), np.float32).view(Special)
    seen = view(array, "q")
    assert seen.library == "numpy"
    assert seen.native is array


# -- torch ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def test_a_torch_tensor(torch: Any) -> None:
    tensor = torch.zeros(2, 3, 4, dtype=torch.bfloat16)[:, 1:]
    seen = view(tensor, "q")
    assert seen.source is tensor
    assert seen.native is tensor
    assert seen.library == "torch"
    assert seen.pointer == tensor.data_ptr()
    assert type(seen.shape) is tuple
    assert seen.shape == (2, 2, 4)
    assert seen.strides == (12, 4, 1)
    assert seen.dtype == "bfloat16"
    assert seen.device == CPU


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float32", "float64", "int32", "uint8", "bool", "float8_e4m3fn"],
)
def test_torch_dtype_names(torch: Any, dtype: str) -> None:
    for _ in range(2):  # the second time from memory
        assert view(torch.zeros(3, dtype=getattr(torch, dtype)), "q").dtype == dtype


@pytest.mark.parametrize("kind", ["sparse", "meta", "meta without elements"])
def test_a_torch_tensor_without_elements_in_memory_is_refused(torch: Any, kind: str) -> None:
    tensors = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.zeros(3, device="meta"),
        "meta without elements": lambda: torch.zeros(0, device="meta"),
    }
    with pytest.raises(TypeError, match="q must be a dense tensor with elements in memory"):
        view(tensors[kind](), "q")
    assert view(torch.zeros(0), "q").shape == (0,)  # an empty one is legal


def test_a_lazily_negated_torch_tensor_is_refused(torch: Any) -> None:
    imaginary = torch.zeros(3, dtype=torch.complex64).conj().imag
    with pytest.raises(TypeError, match=r"lse is a lazily negated view: pass lse.resolve_neg\(\)"):
        view(imaginary, "lse")
    assert view(imaginary.resolve_neg(), "lse").shape == (3,)


def test_torch_subclasses(torch: Any) -> None:
    class Special(torch.Tensor):
        pass

    for tensor in (
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.zeros(2, 3).as_subclass(Special),
        torch.zeros(2, 3, requires_grad=True),
    ):
        seen = view(tensor, "q")
        assert seen.library == "torch"
        assert seen.native is tensor
        assert seen.pointer == tensor.data_ptr()


def test_what_belongs_to_torch_and_is_no_tensor(torch: Any) -> None:
    for thing in (torch.float32, torch.device("cpu"), torch.Size([2])):
        with pytest.raises(TypeError, match=r"^q must be .*, but it is \w+\.$"):
            view(thing, "q")


@pytest.mark.parametrize(
    "stub",
    [None, ModuleType("torch"), SimpleNamespace(Tensor=None), SimpleNamespace(Tensor="Tensor")],
    ids=["None", "empty module", "Tensor is None", "Tensor is no class"],
)
def test_a_stub_in_the_place_of_torch(monkeypatch: pytest.MonkeyPatch, stub: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", stub)
    assert view(np.zeros(3), "q").library == "numpy"
    with pytest.raises(TypeError, match="q must be an array"):
        view("text", "q")


# -- JAX ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jnp() -> Any:
    return pytest.importorskip("jax.numpy")


def test_a_jax_array(jnp: Any) -> None:
    array = jnp.zeros((2, 3, 4), jnp.bfloat16)
    seen = view(array, "q")
    assert seen.source is array
    assert seen.library == "jax"
    assert seen.shape == (2, 3, 4)
    assert seen.strides == (12, 4, 1)  # JAX has no others
    assert seen.dtype == "bfloat16"
    if seen.device == CPU:
        assert seen.native is array
        assert seen.pointer == 0


def test_results_for_jax_are_jax_arrays(jnp: Any) -> None:
    like = view(jnp.zeros(2, jnp.int32), "cache_seqlens")
    made = arrays.from_numpy(like, np.arange(3, dtype=np.int32))
    assert view(made, "made").library == "jax"
    assert made.tolist() == [0, 1, 2]
    assert arrays.to_numpy(view(made, "made")).tolist() == [0, 1, 2]


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_a_jax_tracer_is_told_where_to_call(jnp: Any, transform: str) -> None:
    jax = pytest.importorskip("jax")

    def traced(array: Any) -> Any:
        view(array, "q")
        return array.sum()

    with pytest.raises(TypeError, match=r"^q is a JAX tracer.*outside of them, on arrays;"):
        getattr(jax, transform)(traced)(jnp.ones((2, 3)))


# -- anything with __dlpack__ ---------------------------------------------------------------------


def test_an_array_that_only_speaks_dlpack() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    source = Exported(base[::2, 1:])
    seen = view(source, "q")
    assert seen.source is source
    assert seen.library == "dlpack"
    assert isinstance(seen.native, np.ndarray)
    assert seen.pointer == base.ctypes.data + 4  # the same memory: no copy
    assert seen.shape == (2, 5)
    assert seen.strides == (12, 1)
    assert seen.dtype == "float32"
    assert seen.device == CPU
    np.testing.assert_array_equal(seen.native, base[::2, 1:])


def test_results_for_a_dlpack_array_are_its_own_kind_where_it_can_import() -> None:
    array = np.zeros(3, np.float32)
    result = np.ones(2, np.float32)
    assert arrays.from_native(view(Exported(array), "q"), result) is result
    back = arrays.from_native(view(ExportedWithNamespace(array), "q"), result)
    assert isinstance(back, ExportedWithNamespace)
    assert back.array is result


@pytest.mark.parametrize("kind", [4, 7, 8, 10, 13, 14])
def test_dlpack_devices_that_nothing_here_reads(kind: int) -> None:
    with pytest.raises(TypeError, match=rf"^k_cache lives on DLPack device type {kind}; .*\.$"):
        view(OnDevice(kind), "k_cache")


def test_a_gpu_array_without_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match=r"^q is a OnDevice on a GPU.*CuPy is not installed.*cu13"):
        view(OnDevice(2), "q")


class FakeCupy(ModuleType):
    """CuPy as far as an import over DLPack goes, on a machine with four GPUs."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("cupy")
        self.current = [0]
        self.error = error
        self.cuda = SimpleNamespace(Device=self._device)

    def _device(self, index: int) -> Any:
        stack = self.current

        class Entered:
            def __enter__(self) -> None:
                stack.append(index)

            def __exit__(self, *_: object) -> None:
                stack.pop()

        return Entered()

    def from_dlpack(self, array: OnDevice) -> Any:
        if self.error is not None:
            raise self.error
        memory = SimpleNamespace(ptr=0x7000, device_id=self.current[-1])
        return SimpleNamespace(
            data=memory, itemsize=2, shape=(2, 3), strides=(6, 2), dtype=np.dtype("float16")
        )


def test_a_gpu_array_is_imported_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    source = OnDevice(2, 3)
    seen = view(source, "q")
    assert seen.source is source
    assert seen.library == "dlpack"
    assert seen.device == Device("cuda", 3)
    assert seen.pointer == 0x7000
    assert seen.strides == (3, 1)
    assert seen.dtype == "float16"
    assert cupy.current == [0]


def test_an_import_that_fails_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(BufferError("exporter refuses")))
    with pytest.raises(TypeError, match=r"^q could not be taken over DLPack: exporter refuses\.$"):
        view(OnDevice(2), "q")
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(TypeError("bfloat16 is unknown")))
    with pytest.raises(TypeError, match=r"bfloat16 is unknown.*ml_dtypes"):
        view(OnDevice(2), "q")


def test_bfloat16_without_ml_dtypes_over_dlpack(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CuPy 14 says on a GPU, and NumPy on a CPU, with what helps in each case."""
    refusal = NotImplementedError("CuPy does not support bfloat16. Please install ml_dtypes.")
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(refusal))
    with pytest.raises(TypeError) as caught:
        view(OnDevice(2), "k_cache")
    assert str(caught.value) == (
        "k_cache could not be taken over DLPack: CuPy does not support bfloat16. Please install "
        "ml_dtypes. CuPy needs the package ml_dtypes and NumPy >= 2.1.2 for bfloat16."
    )
    with pytest.raises(TypeError) as caught:
        view(Exported(torch.zeros(3, dtype=torch.bfloat16)), "k_cache")
    said = str(caught.value)
    assert said.startswith("k_cache could not be taken over DLPack: ")
    assert said.endswith("or a NumPy array whose dtype is the bfloat16 of the package ml_dtypes.")
    assert ".." not in said


# -- CuPy's own arrays ----------------------------------------------------------------------------


def test_a_cupy_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy needs a GPU; its arrays are recognised by the module of their class."""

    class ndarray(SimpleNamespace):
        pass

    ndarray.__module__ = "cupy"
    array = ndarray(
        data=SimpleNamespace(ptr=0x1000, device_id=1),
        itemsize=4,
        shape=(2, 3),
        strides=(24, 4),
        dtype=np.dtype("float32"),
    )
    seen = view(array, "q")
    assert seen.source is seen.native is array
    assert (seen.library, seen.device) == ("cupy", Device("cuda", 1))
    assert (seen.pointer, seen.strides, seen.dtype) == (0x1000, (6, 1), "float32")
    # An array without memory belongs to no device yet.
    array.data.device_id = -1
    assert view(array, "q").device == Device("cuda", 0)


# -- no array -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, 1.5, "text", [1, 2], (1, 2), object(), np.float32(1)])
def test_what_is_no_array(thing: Any) -> None:
    with pytest.raises(TypeError) as caught:
        view(thing, "block_table")
    assert str(caught.value).startswith("block_table must be an array (torch, CuPy, NumPy, JAX, or")
    assert str(caught.value).endswith(f"but it is {type(thing).__name__}.")


# -- new arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bfloat16"])
def test_empty_makes_numpy_arrays(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for like in (view(np.zeros(1), "q"), view(Exported(np.zeros(1)), "q")):
        made = arrays.empty(like, (2, 3), dtype)
        assert isinstance(made, np.ndarray)
        assert made.shape == (2, 3)
        assert made.flags.c_contiguous
        assert str(made.dtype) == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bfloat16"])
def test_empty_makes_tensors_on_the_same_device(torch: Any, dtype: str) -> None:
    made = arrays.empty(view(torch.zeros(1), "q"), (2, 0, 3), dtype)
    assert tuple(made.shape) == (2, 0, 3)
    assert made.dtype is getattr(torch, dtype)
    assert made.device.type == "cpu"
    assert made.is_contiguous()
    assert arrays.from_native(view(torch.zeros(1), "q"), made) is made


def test_bfloat16_without_ml_dtypes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="pip install ml_dtypes"):
        arrays.empty(view(np.zeros(1), "q"), (1,), "bfloat16")


def test_pointers_of_what_empty_made(torch: Any) -> None:
    tensor = torch.zeros(3)
    assert arrays.pointer(tensor) == tensor.data_ptr()
    assert arrays.pointer(SimpleNamespace(data=SimpleNamespace(ptr=5))) == 5


# -- integers to the host and back ----------------------------------------------------------------


def round_trip(source: Any) -> View:
    like = view(source, "cache_seqlens")
    values = arrays.to_numpy(like)
    assert isinstance(values, np.ndarray)
    assert values.tolist() == [3, 1, 4]
    return view(arrays.from_numpy(like, values + 1), "back")


def test_integers_to_the_host_and_back() -> None:
    numbers = np.array([3, 1, 4], np.int32)
    assert round_trip(numbers).library == "numpy"
    assert round_trip(Exported(numbers)).library == "numpy"
    assert round_trip(ExportedWithNamespace(numbers)).library == "dlpack"


def test_integers_of_torch_to_the_host_and_back(torch: Any) -> None:
    back = round_trip(torch.tensor([3, 1, 4], dtype=torch.int32))
    assert back.library == "torch"
    assert back.dtype == "int32"
    assert back.source.tolist() == [4, 2, 5]


def test_what_is_kept_for_a_stream_is_let_go_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            log.append(self.name)

    kept = {(0, 7): deque([(Event("a"), ()), (Event("b"), ())]), (1, 7): deque([(Event("c"), ())])}
    monkeypatch.setattr(arrays, "_in_flight", kept)
    release()
    assert log == ["a", "b", "c"]
    assert not any(kept.values())
    release()
    assert log == ["a", "b", "c"]
