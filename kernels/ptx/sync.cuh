// Synchronisation that is not an mbarrier. PTX ISA: "Parallel Synchronization and Communication Instructions",
// "griddepcontrol", "setmaxnreg".
#pragma once
#include "ptx/types.cuh"

// Named barrier `id`: wait until `threads` threads have arrived, this one among them.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary writes to shared memory before later reads by the tensor cores and the copy engine,
// which go through another path (the async proxy).
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Words in device memory by which thread blocks tell each other things. PTX ISA: "Memory Consistency Model". Each word is
// seen whole, some time after it was written; nothing is said about the order of several.
__device__ __forceinline__ void store_for_other_blocks(void* to, u64 word) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
// Two words, under an L2 policy. (PTX promises whole 64-bit words for v2.u64. That makes the same machine instruction, but ptxas
// moves all its operands to the same four registers first, one store after the other.)
template <u32 POLICY>
__device__ __forceinline__ void store_for_other_blocks(void* to, u64 low, u64 high) {
    asm volatile(
        "{ .reg .b64 policy; mov.b64 policy, {0, %5};"
        " st.relaxed.gpu.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, policy; }" ::"l"(to),
        "r"(static_cast<u32>(low)), "r"(static_cast<u32>(low >> 32)), "r"(static_cast<u32>(high)),
        "r"(static_cast<u32>(high >> 32)), "n"(POLICY)
        : "memory");
}
__device__ __forceinline__ int load_from_other_blocks(const int* from) {
    int word;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}
// Load if `wanted`, else leave the words alone.
__device__ __forceinline__ void load_from_other_blocks(u64& word, const void* from, bool wanted) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.relaxed.gpu.global.u64 %0, [%1]; }"
                 : "+l"(word)
                 : "l"(from), "r"(static_cast<u32>(wanted))
                 : "memory");
}
__device__ __forceinline__ void load_from_other_blocks(u64& low, u64& high, const void* from, bool wanted) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2]; }"
                 : "+l"(low), "+l"(high)
                 : "l"(from), "r"(static_cast<u32>(wanted))
                 : "memory");
}
// Return what was there before.
__device__ __forceinline__ u32 atomic_add(u32* word, u32 value) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}
__device__ __forceinline__ u32 atomic_or(u32* word, u32 bits) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.or.b32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(bits) : "memory");
    return before;
}
__device__ __forceinline__ u32 atomic_and(u32* word, u32 bits) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.and.b32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(bits) : "memory");
    return before;
}
// What this thread did before the fence is seen by whoever sees what it does after it, if that one fences as well.
__device__ __forceinline__ void memory_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Has the line of device memory that holds `address` brought to L2. It may be written until it is read.
__device__ __forceinline__ void prefetch_to_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Busy for about as many cycles. (__nanosleep(300) takes one to three microseconds.)
__device__ __forceinline__ void spend_cycles(u32 cycles) {
    u32 begin, now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(begin)::"memory");
    do asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    while (now - begin < cycles);
}

// Programmatic dependent launch: wait until the kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Programmatic dependent launch: let the next kernel start its preamble now.
__device__ __forceinline__ void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Give registers back to, or take them from, the pool of the thread block. Whole warpgroups only.
template <int REGISTERS>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Lane 0's value: the same in all lanes, and the compiler knows that it is.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }

// Bits that any lane has, in all lanes.
__device__ __forceinline__ u32 or_of_warp(u32 x) {
    u32 all;
    asm volatile("redux.sync.or.b32 %0, %1, 0xFFFFFFFF;" : "=r"(all) : "r"(x));
    return all;
}

// True in exactly one lane of a converged warp.
//
// Where that lane waits in a loop, nothing may follow for its warp. ptxas puts YIELD into such loops, and with that the other lanes
// pass the end of the branch at which they should meet it. All lanes share one set of uniform registers, which hold the
// operands of copies; what comes next in the code overwrites them, while a copy has yet to read them (an illegal instruction).
__device__ __forceinline__ bool elect_lane() {
    u32 elected;
    asm volatile(
        "{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}
