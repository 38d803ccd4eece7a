// The scorers of the decode kernel: from query tile and keys to the probabilities of each block, and the sums of rows.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

namespace {

// The first boxes of the query tile, in registers for the whole piece as wgmma's A operand. Their place in the ring is free then.
using QueryBoxes = u32[Q_IN_REGISTERS][K_STEPS][4];

__device__ __forceinline__ void load_query_boxes(QueryBoxes& q, Shared& shared, const Ring<PAIRS>& pair, const Place& place,
    int box_rows) {
    const bool has_rows = Place(here(threadIdx.x)).warp * 16 < box_rows;
#pragma unroll
    for (int i = 0; i < Q_PAIRS; i++) wait(shared.pair_full[(pair + i).at()], (pair + i).turn());
#pragma unroll
    for (int box = 0; box < Q_IN_REGISTERS; box++) {
        const u32 matrices = place.matrices(has_rows ? shared.pairs[(pair + box / 2).at()][box % 2] : shared.q[0]);
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) load_matrix_x4(q[box][step], place.matrix(matrices, step));
    }
#pragma unroll
    for (int i = 0; i < Q_PAIRS; i++) arrive_as_warp(shared.pair_empty[(pair + i).at()], place.lane);
}

// S = Q K^T, box by box as they land, in the order in which they are asked for. Whether the next box is there is asked before
// the products of this one, which are short. `release` is called when all but the last two boxes are under way and when all but the
// last one are, and told which is the better time (measured); `under_way` when all are; `rope_is_read` when the rope columns have
// been read.
template <class Release, class UnderWay, class RopeIsRead>
__device__ __forceinline__ void compute_scores(float (&scores)[32], Shared& shared, const QueryBoxes& q, const Ring<PAIRS>& pair,
    const Ring<TAILS>& tail, Release release, UnderWay under_way, RopeIsRead rope_is_read) {
    constexpr int ORDER[BOXES] = {0, 1, 2, 3, 4, 5, ROPE_BOX, 6, 7};
    auto full = [&](int box) -> const u64& {
        return box == ROPE_BOX ? shared.tail_full[tail.at()] : shared.pair_full[(pair + box / 2).at()];
    };
    auto turn = [&](int box) { return box == ROPE_BOX ? tail.turn() : (pair + box / 2).turn(); };
    auto begins_pair = [](int box) { return box == ROPE_BOX || box % 2 == 0; };
    bool landed = false;
#pragma unroll
    for (int i = 0; i < BOXES; i++) {
        const int box = ORDER[i];
        if (begins_pair(box) && !landed) wait(full(box), turn(box));
        if (i == 0) wgmma_fence();
        if (i + 1 < BOXES && begins_pair(ORDER[i + 1])) {
            landed = mbarrier_test(shared_address(&full(ORDER[i + 1])), turn(ORDER[i + 1]));
        }
        if (i + 2 == BOXES) release(gridDim.x == 2);
        if (i + 1 == BOXES) release(gridDim.x != 2);
        const u64 k = box == ROPE_BOX ? descriptor(TAILS_OFFSET) + tail.at() * NEXT_BOX
                                      : descriptor(box % 2 * BOX_BYTES) + (pair + box / 2).at() * NEXT_PAIR;
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            if (box < Q_IN_REGISTERS) {
                wgmma_n64_rs<Element>(scores, q[box][step], k + step * STEP_K_MAJOR, i > 0 || step > 0);
            } else {
                const u64 in_shared = descriptor(Q_OFFSET + (box - Q_IN_REGISTERS) * BOX_BYTES);
                wgmma_n64_ss<Element>(scores, in_shared + step * STEP_K_MAJOR, k + step * STEP_K_MAJOR, true);
            }
        }
        if (box == ROPE_BOX) wgmma_commit();
    }
    wgmma_commit();
    under_way();
    wgmma_wait<1>();
    rope_is_read();
    wgmma_wait<0>();
}

