// The split plan, as the scheduler writes it and the decode kernel reads it.
//
// Thread blocks form parts: part p is what one thread block per row block and KV head works through. It is a run of neighbouring
// requests with, perhaps, only the tail of the first and the head of the last. Behind that it may have one request from anywhere,
// whole. One row of 8 int32 a part. A request's last piece always runs to the end that cache_seqlens gives when the kernel runs, so
// a plan made for other lengths stays correct and merely balances worse.
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
    int extra;        // 1 + a request that the part has besides, whole, behind the others; 0: none
};
constexpr int PLAN_ROW_INTS = 8;
constexpr PlanRow IDLE_ROW = {0, 0, -1, 0, 0, 0, 0, 0};
constexpr int MOST_BLOCKS = 1 << 25;  // of a request: 2^31 keys
static_assert(sizeof(PlanRow) == PLAN_ROW_INTS * sizeof(int), "a plan row is 8 int32");

// Word `number` of a row, as a thread block keeps it: no `extra`, which is the last, where there is no such request.
__device__ __forceinline__ int checked_word(int number, int word, int batch) {
    return number == PLAN_ROW_INTS - 1 && (word < 0 || word > batch) ? 0 : word;
}

// Pieces of cut requests are kept in a workspace with two slots a part: one for a request's first piece (the end of the part's
// run), one for a later piece (always its first work). So the workspace does not grow with the batch.
__device__ __forceinline__ int piece_slot(int part, int num_parts, bool first_piece) {
    return first_piece ? part : num_parts + part;
}

// The work of one part: requests `first_request` to `last_request`, of the first from `begin_block` on, of the last perhaps
// only up to `end_block`, and behind them perhaps another one, whole. Everything read here is clamped, but for `extra`, which is
// checked: a plan or a length that makes no sense gives wrong numbers at most, never an access outside the caller's arrays.
struct Part {
    int first_request, last_request;
    int begin_block, end_block;
    bool end_is_cut;
    int last_number, extra_request;

    // A lone part has no others to share a request with, and no workspace.
    __device__ __forceinline__ Part(const PlanRow& row, int num_parts, int batch)
        : first_request(clamp(row.begin_request, 0, batch)), last_request(clamp(row.end_request, -1, batch - 1)),
          begin_block(num_parts == 1 ? 0 : clamp(row.begin_block, 0, MOST_BLOCKS)), end_block(max(row.end_block, 0)),
          end_is_cut(row.end_is_cut != 0 && num_parts > 1 && row.end_request < batch),
          last_number(last_request + min(row.extra, 1)), extra_request(row.extra - 1) {}
    // The part's work is numbered from first_request to last_number: as the requests are, but for the one behind them.
    __device__ __forceinline__ int request(int number) const { return number <= last_request ? number : extra_request; }
    // The piece of a request that the part holds begins and ends so ...
    __device__ __forceinline__ int begin(int number) const { return number == min(first_request, last_request) ? begin_block : 0; }
    __device__ __forceinline__ bool cut_at_end(int number) const { return end_is_cut && number == last_request; }
    // ... and is partial when other parts hold the rest.
    __device__ __forceinline__ bool is_partial(int number) const { return begin(number) > 0 || cut_at_end(number); }
    __device__ __forceinline__ bool has_pieces() const {
        return first_request <= last_request && (begin_block > 0 || end_is_cut);
    }
    // Its blocks when the request has `blocks` blocks: [first, last).
    __device__ __forceinline__ int first(int number, int blocks) const { return min(begin(number), blocks); }
    __device__ __forceinline__ int last(int number, int blocks) const {
        return max(cut_at_end(number) ? min(end_block, blocks) : blocks, first(number, blocks));
    }
};
