// What a thread block of the decode kernel is made of: its roles, its shared memory, its rows. mla_decode.cuh tells the story.
#pragma once
#include "mla_decode_partial.cuh"
#include "mla_plan.cuh"
#include "ptx/mbarrier.cuh"
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

constexpr int ONE_SIDE = 1, BOTH_SIDES = 3;  // named barriers: ONE_SIDE + side, of a warpgroup alone (0 is __syncthreads)

// The reference before any key: low enough that 2^(anything - m) vanishes, finite so that no inf - inf arises.
constexpr float NO_REFERENCE = -1e30f;
constexpr float RANGE = 8.0f;  // probabilities reach 2^RANGE before the reference follows: well inside 16-bit floats
constexpr float LN_2 = 0.693147180559945309f;

// A request's pieces lie in neighbouring parts: the first is the last work of part `head`, the others the first work of
// the parts that follow. A task of their merge is `lines` neighbouring lines of one strip; workers take the tasks in turn.
// Few pieces: a worker is a warp. Many: a team, which is all consumer warps of a thread block.
struct Merge {
    int head, pieces;  // 0 pieces: none
    int piece;         // which of them is ours, and the number of our first worker
    int strips;        // of the tile, that have rows
    int workers, lines, tasks_a_strip;
    int team;
    __device__ __forceinline__ int tasks() const { return strips * tasks_a_strip; }
};
// A request, or a piece of one, that a side works on.
struct Piece {
    int request;
    u32 parity;             // of barriers that complete once a piece
    int length, limit_min;  // as in Request
    int first, last;        // its blocks of keys: [first, last)
};

constexpr int FRONT = 0, BACK = 1;  // the piece that a part begins with, and the one that it ends with

struct alignas(1024) Shared {  // q_offset, k_offset and P0_OFFSET count on this order
    u8 q[BOXES][BOX_BYTES];     // box 8 moves to registers at once; P1 takes its place
    u8 k[2][BOXES][BOX_BYTES];  // [slot]
    u8 p0[BOX_BYTES];
    float row_reference[2][ROWS];
    float row_sum[2][2][ROWS];  // [turn of the piece][side]
    int page_is_valid[2];
    Piece pieces[2];  // [side]
    PlanRow plan_row;
    Merge merges[2];
    u8 phases[2][config::MAX_PARTS];  // of the merges' pieces: bit s is that of strip s, before this call
    int left_task;  // whether a warp left a task of its merge behind
    u64 q_full, q_in_registers, q_empty;
    u64 k_full[2][BOXES];
    u64 k_empty[2][3];  // V_L boxes, V_R boxes, rope box
    u64 p_ready[2];     // [side]: its P and references are written
    u64 sums_ready;
    u64 merges_found;
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

// Which query and head a row is.
struct RowPlace {
    int query, head;
    __device__ __forceinline__ RowPlace(const MlaDecodeParams& params, int row) : query(0), head(row) {
        if (params.seq_len_q > 1) {  // a division takes long
            query = row / params.heads_per_group;
            head = row % params.heads_per_group;
        }
        head += blockIdx.y * params.heads_per_group;
    }
};

// One thread's place in its warpgroup's 64-row tiles. Accumulator i of a product belongs to row (i & 2 ? high : low) and
// column i / 4 * 8 + lane % 4 * 2 + i % 2.
struct Place {
    int lane, warp;  // warp of the warpgroup
    __device__ __forceinline__ explicit Place(int thread) : lane(thread % 32), warp(thread % WARPGROUP / 32) {}
    __device__ __forceinline__ int row(int half) const { return warp * 16 + lane / 4 + half * 8; }
    __device__ __forceinline__ int pair_column() const { return lane % 4 * 2; }
    __device__ __forceinline__ bool leads_quad() const { return lane % 4 == 0; }  // a quad shares its rows
    // Address for ldmatrix and stmatrix of the 64 x 16 slice `step` of a box, of which `matrices` is the first: two chunks of
    // 16 bytes on, which the swizzle makes an exclusive or.
    __device__ __forceinline__ u32 matrices(const u8* box) const {
        return here(shared_address(box) + box_offset(warp * 16 + lane % 16, lane / 16));
    }
    __device__ __forceinline__ static u32 matrix(u32 matrices, int step) { return matrices ^ step * 32; }
};

// Over the lanes of a quad.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// The descriptor of a tile that begins `offset` bytes into shared memory: a constant, since dynamic shared memory begins
// at a known address (mla_decode checks it). Computed at run time, descriptors would fill registers that the output needs
// or keep the tensor cores waiting for them.
__device__ constexpr u64 descriptor(u32 offset) { return swizzled_descriptor(config::SHARED_BASE + offset); }
__device__ constexpr u32 q_offset(int box) { return box * BOX_BYTES; }
__device__ constexpr u32 k_offset(int slot, int box) { return sizeof(Shared::q) + (slot * BOXES + box) * BOX_BYTES; }
constexpr u32 P0_OFFSET = k_offset(2, 0), P1_OFFSET = q_offset(ROPE_BOX);

}  // namespace
