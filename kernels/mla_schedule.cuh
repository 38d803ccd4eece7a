// The planner: cuts a batch of any size into parts of equal modelled cost, in one thread block, without the host.
//
// Model. Costs count 1/16 of the time that one part needs for one block of 64 keys. A request of n blocks costs
// segment_cost + 16 n. A cut costs segment_cost once more (the query tile is loaded and an output written again) and
// piece_cost for each piece (its output goes to the workspace). Any cut at all brings a merge: merge_cost, and
// merge_longest_cost / 16 a piece of the most divided request. The finish time of a plan is its dearest part plus its merge.
//
// Search. A candidate is (how many parts to use, how far a cut may slide to the nearest border between requests, what a request
// counts on the line besides its blocks). Its cuts stand at equal distances on the line; a warp evaluates a candidate, a lane a
// part, by binary search in the prefix sum of costs. The cheapest of 64 candidates is written out. schedule.py holds the same
// arithmetic in NumPy, and tests hold the two to equality.
#include "mla_plan.cuh"
#include "ptx/sync.cuh"

namespace {

constexpr int THREADS = config::SCHEDULE_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int UNIT = config::COST_UNIT;
constexpr int CANDIDATES = config::SCHEDULE_CANDIDATES;
constexpr int PREFIX_IN_SHARED = 8192;  // requests whose prefix fits in shared memory; beyond, num_splits holds it
constexpr int MAX_PARTS = config::MAX_PARTS;

struct Cut {
    int request, block;  // before block `block` of request `request`
};

struct Shared {
    int prefix[PREFIX_IN_SHARED + 1];
    int warp_totals[WARPS];
    int candidate_cost[CANDIDATES];
    Cut cuts[MAX_PARTS + 1];
    int cuts_inside_before[MAX_PARTS + 2];  // how many of the cuts before this one lie inside a request
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
        const int request_blocks = (prefix[low + 1] - prefix[low] - params.segment_cost) / UNIT;
        if (UNIT * block <= plan.slack) return {low, 0};
        if (UNIT * (request_blocks - block) <= plan.slack) return {low + 1, 0};
        return {low, block};
    }

    // The finish time that the model gives a candidate. Called by a whole warp; every lane gets the result.
    __device__ int evaluate(const Candidate& plan) const {
        const int lane = threadIdx.x % 32;
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
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            dearest = max(dearest, __shfl_xor_sync(0xFFFFFFFF, dearest, step));
            most_pieces = max(most_pieces, __shfl_xor_sync(0xFFFFFFFF, most_pieces, step));
        }
        return most_pieces == 0 ? dearest : dearest + params.merge_cost + params.merge_longest_cost * most_pieces / 16;
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_schedule(const __grid_constant__ MlaScheduleParams params) {
    __shared__ Shared shared;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int batch = params.batch, num_parts = params.num_parts;
    wait_for_previous_kernel();
    launch_next_kernel();

    // 1. The prefix sum of costs, a tile of requests at a time.
    int* prefix = batch <= PREFIX_IN_SHARED ? shared.prefix : params.num_splits;
    Planner planner{params, prefix, 0, 0};
    for (int base = 0; base < batch; base += THREADS) {
        const int request = base + thread;
        const int blocks = request < batch ? planner.blocks(request) : 0;
        int tile_cost, tile_blocks;
        const int before =
            block_scan(request < batch ? params.segment_cost + UNIT * blocks : 0, shared.warp_totals, tile_cost);
        block_scan(blocks, shared.warp_totals, tile_blocks);
        if (request < batch) prefix[request] = planner.total + before;
        planner.total += tile_cost;
        planner.total_blocks += tile_blocks;
    }
    if (thread == 0) prefix[batch] = planner.total;
    __syncthreads();

    // 2. Every warp evaluates its share of the candidates; no part shall get less than a block.
    const int useful_parts = clamp(planner.total_blocks, 1, num_parts);
    for (int number = warp; number < CANDIDATES && batch > 0; number += WARPS) {
        const int cost = planner.evaluate(planner.candidate(number, useful_parts));
        if (lane == 0) shared.candidate_cost[number] = cost;
    }
    __syncthreads();
    int best = 0;
    for (int candidate = 1; candidate < CANDIDATES && batch > 0; candidate++) {
        if (shared.candidate_cost[candidate] < shared.candidate_cost[best]) best = candidate;
    }

    // 3. The cuts of the cheapest, and how many of them lie inside requests.
    const Candidate plan = batch > 0 ? planner.candidate(best, useful_parts) : Candidate{0, 0, 0};
    const int parts = plan.parts;
    int inside_before = 0;
    for (int base = 0; base <= parts; base += THREADS) {
        const int index = base + thread;
        const Cut cut = index <= parts && batch > 0 ? planner.locate(index, plan) : Cut{batch, 0};
        int tile_inside;
        const int before = block_scan(index <= parts && cut.block > 0, shared.warp_totals, tile_inside);
        if (index <= parts) {
            shared.cuts[index] = cut;
            shared.cuts_inside_before[index] = inside_before + before;
        }
        inside_before += tile_inside;
    }
    if (thread == 0) shared.cuts_inside_before[parts + 1] = inside_before;
    __syncthreads();

    // The first cut at or after the beginning of `request`.
    auto first_cut = [&](int request) {
        int low = 0, high = parts + 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (shared.cuts[middle].request < request) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    };
    auto pieces_of = [&](int request) {
        return shared.cuts_inside_before[first_cut(request + 1)] - shared.cuts_inside_before[first_cut(request)] + 1;
    };

    // 4. The rows of the plan.
    for (int part = thread; part < num_parts; part += THREADS) {
        PlanRow row = {0, 0, -1, 0, 0, 0, 0, 0};
        if (part < parts) {
            const Cut begin = shared.cuts[part], end = shared.cuts[part + 1];
            if (begin.request != end.request || begin.block != end.block) {
                const bool is_cut = end.block > 0;
                row.begin_request = begin.request;
                row.begin_block = begin.block;
                row.end_request = is_cut ? end.request : end.request - 1;
                row.end_block = is_cut ? end.block : planner.blocks(end.request - 1);
                row.begin_split = begin.block > 0 ? shared.cuts_inside_before[part] -
                                                        shared.cuts_inside_before[first_cut(begin.request)] + 1
                                                  : 0;
                row.end_is_cut = is_cut;
                const bool begins_here = begin.request < end.request || begin.block == 0;
                row.merge_count = is_cut && begins_here ? pieces_of(end.request) : 0;
            }
        }
        reinterpret_cast<PlanRow*>(params.plan)[part] = row;
    }

    // 5. How many pieces all requests before this one have. The prefix sum is no longer needed.
    __syncthreads();
    for (int request = thread; request <= batch; request += THREADS) {
        params.num_splits[request] = request + shared.cuts_inside_before[first_cut(request)];
    }
}
