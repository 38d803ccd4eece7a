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
// need the probabilities of every block (a simplification of "seesaw", FlashMLA's write-up of 2025-04-22, in which each
// side multiplies its own block first and P0 has to be rescaled by the maximum of both). For a pair of blocks 0 and 1:
//
//   left                                            right
//   S0 = Q K0^T                                     S1 = Q K1^T
//   m0 = max(m, S0), P0 = 2^(S0 - m0)   -- P0, m0 -->
//   O_L = O_L 2^(m - m0) + P0 V0_L                  O_R = O_R 2^(m - m0) + P0 V0_R
//                                       <-- P1, m1 --  m1 = max(m0, S1), P1 = 2^(S1 - m1)
//   O_L = O_L 2^(m0 - m1) + P1 V1_L                 O_R = O_R 2^(m0 - m1) + P1 V1_R
//
// The sides run half a pair apart: left's softmax runs under S1, right's under the products with V0. K lives in two
// slots of nine 64 x 64 boxes with a barrier each, so S starts with the first box that lands, and boxes are refilled as
// soon as their last reader is done: box 8 (rope, no value) after S, boxes 0..3 (V_L) after left's product, boxes 4..7
// (V_R) after right's.
//
// Who reads what, and why no barrier is missing:
//   P0, row_max[0]: left -> right   written before p_ready[0]. Left writes again after its next S0, for which it needs K boxes
//                                   that right's product P0 V0_R had to free first.
//   P1, row_max[1]: right -> left   written before p_ready[1]. Left awaits its product P1 V1_L before it arrives at the next
//                                   p_ready[0], and right writes again after that.
//   Q's rope box                    P1 takes its place. Both sides load it into registers before their first P, and right
//                                   writes its first P1 after left's first p_ready[0].
//   row_sum                         written before sums_ready, read after it, written again after a p_ready of the next piece
//                                   at which the reader arrived.
#include "mla_decode_block.cuh"
#include "mla_decode_load.cuh"
#include "mla_decode_store.cuh"
#include "mla_plan.cuh"
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

namespace {

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

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

__device__ __forceinline__ void row_maxima(const float (&scores)[32], float (&maximum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = fmaxf(scores[half * 2], scores[half * 2 + 1]);
#pragma unroll
        for (int i = 4; i < 32; i += 4) m = fmaxf(m, fmaxf(scores[i + half * 2], scores[i + half * 2 + 1]));
        maximum[half] = fmaxf(maximum[half], quad_max(m));
    }
}

// scores -> 2^(scale * (scores - maximum)), and this thread's share of the row sums.
__device__ __forceinline__ void exponentiate(
    float (&scores)[32], const float (&maximum)[2], float scale, float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float shift = maximum[half] * scale;
        float s = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
#pragma unroll
            for (int j = i + half * 2; j < i + half * 2 + 2; j++) {
                scores[j] = exp2_approx(fmaf(scores[j], scale, -shift));
                s += scores[j];
            }
        }
        sum[half] += s;
    }
}

// Whether any row of the warp has a factor other than 1.
__device__ __forceinline__ bool any_change(const float (&factor)[2]) {
    return __any_sync(0xFFFFFFFF, factor[0] != 1.0f || factor[1] != 1.0f);
}

// Multiplies rows by their factors; most of the time no maximum in the warp has moved and there is nothing to do.
__device__ __forceinline__ void rescale(float (&output)[128], float (&sum)[2], const float (&factor)[2]) {
    if (!any_change(factor)) return;
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

// Waits for the other side's P and goes over to the maximum that it is relative to.
template <int OTHER>
__device__ __forceinline__ void take_over_maximum(const Shared& shared, const Place& place, u32 parity, float scale,
    float (&maximum)[2], float (&output)[128], float (&sum)[2]) {
    wait(shared.p_ready[OTHER], parity);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float read = place.leads_quad() ? shared.row_max[OTHER][place.row(half)] : 0.0f;
        const float now = __shfl_sync(0xFFFFFFFF, read, 0, 4);  // from the lane that leads the quad
        factor[half] = exp2_approx((maximum[half] - now) * scale);
        maximum[half] = now;
    }
    rescale(output, sum, factor);
}

// Writes this warp's 16 rows of P to a box, for the tensor cores to read.
__device__ __forceinline__ void store_probabilities(u8* box, const u32 (&p)[K_STEPS][4], const Place& place) {
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) store_matrix_x4(place.matrix(box, step), p[step]);
    fence_async_shared();
}

