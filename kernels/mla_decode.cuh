// Absorbed MLA decode for Hopper: one key-value head of 576 numbers a token, whose first 512 are also the value.
//
//   out[row] = sum_j softmax_j(scale * q[row] . k[j]) * k[j][:512]      row = (query, head of the group)
//
// A thread block works on 64 query rows of one KV head and, through its part of the plan, on runs of 64-key blocks
// (one block = one page). Three warpgroups:
//
//   producers  warps 0 and 1 copy K blocks by TMA, warps 2 and 3 copy Q
//   left       scores and probabilities of the even blocks, and output columns   0..255
//   right      scores and probabilities of the odd  blocks, and output columns 256..511
//
// The 64 x 512 float32 output fills half a register file, so only one fits; left and right hold a half each, and both
// need the probabilities of every block ("seesaw", FlashMLA's write-up of 2025-04-22). For a pair of blocks 0 and 1:
//
//   left                                            right
//   S0 = Q K0^T                                     S1 = Q K1^T
//   P0 = 2^(S0 - m)                                 P1 = 2^(S1 - m)
//   O_L += P0 V0_L                -- P0 -->         O_R += P1 V1_R
//   O_L += P1 V1_L               <-- P1 --          O_R += P0 V0_R
//
// m, a row's reference, is what keeps 2^(S - m) in range. Any m does that is not far below the row's maximum, so both sides
// go on with the same one, and neither waits for the other before its own product. A side whose block exceeds m by more
// than 2^RANGE raises it for that block, to the block's maximum, and rescales its half of the output; the other side
// learns of it with P, and both go on from the higher of the two (`take_over`). Right begins with left's first.
//
// K lives in two slots of nine 64 x 64 boxes with a barrier each, so S starts with the first box that lands, and boxes are
// refilled as soon as their last reader is done: box 8 (rope, no value) after S, boxes 0..3 (V_L) after left's product,
// boxes 4..7 (V_R) after right's.
//
// Who reads what, and why no barrier is missing:
//   P0, row_reference[0]: left -> right   written before p_ready[0]. Left writes again after its next S0, for which it needs
//                                   K boxes that right's product P0 V0_R had to free first.
//   P1, row_reference[1]: right -> left   the same, mirrored. The reader alone reads P from shared memory (the writer has it in
//                                   registers) and may rescale it there.
//   Q's rope box                    P1 takes its place, once both sides have loaded it into registers (q_in_registers).
//   row_sum                         written before sums_ready, read after it. Pieces take turns with two copies: who writes one
//                                   again has waited for the sums_ready in between, at which the reader arrived.
#include "mla_decode_block.cuh"
#include "mla_decode_load.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_store.cuh"
#include "mla_plan.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

namespace {

// One arrival a warp: all its lanes are done with the boxes.
__device__ __forceinline__ void release(u64& barrier, const Place& place) {
    __syncwarp();
    if (place.lane == 0) mbarrier_arrive(shared_address(&barrier));
}

// Starts S = Q K^T, each box as soon as it has landed: the rope box, which is refilled first, then the side's own value
// boxes, then the other side's. Whether the next box is there is asked before the products of this one, which are short.
template <int SIDE>
__device__ __forceinline__ void start_scores(
    float (&scores)[32], Shared& shared, const u32 (&q_rope)[K_STEPS][4], u32 parity) {
    auto number = [](int i) { return i == 0 ? ROPE_BOX : (i - 1 + SIDE * HALF_BOXES) % VALUE_BOXES; };
    bool landed = false;
#pragma unroll
    for (int i = 0; i < BOXES; i++) {
        const int box = number(i);
        if (!landed) wait(shared.k_full[SIDE][box], parity);
        if (i == 0) wgmma_fence();
        if (i + 1 < BOXES) landed = mbarrier_test(shared_address(&shared.k_full[SIDE][number(i + 1)]), parity);
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            const u64 k = descriptor(k_offset(SIDE, box)) + step * STEP_K_MAJOR;
            if (i == 0) {
                wgmma_n64_rs<Element>(scores, q_rope[step], k, step > 0);
            } else {
                wgmma_n64_ss<Element>(scores, descriptor(q_offset(box)) + step * STEP_K_MAJOR, k, true);
            }
        }
    }
}

