"""Compiling with NVRTC: what comes out, what is refused, and what an error shows."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")

from flashmla_rtc.rtc import compiler
from flashmla_rtc.rtc.compiler import (
    CompileError,
    CompilerMissing,
    KernelSource,
    compile_kernel,
    nvrtc_version,
)

SHARED = """
extern "C" __global__ void shift(int* p) {
    __shared__ int tile[64];
    tile[threadIdx.x & 63] = p[threadIdx.x];
    __syncthreads();
    p[threadIdx.x] = tile[(threadIdx.x + 1) & 63];
}
"""

# 64 values live over a barrier with at most 32 registers a thread.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
    float a[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) p[(63 - i) * 1024 + threadIdx.x] = a[i];
}
"""

# Without launch bounds the register count at entry is unknown, so setmaxnreg can't be honoured.
SETMAXNREG = """
extern "C" __global__ void BOUNDS grows(float* p) {
    if (threadIdx.x < 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    p[threadIdx.x] = 1;
}
"""

# TOUCH reads an accumulator between two wgmma of one group, which forces them apart.
WGMMA = """
__device__ __forceinline__ void wgmma(float (&d)[4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
extern "C" __global__ void __launch_bounds__(128) multiply(float* p, unsigned long long a) {
    float d[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    wgmma(d, a, a);
    TOUCH
    wgmma(d, a, a + 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; ++i) p[threadIdx.x * 4 + i] = d[i];
}
"""


def failure(*args, **kwargs) -> str:
    with pytest.raises(CompileError) as caught:
        compile_kernel(KernelSource(*args, **kwargs))
    return str(caught.value)


def test_a_kernel_compiles_to_a_cubin_and_its_figures():
    kernel = compile_kernel(KernelSource("shift_by_one", "shift", SHARED))
    assert kernel.cubin.startswith(b"\x7fELF")
    assert b"shift" in kernel.cubin
    assert (kernel.name, kernel.entry) == ("shift_by_one", "shift")
    assert 4 <= kernel.registers <= 64
    assert kernel.smem_bytes == 64 * 4
    assert kernel.spill_bytes == 0
    assert kernel.stack_bytes == 0
    assert 0 < kernel.compile_seconds < 60
    assert "bytes smem" in kernel.log


def test_figures_are_those_of_the_entry_and_not_of_another_kernel_in_the_unit():
    other = (
        'extern "C" __global__ void other(int* p) { __shared__ int t[999]; t[*p] = 1; *p = t[0]; }'
    )
    for source in (SHARED + other, other + SHARED):
        assert compile_kernel(KernelSource("two", "shift", source)).smem_bytes == 64 * 4


def test_headers_come_from_memory_by_their_full_name():
    headers = {
        "math/add.cuh": '#pragma once\n#include "math/one.cuh"\n'
        "__device__ int add(int x) { return x + ONE; }\n",
        "math/one.cuh": "#pragma once\nconstexpr int ONE = 1;\n",
    }
    source = '#include "math/add.cuh"\nextern "C" __global__ void k(int* p) { *p = add(*p); }'
    assert compile_kernel(KernelSource("k", "k", source, headers)).cubin


def test_a_stack_frame_is_reported():
    source = """
    extern "C" __global__ void k(int* p) {
        int table[32];
        for (int i = 0; i < 32; ++i) table[p[i] & 31] = i;
        p[0] = table[p[1] & 31];
    }
    """
    assert compile_kernel(KernelSource("k", "k", source)).stack_bytes >= 32 * 4


def test_extra_options_reach_the_compiler():
    source = 'extern "C" __global__ void k(int* p) { *p = WORTH; }'
    assert compile_kernel(KernelSource("k", "k", source, options=("-DWORTH=3",))).cubin
    assert "unrecognized option --bogus" in failure("k", "k", source, options=("--bogus",))


