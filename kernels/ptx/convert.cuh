// Number formats and the fast powers of two. PTX ISA: "cvt", "ex2", "lg2", "ldmatrix", "stmatrix".
#pragma once
#include "ptx/types.cuh"

// Two floats, rounded to nearest even, as one 32-bit word: `low` in the low half.
template <class Element>
__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 word;
    if constexpr (SameType<Element, Bf16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

// The two floats of a word: x is its low half.
template <class Element>
__device__ __forceinline__ float2 unpack2(u32 word) {
    float2 pair;
    if constexpr (SameType<Element, Bf16>::value) {
        pair = {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000)};
    } else {
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
            : "=f"(pair.x), "=f"(pair.y)
            : "r"(word));
    }
    return pair;
}

// Both halves of a word times `factor`, rounded to nearest even.
template <class Element>
__device__ __forceinline__ u32 scale2(u32 word, float factor) {
    const float2 pair = unpack2<Element>(word);
    return pack2<Element>(pair.x * factor, pair.y * factor);
}

// 2 ** x; exact 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, to the last bit or the one before.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8x8 matrices of 16-bit elements from shared memory, in the layout of wgmma's A operand.
__device__ __forceinline__ void load_matrix_x4(u32 (&words)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_matrix_x4(u32 address, const u32 (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}
