// mbarrier: a counter in shared memory that threads and the copy engine arrive at. PTX ISA: "mbarrier".
// A barrier alternates between phases 0 and 1; `parity` names the phase whose completion is awaited.
#pragma once
#include "ptx/types.cuh"

__device__ __forceinline__ void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive if `arrives`, without a branch that the compiler could copy code for.
__device__ __forceinline__ void mbarrier_arrive_if(u32 barrier, bool arrives) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier),
                 "r"(static_cast<u32>(arrives))
                 : "memory");
}

// Arrive, and expect `bytes` more from the copy engine before the phase can complete.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Whether the phase of `parity` is complete; never waits.
__device__ __forceinline__ bool mbarrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Wait for the phase of `parity`. With TRAP_AFTER_SPINS > 0 a wait that does not end is a bug and ends the kernel.
template <u32 TRAP_AFTER_SPINS = 0>
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    u32 spins = 0;
    while (!mbarrier_try_wait(barrier, parity)) {
        if (TRAP_AFTER_SPINS > 0 && ++spins > TRAP_AFTER_SPINS) __trap();
    }
}
