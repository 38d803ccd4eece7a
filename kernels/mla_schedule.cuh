// The planner: gives a batch of any size to parts of equal modelled cost, in one thread block, without the host.
//
// Model. Costs count 1/16 of the time that one part needs for one block of 64 keys. A request of n blocks costs
// segment_cost + 16 n. A cut costs segment_cost once more (the query tile is loaded and an output written again) and
// piece_cost for each piece (its output goes to the workspace). Any cut at all brings a merge: merge_cost, and
// merge_longest_cost / 16 a piece of the most divided request. The finish time of a plan is its dearest part plus its merge.
//
// Two kinds of plans are tried: all requests laid end to end and cut (mla_schedule_line.cuh), and requests in pairs
// (mla_schedule_pairs.cuh). Parts that end before the dearest are not quite lost where memory is the limit: they leave bandwidth to
// the others. So where the two are compared, `pooled` sixteenths of the difference of the finish time and the mean are taken off.
//
// schedule.py and schedule_pairs.py hold the same arithmetic in NumPy, and tests hold them to equality.
#include "mla_plan.cuh"
#include "mla_schedule_line.cuh"
#include "mla_schedule_pairs.cuh"
#include "ptx/sync.cuh"

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
        int total;
        const int cost = planner.evaluate(planner.candidate(number, useful_parts), total);
        if (lane == 0) {
            shared.candidate_cost[number] = cost;
            shared.candidate_total[number] = total;
        }
    }
    __syncthreads();
    int best = 0;
    for (int candidate = 1; candidate < CANDIDATES && batch > 0; candidate++) {
        if (shared.candidate_cost[candidate] < shared.candidate_cost[best]) best = candidate;
    }

    // 3. Pairs, if they finish earlier.
    if (batch > useful_parts / 2 && batch <= 2 * useful_parts) {
        sort_by_length(planner, batch, shared.by_length);
        if (thread < 2) shared.pairs[thread] = {0, 0, 0};
        __syncthreads();
        auto pooled = [&](int cost, int total) { return cost - max(cost - total / useful_parts, 0) / 16 * params.pooled; };
        int cheapest = pooled(shared.candidate_cost[best], shared.candidate_total[best]), parts_a_group = 0;
        for (int parts = 1; parts <= 2; parts++) {
            Pairs pairs{params, planner, shared.by_length, parts, useful_parts / parts, 0};
            if (!pairs.fits()) continue;
            auto& found = shared.pairs[parts - 1];
            if (thread < pairs.groups) atomicMax(&found.dearest, pairs.group(thread).cost);
            __syncthreads();
            pairs.enough = found.dearest;
            if (thread < pairs.groups) {
                const Group group = pairs.group(thread);
                atomicAdd(&found.total, group.total);
                if (group.cut > 0) found.is_cut = 1;
            }
            __syncthreads();
            const int cost = pooled(found.dearest + planner.merge(found.is_cut ? 2 : 0), found.total);
            if (cost < cheapest) {
                cheapest = cost;
                parts_a_group = parts;
            }
        }
        if (parts_a_group > 0) {
            const int enough = shared.pairs[parts_a_group - 1].dearest;
            write_pairs({params, planner, shared.by_length, parts_a_group, useful_parts / parts_a_group, enough}, shared);
            return;
        }
    }

    // 4. The cuts of the cheapest, and how many of them lie inside requests.
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

    // 5. The rows of the plan.
    for (int part = thread; part < num_parts; part += THREADS) {
        PlanRow row = IDLE_ROW;
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

    // 6. How many pieces all requests before this one have. The prefix sum is no longer needed.
    __syncthreads();
    for (int request = thread; request <= batch; request += THREADS) {
        params.num_splits[request] = request + shared.cuts_inside_before[first_cut(request)];
    }
}
