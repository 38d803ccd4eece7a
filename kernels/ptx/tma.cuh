// The copy engine (TMA): box copies through a tensor map, and the 16-byte cp.async that threads issue themselves.
// PTX ISA: "cp.async.bulk.tensor", "cp.async", "createpolicy".
#pragma once
#include "ptx/types.cuh"

// What cuTensorMapEncodeTiled fills on the host; opaque here.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copy the box at coordinates (c0, c1, c2, c3, c4) to shared memory; `barrier` counts its bytes. What lies outside the
// tensor arrives as zeros and is counted all the same.
__device__ __forceinline__ void tma_load_5d(
    u32 destination, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3, int c4, u32 policy) {
    asm volatile(
        "{ .reg .b64 policy; mov.b64 policy, {0, %8};"
        " cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], policy; }" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(policy)
        : "memory");
}

// Have the box brought to L2. It may be written until it is read.
__device__ __forceinline__ void tma_prefetch_5d(const TensorMap* map, int c0, int c1, int c2, int c3, int c4, u32 policy) {
    asm volatile(
        "{ .reg .b64 policy; mov.b64 policy, {0, %6};"
        " cp.async.bulk.prefetch.tensor.5d.L2.global.tile.L2::cache_hint [%0, {%1, %2, %3, %4, %5}], policy; }" ::"l"(map),
        "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(policy)
        : "memory");
}

// 16 bytes from global to shared memory without passing registers; zeros when !valid (nothing is read then).
__device__ __forceinline__ void copy_async_16(u32 destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One 16-bit element to shared memory.
__device__ __forceinline__ void store_shared(u32 address, u16 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