// Starts O += P V for the side's columns of the block in `SLOT`; P from registers, or from shared memory.
template <int SIDE, int SLOT>
__device__ __forceinline__ void start_output(float (&output)[128], const u32 (&p)[K_STEPS][4]) {
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        wgmma_n256_rs<Element>(output, p[step], descriptor(k_offset(SLOT, SIDE * HALF_BOXES)) + step * STEP_N_MAJOR);
    }
}
template <int SIDE, int SLOT>
__device__ __forceinline__ void start_output(float (&output)[128], u32 p_offset) {
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        wgmma_n256_ss<Element>(output, descriptor(p_offset) + step * STEP_K_MAJOR,
            descriptor(k_offset(SLOT, SIDE * HALF_BOXES)) + step * STEP_N_MAJOR);
    }
}

// Masks the scores of keys that a row does not see. Such a key's probability is 0, but 0 * NaN is NaN: what is not finite
// in values that some row does not see becomes 0 in shared memory. (A row that does see such a key has a score that is not
// finite either: it turns NaN all the same, or, at a score of -inf, gives the key no weight.)
template <int SIDE>
__device__ __forceinline__ void clean_values(Shared& shared, int first_key) {
    named_barrier_sync(ONE_SIDE + SIDE, WARPGROUP);  // every warp has its scores
#pragma unroll 1
    for (int i = threadIdx.x % WARPGROUP; i < (KEYS - first_key) * VALUE_BOXES * 8; i += WARPGROUP) {
        const int key = first_key + i / (VALUE_BOXES * 8), chunk = i % (VALUE_BOXES * 8);
        uint4* words = reinterpret_cast<uint4*>(shared.k[SIDE][chunk / 8] + box_offset(key, chunk % 8));
        uint4 value = *words;
        auto clean = [](u32 pair) {
            constexpr u32 low = Element::EXPONENT_MASK, high = low << 16;
            return ((pair & low) == low ? 0 : pair & 0xFFFF) | ((pair & high) == high ? 0 : pair & 0xFFFF0000);
        };
        value = {clean(value.x), clean(value.y), clean(value.z), clean(value.w)};
        *words = value;
    }
    fence_async_shared();
    named_barrier_sync(ONE_SIDE + SIDE, WARPGROUP);
}

template <int SIDE>
__device__ __forceinline__ void mask_scores(
    float (&scores)[32], Shared& shared, const Place& place, const int (&limit)[2], int limit_min, int block, bool valid) {
    const int first_key = block * KEYS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int visible = valid ? limit[half] - first_key - place.pair_column() : 0;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            if ((i / 2) % 2 == half && !(valid && i / 4 * 8 + i % 2 < visible)) scores[i] = -INFINITY_F32;
        }
    }
    if (valid) clean_values<SIDE>(shared, clamp(limit_min - first_key, 0, KEYS));
}

// The reference for a block's scores: the one so far, unless they exceed it by more than 2^RANGE. A rounded probability
// is as exact above 1 as below, and the headroom keeps a maximum that creeps up from costing a rescale.
__device__ __forceinline__ float block_reference(const float (&scores)[32], int half, float reference, float scale) {
    float m = fmaxf(scores[half * 2], scores[half * 2 + 1]);
#pragma unroll
    for (int i = 4; i < 32; i += 4) m = fmaxf(m, fmaxf(scores[i + half * 2], scores[i + half * 2 + 1]));
    m = quad_max(m);
    return (m - reference) * scale > RANGE ? m : reference;
}

