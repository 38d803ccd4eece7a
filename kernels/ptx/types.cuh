// Integer names and the two element types, so that no header outside kernels/ is needed.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// Tags: which 16-bit float the tensor cores shall read. The bits travel as u16 or, two at a time, as u32.
struct Bf16 {
    static constexpr u32 EXPONENT_MASK = 0x7F80;  // all ones: inf or NaN
};
struct Fp16 {
    static constexpr u32 EXPONENT_MASK = 0x7C00;
};

template <class A, class B>
struct SameType {
    static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
    static constexpr bool value = true;
};

#define INFINITY_F32 __int_as_float(0x7F800000)

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : (x > high ? high : x); }

// The same number, and what follows from it is computed after this point: not ahead of loops, in registers they need.
__device__ __forceinline__ int here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The thread's number, read here, so that no register has to keep it.
__device__ __forceinline__ int thread_here() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// A load that is issued where it stands, however late its value is used.
__device__ __forceinline__ int load_now(const int* pointer) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer));
    return value;
}

// L2 policies, as createpolicy makes them: this data is read once, evict it first; others read it soon, keep it as usual; it is
// written and read again and again, evict it last. Their high words; the low ones are 0.
constexpr u32 L2_EVICT_FIRST = 0x12F00000, L2_EVICT_NORMAL = 0x10000000, L2_EVICT_LAST = 0x14F00000;

// In a cluster the high bits of an address in shared memory are the thread block's rank.
constexpr u32 SHARED_OFFSET = 0x00FFFFFF;

// The 32-bit address that shared-memory instructions take.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
