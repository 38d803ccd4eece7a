// Plans that cut a line: requests in their order, end to end.
//
// A candidate is (how many parts to use, how far a cut may slide to the nearest border between requests, what a request counts on
// the line besides its blocks). Its cuts stand at equal distances on the line; a warp evaluates a candidate, a lane a part, by
// binary search in the prefix sum of costs.
#pragma once
#include "mla_plan.cuh"

namespace {

constexpr int THREADS = config::SCHEDULE_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int UNIT = config::COST_UNIT;
constexpr int CANDIDATES = config::SCHEDULE_CANDIDATES;
constexpr int PREFIX_IN_SHARED = 8192;  // requests whose prefix fits in shared memory; beyond, num_splits holds it
constexpr int MAX_PARTS = config::MAX_PARTS;
constexpr int MOST_PAIRED = 2 * MAX_PARTS;  // requests
static_assert(MOST_PAIRED <= THREADS, "a thread a request");

struct Cut {
    int request, block;  // before block `block` of request `request`
};

struct Shared {
    int prefix[PREFIX_IN_SHARED + 1];
    int warp_totals[WARPS];
    int candidate_cost[CANDIDATES], candidate_total[CANDIDATES];
    Cut cuts[MAX_PARTS + 1];
    int cuts_inside_before[MAX_PARTS + 2];  // how many of the cuts before this one lie inside a request
    int by_length[MOST_PAIRED];             // the longest first
    int is_cut[MOST_PAIRED];
    struct {
        int dearest, total, is_cut;
    } pairs[2];  // with one part a pair, and with two
};

// Exclusive prefix sum over the thread block; `total` gets the sum.
__device__ int block_scan(int value, int* warp_totals, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int inclusive = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(0xFFFFFFFF, inclusive, step);
        if (lane >= step) inclusive += left;
    }
    __syncthreads();
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < WARPS; w++) {
        const int sum = warp_totals[w];
        before += w < warp ? sum : 0;
        total += sum;
    }
    return before + inclusive - value;
}

struct Candidate {
    int parts;         // to use
    int slack;         // how far a cut may slide
    int request_cost;  // what a request counts on the line besides its blocks
};

struct Planner {
    const MlaScheduleParams& params;
    const int* prefix;  // [batch + 1] cost of all requests before this one
    int total;          // prefix[batch]
    int total_blocks;

    // The planned blocks of a request: its length, capped so that sums stay in 32 bits.
    __device__ __forceinline__ int blocks(int request) const {
        const int length = params.cache_seqlens[request];
        const int count = length <= 0 ? 0 : (length - 1) / config::BLOCK_KEYS + 1;
        const int cap = config::MAX_PLANNED_BLOCKS / params.batch;
        return count < cap ? count : cap;
    }

    // The same, from the prefix sum.
    __device__ __forceinline__ int planned(int request) const {
        return (prefix[request + 1] - prefix[request] - params.segment_cost) / UNIT;
    }

    __device__ __forceinline__ int position(Cut cut) const {
        return prefix[cut.request] + (cut.block > 0 ? params.segment_cost + UNIT * cut.block : 0);
    }

    // Where a request begins on a candidate's line.
    __device__ __forceinline__ int on_line(const Candidate& plan, int request) const {
        return prefix[request] - request * (params.segment_cost - plan.request_cost);
    }

    // Where a candidate's cut `index` falls.
    __device__ Cut locate(int index, const Candidate& plan) const {
        if (index <= 0) return {0, 0};
        if (index >= plan.parts) return {params.batch, 0};
        // Every part behind the first pays a segment_cost that the line does not hold, if it continues a request, as most
        // do where cuts matter. So the first part reaches that much further, and all finish together.
        const int length = on_line(plan, params.batch) - plan.request_cost;
        const int x = plan.request_cost + static_cast<int>(static_cast<i64>(length) * index / plan.parts);
        int low = 0, high = params.batch;  // the last request that begins at x or before
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (on_line(plan, middle) <= x) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const int inside = x - on_line(plan, low) - plan.request_cost;
        const int block = inside > 0 ? inside / UNIT : 0;
        const int request_blocks = planned(low);
        if (UNIT * block <= plan.slack) return {low, 0};
        if (UNIT * (request_blocks - block) <= plan.slack) return {low + 1, 0};
        return {low, block};
    }

