// wgmma: a warpgroup's asynchronous matrix product, D[64 x n] += A[64 x 16] * B[16 x n] with float32 accumulators.
// PTX ISA: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// A comes from shared memory (suffix _ss) or registers (_rs); B always from shared memory. Operands in shared memory
// are named by descriptors. Every tile here is made of boxes as the copy engine's 128-byte swizzle leaves them: 64 rows
// of 64 elements, 8,192 bytes, 1,024-byte aligned; the 16-byte chunk c of row r lies at r * 128 + ((c ^ (r % 8)) * 16).
#pragma once
#include "ptx/types.cuh"

constexpr int BOX_ROWS = 64;
constexpr int BOX_COLUMNS = 64;
constexpr int BOX_BYTES = BOX_ROWS * BOX_COLUMNS * 2;

// Byte offset of the 16-byte chunk `chunk` of row `row` inside a box.
__device__ __forceinline__ u32 box_offset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Descriptor of a swizzled tile at `address`. 8 rows of a box are 1,024 bytes apart (SBO); LBO, the distance from box
// to box, matters only where an operand spans several boxes along its contiguous dimension.
__device__ constexpr u64 swizzled_descriptor(u32 address, u32 leading_bytes = BOX_BYTES) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}

// One instruction covers 16 of the summed dimension. Its step from one to the next, in descriptor units of 16 bytes:
constexpr u64 STEP_K_MAJOR = 32 >> 4;    // the summed dimension is contiguous: 16 elements on in the same rows
constexpr u64 STEP_N_MAJOR = 2048 >> 4;  // the summed dimension runs over rows: 16 rows on

// Order earlier register writes before the products that read them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close a group of products; wait until at most PENDING groups are still running.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The operand lists of the accumulators, written once.
#define WGMMA_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_D16(d, i) WGMMA_D4(d, i), WGMMA_D4(d, i + 4), WGMMA_D4(d, i + 8), WGMMA_D4(d, i + 12)
#define WGMMA_D32(d) WGMMA_D16(d, 0), WGMMA_D16(d, 16)

// Keeps the compiler from moving accesses to accumulators across this point, where products own them. Sixteen at a time:
// one by one they take the compiler seconds.
template <int FIRST, int END, int N>
__device__ __forceinline__ void pin_registers(float (&values)[N]) {
#pragma unroll
    for (int i = FIRST; i < END; i += 16) asm volatile("" : WGMMA_D16(values, i)::"memory");
}

template <int N>
__device__ __forceinline__ void pin_registers(float (&values)[N]) {
    pin_registers<0, N>(values);
}

#define WGMMA_R32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R64 \
    WGMMA_R32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// S += A * B^T with both operands K-major, n = 64. `accumulate` false: S = A * B^T.
#define WGMMA_N64_SS(TYPE)                                                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE   \
                 " {" WGMMA_R32 "}, %32, %33, p, 1, 1, 0, 0; }"                                              \
                 : WGMMA_D32(d)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
template <class Element>
__device__ __forceinline__ void wgmma_n64_ss(float (&d)[32], u64 a, u64 b, bool accumulate) {
    if constexpr (SameType<Element, Bf16>::value) {
        WGMMA_N64_SS("bf16.bf16");
    } else {
        WGMMA_N64_SS("f16.f16");
    }
}

#define WGMMA_N64_RS(TYPE)                                                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE   \
                 " {" WGMMA_R32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"                                \
                 : WGMMA_D32(d)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
template <class Element>
__device__ __forceinline__ void wgmma_n64_rs(float (&d)[32], const u32 (&a)[4], u64 b, bool accumulate) {
    if constexpr (SameType<Element, Bf16>::value) {
        WGMMA_N64_RS("bf16.bf16");
    } else {
        WGMMA_N64_RS("f16.f16");
    }
}

// O += P * V with V N-major (its rows are the summed keys), n = 128: two boxes side by side, for `FIRST` and the 63 accumulators
// behind it.
#define WGMMA_N128_SS(TYPE)                                                                                           \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE             \
                 " {" WGMMA_R64 "}, %64, %65, p, 1, 1, 0, 1; }"                                                       \
                 : WGMMA_D16(d, FIRST), WGMMA_D16(d, FIRST + 16), WGMMA_D16(d, FIRST + 32), WGMMA_D16(d, FIRST + 48)  \
                 : "l"(a), "l"(b))
template <class Element, int FIRST>
__device__ __forceinline__ void wgmma_n128_ss(float (&d)[128], u64 a, u64 b) {
    if constexpr (SameType<Element, Bf16>::value) {
        WGMMA_N128_SS("bf16.bf16");
    } else {
        WGMMA_N128_SS("f16.f16");
    }
}