def test_compiles_in_several_threads():
    kernels = []

    def build(number: int) -> None:
        kernels.append(compile_kernel(KernelSource(f"k{number}", "shift", SHARED)))

    threads = [threading.Thread(target=build, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kernel.name for kernel in kernels) == ["k0", "k1", "k2", "k3"]
    assert len({kernel.registers for kernel in kernels}) == 1


# --- Refused although it compiles ----------------------------------------------------------------


def test_a_spill_is_refused():
    text = failure("spilling", "spills", SPILLS)
    assert "spilling" in text
    assert "spills registers" in text
    assert "at 32 registers" in text


def test_a_spill_in_a_function_that_the_entry_calls_is_refused():
    helper = SPILLS.replace('extern "C" __global__ void', "__device__ __noinline__ void").replace(
        "__launch_bounds__(1024, 2)", ""
    )
    entry = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) entry(float* p) '
        "{ spills(p); spills(p + 7); }"
    )
    assert "spills registers" in failure("spilling", "entry", helper + entry)


def test_an_ignored_setmaxnreg_is_refused():
    text = failure("growing", "grows", SETMAXNREG.replace("BOUNDS", ""))
    assert "C7508" in text
    assert "'setmaxnreg' ignored" in text


def test_a_setmaxnreg_that_is_honoured_passes():
    source = SETMAXNREG.replace("BOUNDS", "__launch_bounds__(256, 1)")
    kernel = compile_kernel(KernelSource("growing", "grows", source))
    assert "setmaxnreg" not in kernel.log


def test_serialised_wgmma_is_refused():
    text = failure("serial", "multiply", WGMMA.replace("TOUCH", "d[0] += p[3];"))
    assert "wgmma.mma_async instructions are serialized" in text


def test_pipelined_wgmma_passes():
    kernel = compile_kernel(KernelSource("pipelined", "multiply", WGMMA.replace("TOUCH", "")))
    assert "serialized" not in kernel.log


@pytest.mark.parametrize("code", ["C7506", "C7508", "C7509", "C7510", "C7514"])
def test_every_code_of_a_performance_loss_is_refused(code):
    """ptxas has a code per cause; sources that provoke each change with its version."""
    log = (
        f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to the presence of Extern calls in the function 'k'\n"
    )
    usage = compiler._Usage(registers=168, spill_bytes=0, smem_bytes=0, stack_bytes=0)
    with pytest.raises(CompileError, match=code):
        compiler._refuse_slow_code(KernelSource("k", "k", ""), "sm_90a", usage, log)


def test_a_wait_that_ptxas_put_in_is_refused():
    """In a branch that some warps take, it would make the warps of a warpgroup disagree."""
    log = (
        "ptxas info    : (C7517) warpgroup.wait is injected in around line 1 by compiler to allow "
        "use of registers defined by GMMA in function 'k'\n"
    )
    usage = compiler._Usage(registers=168, spill_bytes=0, smem_bytes=0, stack_bytes=0)
    with pytest.raises(CompileError, match="C7517"):
        compiler._refuse_slow_code(KernelSource("k", "k", ""), "sm_90a", usage, log)
    arrive = log.replace("C7517", "C7519").replace("wait", "arrive")  # this one costs nothing
    compiler._refuse_slow_code(KernelSource("k", "k", ""), "sm_90a", usage, arrive)


def test_an_entry_that_does_not_exist_is_named_with_those_that_do():
    text = failure("k", "shfit", SHARED)
    assert "named shfit; it defines shift" in text


def test_a_log_without_figures_is_refused_because_it_can_not_be_checked():
    log = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
    with pytest.raises(CompileError, match="can't be checked"):
        compiler._read_usage(KernelSource("k", "k", ""), log)


# --- Errors show where ---------------------------------------------------------------------------


def test_an_error_in_the_main_file_shows_its_numbered_line():
    source = "// one\n// two\n" + SHARED.replace("p[threadIdx.x] =", "q[threadIdx.x] =")
    text = failure("broken", "shift", source)
    assert "did not compile for sm_90a with NVRTC" in text
    assert 'broken.cu(8): error: identifier "q" is undefined' in text
    assert "\n> 8 |     q[threadIdx.x] = tile" in text
    assert "\n  7 |     __syncthreads();" in text


def test_an_error_in_a_header_shows_its_numbered_line():
    headers = {
        "deep/one.cuh": '#pragma once\n#include "deep/two.cuh"\n',
        "deep/two.cuh": "#pragma once\n\n__device__ int two(int x) {\n    return y + x;\n}\n",
    }
    source = '#include "deep/one.cuh"\nextern "C" __global__ void k(int* p) { *p = two(*p); }'
    text = failure("k", "k", source, headers)
    assert "deep/two.cuh(4): error" in text
    assert "\ndeep/two.cuh:4\n" in text
    assert "\n> 4 |     return y + x;" in text