// scores -> 2^(scale * (scores - reference)).
__device__ __forceinline__ void exponentiate(float (&scores)[32], int half, float reference, float scale) {
    const float shift = reference * scale;
#pragma unroll
    for (int i = half * 2; i < 32; i += 4) {
        scores[i] = exp2_approx(fmaf(scores[i], scale, -shift));
        scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale, -shift));
    }
}

// This thread's share of the sums of its two rows.
__device__ __forceinline__ void add_to_sums(const float (&p)[32], float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int i = half * 2; i < 32; i += 4) {
            even += p[i];
            odd += p[i + 1];
        }
        sum[half] += even + odd;
    }
}

// Multiplies rows of the output, and their sums, by their factors.
__device__ __forceinline__ void rescale(float (&output)[128], float (&sum)[2], const float (&factor)[2]) {
    sum[0] *= factor[0];
    sum[1] *= factor[1];
#pragma unroll
    for (int i = 0; i < 128; i++) output[i] *= factor[(i / 2) % 2];
}

// Probabilities in the layout of wgmma's A operand: step s covers keys 16 s .. 16 s + 15.
__device__ __forceinline__ void pack_probabilities(const float (&scores)[32], u32 (&p)[K_STEPS][4]) {
#pragma unroll
    for (int i = 0; i < K_STEPS * 4; i++) p[i / 4][i % 4] = pack2<Element>(scores[i * 2], scores[i * 2 + 1]);
}

// Writes this warp's 16 rows of P to a box, for the tensor cores to read.
__device__ __forceinline__ void store_probabilities(u8* box, const u32 (&p)[K_STEPS][4], const Place& place) {
    const u32 matrices = place.matrices(box);
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) store_matrix_x4(place.matrix(matrices, step), p[step]);
    fence_async_shared();
}

// Multiplies this warp's 16 rows of P by their factors, where they lie.
__device__ __forceinline__ void rescale_probabilities(u8* box, const float (&factor)[2], const Place& place) {
    const u32 matrices = place.matrices(box);
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        u32 p[4];
        load_matrix_x4(p, place.matrix(matrices, step));
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = scale2<Element>(p[i], factor[i % 2]);
        store_matrix_x4(place.matrix(matrices, step), p);
    }
    fence_async_shared();
}

// The references of the other side's P, once it is there.
template <int OTHER>
__device__ __forceinline__ void read_references(Shared& shared, const Place& place, u32 parity, float (&reference)[2]) {
    wait(shared.p_ready[OTHER], parity);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float read = place.leads_quad() ? shared.row_reference[OTHER][place.row(half)] : 0.0f;
        reference[half] = __shfl_sync(0xFFFFFFFF, read, 0, 4);  // from the lane that leads the quad
    }
}

// Waits for the other side's P. Brings it, the output and the sums to the higher of the references of both.
template <int OTHER>
__device__ __forceinline__ void take_over(Shared& shared, const Place& place, u32 parity, float scale,
    float (&reference)[2], float (&output)[128], float (&sum)[2]) {
    float theirs[2];
    read_references<OTHER>(shared, place, parity, theirs);
    if (__any_sync(0xFFFFFFFF, theirs[0] != reference[0] || theirs[1] != reference[1])) {
        const float common[2] = {fmaxf(reference[0], theirs[0]), fmaxf(reference[1], theirs[1])};
        const float for_us[2] = {exp2_approx((reference[0] - common[0]) * scale),
                                 exp2_approx((reference[1] - common[1]) * scale)};
        const float for_them[2] = {exp2_approx((theirs[0] - common[0]) * scale),
                                   exp2_approx((theirs[1] - common[1]) * scale)};
        rescale(output, sum, for_us);
        rescale_probabilities(OTHER == LEFT ? shared.p0 : shared.q[ROPE_BOX], for_them, place);
        reference[0] = common[0];
        reference[1] = common[1];
    }
    named_barrier_sync(ONE_SIDE + (OTHER ^ 1), WARPGROUP);  // P is whole, rescaled or not
}

