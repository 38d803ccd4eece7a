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
//   P0, row_max[0]: left -> right   written before P0_READY. Left writes again after its next S0, for which it needs K boxes
//                                   that right's product P0 V0_R had to free first.
//   P1, row_max[1]: right -> left   written before P1_READY. Left awaits its product P1 V1_L before the next P0_READY, and
//                                   right writes again after that.
#include "mla_plan.cuh"
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace {

using Element = config::Element;
constexpr int ROWS = config::BLOCK_ROWS;
constexpr int KEYS = config::BLOCK_KEYS;
constexpr int HEAD_DIM = config::HEAD_DIM;
constexpr int HEAD_DIM_V = config::HEAD_DIM_V;
constexpr int BOXES = HEAD_DIM / BOX_COLUMNS;         // 9 boxes a K block
constexpr int VALUE_BOXES = HEAD_DIM_V / BOX_COLUMNS;  // the first 8 are also V
constexpr int HALF_BOXES = VALUE_BOXES / 2;
constexpr int ROPE_BOX = VALUE_BOXES;
constexpr int K_STEPS = BOX_COLUMNS / 16;  // products of depth 16 a box
static_assert(ROWS == BOX_ROWS && KEYS == BOX_ROWS, "rows and keys of a tile fill the rows of a box");
static_assert(BOXES == VALUE_BOXES + 1 && VALUE_BOXES == 8, "the roles below divide 8 value boxes and one rope box");

constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
constexpr int LEFT = 0, RIGHT = 1;  // sides, and the K slots that they own
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int Q_LOADERS = 64;  // threads

// Named barriers (0 is __syncthreads).
constexpr int P0_READY = 1, P1_READY = 2, BOTH_SIDES = 3, ONE_SIDE = 4;  // ONE_SIDE + side

// The maximum before any key: low enough that 2^(anything - m) vanishes, finite so that no inf - inf arises.
constexpr float NO_MAXIMUM = -1e30f;
constexpr float LN_2 = 0.693147180559945309f;

struct alignas(1024) Shared {  // q_offset, k_offset and P0_OFFSET count on this order
    u8 q[BOXES][BOX_BYTES];     // box 8 moves to registers at once; P1 takes its place
    u8 k[2][BOXES][BOX_BYTES];  // [slot]
    u8 p0[BOX_BYTES];
    float row_max[2][ROWS];
    float row_sum[2][ROWS];
    int page_is_valid[2];
    u64 q_full, q_empty;
    u64 k_full[2][BOXES];
    u64 k_empty[2][3];  // V_L boxes, V_R boxes, rope box
};
constexpr int ROPE_BOXES_FREE = 2;  // k_empty[slot][LEFT | RIGHT | this]
static_assert(sizeof(Shared) == config::SHARED_BYTES, "the host asks for exactly this much");
static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper thread block");

__device__ __forceinline__ void wait(const u64& barrier, u32 parity) {
    mbarrier_wait<config::TRAP_AFTER_SPINS>(shared_address(&barrier), parity);
}

// What a thread block knows of one request: which keys its rows see.
struct Request {
    int length;     // keys of the request, clamped to its block table
    int limit_min;  // keys seen by the first of our rows
    int limit_max;  // ... by the last: the keys that this thread block has to visit

    // causal aligns to the bottom right: query i sees keys j < length - seq_len_q + i + 1.
    __device__ __forceinline__ static int limit(const MlaDecodeParams& params, int length, int row) {
        if (!params.causal) return length;
        return clamp(length - params.seq_len_q + row / params.heads_per_group + 1, 0, length);
    }
    __device__ __forceinline__ Request(const MlaDecodeParams& params, int request, int first_row) {
        const i64 capacity = static_cast<i64>(params.max_blocks) * KEYS;
        length = params.cache_seqlens[request];
        length = length < 0 ? 0 : (length > capacity ? static_cast<int>(capacity) : length);
        limit_min = limit(params, length, first_row);
        limit_max = limit(params, length, min(first_row + ROWS, params.rows_per_group) - 1);
    }
    __device__ __forceinline__ int blocks() const { return (limit_max + KEYS - 1) / KEYS; }
};

// ------------------------------------------------------------------------------------------------ producers

// Fills one K slot: the even (slot 0) or odd (slot 1) blocks of every piece. One lane does it all.
__device__ void produce_k(const MlaDecodeParams& params, Shared& shared, int slot, int first_row) {
    const u64 policy = gridDim.x > 1 ? l2_evict_normal() : l2_evict_first();  // several row blocks share K through L2
    const int kv_head = blockIdx.y;
    u32 parity = 0;
    for (PartWalk walk(params.plan, blockIdx.z, gridDim.z, params.batch); walk.more(); walk.next()) {
        const Request request(params, walk.request, first_row);
        const int first = walk.first(request.blocks()), last = walk.last(request.blocks());
        const int* table = params.block_table + walk.request * params.block_table_stride;
        int page = first + slot < last ? table[first + slot] : -1;
        for (int block = first + slot; block - slot < last; block += 2) {
            // A page out of range, or the missing second block of the last pair: the copy engine fills in zeros and
            // the scores will be masked.
            const bool valid = page >= 0 && page < params.num_blocks;
            const int coordinate = valid ? page : -1;
            page = block + 2 < last ? table[block + 2] : -1;  // fetched ahead

            auto load = [&](int box) {
                const u32 barrier = shared_address(&shared.k_full[slot][box]);
                mbarrier_arrive_expect(barrier, BOX_BYTES);
                tma_load_4d(shared_address(shared.k[slot][box]), &params.k_map, barrier, box * BOX_COLUMNS, 0, kv_head,
                            coordinate, policy);
            };
            wait(shared.k_empty[slot][ROPE_BOXES_FREE], parity ^ 1);
            shared.page_is_valid[slot] = valid;
            load(ROPE_BOX);
            for (int half = 0; half < 2; half++) {  // the owner of the slot frees its own half first
                const int side = slot ^ half;
                wait(shared.k_empty[slot][side], parity ^ 1);
#pragma unroll
                for (int box = 0; box < HALF_BOXES; box++) load(side * HALF_BOXES + box);
            }
            parity ^= 1;
        }
    }
}

// Copies the 64 query rows of every piece to shared memory, in the boxes that TMA would have made: rows are pairs
// (query, head), which no tensor map can cut into runs of 64 for every head count. A warp takes 32 rows; each lane
// finds where one of them lies, then 8 lanes at a time copy a row's 128 bytes of a box.
__device__ void produce_q(const MlaDecodeParams& params, Shared& shared, int first_row) {
    constexpr int ROWS_A_WARP = ROWS / (Q_LOADERS / 32);
    static_assert(ROWS_A_WARP == 32, "one row a lane");
    const int lane = threadIdx.x % 32, warp_row = (threadIdx.x / 32 - 2) * ROWS_A_WARP;
    const int group_row = first_row + warp_row + lane;
    const bool row_exists = group_row < params.rows_per_group;
    const i64 row_offset = group_row / params.heads_per_group * params.q_stride_seq +
                           (blockIdx.y * params.heads_per_group + group_row % params.heads_per_group) * params.q_stride_head;
    u32 parity = 0;
    for (PartWalk walk(params.plan, blockIdx.z, gridDim.z, params.batch); walk.more(); walk.next()) {
        const Request request(params, walk.request, first_row);
        if (walk.first(request.blocks()) == walk.last(request.blocks())) continue;
        const u16* const lane_row = params.q + (row_exists ? walk.request * params.q_stride_batch + row_offset : 0);
        wait(shared.q_empty, parity ^ 1);
#pragma unroll 1
        for (int group = 0; group < ROWS_A_WARP; group += 4) {
            const int owner = group + lane / 8, row = warp_row + owner, chunk = lane % 8;
            const u16* source = reinterpret_cast<const u16*>(
                                    __shfl_sync(0xFFFFFFFF, reinterpret_cast<u64>(lane_row), owner)) + chunk * 8;
            const bool valid = __shfl_sync(0xFFFFFFFF, static_cast<int>(row_exists), owner) != 0;
            u8* destination = shared.q[0] + box_offset(row, chunk);
            if (params.q_is_aligned) {
#pragma unroll
                for (int box = 0; box < BOXES; box++) {
                    copy_async_16(shared_address(destination + box * BOX_BYTES), source + box * BOX_COLUMNS, valid);
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < BOXES * 8; i++) {
                    const int box = i / 8, element = i % 8;
                    reinterpret_cast<u16*>(destination + box * BOX_BYTES)[element] =
                        valid ? source[box * BOX_COLUMNS + element] : static_cast<u16>(0);
                }
            }
        }
        copy_async_wait_all();
        fence_async_shared();
        mbarrier_arrive(shared_address(&shared.q_full));
        parity ^= 1;
    }
}

// ------------------------------------------------------------------------------------------------ consumers

// One thread's place in its warpgroup's 64-row tiles. Accumulator i of a product belongs to row (i & 2 ? high : low) and
// column i / 4 * 8 + lane % 4 * 2 + i % 2.
struct Place {
    int lane, warp;  // warp of the warpgroup
    __device__ __forceinline__ Place() : lane(threadIdx.x % 32), warp(threadIdx.x % WARPGROUP / 32) {}
    __device__ __forceinline__ int row(int half) const { return warp * 16 + lane / 4 + half * 8; }
    __device__ __forceinline__ int pair_column() const { return lane % 4 * 2; }
    // Address for ldmatrix and stmatrix of the 64 x 16 slice `step` of a box.
    __device__ __forceinline__ u32 matrix(const u8* box, int step) const {
        return shared_address(box) + box_offset(warp * 16 + lane % 16, step * 2 + lane / 16);
    }
};

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

// The descriptor of a tile that begins `offset` bytes into shared memory: a constant, since dynamic shared memory begins
// at a known address (mla_decode checks it). Computed at run time, descriptors would fill registers that the output needs
// or keep the tensor cores waiting for them.
constexpr u32 SHARED_BASE = 1024;
__device__ constexpr u64 descriptor(u32 offset) { return swizzled_descriptor(SHARED_BASE + offset); }
__device__ constexpr u32 q_offset(int box) { return box * BOX_BYTES; }
__device__ constexpr u32 k_offset(int slot, int box) { return sizeof(Shared::q) + (slot * BOXES + box) * BOX_BYTES; }
constexpr u32 P0_OFFSET = k_offset(2, 0), P1_OFFSET = q_offset(ROPE_BOX);

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
// finite either, so it turns NaN all the same.)
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
__device__ __forceinline__ void take_over_maximum(const Shared& shared, const Place& place, float scale,
    float (&maximum)[2], float (&output)[128], float (&sum)[2]) {
    named_barrier_sync(OTHER == LEFT ? P0_READY : P1_READY, 2 * WARPGROUP);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float now = shared.row_max[OTHER][place.row(half)];
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
            if (SIDE == LEFT && place.lane % 4 == 0) params.partial_lse[at] = empty ? -INFINITY_F32 : lse;
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
        if (SIDE == LEFT && valid && place.lane % 4 == 0) {
            params.lse[to.request * params.lse_stride_batch + head * params.lse_stride_head +
                       query * params.lse_stride_seq] = empty ? INFINITY_F32 : lse * LN_2;
        }
    }
}