// Masks the scores of keys that a row does not see. Such a key's probability is 0, but 0 * NaN is NaN: what is not finite
// in values that some row does not see becomes 0 in shared memory. (A row that does see such a key has a score that is not
// finite either: it turns NaN all the same, or, at a score of -inf, gives the key no weight.)
__device__ __forceinline__ void clean_values(Shared& shared, const Ring<PAIRS>& pair, int first_key) {
#pragma unroll 1
    for (int i = threadIdx.x % WARPGROUP; i < (KEYS - first_key) * VALUE_BOXES * 8; i += WARPGROUP) {
        const int key = first_key + i / (VALUE_BOXES * 8), chunk = i % (VALUE_BOXES * 8);
        uint4* words = reinterpret_cast<uint4*>(shared.pairs[(pair + chunk / 16).at()][chunk / 8 % 2] + box_offset(key, chunk % 8));
        uint4 value = *words;
        auto clean = [](u32 pair) {
            constexpr u32 low = Element::EXPONENT_MASK, high = low << 16;
            return ((pair & low) == low ? 0 : pair & 0xFFFF) | ((pair & high) == high ? 0 : pair & 0xFFFF0000);
        };
        value = {clean(value.x), clean(value.y), clean(value.z), clean(value.w)};
        *words = value;
    }
}

__device__ __forceinline__ void mask_scores(float (&scores)[32], const MlaDecodeParams& params, Shared& shared,
    const Ring<PAIRS>& pair, const Piece& piece, int first_row, int block, bool valid) {
    const Place place(here(threadIdx.x));  // again, rather than keep what is rarely used
    const int first_key = block * KEYS, length = piece.length;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int limit = Request::limit(params, length, first_row + place.row(half));
        const int visible = valid ? limit - first_key - place.pair_column() : 0;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            if ((i / 2) % 2 == half && !(i / 4 * 8 + i % 2 < visible)) scores[i] = -INFINITY_F32;
        }
    }
    if (valid) clean_values(shared, pair, clamp(piece.limit_min - first_key, 0, KEYS));
}

// The highest score of a row.
__device__ __forceinline__ float highest_score(const float (&scores)[32], int half) {
    float even = scores[half * 2], odd = scores[half * 2 + 1];  // two chains, since each waits for itself
#pragma unroll
    for (int i = 4; i < 32; i += 4) {
        even = fmaxf(even, scores[i + half * 2]);
        odd = fmaxf(odd, scores[i + half * 2 + 1]);
    }
    return quad_max(fmaxf(even, odd));
}

// Writes the probabilities 2^(scale * (scores - reference)) of this warp's 16 rows to a box, for the tensor cores to read, as soon
// as nobody needs what is there. Returns this thread's share of the sums of its two rows. Step s covers keys 16 s .. 16 s + 15.
__device__ __forceinline__ float2 exponentiate(const float (&scores)[32], const float (&reference)[2], float scale, u8* box,
    const u64& box_is_free, u32 turn, const Place& place) {
    const float shift[2] = {reference[0] * scale, reference[1] * scale};
    const u32 matrices = place.matrices(box);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // [half][even, odd]
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u32 p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* const pair = scores + step * 8 + i * 2;
            const float even = exp2_approx(fmaf(pair[0], scale, -shift[i % 2]));
            const float odd = exp2_approx(fmaf(pair[1], scale, -shift[i % 2]));
            sum[i % 2 * 2] += even;
            sum[i % 2 * 2 + 1] += odd;
            p[i] = pack2<Element>(even, odd);
        }
        if (step == 0) wait(box_is_free, turn);
        store_matrix_x4(place.matrix(matrices, step), p);
    }
    return {sum[0] + sum[1], sum[2] + sum[3]};
}