// O += P V for the other side's block.
template <int SIDE>
__device__ __forceinline__ void multiply_other(Shared& shared, const Place& place, u32 parity, float scale,
    float (&reference)[2], float (&output)[128], float (&sum)[2]) {
    constexpr int OTHER = SIDE ^ 1;
    take_over<OTHER>(shared, place, parity, scale, reference, output, sum);
    pin_registers(output);
    wgmma_fence();
    start_output<SIDE, OTHER>(output, SIDE == LEFT ? P1_OFFSET : P0_OFFSET);
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(output);
    release(shared.k_empty[OTHER][SIDE], place);
}

// Read again wherever it is asked: the consumers have no registers to keep it in.
__device__ __forceinline__ Part part(const MlaDecodeParams& params, const Shared& shared) {
    return Part(shared.plan_row, gridDim.z, params.batch);
}

// What a side works on: notes in shared memory, since there are no registers to keep it in.
__device__ __forceinline__ const volatile Piece& piece_of(const Shared& shared, int side) { return shared.pieces[side]; }

// Called by the whole side when all of it has read what was there.
__device__ __forceinline__ void begin_piece(const MlaDecodeParams& params, Shared& shared, int side, int number, u32 parity) {
    named_barrier_sync(ONE_SIDE + side, WARPGROUP);
    if (here(threadIdx.x) % WARPGROUP == 0) {
        volatile Piece& piece = shared.pieces[side];
        const Part all = part(params, shared);
        piece.request = number;
        piece.parity = parity;
        if (number <= all.last_request) {
            const Request request(params, number, blockIdx.x * ROWS);
            piece.length = request.length;
            piece.limit_min = request.limit_min;
            piece.first = all.first(number, request.blocks());
            piece.last = all.last(number, request.blocks());
        }
    }
    named_barrier_sync(ONE_SIDE + side, WARPGROUP);
}

// Parities of barriers that complete once a block of our side, a block of the other.
struct Turns {
    u32 own, other;
};

// One piece: its unnormalised output, and the sums of its probabilities.
template <int SIDE>
__device__ __forceinline__ void attend(const MlaDecodeParams& params, Shared& shared, int first_row, Turns& turns,
    float (&output)[128], float (&reference)[2], float (&sum)[2], Trace& trace) {
    const Place place(here(threadIdx.x));
    const float scale = params.scale_log2;
    const volatile Piece& piece = piece_of(shared, SIDE);
    const int last = piece.last;

    u32 q_rope[K_STEPS][4];
    wait(shared.q_full, piece.parity);
    trace.mark(TRACE_Q);
    const u32 matrices = place.matrices(shared.q[ROPE_BOX]);
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) load_matrix_x4(q_rope[step], place.matrix(matrices, step));
    __syncwarp();
    if (place.lane == 0) mbarrier_arrive(shared_address(&shared.q_in_registers));
    if (SIDE == RIGHT) wait(shared.q_in_registers, piece.parity);

    for (int pair = piece.first; pair < last; pair += 2) {  // the last may lack its second block, which is right's
        const int block = pair + SIDE;
        if (SIDE == LEFT || block < last) {
            // 1. S of our own block.
            float scores[32];
            u32 p[K_STEPS][4];
            pin_registers(scores);
            start_scores<SIDE>(scores, shared, q_rope, turns.own);
            wgmma_commit();
            const bool valid = __shfl_sync(0xFFFFFFFF, place.lane == 0 ? shared.page_is_valid[SIDE] : 0, 0) != 0;
            const int limit_min = piece.limit_min;
            wgmma_wait<0>();
            pin_registers(scores);
            trace.mark(TRACE_SCORES);
            release(shared.k_empty[SIDE][ROPE_BOXES_FREE], place);

            // 2. Its probabilities, for both sides.
            if (!valid || (block + 1) * KEYS > limit_min) {
                const Place again(here(threadIdx.x));  // rather than keep what is rarely used
                const int limit[2] = {Request::limit(params, piece.length, first_row + again.row(0)),
                                      Request::limit(params, piece.length, first_row + again.row(1))};
                mask_scores<SIDE>(scores, shared, again, limit, limit_min, block, valid);
            }
            if (SIDE == RIGHT && pair == piece.first) read_references<LEFT>(shared, place, turns.other, reference);
            const float before[2] = {reference[0], reference[1]};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                reference[half] = block_reference(scores, half, before[half], scale);
                exponentiate(scores, half, reference[half], scale);
            }
            pack_probabilities(scores, p);
            store_probabilities(SIDE == LEFT ? shared.p0 : shared.q[ROPE_BOX], p, place);
            __syncwarp();
            if (place.leads_quad()) {
                shared.row_reference[SIDE][place.row(0)] = reference[0];
                shared.row_reference[SIDE][place.row(1)] = reference[1];
                mbarrier_arrive(shared_address(&shared.p_ready[SIDE]));
            }
            trace.mark(TRACE_P);

            // 3. The product with our own block's values.
            if (__any_sync(0xFFFFFFFF, reference[0] != before[0] || reference[1] != before[1])) {
                const float factor[2] = {exp2_approx((before[0] - reference[0]) * scale),
                                         exp2_approx((before[1] - reference[1]) * scale)};
                rescale(output, sum, factor);
            }
            pin_registers(output);
            wgmma_fence();
            start_output<SIDE, SIDE>(output, p);
            wgmma_commit();
            add_to_sums(scores, sum);
            wgmma_wait<0>();
            pin_registers(output);
            release(shared.k_empty[SIDE][SIDE], place);
            turns.own ^= 1;
        }

        // 4. The product with the other block of the pair.
        if (SIDE == RIGHT || pair + 1 < last) {
            multiply_other<SIDE>(shared, place, turns.other, scale, reference, output, sum);
            turns.other ^= 1;
        }
        trace.mark(TRACE_OUTPUT);
    }
    mbarrier_arrive(shared_address(&shared.q_empty));
}