    // The finish time that the model gives a candidate, and what all its parts cost. Called by a whole warp; every lane gets the result.
    __device__ int evaluate(const Candidate& plan, int& total_cost) const {
        const int lane = threadIdx.x % 32;
        total_cost = 0;
        int dearest = 0, most_pieces = 0;  // of the most divided request; 0: none is cut
        Cut carried = {0, 0};
        for (int base = 0; base < plan.parts; base += 32) {
            const int part = base + lane;
            const Cut end = locate(part + 1, plan);
            Cut begin = {__shfl_up_sync(0xFFFFFFFF, end.request, 1), __shfl_up_sync(0xFFFFFFFF, end.block, 1)};
            if (lane == 0) begin = carried;
            carried = {__shfl_sync(0xFFFFFFFF, end.request, 31), __shfl_sync(0xFFFFFFFF, end.block, 31)};
            if (part < plan.parts) {
                int cost = position(end) - position(begin);
                if (begin.block > 0) cost += params.segment_cost + params.piece_cost;
                if (end.block > 0) {
                    if (begin.block == 0 || begin.request < end.request) cost += params.piece_cost;
                    const int length = on_line(plan, params.batch) - plan.request_cost;  // its first cut, by the rule of locate
                    const int first = static_cast<int>(static_cast<i64>(on_line(plan, end.request)) * plan.parts / length) + 1;
                    most_pieces = max(most_pieces, part + 1 - first + 2);
                }
                dearest = max(dearest, cost);
                total_cost += cost;
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            total_cost += __shfl_xor_sync(0xFFFFFFFF, total_cost, step);
            dearest = max(dearest, __shfl_xor_sync(0xFFFFFFFF, dearest, step));
            most_pieces = max(most_pieces, __shfl_xor_sync(0xFFFFFFFF, most_pieces, step));
        }
        return dearest + merge(most_pieces);
    }
    __device__ __forceinline__ int merge(int most_pieces) const {
        return most_pieces == 0 ? 0 : params.merge_cost + params.merge_longest_cost * most_pieces / 16;
    }

    // How many parts candidate c uses: 0 puts whole requests on as few as finish no later, 1 takes no more than are needed for the
    // largest to have as few blocks as it can, 2.. take 16/16, 15/16, ..., and 15 as many as give every request the same number.
    __device__ __forceinline__ int candidate_parts(int candidate, int useful_parts) const {
        const int choice = candidate % 16;
        if (choice == 0) {
            const int requests_a_part = (params.batch + useful_parts - 1) / useful_parts;
            return (params.batch + requests_a_part - 1) / requests_a_part;
        }
        if (choice == 1) {
            const int blocks_a_part = max((total_blocks + useful_parts - 1) / useful_parts, 1);
            return max((total_blocks + blocks_a_part - 1) / blocks_a_part, 1);
        }
        if (choice == 15 && params.batch <= useful_parts) return useful_parts / params.batch * params.batch;
        const int parts = useful_parts * (18 - choice) / 16;
        return parts > 1 ? parts : 1;
    }
    // ... and lets cuts slide by 0, 1/8, 1/4 or 1/2 of a part. 1 and 15 count blocks alone, which cuts equal requests equally.
    __device__ __forceinline__ Candidate candidate(int number, int useful_parts) const {
        const int parts = candidate_parts(number, useful_parts), eighths = (1 << (number / 16)) >> 1;
        const bool counts_blocks = number % 16 == 1 || number % 16 == 15;
        return {parts, total / parts / 8 * eighths, counts_blocks ? 0 : params.segment_cost};
    }
};

}  // namespace
