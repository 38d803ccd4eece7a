"""Parameter structs: the bytes that Python packs are the struct that the kernels see."""

from __future__ import annotations

import struct

import pytest

from flashmla_rtc import geometry
from flashmla_rtc.rtc.params import ParamStruct

STRUCTS = [geometry.DECODE_PARAMS, geometry.SCHEDULE_PARAMS]
TENSOR_MAP = bytes(range(128))

# Every kind, in an order that needs padding before most of them and at the end.
MIXED = ParamStruct(
    "Mixed",
    (
        ("int", "a"),
        ("TensorMap", "map"),
        ("float", "b"),
        ("const u16*", "p"),
        ("int", "c"),
        ("i64", "d"),
        ("int", "e"),
    ),
)
MIXED_OFFSETS = {"a": 0, "map": 64, "b": 192, "p": 200, "c": 208, "d": 216, "e": 224}


def distinct_values(params: ParamStruct) -> dict[str, object]:
    """A value for each field that no other field has, and whose bytes are not 0."""
    values: dict[str, object] = {}
    for number, (kind, name) in enumerate(params.fields, start=1):
        if kind == "TensorMap":
            values[name] = bytes([number]) * 128
        elif kind == "float":
            values[name] = float(number)
        elif kind == "int":
            values[name] = 0x01010101 * number
        else:
            values[name] = 0x0101010101010101 * number
    return values


def offsets(params: ParamStruct) -> dict[str, int]:
    """Where each field begins, read off what ``pack_into`` writes."""
    values = distinct_values(params)
    found = {}
    for kind, name in params.fields:
        buffer = bytearray(params.size)
        params.pack_into(buffer, {**dict.fromkeys(values, 0), **_zero_maps(params)})
        blank = bytes(buffer)
        params.pack_into(
            buffer, {**dict.fromkeys(values, 0), **_zero_maps(params), name: values[name]}
        )
        changed = [i for i, (x, y) in enumerate(zip(blank, buffer, strict=True)) if x != y]
        # The low bytes of a float are 0; a float is 4 bytes, aligned to 4.
        found[name] = changed[0] // 4 * 4 if kind == "float" else changed[0]
    return found


def _zero_maps(params: ParamStruct) -> dict[str, bytes]:
    return {name: bytes(128) for kind, name in params.fields if kind == "TensorMap"}


def test_fields_are_aligned_as_in_cpp() -> None:
    assert offsets(MIXED) == MIXED_OFFSETS
    assert MIXED.size == 256  # a multiple of the tensor map's alignment


def test_the_bytes_are_the_values() -> None:
    buffer = bytearray(b"\xff" * MIXED.size)
    values = {
        "a": -1,
        "map": TENSOR_MAP,
        "b": 0.5,
        "p": 2**64 - 16,
        "c": 7,
        "d": -(2**40),
        "e": 2**31 - 1,
    }
    MIXED.pack_into(buffer, values)
    assert struct.unpack_from("<i", buffer, 0) == (-1,)
    assert bytes(buffer[64:192]) == TENSOR_MAP
    assert struct.unpack_from("<f", buffer, 192) == (0.5,)
    assert struct.unpack_from("<Q", buffer, 200) == (2**64 - 16,)
    assert struct.unpack_from("<i", buffer, 208) == (7,)
    assert struct.unpack_from("<q", buffer, 216) == (-(2**40),)
    assert struct.unpack_from("<i", buffer, 224) == (2**31 - 1,)


def test_order_of_the_values_does_not_matter() -> None:
    values = distinct_values(MIXED)
    buffers = [bytearray(MIXED.size), bytearray(MIXED.size)]
    MIXED.pack_into(buffers[0], values)
    MIXED.pack_into(buffers[1], dict(reversed(values.items())))
    assert buffers[0] == buffers[1]


def test_padding_is_zero() -> None:
    """So that equal parameters are equal bytes."""
    buffer = bytearray(b"\xff" * MIXED.size)
    MIXED.pack_into(buffer, {**dict.fromkeys(MIXED_OFFSETS, 0), "map": bytes(128)})
    assert bytes(buffer) == bytes(MIXED.size)