// Each side has summed its own blocks' probabilities; afterwards both have the sums of all.
__device__ __forceinline__ void share_sums(Shared& shared, const Place& place, int side, u32 turn, float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] = quad_sum(sum[half]);
        if (place.leads_quad()) shared.row_sum[turn][side][place.row(half)] = sum[half];
    }
    mbarrier_arrive(shared_address(&shared.sums_ready));
    wait(shared.sums_ready, turn);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float read = place.leads_quad() ? shared.row_sum[turn][side ^ 1][place.row(half)] : 0.0f;
        sum[half] += __shfl_sync(0xFFFFFFFF, read, 0, 4);
    }
}

// Which merge a part's last work belongs to.
__device__ __forceinline__ int last_end(const Part& part) {
    return part.first_request == part.last_request && part.begin_block > 0 ? FRONT : BACK;  // front: a single piece
}

// The consumers merge the request that the part ends with a piece of, and depart from the merges that it has pieces in.
__device__ __forceinline__ void finish_part(const MlaDecodeParams& params, Shared& shared) {
    const Part at_first = part(params, shared);
    if (at_first.first_request > at_first.last_request || (at_first.begin_block == 0 && !at_first.end_is_cut)) return;
    Trace trace(TRACE_MERGING + threadIdx.x / WARPGROUP - 1, threadIdx.x % WARPGROUP == 0);
    if (shared.merges[last_end(at_first)].pieces > 0) {
        const int consumer = here(threadIdx.x) - WARPGROUP;
        merge_share(params, shared, last_end(at_first), at_first.last_request, uniform(consumer / 32), consumer % 32, trace);
    }
    trace.mark(TRACE_WRITTEN);
    named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);
    const int consumer = here(threadIdx.x) - WARPGROUP, end = consumer / 32;
    if (end > BACK || shared.merges[end].pieces == 0) return;  // a warp for the merge at each end
    const Part at_last = part(params, shared);
    depart(params, shared, end, end == FRONT ? at_last.first_request : at_last.last_request,
           shared.left_task && end == last_end(at_last), consumer % 32);
}

