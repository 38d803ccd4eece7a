// What a merge adds up: the same columns of all pieces of a request, as they get written (mla_decode_merge.cuh tells by whom).
//
// Piece s of a query row left an output o_s and a sum of exponentials l_s that are relative to 2^r_s. The whole row is
// sum_s w_s o_s / sum_s w_s l_s with w_s = 2^(r_s - m), m the largest r_s: exact, whatever the cuts. A piece without keys has
// l_s = 0; a row without keys gives 0 and lse = +inf. Pieces are added in an order that the plan alone decides, so a call gives the
// same bits every time (but for tasks that were left behind: mla_decode_merge.cuh).
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_partial.cuh"
#include "mla_plan.cuh"
#include "ptx/convert.cuh"
#include "ptx/sync.cuh"

namespace {

constexpr u32 FOR_EVER = 0xFFFFFFFF;  // looks

// What a task of a merge reads: some lines of one strip of all pieces.
struct TaskPieces {
    const PieceWords *first, *later;  // the task's lines of piece 0; of piece p they lie p tiles behind `later`
    const u8* phases;                 // of the pieces
    int tile, weights, strip;         // in 16 bytes: from piece to piece, from the task's lines to the strip's weights
    int number;                       // of the strip's lines, the task's first
    bool is_single;                   // of one line
    __device__ __forceinline__ TaskPieces(
        const MlaDecodeParams& params, const Shared& shared, int end, const Merge& merge, const MergeTask& task)
        : first(static_cast<const PieceWords*>(params.partials) + task.first),
          later(static_cast<const PieceWords*>(params.partials) + task.later), phases(shared.phases[end]),
          tile(strips_a_tile(params) * STRIP_SIZE), weights(task.weights), strip(task.strip),
          number(task.number * merge.lines), is_single(merge.lines == 1) {}
    __device__ __forceinline__ const PieceWords* piece(int number) const { return number == 0 ? first : later + number * tile; }
};

// Pieces' share of some groups: a lane has four columns of each, two of row lane / 4 (x, y) and two of the row 8 further.
template <int GROUPS>
struct PieceSum {
    float4 output[GROUPS];
    float largest[2], sum[2];
    __device__ __forceinline__ PieceSum() : largest{NO_REFERENCE, NO_REFERENCE}, sum{0.0f, 0.0f} {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) output[g] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    // Goes over to larger references.
    __device__ __forceinline__ void raise(const float (&now)[2]) {
        const float low = exp2_approx(largest[0] - now[0]), high = exp2_approx(largest[1] - now[1]);
        sum[0] *= low;
        sum[1] *= high;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            output[g] = {output[g].x * low, output[g].y * low, output[g].z * high, output[g].w * high};
        }
        largest[0] = now[0];
        largest[1] = now[1];
    }
    __device__ __forceinline__ void add_sums(const float2& sums, float low, float high) {
        sum[0] += low * sums.x;
        sum[1] += high * sums.y;
    }
    __device__ __forceinline__ void add(int g, const float2& in_low, const float2& in_high, float low, float high) {
        output[g].x += low * in_low.x;
        output[g].y += low * in_low.y;
        output[g].z += high * in_high.x;
        output[g].w += high * in_high.y;
    }
};