template <int SIDE>
__device__ __forceinline__ void consume(const MlaDecodeParams& params, Shared& shared, int first_row) {
    const Place place;
    const float scale = params.scale_log2;
    u8* const p1_box = shared.q[ROPE_BOX];
    u32 piece_parity = 0, parity = 0;  // of barriers that complete once a piece, and once a pair of blocks

    for (PartWalk walk(params.plan, blockIdx.z, gridDim.z, params.batch); walk.more(); walk.next()) {
        const Request request(params, walk.request, first_row);
        const int first = walk.first(request.blocks()), last = walk.last(request.blocks());
        const int limit[2] = {Request::limit(params, request.length, first_row + place.row(0)),
                              Request::limit(params, request.length, first_row + place.row(1))};
        float output[128], maximum[2] = {NO_MAXIMUM, NO_MAXIMUM}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 128; i++) output[i] = 0.0f;

        if (first < last) {
            u32 q_rope[K_STEPS][4];
            wait(shared.q_full, piece_parity);
#pragma unroll
            for (int step = 0; step < K_STEPS; step++) load_matrix_x4(q_rope[step], place.matrix(shared.q[ROPE_BOX], step));

            for (int block = first + SIDE; block - SIDE < last; block += 2) {
                // 1. S of our own block. Right then multiplies the left block's P, and goes on under the product.
                float scores[32];
                u32 p[K_STEPS][4];
                pin_registers(scores);
                start_scores<SIDE>(scores, shared, q_rope, parity);
                wgmma_commit();
                wgmma_wait<0>();
                pin_registers(scores);
                if (SIDE == RIGHT) {
                    take_over_maximum<LEFT>(shared, place, parity, scale, maximum, output, sum);
                    pin_registers(output);
                    wgmma_fence();
                    start_output<RIGHT, LEFT>(output, P0_OFFSET);
                    wgmma_commit();
                }
                const bool valid = __shfl_sync(0xFFFFFFFF, place.lane == 0 ? shared.page_is_valid[SIDE] : 0, 0) != 0;
                release(shared.k_empty[SIDE][ROPE_BOXES_FREE], place);

                // 2. The maximum with our block, P, and both for the other side.
                if (!valid || (block + 1) * KEYS > request.limit_min) {
                    mask_scores<SIDE>(scores, shared, place, limit, request.limit_min, block, valid);
                }
                const float before[2] = {maximum[0], maximum[1]};
                row_maxima(scores, maximum);
                const float factor[2] = {exp2_approx((before[0] - maximum[0]) * scale),
                                         exp2_approx((before[1] - maximum[1]) * scale)};
                float own_sum[2] = {0.0f, 0.0f};
                exponentiate(scores, maximum, scale, own_sum);
                pack_probabilities(scores, p);
                store_probabilities(SIDE == LEFT ? shared.p0 : p1_box, p, place);
                __syncwarp();
                if (place.leads_quad()) {
                    shared.row_max[SIDE][place.row(0)] = maximum[0];
                    shared.row_max[SIDE][place.row(1)] = maximum[1];
                    mbarrier_arrive(shared_address(&shared.p_ready[SIDE]));
                }

                // 3. The product with our own block's values.
                if (SIDE == RIGHT) {
                    wgmma_wait<0>();
                    pin_registers(output);
                    release(shared.k_empty[LEFT][RIGHT], place);
                }
                rescale(output, sum, factor);
                sum[0] += own_sum[0];
                sum[1] += own_sum[1];
                pin_registers(output);
                wgmma_fence();
                start_output<SIDE, SIDE>(output, p);
                wgmma_commit();
                wgmma_wait<0>();
                pin_registers(output);
                release(shared.k_empty[SIDE][SIDE], place);

                // 4. Left multiplies the right block's P.
                if (SIDE == LEFT) {
                    take_over_maximum<RIGHT>(shared, place, parity, scale, maximum, output, sum);
                    pin_registers(output);
                    wgmma_fence();
                    start_output<LEFT, RIGHT>(output, P1_OFFSET);
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin_registers(output);
                    release(shared.k_empty[RIGHT][LEFT], place);
                }
                parity ^= 1;
            }
            mbarrier_arrive(shared_address(&shared.q_empty));

            // Each side has summed its own blocks' probabilities.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[half] = quad_sum(sum[half]);
                if (place.leads_quad()) shared.row_sum[SIDE][place.row(half)] = sum[half];
            }
            mbarrier_arrive(shared_address(&shared.sums_ready));
            wait(shared.sums_ready, piece_parity);
            piece_parity ^= 1;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float read = place.leads_quad() ? shared.row_sum[SIDE ^ 1][place.row(half)] : 0.0f;
                sum[half] += __shfl_sync(0xFFFFFFFF, read, 0, 4);
            }
        }

        const int rows = params.heads_k * params.rows_per_group;
        const int slot = piece_slot(blockIdx.z, walk.begin_block == 0);
        const Destination to = {walk.is_partial(),
            static_cast<i64>(slot) * rows + blockIdx.y * params.rows_per_group + first_row, walk.request};
        write_results<SIDE>(params, output, maximum, sum, place, first_row, to);
    }
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
        mbarrier_init(shared_address(&shared.sums_ready), 2 * WARPGROUP);
        for (int slot = 0; slot < 2; slot++) {
            for (int box = 0; box < BOXES; box++) mbarrier_init(shared_address(&shared.k_full[slot][box]), 1);
            for (int boxes = 0; boxes < 3; boxes++) mbarrier_init(shared_address(&shared.k_empty[slot][boxes]), 4);
            mbarrier_init(shared_address(&shared.p_ready[slot]), WARPGROUP / 4);  // lanes that lead a quad
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    wait_for_previous_kernel();  // everything above overlaps the end of the kernel before this one
    launch_next_kernel();

    if (threadIdx.x < WARPGROUP) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (warp < 2) {
            if (elect_lane()) produce_k(params, shared, warp, first_row);
        } else {
            produce_q(params, shared, first_row);
        }
    } else if (threadIdx.x < 2 * WARPGROUP) {
        grow_registers<CONSUMER_REGISTERS>();
        consume<LEFT>(params, shared, first_row);
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume<RIGHT>(params, shared, first_row);
    }
}