// The two sides.
__device__ __forceinline__ void consume(const MlaDecodeParams& params, Shared& shared) {
    Trace trace(threadIdx.x / WARPGROUP - 1, threadIdx.x % WARPGROUP == 0);
    Turns turns = {0, 0};
    begin_piece(params, shared, threadIdx.x / WARPGROUP - 1, part(params, shared).first_request, 0);
    while (piece_of(shared, here(threadIdx.x) / WARPGROUP - 1).request <= part(params, shared).last_request) {
        float output[128], reference[2] = {NO_REFERENCE, NO_REFERENCE}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 128; i++) output[i] = 0.0f;
        if (threadIdx.x < 2 * WARPGROUP) {
            attend<LEFT>(params, shared, blockIdx.x * ROWS, turns, output, reference, sum, trace);
        } else {
            attend<RIGHT>(params, shared, blockIdx.x * ROWS, turns, output, reference, sum, trace);
        }
        const int thread = here(threadIdx.x), side = thread / WARPGROUP - 1;
        const Place place(thread);
        const volatile Piece& piece = piece_of(shared, side);
        share_sums(shared, place, side, piece.parity, sum);
        trace.mark(TRACE_SUMS);
        if (part(params, shared).is_partial(piece.request)) {
            wait(shared.merges_found, 0);
            const int end = part(params, shared).begin(piece.request) > 0 ? FRONT : BACK;
            write_partial(params, shared, end, output, reference, sum, place, side);
        } else {
            write_output(params, output, reference, sum, place, side, blockIdx.x * ROWS, piece.request);
        }
        trace.mark(TRACE_WRITTEN);
        begin_piece(params, shared, side, piece.request + 1, piece.parity ^ 1);
    }
    finish_part(params, shared);
}

}  // namespace

// Grid: (row blocks, KV heads, parts). Row blocks of a part are neighbours, so that they run in step and the second
// finds K in L2.
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ MlaDecodeParams params) {
    extern __shared__ u8 dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    const int first_row = blockIdx.x * ROWS;
    const int warp = threadIdx.x / 32;

    if (threadIdx.x == 0) {
        if (shared_address(&shared) != config::SHARED_BASE) __trap();
        tma_prefetch_map(&params.k_map);
        mbarrier_init(shared_address(&shared.q_full), Q_LOADERS);
        mbarrier_init(shared_address(&shared.q_empty), 2 * WARPGROUP);
        mbarrier_init(shared_address(&shared.q_in_registers), 2 * WARPGROUP / 32);
        mbarrier_init(shared_address(&shared.sums_ready), 2 * WARPGROUP);
        mbarrier_init(shared_address(&shared.merges_found), Q_LOADERS);
        for (int slot = 0; slot < 2; slot++) {
            for (int box = 0; box < BOXES; box++) mbarrier_init(shared_address(&shared.k_full[slot][box]), 1);
            for (int boxes = 0; boxes < 3; boxes++) mbarrier_init(shared_address(&shared.k_empty[slot][boxes]), 4);
            mbarrier_init(shared_address(&shared.p_ready[slot]), WARPGROUP / 4);  // lanes that lead a quad
        }
        shared.left_task = 0;
        mbarrier_init_fence();
    }
    wait_for_previous_kernel();  // everything above overlaps the end of the kernel before this one
    launch_next_kernel();
    if (threadIdx.x < PLAN_ROW_INTS) {
        reinterpret_cast<int*>(&shared.plan_row)[threadIdx.x] = params.plan[blockIdx.z * PLAN_ROW_INTS + threadIdx.x];
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (warp < 2) {
            if (elect_lane()) produce_k(params, shared, warp, first_row);
        } else {
            produce_q(params, shared, first_row);
        }
        return;
    }
    grow_registers<CONSUMER_REGISTERS>();
    consume(params, shared);
}
