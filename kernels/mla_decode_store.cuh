// What the decode kernel writes: final rows in the caller's strides, or a piece's tile in the workspace.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_partial.cuh"
#include "ptx/convert.cuh"

namespace {

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

// The largest of a row's numbers, of which the lanes of a quad have a part each.
__device__ __forceinline__ float largest_of_row(const float (&output)[128], int half) {
    float even = 0.0f, odd = 0.0f;  // two chains, since each waits for itself
#pragma unroll
    for (int i = half * 2; i < 128; i += 4) {
        even = fmaxf(even, fabsf(output[i]));
        odd = fmaxf(odd, fabsf(output[i + 1]));
    }
    return quad_max(fmaxf(even, odd));
}

// The scorers' account of a piece: of this thread's two rows.
struct RowSums {
    float reference[2], sum[2];
    __device__ __forceinline__ RowSums(const Shared& shared, int note) {
        const Place place(here(threadIdx.x));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            reference[half] = shared.row_reference[note][place.row(half)];
            sum[half] = shared.row_sum[note][place.row(half)];
        }
    }
};

// A piece of a cut request, for the merge: the accumulators as they are, or in halves, and what they are relative to.
__device__ __forceinline__ void write_partial(const MlaDecodeParams& params, const Shared& shared, int end,
    const float (&output)[128], const RowSums& rows, const Place& place, int side) {
    const int strip = place.warp * 2 + side, slot = piece_slot(blockIdx.z, gridDim.z, end == BACK);
    const Merge& merge = shared.merges[end];
    if (strip >= merge.strips) return;
    const u32 phase = (shared.phases[end][merge.piece] >> strip & 1) ^ 1;
    PieceWords* const to = piece_strips(params, slot) + strip * STRIP_SIZE + place.lane;
    float relative_to[2], kept_relative_to[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        relative_to[half] = rows.sum[half] == 0.0f ? NO_REFERENCE : rows.reference[half] * params.scale_log2;
        kept_relative_to[half] = relative_to[half];
    }
    if constexpr (config::KEPT_IN_HALVES) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int exponent = exponent_for_halves(largest_of_row(output, half));
            factor[half] = power_of_two(exponent);
            kept_relative_to[half] -= exponent;
        }
#pragma unroll
        for (int line = 0; line < STRIP_GROUPS / 2; line++) {
            const float* o = output + line * 8;
            const PieceWords words = {
                {pack2<Fp16>(o[0] * factor[0], o[1] * factor[0]), pack2<Fp16>(o[2] * factor[1], o[3] * factor[1])},
                {pack2<Fp16>(o[4] * factor[0], o[5] * factor[0]), pack2<Fp16>(o[6] * factor[1], o[7] * factor[1])}};
            words.store(to + line * 32, phase);
        }
    } else {
#pragma unroll
        for (int line = 0; line < STRIP_GROUPS; line++) {
            const float* o = output + line * 4;
            const PieceWords words = {{o[0], o[1]}, {o[2], o[3]}};
            words.store(to + line * 32, phase);
        }
    }
    if (place.leads_quad()) {
        PieceWords* const at = to - place.lane + LINES_A_STRIP * 32 + place.lane / 4 * 2;
        const PieceWords weights = {{relative_to[0], relative_to[1]}, {rows.sum[0], rows.sum[1]}};
        const PieceWords kept = {{kept_relative_to[0], kept_relative_to[1]}, {0.0f, 0.0f}};
        weights.store(at, phase);
        kept.store(at + 1, phase);
    }
}

// A whole request: 16-bit, in the caller's strides. All is rounded first, which sets half of the registers free.
__device__ __forceinline__ void write_output(const MlaDecodeParams& params, const float (&output)[128], const RowSums& rows,
    const Place& place, int side, int request) {
    const RowSum row_sums[2] = {RowSum(rows.sum[0], rows.reference[0] * params.scale_log2),
                                RowSum(rows.sum[1], rows.reference[1] * params.scale_log2)};
    const float inverse[2] = {row_sums[0].inverse(), row_sums[1].inverse()};
    u32 rounded[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        rounded[i] = here(pack2<Element>(output[i * 2] * inverse[i % 2], output[i * 2 + 1] * inverse[i % 2]));
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = blockIdx.x * ROWS + place.row(half);
        const bool valid = row < params.rows_per_group;
        const RowPlace at(params, row);
        u16* out = params.out + request * params.out_stride_batch + at.query * params.out_stride_seq +
                   at.head * params.out_stride_head + side * (HEAD_DIM_V / 2) + place.lane % 4 * 8;
#pragma unroll
        for (int group = 0; group < 32; group += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = rounded[(group + i) * 2 + half];
            transpose_quad(words, place.lane);
            if (!valid) continue;
            if (config::PLAIN || params.out_is_aligned) {
                *reinterpret_cast<uint4*>(out + group * 8) = {words[0], words[1], words[2], words[3]};
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) out[group * 8 + i] = words[i / 2] >> (i % 2 * 16);
            }
        }
        if (side == LEFT && valid && place.leads_quad()) {
            params.lse[request * params.lse_stride_batch + at.head * params.lse_stride_head + at.query * params.lse_stride_seq] =
                row_sums[half].lse();
        }
    }
}

}  // namespace
