// What the decode kernel writes: final rows in the caller's strides, or a piece's float32 rows in the workspace.
#pragma once
#include "mla_decode_block.cuh"
#include "ptx/convert.cuh"

namespace {

// Where one piece's results go, and how.
struct Destination {
    bool partial;
    i64 partial_row;  // of the row block's first row, in the workspace
    int request;
};

// A quad of lanes holds 8 neighbouring columns of a row, 2 a lane. After this transposition of 4 such groups each lane
// holds the 8 columns of one group: 16 bytes that can be written at once.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 received = __shfl_xor_sync(0xFFFFFFFF, odd ? words[i] : words[i + 1], 1);
        if (odd) words[i] = received;
        else words[i + 1] = received;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 received = __shfl_xor_sync(0xFFFFFFFF, upper ? words[i] : words[i + 2], 2);
        if (upper) words[i] = received;
        else words[i + 2] = received;
    }
}

template <int SIDE>
__device__ __forceinline__ void write_results(const MlaDecodeParams& params, const float (&output)[128],
    const float (&maximum)[2], const float (&sum)[2], const Place& place, int first_row, const Destination& to) {
    constexpr int FIRST_COLUMN = SIDE * HEAD_DIM_V / 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + place.row(half);
        const bool valid = row < params.rows_per_group;
        const bool empty = sum[half] == 0.0f;
        const float inverse = empty ? 0.0f : 1.0f / sum[half];
        const float lse = maximum[half] * params.scale_log2 + log2f(sum[half]);  // base 2
        const int query = row / params.heads_per_group;
        const int head = blockIdx.y * params.heads_per_group + row % params.heads_per_group;
        if (to.partial) {
            if (!valid) continue;
            const i64 at = to.partial_row + place.row(half);
            float* out = params.partial_out + at * HEAD_DIM_V + FIRST_COLUMN + place.pair_column();
#pragma unroll
            for (int group = 0; group < 32; group++) {
                *reinterpret_cast<float2*>(out + group * 8) = {output[group * 4 + half * 2] * inverse,
                                                               output[group * 4 + half * 2 + 1] * inverse};
            }
            if (SIDE == LEFT && place.leads_quad()) params.partial_lse[at] = empty ? -INFINITY_F32 : lse;
            continue;
        }
        u16* out = params.out + to.request * params.out_stride_batch + query * params.out_stride_seq +
                   head * params.out_stride_head + FIRST_COLUMN + place.lane % 4 * 8;
#pragma unroll
        for (int group = 0; group < 32; group += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = (group + i) * 4 + half * 2;
                words[i] = pack2<Element>(output[at] * inverse, output[at + 1] * inverse);
            }
            transpose_quad(words, place.lane);
            if (!valid) continue;
            if (params.out_is_aligned) {
                *reinterpret_cast<uint4*>(out + group * 8) = {words[0], words[1], words[2], words[3]};
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) out[group * 8 + i] = words[i / 2] >> (i % 2 * 16);
            }
        }
        if (SIDE == LEFT && valid && place.leads_quad()) {
            params.lse[to.request * params.lse_stride_batch + head * params.lse_stride_head +
                       query * params.lse_stride_seq] = empty ? INFINITY_F32 : lse * LN_2;
        }
    }
}

}  // namespace
