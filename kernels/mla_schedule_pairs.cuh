// Plans of pairs: requests in order of length, the longest with the shortest, the next with the next, ...
//
// Such pairs are about equally long. So a part a pair, or two parts with a cut in the longer one, balance with few cuts or none,
// where the line has one for nearly every part. If there are more parts than that takes, the longest requests have theirs alone.
#pragma once
#include "mla_plan.cuh"
#include "mla_schedule_line.cuh"

namespace {

// A request or two that have their own parts, the longer one cut before block `cut`, if that is not 0.
struct Group {
    int longer, shorter;  // shorter: -1 if there is none
    int cut;
    int cost, total;  // the dearest part's, and both parts'
};

// Requests in groups of at most two, each of which has `parts_a_group` parts, one or two.
struct Pairs {
    const MlaScheduleParams& params;
    const Planner& planner;
    const int* by_length;
    int parts_a_group, groups;
    int enough;  // no request is cut that costs no more whole

    __device__ __forceinline__ bool fits() const { return groups < params.batch && params.batch <= 2 * groups; }
    __device__ __forceinline__ int cost_of(int request) const { return params.segment_cost + UNIT * planner.planned(request); }

    __device__ Group group(int number) const {
        const int alone = 2 * groups - params.batch;
        const bool is_pair = number >= alone;
        Group group = {by_length[number], is_pair ? by_length[params.batch - 1 - (number - alone)] : -1, 0, 0, 0};
        const int longer = cost_of(group.longer), shorter = is_pair ? cost_of(group.shorter) : 0;
        group.total = longer + shorter;
        group.cost = parts_a_group == 1 ? longer + shorter : longer;
        if (parts_a_group == 1 || longer <= enough) return group;
        const int blocks = planner.planned(group.longer);
        const int cut = (longer + shorter - params.segment_cost) / (2 * UNIT);  // so that both parts take as long
        if (cut > 0 && cut < blocks) {
            const int piece = params.segment_cost + params.piece_cost;
            const int cost = max(piece + UNIT * cut, piece + UNIT * (blocks - cut) + shorter);
            if (cost < group.cost) {
                group.cost = cost;
                group.cut = cut;
                group.total += piece + params.piece_cost;
            }
        }
        return group;
    }

    // The row of one of the group's parts.
    __device__ PlanRow row(const Group& group, int part) const {
        const int longer = group.longer, shorter = group.shorter, blocks = planner.planned(longer);
        if (parts_a_group == 1) return {longer, 0, longer, blocks, 0, 0, 0, shorter + 1};
        if (group.cut > 0) {
            return part == 0 ? PlanRow{longer, 0, longer, group.cut, 0, 1, 2, 0}
                             : PlanRow{longer, group.cut, longer, blocks, 1, 0, 0, shorter + 1};
        }
        if (part == 0) return {longer, 0, longer, blocks, 0, 0, 0, 0};
        return shorter >= 0 ? PlanRow{shorter, 0, shorter, planner.planned(shorter), 0, 0, 0, 0} : IDLE_ROW;
    }
};

// Sorts the requests by length, with a thread for each.
__device__ void sort_by_length(const Planner& planner, int batch, int* by_length) {
    const int request = threadIdx.x;
    if (request >= batch) return;
    const int blocks = planner.planned(request);
    int rank = 0;
    for (int other = 0; other < batch; other++) {
        const int others = planner.planned(other);
        rank += others > blocks || (others == blocks && other < request);
    }
    by_length[rank] = request;
}

// Writes the plan of pairs.
__device__ void write_pairs(const Pairs& pairs, Shared& shared) {
    const MlaScheduleParams& params = pairs.params;
    const int thread = threadIdx.x;
    if (thread < params.batch) shared.is_cut[thread] = 0;
    __syncthreads();
    if (thread < params.num_parts) {
        const int number = thread / pairs.parts_a_group;
        PlanRow row = IDLE_ROW;
        if (number < pairs.groups) {
            const Group group = pairs.group(number);
            row = pairs.row(group, thread % pairs.parts_a_group);
            if (row.merge_count > 0) shared.is_cut[group.longer] = 1;
        }
        reinterpret_cast<PlanRow*>(params.plan)[thread] = row;
    }
    __syncthreads();
    int total;
    const int before = block_scan(thread < params.batch && shared.is_cut[thread], shared.warp_totals, total);
    if (thread <= params.batch) params.num_splits[thread] = thread + before;
}

}  // namespace