// `LINES` lines of one piece, and what their rows' numbers and sums are relative to.
template <int LINES>
struct PieceLines {
    PieceWord relative_to, sum, kept_relative_to;
    PieceWords lines[LINES];
    __device__ __forceinline__ PieceLines()
        : relative_to(NO_REFERENCE, NO_REFERENCE), sum(0.0f, 0.0f), kept_relative_to(NO_REFERENCE, NO_REFERENCE) {
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l] = {{0u, 0u}, {0u, 0u}};
    }
    // Of one line only, if `is_single`. Strips that are not in halves are kept relative to the same as their sums.
    __device__ __forceinline__ void load(
        const PieceWords* lines_at, const PieceWords* weights_at, int half, bool is_single, bool wanted) {
        load_from_other_blocks(relative_to.bits, sum.bits, weights_at, wanted);
        const PieceWord* const kept_at = &weights_at[1].low + half;
        load_from_other_blocks(kept_relative_to.bits, kept_at, wanted && config::KEPT_IN_HALVES);
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l].load(lines_at + l * 32, wanted && (l == 0 || !is_single));
    }
    // Whether some word is still of the phase that it had before this call, bit 0 of `before`.
    __device__ __forceinline__ bool is_unwritten(u32 before, bool is_single) const {
        u32 unwritten = 0;
        relative_to.add_if_of(before, unwritten);
        sum.add_if_of(before, unwritten);
        if (config::KEPT_IN_HALVES) kept_relative_to.add_if_of(before, unwritten);
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            if (l == 0 || !is_single) lines[l].add_if_of(before, unwritten);
        }
        return unwritten & 1;
    }
    __device__ __forceinline__ void clear_phase() {
        relative_to.clear_phase();
        sum.clear_phase();
        kept_relative_to.clear_phase();
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l].clear_phase();
    }
    __device__ __forceinline__ void add_to(PieceSum<GROUPS_A_LINE * LINES>& total) const {
        const float low = exp2_approx(relative_to.numbers().x - total.largest[0]);
        const float high = exp2_approx(relative_to.numbers().y - total.largest[1]);
        total.add_sums(sum.numbers(), low, high);
#pragma unroll
        for (int l = 0; l < LINES; l++) total.add(l, lines[l].low.numbers(), lines[l].high.numbers(), low, high);
    }
    __device__ __forceinline__ void add_halves_to(PieceSum<GROUPS_A_LINE * LINES>& total) const {
        total.add_sums(sum.numbers(), exp2_approx(relative_to.numbers().x - total.largest[0]),
                       exp2_approx(relative_to.numbers().y - total.largest[1]));
        const float low = exp2_approx(kept_relative_to.numbers().x - total.largest[0]);
        const float high = exp2_approx(kept_relative_to.numbers().y - total.largest[1]);
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            const PieceWord &a = lines[l].low, &b = lines[l].high;
            total.add(2 * l, unpack2<Fp16>(a.x()), unpack2<Fp16>(a.y()), low, high);
            total.add(2 * l + 1, unpack2<Fp16>(b.x()), unpack2<Fp16>(b.y()), low, high);
        }
    }
};

// Adds `LINES` lines, from `line` on, of pieces first, first + 2^step, ... as they get written; `LOADS` pieces are under way at
// once, and those that were not written yet are looked at again. `meanwhile` is done while the first are. False: patience has
// ended.
template <int LINES, int LOADS, class Meanwhile>
__device__ __forceinline__ bool add_pieces(PieceSum<GROUPS_A_LINE * LINES>& total, const TaskPieces& from, int first, int step,
    int pieces, int line, u32 patience, int lane, Meanwhile meanwhile) {
    const int lines_at = line * 32 + lane, weights_at = from.weights + lane / 4 * 2;
    const int half = (from.number + line) / (STRIP_LINES / 2);  // of the strip's columns
#pragma unroll 1
    for (int base = first; base < pieces; base += LOADS << step) {
        const int count = min(((pieces - base - 1) >> step) + 1, LOADS);
        PieceLines<LINES> piece[LOADS];  // those that do not exist weigh nothing
        u32 missing = (1u << count) - 1;
#pragma unroll 1
        for (u32 looks = 0; missing != 0; looks++) {
            if (looks > patience && patience != FOR_EVER) return false;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const PieceWords* const at = from.piece(base + (i << step));
                piece[i].load(at + lines_at, at + weights_at, half, LINES == 2 && from.is_single, missing >> i & 1);
            }
            if (looks == 0 && base == first) meanwhile();
            u32 unwritten = 0;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const u32 before = from.phases[min(base + (i << step), pieces - 1)] >> from.strip;
                if (piece[i].is_unwritten(before, LINES == 2 && from.is_single)) unwritten |= 1u << i;
            }
            missing &= or_of_warp(unwritten);
        }
        float now[2] = {total.largest[0], total.largest[1]};
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            piece[i].clear_phase();
            now[0] = fmaxf(now[0], piece[i].relative_to.numbers().x);
            now[1] = fmaxf(now[1], piece[i].relative_to.numbers().y);
        }
        total.raise(now);
        if constexpr (config::KEPT_IN_HALVES) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) piece[i].add_halves_to(total);
        } else {
#pragma unroll
            for (int i = 0; i < LOADS; i++) piece[i].add_to(total);
        }
    }
    return true;
}

}  // namespace