def test_bools_are_ints_of_0_and_1() -> None:
    flags = ParamStruct("Flags", (("int", "yes"), ("int", "no")))
    buffer = bytearray(flags.size)
    flags.pack_into(buffer, {"yes": True, "no": False})
    assert bytes(buffer) == b"\1\0\0\0\0\0\0\0"


def test_the_cpp_struct_names_every_field_in_order() -> None:
    lines = [line.strip() for line in MIXED.cpp().splitlines()]
    assert lines[:2] == ["struct Mixed {", "int a;"]
    assert lines[2:8] == [
        "TensorMap map;", "float b;", "const u16* p;", "int c;", "i64 d;", "int e;",
    ]  # fmt: skip
    assert lines[8] == "};"
    assert lines[9].startswith("static_assert(sizeof(Mixed) == 256")


def test_a_missing_field_is_named() -> None:
    values = distinct_values(MIXED)
    del values["c"]
    with pytest.raises(KeyError, match="c"):
        MIXED.pack_into(bytearray(MIXED.size), values)


def test_a_field_too_many_is_named() -> None:
    values = {**distinct_values(MIXED), "stride": 1}
    with pytest.raises(TypeError, match=r"Mixed has no field stride\."):
        MIXED.pack_into(bytearray(MIXED.size), values)


def test_a_misspelt_field_is_not_packed() -> None:
    values = distinct_values(MIXED)
    values["cc"] = values.pop("c")
    with pytest.raises(KeyError, match="c"):
        MIXED.pack_into(bytearray(MIXED.size), values)


def test_a_value_that_does_not_fit_is_an_error() -> None:
    for name, value in (("a", 2**31), ("d", 2**63), ("p", -1)):
        with pytest.raises(struct.error):
            MIXED.pack_into(bytearray(MIXED.size), {**distinct_values(MIXED), name: value})


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError, match="double"):
        ParamStruct("Bad", (("double", "x"),))


@pytest.mark.parametrize("params", STRUCTS, ids=lambda params: params.name)
def test_names_are_unique_and_parameters_are_small(params: ParamStruct) -> None:
    names = [name for _, name in params.fields]
    assert len(set(names)) == len(names)
    assert params.size <= 4096  # what every driver takes


@pytest.mark.parametrize("params", [MIXED, *STRUCTS], ids=lambda params: params.name)
def test_the_compiler_lays_the_struct_out_the_same(params: ParamStruct) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    from flashmla_rtc import variants
    from flashmla_rtc.rtc import CompileError, KernelSource, compile_kernel

    headers = variants.default_variants()[0].source().headers
    places = offsets(params)

    def offset(name: str) -> str:
        # What the offsetof of <stddef.h> stands for in NVRTC's front end, which has no such header.
        return f"__INTADDR__(&(({params.name}*)0)->{name})"

    def unit(name: str, checks: list[str]) -> KernelSource:
        lines = ['#include "ptx/tma.cuh"', params.cpp(), *checks]
        lines.append('extern "C" __global__ void empty() {}')
        return KernelSource(name, "empty", "\n".join(lines), headers)

    checks = [
        f'static_assert({offset(name)} == {place}, "{name}");' for name, place in places.items()
    ]
    compile_kernel(unit("layout", checks))

    # The check is a real one: a wrong offset, or a wrong size, does not compile.
    name, place = next(reversed(places.items()))
    wrong = f'static_assert({offset(name)} == {place + 4}, "moved");'
    with pytest.raises(CompileError, match="moved"):
        compile_kernel(unit("layout", [wrong]))
    size = f"sizeof({params.name}) == {params.size}"
    source = unit("layout", [])
    assert size in source.source
    text = source.source.replace(size, f"{size} + 64")
    with pytest.raises(CompileError, match="the host packs"):
        compile_kernel(KernelSource("layout", "empty", text, headers))
