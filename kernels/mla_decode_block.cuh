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
constexpr int ROPE_BOX = VALUE_BOXES;
constexpr int K_STEPS = BOX_COLUMNS / 16;  // products of depth 16 a box
static_assert(ROWS == BOX_ROWS && KEYS == BOX_ROWS, "rows and keys of a tile fill the rows of a box");
static_assert(BOXES == VALUE_BOXES + 1 && VALUE_BOXES == 8, "the roles below divide 8 value boxes and one rope box");

constexpr int WARPGROUP = 128;
constexpr int THREADS = 4 * WARPGROUP;
constexpr int CONSUMER_WARPS = 2 * WARPGROUP / 32, LOG2_CONSUMER_WARPS = 3;  // left's and right's
constexpr int LEFT = 0, RIGHT = 1;  // halves of the output's columns, and the warpgroups that hold them
// Registers a thread, of 512 that the four warpgroups share. At the end the scorers give theirs to those who merge.
constexpr int PRODUCER_REGISTERS = 32, SCORE_REGISTERS = 160, OUTPUT_REGISTERS = 160, MERGE_REGISTERS = 224;
static_assert(PRODUCER_REGISTERS + SCORE_REGISTERS + 2 * OUTPUT_REGISTERS <= 512, "as many as there are");
static_assert(2 * PRODUCER_REGISTERS + 2 * MERGE_REGISTERS <= 512, "as many as there are");
constexpr int Q_LOADERS = 2;  // warps, the last of the producers', where Q is gathered by threads
constexpr int Q_ARRIVALS = config::PLAIN ? 1 : Q_LOADERS * 32, Q_RELEASES = config::PLAIN ? 1 : Q_LOADERS;

// Rows of a query tile that the copy engine brings; the others are zero.
__device__ __forceinline__ int query_rows(const MlaDecodeParams& params) {
    return config::KEPT_IN_HALVES || !config::PLAIN ? ROWS : params.q_map_rows;
}

// Rings of shared memory. Two neighbouring boxes of values are a pair: half of what left or right reads of a block.
constexpr int PAIR_BYTES = 2 * BOX_BYTES, PAIRS_A_BLOCK = VALUE_BOXES / 2, PAIRS = 11;
constexpr int RING_BLOCKS = PAIRS / PAIRS_A_BLOCK + 1;  // of keys that the ring begins to hold
constexpr int ALL_BLOCKS = 0x7FFFFFFF;                  // no more will be asked for
constexpr int TAILS = 3;   // boxes for the rope columns of a block and then its probabilities
constexpr int PIECES = 2;  // notes
constexpr int Q_IN_REGISTERS = 6, Q_IN_SHARED = BOXES - Q_IN_REGISTERS;  // boxes
constexpr int Q_PAIRS = Q_IN_REGISTERS / 2;                              // on the way to registers

constexpr int SCORERS = 1, BOTH_SIDES = 3;  // named barriers (0 is __syncthreads)

// The reference before any key: low enough that 2^(anything - m) vanishes, finite so that no inf - inf arises.
constexpr float NO_REFERENCE = -1e30f;
// When the sum of a thread's 16 probabilities of a row and block exceeds MOST, well inside 16-bit floats, or is not a number, the
// warp looks for the maxima of its rows, and rows with such a sum get theirs as reference.
constexpr float MOST = 256.0f;
constexpr float LN_2 = 0.693147180559945309f;

// A request's pieces lie in neighbouring parts: the first is the last work of part `head`, the others the first work of
// the parts that follow. A task of their merge is `lines` neighbouring lines of one strip, and a worker has one of them or none.
// Few pieces: a worker is a warp. Many: a team, which is all consumer warps of a thread block.
struct Merge {
    int head, pieces;  // 0 pieces: none
    int piece;         // which of them is ours
    int strips;        // of the tile, that have rows
    int lines;
    int log2_tasks;    // of the tasks of a strip
    int team;
    __device__ __forceinline__ int tasks() const { return strips << log2_tasks; }
};
struct MergeTask {
    int task;           // its number; negative: nothing to do
    int strip, number;  // of the tile's strips, of the strip's tasks
    int first, later;   // where its lines of piece 0 lie; of piece p they lie p tiles behind `later`. In 16 bytes
    int weights;        // from its lines to the weights of the strip
};
// A request, or a piece of one: what all roles have to know alike, so one of them finds it out.
struct Piece {
    int length, limit_min;  // as in Request
    int first, last;        // its blocks of keys: [first, last)
    int pair;               // where its query tile is: steps in the ring of pairs
};

