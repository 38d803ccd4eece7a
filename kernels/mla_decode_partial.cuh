// The workspace in which thread blocks leave pieces of cut requests for each other.
//
// A tile holds what one thread block leaves of one piece: up to 4 warps of 16 rows, 2 sides of 256 columns. The 16 rows and
// 256 columns of a warp are a strip: lines of 512 bytes, 16 a lane, as the accumulators lie in registers, and the weights of
// its rows. Lane l has columns l % 4 * 2 and + 1 of each group of 8 columns, in row l / 4 and in row l / 4 + 8. Tiles of
// neighbouring pieces lie side by side, and no strip is kept that has no rows.
//
// Few rows are kept in float32: a group a line, no arithmetic. From 33 on, for results in bf16, they are kept in fp16 (11 bits
// against 8), two groups a line: what L2 moves halves. Each row has a power of two for each half of the strip's columns, which
// brings the sum of its numbers there near the largest of fp16; it stands in the second 16 bytes of the row's weights, which are
// neither written nor read otherwise. That is for config::KEPT_IN_HALVES to say: all thread blocks of a call do the same, and
// code that does not run still costs time to skip.
//
// Every 64-bit word of the workspace says itself whether it has been written: its lowest bit, the word's phase, is another
// than before. (Readers clear that bit, so that it never changes a result.) A call writes all words of a strip or none, so a
// bit for each strip of a tile says what their phase is between calls. A reader needs no flag and no fence: it looks at the
// words until they are there.
//
// The words are written anew by every call, and keys that stream through L2 would have them written to device memory in
// between, in vain. So they are the last that L2 evicts.
#pragma once
#include "mla_plan.cuh"
#include "ptx/sync.cuh"
#include "ptx/types.cuh"

namespace {

constexpr int STRIP_ROWS = 16;
constexpr int STRIP_GROUPS = 32;
constexpr int GROUP_COLUMNS = 8;
constexpr int TILE_STRIPS = 8;           // 4 warps, 2 sides: strip = warp * 2 + side
constexpr int WEIGHTS = STRIP_ROWS / 2;  // of rows r and r + 8, 32 bytes each: what sums are relative to, sums, what numbers are

__device__ __forceinline__ int strips_a_tile(const MlaDecodeParams& params) {
    return min((params.rows_per_group + STRIP_ROWS - 1) / STRIP_ROWS * 2, TILE_STRIPS);
}
constexpr int GROUPS_A_LINE = config::KEPT_IN_HALVES ? 2 : 1;
constexpr int STRIP_LINES = STRIP_GROUPS / GROUPS_A_LINE;
constexpr int STRIP_SIZE = STRIP_LINES * 32 + 2 * WEIGHTS;  // in 16 bytes

// A word: two numbers, or four halves.
struct PieceWord {
    u64 bits;
    __device__ __forceinline__ PieceWord() {}
    __device__ __forceinline__ PieceWord(u32 x, u32 y) : bits(static_cast<u64>(y) << 32 | x) {}
    __device__ __forceinline__ PieceWord(float x, float y) : PieceWord(__float_as_uint(x), __float_as_uint(y)) {}
    __device__ __forceinline__ u32 x() const { return bits; }
    __device__ __forceinline__ u32 y() const { return bits >> 32; }
    __device__ __forceinline__ float2 numbers() const { return {__uint_as_float(x()), __uint_as_float(y())}; }
    __device__ __forceinline__ u64 with(u32 phase) const { return (bits & ~1ull) | phase; }
    // Sets bit 0 of `sum` if the word is of phase `phase`'s bit 0.
    __device__ __forceinline__ void add_if_of(u32 phase, u32& sum) const {
        asm("lop3.b32 %0, %0, %1, %2, 0xF9;" : "+r"(sum) : "r"(x()), "r"(phase));  // sum | ~(x ^ phase)
    }
    __device__ __forceinline__ void clear_phase() { bits &= ~1ull; }
};
// Two words, as they are moved.
struct PieceWords {
    PieceWord low, high;
    __device__ __forceinline__ void store(void* to, u32 phase) const {
        store_for_other_blocks<L2_EVICT_LAST>(to, low.with(phase), high.with(phase));
    }
    __device__ __forceinline__ void load(const void* from, bool wanted) {
        load_from_other_blocks(low.bits, high.bits, from, wanted);
    }
    __device__ __forceinline__ void add_if_of(u32 phase, u32& sum) const {
        low.add_if_of(phase, sum);
        high.add_if_of(phase, sum);
    }
    __device__ __forceinline__ void clear_phase() {
        low.clear_phase();
        high.clear_phase();
    }
};

// The tiles of this thread block's row block and KV head: of the pieces in `slot`.
__device__ __forceinline__ int merge_tile(int slot) {
    return (here(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * gridDim.z + slot;
}
// Where the strips of a tile lie, in 16 bytes.
__device__ __forceinline__ int piece_strips_at(const MlaDecodeParams& params, int slot) {
    return merge_tile(slot) * strips_a_tile(params) * STRIP_SIZE;
}
__device__ __forceinline__ PieceWords* piece_strips(const MlaDecodeParams& params, int slot) {
    return static_cast<PieceWords*>(params.partials) + piece_strips_at(params, slot);
}

// The power of two that brings numbers of at most `bound` into fp16's range, near its upper end. If some number is NaN, the bound
// is, and the others are not to suffer: they are taken to be of usual size (so beside a NaN a sum above 65504 becomes infinite).
__device__ __forceinline__ int exponent_for_halves(float bound) {
    return bound == bound ? clamp(127 + 14 - static_cast<int>(__float_as_uint(bound) >> 23), -112, 112) : 0;
}
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }

}  // namespace
