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

// The scorers' account of a piece: of this thread's two rows.
struct RowSums {
    float reference[2], sum[2];
    __device__ __forceinline__ RowSums(const Shared& shared, int note) {
        const Place place(thread_here());
#pragma unroll
        for (int half = 0; half < 2; half++) {
            reference[half] = shared.row_reference[note][place.row(half)];
            sum[half] = shared.row_sum[note][place.row(half)];
        }
    }
};

// Where a warp's strip of a piece goes, for the merge. Not all strips have rows.
struct PieceStrip {
    PieceWords* at;
    u32 phase;
    bool exists;
    __device__ __forceinline__ PieceStrip(
        const MlaDecodeParams& params, const Shared& shared, int end, const Place& place, int side) {
        const int strip = place.warp * 2 + side;
        const Merge& merge = shared.merges[end];
        exists = strip < merge.strips;
        phase = (shared.phases[end][merge.piece] >> strip & 1) ^ 1;
        at = piece_strips(params, piece_slot(blockIdx.z, gridDim.z, end == BACK)) + strip * STRIP_SIZE;
    }
};

// Half of a strip's columns: the accumulators as they are, or in halves, each row with the power of two that brings the sum of its
// numbers here near the largest of fp16. Its exponents are returned. (A sum takes less time to find than the largest number, and is
// not so much larger that small numbers suffer.)
template <int HALF>
__device__ __forceinline__ void write_columns(
    const PieceStrip& strip, const float (&output)[128], int (&exponents)[2], int lane) {
    PieceWords* const to = strip.at + lane;
    constexpr int FIRST = HALF * (STRIP_LINES / 2), END = FIRST + STRIP_LINES / 2;
    if constexpr (config::KEPT_IN_HALVES) {
        float factor[2];
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float sum[2] = {0.0f, 0.0f};  // two chains, since each waits for itself
#pragma unroll
            for (int i = FIRST * 8 + row * 2; i < END * 8; i += 4) {
                sum[0] += fabsf(output[i]);
                sum[1] += fabsf(output[i + 1]);
            }
            exponents[row] = exponent_for_halves(quad_sum(sum[0] + sum[1]));
            factor[row] = power_of_two(exponents[row]);
        }
#pragma unroll
        for (int line = FIRST; line < END; line++) {
            const float* o = output + line * 8;
            const PieceWords words = {
                {pack2<Fp16>(o[0] * factor[0], o[1] * factor[0]), pack2<Fp16>(o[2] * factor[1], o[3] * factor[1])},
                {pack2<Fp16>(o[4] * factor[0], o[5] * factor[0]), pack2<Fp16>(o[6] * factor[1], o[7] * factor[1])}};
            words.store(to + line * 32, strip.phase);
        }
    } else {
#pragma unroll
        for (int line = FIRST; line < END; line++) {
            const float* o = output + line * 4;
            const PieceWords words = {{o[0], o[1]}, {o[2], o[3]}};
            words.store(to + line * 32, strip.phase);
        }
    }
}

// The first half of a strip's columns where there are no keys.
__device__ __forceinline__ void clear_columns(const PieceStrip& strip, int lane) {
#pragma unroll 1
    for (int line = 0; line < STRIP_LINES / 2; line++) {
        const PieceWords zeros = {{0u, 0u}, {0u, 0u}};
        zeros.store(strip.at + lane + line * 32, strip.phase);
    }
}

// What a strip's numbers and its rows' sums are relative to.
__device__ __forceinline__ void write_weights(const MlaDecodeParams& params, const PieceStrip& strip, const RowSums& rows,
    const int (&low)[2], const int (&high)[2], const Place& place) {
    if (!place.leads_quad()) return;
    float relative_to[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        relative_to[half] = rows.sum[half] == 0.0f ? NO_REFERENCE : rows.reference[half] * params.scale_log2;
    }
    PieceWords* const at = strip.at + STRIP_LINES * 32 + place.lane / 4 * 2;
    const PieceWords weights = {{relative_to[0], relative_to[1]}, {rows.sum[0], rows.sum[1]}};
    weights.store(at, strip.phase);
    if constexpr (config::KEPT_IN_HALVES) {
        const PieceWords kept = {
            {relative_to[0] - low[0], relative_to[1] - low[1]}, {relative_to[0] - high[0], relative_to[1] - high[1]}};
        kept.store(at + 1, strip.phase);
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