constexpr int FRONT = 0, BACK = 1;  // the piece that a part begins with, and the one that it ends with

struct alignas(1024) Shared {  // descriptors count on the order of the boxes
    u8 pairs[PAIRS][2][BOX_BYTES];
    u8 tails[TAILS][BOX_BYTES];
    u8 q[Q_IN_SHARED][BOX_BYTES];  // the last boxes of the query tile
    float row_factor[TAILS][ROWS];  // of the output so far, where rescales says so
    int rescales[TAILS][4];         // [warp]
    float row_reference[PIECES][ROWS];
    float row_sum[PIECES][ROWS];
    u8 page_is_valid[TAILS];
    Piece pieces[PIECES];
    PlanRow plan_row;
    Merge merges[2];
    u8 phases[2][config::MAX_PARTS];  // of the merges' pieces: bit s is that of strip s, before this call
    MergeTask tasks[CONSUMER_WARPS];  // of the merge at the part's end: one a warp, or the first for all
    int has_orphans[2];               // whether tasks were left behind, of the merges from which this thread block departed last
    volatile int blocks_asked;        // of keys, by the loader, so far
    u64 pair_full[PAIRS], pair_empty[PAIRS];
    u64 tail_full[TAILS], tail_empty[TAILS];
    u64 rope_is_read[TAILS], p_ready[TAILS];
    u64 piece_ready[PIECES], piece_empty[PIECES];
    u64 q_ready[PIECES], q_empty;
    u64 sums_ready[PIECES];
    u64 keys_asked, merges_found, tasks_ready, plan_ready;
};
static_assert(sizeof(Shared) == config::SHARED_BYTES, "the host asks for exactly this much");
static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper thread block");

__device__ __forceinline__ void wait(const u64& barrier, u32 parity) {
    mbarrier_wait<config::TRAP_AFTER_SPINS>(shared_address(&barrier), parity);
}

// One arrival a warp: all its lanes have done what the barrier counts.
__device__ __forceinline__ void arrive_as_warp(u64& barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
}

// What a thread block knows of one request: which keys its rows see.
struct Request {
    int length;     // keys of the request, clamped to its block table
    int limit_min;  // keys seen by the first of our rows
    int limit_max;  // ... by the last: the keys that this thread block has to visit

    // causal aligns to the bottom right: query i sees keys j < length - seq_len_q + i + 1.
    __device__ __forceinline__ static int limit(const MlaDecodeParams& params, int length, int row) {
        if (!params.causal || params.seq_len_q == 1) return length;
        return clamp(length - params.seq_len_q + row / params.heads_per_group + 1, 0, length);
    }
    __device__ __forceinline__ Request(const MlaDecodeParams& params, int request, int first_row) {
        const i64 capacity = static_cast<i64>(params.max_blocks) * KEYS;
        length = params.cache_seqlens[request];
        length = length < 0 ? 0 : (length > capacity ? static_cast<int>(capacity) : length);
        limit_min = limit(params, length, first_row);
        limit_max = limit(params, length, min(first_row + ROWS, params.rows_per_group) - 1);
    }
    __device__ __forceinline__ int blocks() const { return limit_max / KEYS + (limit_max % KEYS > 0); }
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
constexpr u32 TAILS_OFFSET = PAIRS * PAIR_BYTES, Q_OFFSET = TAILS_OFFSET + TAILS * BOX_BYTES;
// From one to the next, in descriptors of places that are known at run time alone.
constexpr u64 NEXT_PAIR = PAIR_BYTES >> 4, NEXT_BOX = BOX_BYTES >> 4;

// A place in a ring of `SIZE`, in one register: steps from the beginning, modulo two rounds.
template <int SIZE>
struct Ring {
    int steps;
    __device__ __forceinline__ explicit Ring(int steps = 0) : steps(steps) {}
    __device__ __forceinline__ int at() const { return steps < SIZE ? steps : steps - SIZE; }
    __device__ __forceinline__ u32 turn() const { return steps >= SIZE; }  // rounds so far, modulo 2: what barriers are asked for
    // The place `more` steps further, fewer than two rounds.
    __device__ __forceinline__ Ring operator+(int more) const {
        return Ring(steps + more < 2 * SIZE ? steps + more : steps + more - 2 * SIZE);
    }
    __device__ __forceinline__ void operator+=(int more) { *this = *this + more; }
};

}  // namespace