def test_errors_in_header_and_main_file_show_both():
    headers = {"bad.cuh": "__device__ int two(int x) { return y + x; }\n"}
    source = '#include "bad.cuh"\n\nextern "C" __global__ void k(int* p) { *p = two(*p) }'
    text = failure("k", "k", source, headers)
    assert "\nbad.cuh:1\n> 1 |" in text
    assert "\nk.cu:3\n" in text


def test_a_failed_static_assert_shows_where_the_template_was_used():
    source = """template <int N> struct Tile { static_assert(N % 64 == 0, "N is whole boxes"); };

    extern "C" __global__ void k(int* p) {
        Tile<63> tile;
        *p = sizeof(tile);
    }
    """
    text = failure("k", "k", source)
    assert "N is whole boxes" in text
    assert "\n> 1 | template <int N>" in text
    assert "\n> 4 |         Tile<63> tile;" in text


@pytest.mark.parametrize("options", [(), ("-lineinfo",)])
def test_an_error_in_inline_assembly_shows_the_ptx_and_the_source_line(options):
    headers = {
        "op.cuh": "#pragma once\n__device__ __forceinline__ void op(float* p) {\n    p[0] = 1;\n"
        '    asm volatile("bogus.f32 %0, %0;" :: "f"(p[1]));\n}\n'
    }
    source = '#include "op.cuh"\n\n\nextern "C" __global__ void k(float* p) {\n    op(p);\n}\n'
    text = failure("k", "k", source, headers, options)
    assert "Not a name of any known instruction: 'bogus'" in text
    assert [line for line in text.splitlines() if line.startswith("> ") and "\tbogus.f32" in line]
    assert "\nop.cuh:4\n" in text
    assert '\n> 4 |     asm volatile("bogus' in text


def test_a_header_missing_from_memory_is_not_taken_from_the_working_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "stray.cuh").write_text("#define STRAY 1\n")
    monkeypatch.chdir(tmp_path)
    source = '\n#  include "stray.cuh"\nextern "C" __global__ void k(int* p) { *p = STRAY; }'
    text = failure("k", "k", source, {"known.cuh": ""})
    assert "includes 'stray.cuh', which is none of its headers (known.cuh)" in text
    assert '\n> 2 | #  include "stray.cuh"' in text
    # and one in memory wins over one on disk
    headers = {"stray.cuh": "#define STRAY 2\n#define FROM_MEMORY 1\n"}
    guarded = source + "\n#ifndef FROM_MEMORY\n#error from disk\n#endif\n"
    assert compile_kernel(KernelSource("k", "k", guarded, headers)).cubin


# --- No compiler ---------------------------------------------------------------------------------


@pytest.fixture
def forgotten_version():
    nvrtc_version.cache_clear()
    yield
    nvrtc_version.cache_clear()


def test_the_version_is_one_that_is_supported():
    assert nvrtc_version() >= (12, 9)


def test_without_cuda_bindings_one_sentence_says_what_to_install(forgotten_version, monkeypatch):
    def refuse(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(CompilerMissing) as caught:
        compile_kernel(KernelSource("k", "shift", SHARED))
    text = str(caught.value)
    assert "needs cuda-bindings" in text
    assert "pip install 'flashmla_rtc[cu13]'" in text
    assert "flashmla_rtc[cu12]" in text
    assert "\n" not in text


def test_without_the_nvrtc_library_one_sentence_says_what_to_install(
    forgotten_version, monkeypatch
):
    def fail():
        raise RuntimeError("libnvrtc.so.13 not found\nsearched: a long list")

    monkeypatch.setattr(compiler, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=fail))
    with pytest.raises(CompilerMissing) as caught:
        nvrtc_version()
    text = str(caught.value)
    assert "libnvrtc.so.13 not found" in text
    assert "flashmla_rtc[cu13]" in text
    assert "\n" not in text


def test_an_old_nvrtc_is_mentioned_when_a_compile_fails(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 4))
    text = failure("k", "k", "nonsense")
    assert "NVRTC 12.4" in text
    assert "older than 12.9" in text