// The probabilities of all blocks of all pieces.
__device__ __forceinline__ void produce_p(const MlaDecodeParams& params, Shared& shared, int first_row) {
    const Place place(threadIdx.x);
    const float scale = params.scale_log2;
    Trace trace(TRACE_SCORER, threadIdx.x % WARPGROUP == 0);
    Ring<PAIRS> pair;
    Ring<TAILS> tail;
    Ring<PIECES> note;
    const Part part(shared.plan_row, gridDim.z, params.batch);
    for (int number = part.first_request; number <= part.last_number; number++) {
        const Piece& piece = shared.pieces[note.at()];
        QueryBoxes q;
        wait(shared.piece_ready[note.at()], note.turn());
        if (!config::PLAIN) wait(shared.q_ready[note.at()], note.turn());
        load_query_boxes(q, shared, pair, place, query_rows(params));
        if (config::PLAIN) wait(shared.q_ready[note.at()], note.turn());
        trace.mark(TRACE_Q);
        pair += Q_PAIRS;

        float reference[2] = {NO_REFERENCE, NO_REFERENCE}, sum[2] = {0.0f, 0.0f};
        bool held_back = false;  // P of the block before
        const int last = piece.last;
        for (int block = piece.first; block < last; block++) {
            // 1. S.
            float scores[32];
            bool valid, every_row_sees_all, is_first;  // looked up while the products run
            pin_registers(scores);
            compute_scores(scores, shared, q, pair, tail, [&](bool now) {
                // All warps of a warpgroup have to take the same way between products, and each holds back on its own account.
                __syncwarp();
                mbarrier_arrive_if(shared_address(&shared.p_ready[(tail + (TAILS - 1)).at()]), now && held_back && place.lane == 0);
            }, [&] {
                valid = __shfl_sync(0xFFFFFFFF, shared.page_is_valid[tail.at()], 0) != 0;
                every_row_sees_all = valid && (block + 1) * KEYS <= piece.limit_min;
                is_first = block == piece.first;
            }, [&] { mbarrier_arrive_if(shared_address(&shared.rope_is_read[tail.at()]), place.lane == 0); });
            pin_registers(scores);
            trace.mark(TRACE_SCORES);
            if (!every_row_sees_all) {
                named_barrier_sync(SCORERS, WARPGROUP);  // no warp needs the keys any more, which are cleaned as values
                mask_scores(scores, params, shared, pair, piece, first_row, block, valid);
            }
            pair += PAIRS_A_BLOCK;

            // 2. Its probabilities, by the reference so far. If they get too large for that, and in the first block, by another.
            bool rescales = false;
            float2 share = {0.0f, 0.0f};
            for (bool looks = is_first;; looks = true) {
                if (looks) {
                    rescales = !is_first;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float before = reference[half], highest = highest_score(scores, half);
                        const float most = quad_max(half == 0 ? share.x : share.y);  // a row's own, whatever its neighbours have
                        if (is_first || most > MOST) reference[half] = fmaxf(before, highest);
                        const float factor = exp2_approx((before - reference[half]) * scale);
                        sum[half] *= factor;
                        if (place.leads_quad()) shared.row_factor[tail.at()][place.row(half)] = factor;
                    }
                }
                share = exponentiate(
                    scores, reference, scale, shared.tails[tail.at()], shared.rope_is_read[tail.at()], tail.turn(), place);
                if (looks || __all_sync(0xFFFFFFFF, share.x <= MOST && share.y <= MOST)) break;
            }
            sum[0] += share.x;
            sum[1] += share.y;
            if (place.lane == 0) shared.rescales[tail.at()][place.warp] = rescales;
            fence_async_shared();

            // 3. Its product with the values may begin: when all of our next S but the end is under way, so that the tensor cores
            // have the product to do while we do the next probabilities. With one row block memory is the limit: at once if the
            // next keys are not there.
            const auto keys_are_there = [&] {
                const Ring<PAIRS> end = pair + (PAIRS_A_BLOCK - 1);
                return __any_sync(0xFFFFFFFF, mbarrier_test(shared_address(&shared.pair_full[end.at()]), end.turn()));
            };
            held_back = block + 1 < last && (gridDim.x > 1 || keys_are_there());
            if (!held_back) arrive_as_warp(shared.p_ready[tail.at()], place.lane);
            trace.mark(TRACE_P);
            tail += 1;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] = quad_sum(sum[half]);
            if (!place.leads_quad()) continue;
            shared.row_sum[note.at()][place.row(half)] = sum[half];
            shared.row_reference[note.at()][place.row(half)] = reference[half];
        }
        trace.mark(TRACE_SUMS);
        arrive_as_warp(shared.sums_ready[note.at()], place.lane);
        if (place.lane == 0) {
            mbarrier_arrive(shared_address(&shared.q_empty));
            mbarrier_arrive(shared_address(&shared.piece_empty[note.at()]));
        }
        note += 1;
    }
}

}  // namespace