template <int SIDE>
__device__ __forceinline__ void consume(const MlaDecodeParams& params, Shared& shared, int first_row) {
    const Place place;
    const float scale = params.scale_log2;
    u8* const p1_box = shared.q[ROPE_BOX];
    u32 q_parity = 0, k_parity = 0;

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
            wait(shared.q_full, q_parity);
            q_parity ^= 1;
#pragma unroll
            for (int step = 0; step < K_STEPS; step++) load_matrix_x4(q_rope[step], place.matrix(shared.q[ROPE_BOX], step));
            named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);  // P1 may overwrite Q's rope box

            for (int block = first + SIDE; block - SIDE < last; block += 2) {
                // 1. Start S of our own block. Right multiplies the left block's P behind it.
                float scores[32];
                u32 p[K_STEPS][4];
                pin_registers(scores);
                start_scores<SIDE>(scores, shared, q_rope, k_parity);
                wgmma_commit();
                if (SIDE == RIGHT) {
                    take_over_maximum<LEFT>(shared, place, scale, maximum, output, sum);
                    pin_registers(output);
                    wgmma_fence();
                    start_output<RIGHT, LEFT>(output, P0_OFFSET);
                    wgmma_commit();
                    wgmma_wait<1>();
                } else {
                    wgmma_wait<0>();
                }
                pin_registers(scores);
                const bool valid = shared.page_is_valid[SIDE];
                release(shared.k_empty[SIDE][ROPE_BOXES_FREE], place);
                k_parity ^= 1;

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
                if (place.lane % 4 == 0) {
                    shared.row_max[SIDE][place.row(0)] = maximum[0];
                    shared.row_max[SIDE][place.row(1)] = maximum[1];
                }
                store_probabilities(SIDE == LEFT ? shared.p0 : p1_box, p, place);
                named_barrier_arrive(SIDE == LEFT ? P0_READY : P1_READY, 2 * WARPGROUP);

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
                    take_over_maximum<RIGHT>(shared, place, scale, maximum, output, sum);
                    pin_registers(output);
                    wgmma_fence();
                    start_output<LEFT, RIGHT>(output, P1_OFFSET);
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin_registers(output);
                    release(shared.k_empty[RIGHT][LEFT], place);
                }
            }
            release(shared.q_empty, place);

            // Each side has summed its own blocks' probabilities.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[half] = quad_sum(sum[half]);
                if (place.lane % 4 == 0) shared.row_sum[SIDE][place.row(half)] = sum[half];
            }
            named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);
#pragma unroll
            for (int half = 0; half < 2; half++) sum[half] += shared.row_sum[SIDE ^ 1][place.row(half)];
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
        if (shared_address(&shared) != SHARED_BASE) __trap();
        tma_prefetch_map(&params.k_map);
        mbarrier_init(shared_address(&shared.q_full), Q_LOADERS);
        mbarrier_init(shared_address(&shared.q_empty), 8);  // warps of both sides
        for (int slot = 0; slot < 2; slot++) {
            for (int box = 0; box < BOXES; box++) mbarrier_init(shared_address(&shared.k_full[slot][box]), 1);
            for (int boxes = 0; boxes < 3; boxes++) mbarrier_init(shared_address(&shared.k_empty[slot][boxes]), 4);
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
