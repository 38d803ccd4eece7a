// The split plan, as the scheduler writes it and the decode kernel reads it.
//
// Thread blocks form parts: part p is what one thread block per row block and KV head works through. The plan lays all
// requests end to end and cuts the line into parts, so a part is a run of whole requests with, perhaps, the tail of one
// at its front and the head of one at its end. One row of 8 int32 a part. A request's last
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
constexpr int MOST_BLOCKS = 1 << 25;  // of a request: 2^31 keys
static_assert(sizeof(PlanRow) == PLAN_ROW_INTS * sizeof(int), "a plan row is 8 int32");

// Pieces of cut requests are kept in a workspace with two slots a part: one for a request's first piece (always the
// part's last work), one for a later piece (always its first). So the workspace does not grow with the batch.
__device__ __forceinline__ int piece_slot(int part, int num_parts, bool first_piece) {
    return first_piece ? part : num_parts + part;
}

// The work of one part: requests `first_request` to `last_request`, of the first from `begin_block` on, of the last perhaps
// only up to `end_block`. Everything read here is clamped: a plan or a length that makes no sense gives wrong numbers at
// most, never an access outside the caller's arrays.
struct Part {
    int first_request, last_request;
    int begin_block, end_block;
    bool end_is_cut;

    // A lone part has no others to share a request with, and no workspace.
    __device__ __forceinline__ Part(const PlanRow& row, int num_parts, int batch)
        : first_request(clamp(row.begin_request, 0, batch)), last_request(clamp(row.end_request, -1, batch - 1)),
          begin_block(num_parts == 1 ? 0 : clamp(row.begin_block, 0, MOST_BLOCKS)), end_block(max(row.end_block, 0)),
          end_is_cut(row.end_is_cut != 0 && num_parts > 1 && row.end_request < batch) {}
    // The piece of a request that the part holds begins and ends so ...
    __device__ __forceinline__ int begin(int request) const { return request == first_request ? begin_block : 0; }
    __device__ __forceinline__ bool cut_at_end(int request) const { return end_is_cut && request == last_request; }
    // ... and is partial when other parts hold the rest.
    __device__ __forceinline__ bool is_partial(int request) const { return begin(request) > 0 || cut_at_end(request); }
    __device__ __forceinline__ bool has_pieces() const {
        return first_request <= last_request && (begin_block > 0 || end_is_cut);
    }
    // Its blocks when the request has `blocks` blocks: [first, last).
    __device__ __forceinline__ int first(int request, int blocks) const { return min(begin(request), blocks); }
    __device__ __forceinline__ int last(int request, int blocks) const {
        return max(cut_at_end(request) ? min(end_block, blocks) : blocks, first(request, blocks));
    }
};
