// The split plan, as the scheduler writes it and the decode and combine kernels read it.
//
// Thread blocks form parts: part p is what one thread block per row block and KV head works through. The plan lays all
// requests end to end and cuts the line into parts, so a part is a run of whole requests with, perhaps, the tail of one
// at its front and the head of one at its end. One row of 8 int32 a part; DESIGN: only the cuts matter. A request's last
// piece always runs to the end that cache_seqlens gives when the kernel runs, so a plan made for other lengths stays
// correct and merely balances worse.
#pragma once
#include "ptx/types.cuh"

struct PlanRow {
    int begin_request;
    int begin_block;  // > 0: the front piece continues a request that an earlier part began
    int end_request;  // last request of the part; smaller than begin_request: the part is idle
    int end_block;    // one past the last block of end_request that this part takes
    int begin_split;  // which piece of begin_request the front piece is
    int end_is_cut;   // 1: end_request goes on in the next part
    int merge_count;  // > 0: end_request begins here and has this many pieces
    int reserved;
};
constexpr int PLAN_ROW_INTS = 8;
static_assert(sizeof(PlanRow) == PLAN_ROW_INTS * sizeof(int), "a plan row is 8 int32");

// Pieces of cut requests are kept in a workspace with two slots a part: one for a request's first piece (always the
// part's last work), one for a later piece (always its first). So the workspace does not grow with the batch.
__device__ __forceinline__ int piece_slot(int part, bool first_piece) { return 2 * part + (first_piece ? 1 : 0); }

// The work of one part, walked request by request. Everything read here is clamped: a plan or a length that makes no
// sense gives wrong numbers at most, never an access outside the caller's arrays.
struct PartWalk {
    int request, last_request;
    int begin_block, end_block;
    bool end_is_cut;

    // A lone part has no others to share a request with, and no workspace.
    __device__ __forceinline__ PartWalk(const int* plan, int part, int num_parts, int batch) {
        const int4 low = reinterpret_cast<const int4*>(plan)[2 * part];
        const int4 high = reinterpret_cast<const int4*>(plan)[2 * part + 1];
        request = clamp(low.x, 0, batch);
        last_request = clamp(low.z, -1, batch - 1);
        begin_block = low.y < 0 || num_parts == 1 ? 0 : low.y;
        end_block = low.w < 0 ? 0 : low.w;
        end_is_cut = high.y != 0 && num_parts > 1 && low.z < batch;
    }
    __device__ __forceinline__ bool more() const { return request <= last_request; }
    __device__ __forceinline__ void next() {
        request++;
        begin_block = 0;
    }
    // A piece is partial when other parts hold the rest of its request.
    __device__ __forceinline__ bool cut_here() const { return end_is_cut && request == last_request; }
    __device__ __forceinline__ bool is_partial() const { return begin_block > 0 || cut_here(); }
    // The blocks of this piece when the request has `blocks` blocks: [first, last).
    __device__ __forceinline__ int first(int blocks) const { return begin_block < blocks ? begin_block : blocks; }
    __device__ __forceinline__ int last(int blocks) const {
        const int end = cut_here() && end_block < blocks ? end_block : blocks;
        return end < first(blocks) ? first(blocks) : end;
    }
};
