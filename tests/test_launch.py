"""Loading and launching without a GPU: what the driver is told, by a driver that only listens."""

from __future__ import annotations

import ctypes
import enum
import gc
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flashmla_rtc.rtc import kernel, launch, tensor_map
from flashmla_rtc.rtc.compiler import CompiledKernel
from flashmla_rtc.rtc.kernel import DriverError, KernelTable, LoadedKernel, call, on_device
from flashmla_rtc.rtc.launch import Launcher
from flashmla_rtc.rtc.params import ParamStruct

PARAMS = ParamStruct("Params", (("int", "count"), ("const int*", "data"), ("TensorMap", "map")))
CUBIN = CompiledKernel("kernel_a", "entry", b"\x7fELF a", 32, 0, 0, 0.1, "")


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NO_DEVICE = 100


class Capture(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class Record(SimpleNamespace):
    """A struct of the driver's, with whatever fields are set."""


class AttributeValue(Record):
    """A union, one of whose members is a struct."""

    def __init__(self) -> None:
        super().__init__(clusterDim=Record())


class Driver:
    """The parts of ``cuda.bindings.driver`` that are used.

    calls: what was asked, in order. results: other answers than the usual, by function.
    """

    CUresult = CUresult
    CUstreamCaptureMode = Capture
    CUlaunchAttribute = CUlaunchConfig = Record
    CUlaunchAttributeValue = AttributeValue
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="serialization",
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster",
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max_dynamic_shared"
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="sms",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK="reserved",
    )

    def __init__(self, **results: Callable[..., tuple[Any, ...]]) -> None:
        self.results = results
        self.calls: list[tuple[Any, ...]] = []
        self.contexts = [0]  # the stack of current contexts
        self.capture = Capture.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.launches: list[tuple[Record, Any, bytes]] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.results.get(name) or getattr(self, f"_{name}", None)
            return answer(*arguments) if answer else (CUresult.CUDA_SUCCESS,)

        return function

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def CUstream(self, handle: int) -> tuple[str, int]:
        return ("stream", handle)

    def _cuGetErrorString(self, status: CUresult) -> tuple[Any, ...]:
        if not isinstance(status, CUresult):
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        return CUresult.CUDA_SUCCESS, {1: b"invalid argument", 100: b"no device"}[status]

    def _cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, index + 10

    def _cuDeviceGetName(self, size: int, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, b"NVIDIA H100\0".ljust(size)  # as the bindings give it

    def _cuDeviceGetAttribute(self, name: str, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, {"sms": 132, "major": 9, "minor": 0, "reserved": 1024}[name]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, device + 100

    def _cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.contexts[-1]

    def _cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.contexts.append(context)
        return (CUresult.CUDA_SUCCESS,)

    def _cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.contexts.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode: Capture) -> tuple[Any, ...]:
        before, self.capture = self.capture, mode
        return CUresult.CUDA_SUCCESS, before

    def _cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        self.loaded_in = (self.contexts[-1], self.capture)
        return CUresult.CUDA_SUCCESS, ("module", cubin)

    def _cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, ("function", module[1], name)

    def _cuLaunchKernelEx(
        self, config: Record, function: Any, pointers: int, extra: int
    ) -> tuple[Any, ...]:
        # The driver copies the parameters before it returns; so does this one.
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        self.launches.append((config, function, ctypes.string_at(address, PARAMS.size)))
        return (CUresult.CUDA_SUCCESS,)


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    for module in (kernel, launch, tensor_map):
        monkeypatch.setattr(module, "driver", lambda: driver)
    return driver


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test sees another's devices."""
    remembered = (kernel.device_facts, kernel.primary_context, kernel.driver)
    for cache in remembered:
        cache.cache_clear()
    yield
    for cache in remembered:
        cache.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return install(monkeypatch, Driver())


def refuse(status: Any) -> Callable[..., tuple[Any, ...]]:
    return lambda *arguments: (status,)


# -- the driver itself ----------------------------------------------------------------------------


def bindings(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Put ``module`` where cuda.bindings.driver is imported from."""
    package: Any = ModuleType("cuda.bindings")
    package.driver = module
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)


def test_the_driver_is_initialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Driver()
    bindings(monkeypatch, module)
    assert kernel.driver() is module
    assert kernel.driver() is module
    assert module.calls == [("cuInit", 0)]


def test_without_cuda_bindings_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DriverError, match=r"needs cuda-bindings.*flashmla_rtc\[cu13\]"):
        kernel.driver()


def test_a_driver_library_that_is_absent_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(flags: int) -> tuple[Any, ...]:
        raise RuntimeError("Failed to dlopen libcuda.so.1\nand a long story")

    bindings(monkeypatch, Driver(cuInit=absent))
    with pytest.raises(DriverError) as caught:
        kernel.driver()
    assert "Failed to dlopen libcuda.so.1" in str(caught.value)
    assert "long story" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_driver_without_a_device_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch, Driver(cuInit=refuse(CUresult.CUDA_ERROR_NO_DEVICE)))
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(DriverError, match="cuInit failed: CUDA_ERROR_NO_DEVICE, no device"):
            kernel.driver()


# -- calls ----------------------------------------------------------------------------------------


def test_results_come_alone_or_as_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(cuOne=lambda: (0, 7), cuTwo=lambda: (0, 7, 8), cuNone=lambda: (0,)))
    assert call("cuOne") == 7
    assert call("cuTwo") == (7, 8)
    assert call("cuNone") == ()


def test_a_refusal_names_the_call_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(cuMemAlloc=refuse(CUresult.CUDA_ERROR_INVALID_VALUE)))
    with pytest.raises(DriverError) as caught:
        call("cuMemAlloc", 5)
    assert str(caught.value) == "cuMemAlloc failed: CUDA_ERROR_INVALID_VALUE, invalid argument."


def test_a_status_that_the_driver_cannot_explain_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(cuMemAlloc=refuse(98765)))
    with pytest.raises(DriverError, match="cuMemAlloc failed: 98765"):
        call("cuMemAlloc", 5)


def test_facts_of_a_device_are_asked_once(driver: Driver) -> None:
    facts = kernel.device_facts(1)
    assert facts == kernel.DeviceFacts(1, "NVIDIA H100", 132, (9, 0), 1024)
    asked = len(driver.calls)
    assert kernel.device_facts(1) is facts
    assert len(driver.calls) == asked
    assert ("cuDeviceGet", 1) in driver.calls


# -- the current device ---------------------------------------------------------------------------


def test_another_device_is_current_for_a_while(driver: Driver) -> None:
    with on_device(2):
        assert driver.contexts == [0, 112]
        with on_device(3):
            assert driver.contexts == [0, 112, 113]
        assert driver.contexts == [0, 112]
    assert driver.contexts == [0]


def test_the_current_device_is_left_in_place(driver: Driver) -> None:
    driver.contexts = [112]
    with on_device(2):
        assert driver.contexts == [112]
    assert driver.contexts == [112]
    assert "cuCtxPushCurrent" not in driver.names()


def test_the_device_is_restored_after_an_error(driver: Driver) -> None:
    with suppress(ZeroDivisionError), on_device(2):
        raise ZeroDivisionError
    assert driver.contexts == [0]


def test_contexts_are_the_primary_ones_retained_once(driver: Driver) -> None:
    for _ in range(3):
        with on_device(2):
            pass
    assert driver.names().count("cuDevicePrimaryCtxRetain") == 1


def test_capture_is_relaxed_for_a_while(driver: Driver) -> None:
    with suppress(ZeroDivisionError), kernel.allowed_while_capturing():
        assert driver.capture is Capture.CU_STREAM_CAPTURE_MODE_RELAXED
        raise ZeroDivisionError
    assert driver.capture is Capture.CU_STREAM_CAPTURE_MODE_GLOBAL


# -- loading --------------------------------------------------------------------------------------


def test_a_cubin_is_loaded_on_its_device_even_while_capturing(driver: Driver) -> None:
    loaded = LoadedKernel(CUBIN, 1, 0)
    assert driver.loaded_in == (111, Capture.CU_STREAM_CAPTURE_MODE_RELAXED)
    assert driver.contexts == [0]
    assert loaded.handle == ("function", CUBIN.cubin, b"entry")
    assert (loaded.name, loaded.device, loaded.dynamic_smem_bytes) == ("kernel_a", 1, 0)
    assert "cuFuncSetAttribute" not in driver.names()


def test_shared_memory_is_asked_for_once_when_loading(driver: Driver) -> None:
    loaded = LoadedKernel(CUBIN, 0, 231424)
    asked = [arguments for name, *arguments in driver.calls if name == "cuFuncSetAttribute"]
    assert asked == [[loaded.handle, "max_dynamic_shared", 231424]]


def test_a_cubin_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(cuModuleLoadData=refuse(CUresult.CUDA_ERROR_INVALID_VALUE))
    install(monkeypatch, driver)
    with pytest.raises(DriverError, match="cuModuleLoadData failed"):
        LoadedKernel(CUBIN, 0, 0)
    assert driver.contexts == [0]


def test_the_table_loads_each_kernel_once_a_device(driver: Driver) -> None:
    table = KernelTable()
    assert table.get("kernel_a", 0) is None
    first = table.load(CUBIN, 0, 0)
    assert table.load(CUBIN, 0, 0) is first
    assert table.get("kernel_a", 0) is first
    assert table.load(CUBIN, 1, 0) is not first
    assert driver.names().count("cuModuleLoadData") == 2


def test_threads_that_race_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(cubin: bytes) -> tuple[Any, ...]:
        time.sleep(0.05)
        return CUresult.CUDA_SUCCESS, ("module", cubin)

    driver = install(monkeypatch, Driver(cuModuleLoadData=slow))
    table, found = KernelTable(), []
    threads = [
        threading.Thread(target=lambda: found.append(table.load(CUBIN, 0, 0))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(map(id, found))) == 1
    assert driver.names().count("cuModuleLoadData") == 1


# -- launching ------------------------------------------------------------------------------------


def launcher(driver: Driver, smem: int = 1024) -> Launcher:
    return Launcher(LoadedKernel(CUBIN, 0, smem), PARAMS, 384)


def values(count: int = 3) -> dict[str, Any]:
    return {"count": count, "data": 0xABC0, "map": bytes([count]) * 128}


def packed(count: int = 3) -> bytes:
    buffer = bytearray(PARAMS.size)
    PARAMS.pack_into(buffer, values(count))
    return bytes(buffer)


def test_a_launch_tells_the_driver_everything(driver: Driver) -> None:
    launcher(driver).launch((2, 3, 4), 0x55, values())
    ((config, function, parameters),) = driver.launches
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (2, 3, 4)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (384, 1, 1)
    assert config.sharedMemBytes == 1024
    assert config.hStream == ("stream", 0x55)
    assert function == ("function", CUBIN.cubin, b"entry")
    assert parameters == packed()
    assert struct.unpack_from("<i", parameters) == (3,)


def test_every_launch_may_overlap_the_end_of_the_one_before(driver: Driver) -> None:
    launcher(driver).launch((1, 1, 1), 0, values())
    ((config, _, _),) = driver.launches
    (attribute,) = config.attrs
    assert config.numAttrs == 1
    assert attribute.id == "serialization"
    assert attribute.value.programmaticStreamSerializationAllowed == 1


@pytest.mark.parametrize("blocks, clustered", [(1, False), (2, True), (3, False), (4, True)])
def test_neighbours_form_clusters_where_they_divide_the_grid(
    driver: Driver, blocks: int, clustered: bool
) -> None:
    paired = Launcher(LoadedKernel(CUBIN, 0, 1024), PARAMS, 384, cluster=2)
    paired.launch((blocks, 1, 5), 0, values())
    ((config, _, _),) = driver.launches
    dims = [a.value.clusterDim for a in config.attrs if a.id == "cluster"]
    assert [(d.x, d.y, d.z) for d in dims] == [(2, 1, 1)] * clustered
    assert config.numAttrs == len(config.attrs) == 1 + clustered


def test_parameters_are_those_of_the_call(driver: Driver) -> None:
    kernel_a = launcher(driver)
    for count in (1, 2, 3):
        kernel_a.launch((1, 1, 1), 0, values(count))
    assert [parameters for *_, parameters in driver.launches] == [packed(1), packed(2), packed(3)]


def test_a_launch_like_the_last_makes_no_new_config(driver: Driver) -> None:
    kernel_a = launcher(driver)
    for grid, stream in [((1, 1, 1), 0), ((1, 1, 1), 7), ((1, 1, 1), 0), ((2, 1, 1), 0)]:
        kernel_a.launch(grid, stream, values())
    configs = [config for config, *_ in driver.launches]
    assert configs[0] is configs[2]
    assert len(set(map(id, configs))) == 3


def test_what_is_remembered_of_launches_does_not_grow_without_end(driver: Driver) -> None:
    kernel_a = launcher(driver)
    for stream in range(1000):
        kernel_a.launch((1, 1, 1), stream, values())
    assert len(kernel_a._local.configs) <= 257
    assert [config.hStream[1] for config, *_ in driver.launches] == list(range(1000))


def test_threads_do_not_share_a_buffer(driver: Driver) -> None:
    kernel_a = launcher(driver)
    start = threading.Barrier(8)

    def work(count: int) -> None:
        start.wait()
        for _ in range(200):
            kernel_a.launch((1, 1, 1), count, values(count))

    threads = [threading.Thread(target=work, args=(count,)) for count in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 8 * 200
    for config, _, parameters in driver.launches:
        assert parameters == packed(config.hStream[1])


def test_a_launch_that_fails_names_the_kernel_and_its_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(cuLaunchKernelEx=refuse(CUresult.CUDA_ERROR_INVALID_VALUE))
    install(monkeypatch, driver)
    with pytest.raises(DriverError) as caught:
        launcher(driver).launch((0, 1, 1), 0, values())
    for words in ("kernel_a", "(0, 1, 1)", "invalid argument"):
        assert words in str(caught.value)


def test_a_launch_is_made_again_with_what_the_buffer_holds_then(driver: Driver) -> None:
    kernel_a = launcher(driver)
    buffer = kernel_a.pack(values(1))
    again = kernel_a.again((2, 3, 4), 0x55, buffer)
    assert driver.launches == []
    assert again()[0] == 0
    PARAMS.pack_into(buffer, values(2))
    del buffer
    gc.collect()  # the launch keeps what it points at
    assert again()[0] == 0
    kernel_a.launch((2, 3, 4), 0x55, values(3))
    configs, functions, parameters = zip(*driver.launches, strict=True)
    assert parameters == (packed(1), packed(2), packed(3))
    assert configs[0] is configs[1] is configs[2]
    assert len(set(functions)) == 1


def test_a_launch_that_is_made_again_and_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(cuLaunchKernelEx=refuse(CUresult.CUDA_ERROR_INVALID_VALUE))
    install(monkeypatch, driver)
    kernel_a = launcher(driver)
    again = kernel_a.again((1, 1, 1), 0, kernel_a.pack(values()))
    assert again()[0] == CUresult.CUDA_ERROR_INVALID_VALUE
    assert driver.launches == []


def test_nothing_is_launched_with_a_parameter_missing(driver: Driver) -> None:
    incomplete = values()
    del incomplete["data"]
    with pytest.raises(KeyError, match="data"):
        launcher(driver).launch((1, 1, 1), 0, incomplete)
    assert driver.launches == []


# -- tensor maps ----------------------------------------------------------------------------------


def test_a_tensor_map_is_encoded_once_for_each_description(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = [ctypes.create_string_buffer(bytes([i]) * 128, 128) for i in range(8)]
    made: list[tuple[Any, ...]] = []

    def encode(*arguments: Any) -> tuple[Any, ...]:
        address = ctypes.addressof(memory[len(made)])
        made.append(arguments)
        return CUresult.CUDA_SUCCESS, SimpleNamespace(getPtr=lambda: address)

    driver: Any = install(monkeypatch, Driver(cuTensorMapEncodeTiled=encode))
    everything = SimpleNamespace
    driver.cuuint64_t = driver.cuuint32_t = int
    driver.CUtensorMapDataType = everything(
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16="bf16", CU_TENSOR_MAP_DATA_TYPE_FLOAT16="fp16"
    )
    driver.CUtensorMapInterleave = everything(CU_TENSOR_MAP_INTERLEAVE_NONE="plain")
    driver.CUtensorMapSwizzle = everything(CU_TENSOR_MAP_SWIZZLE_128B="swizzle")
    driver.CUtensorMapL2promotion = everything(CU_TENSOR_MAP_L2_PROMOTION_L2_128B="promotion")
    driver.CUtensorMapFloatOOBfill = everything(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE="zeros")

    tensor_map.tiled_map.cache_clear()
    try:
        description = (0x1000, "bfloat16", (576, 64, 1, 9), (1152, 1152, 73728), (64, 64, 1, 1))
        first = tensor_map.tiled_map(*description)
        assert first == bytes(128)
        assert tensor_map.tiled_map(*description) is first
        assert len(made) == 1
        assert made[0] == (
            "bf16", 4, 0x1000, [576, 64, 1, 9], [1152, 1152, 73728], [64, 64, 1, 1], [1, 1, 1, 1],
            "plain", "swizzle", "promotion", "zeros",
        )  # fmt: skip
        other = tensor_map.tiled_map(0x2000, "float16", *description[2:])
        assert other == b"\1" * 128
        assert made[1][0] == "fp16"
    finally:
        tensor_map.tiled_map.cache_clear()
