// Merges the pieces of a request that was cut over several parts, inside the decode kernel.
//
// Every thread block that ends with a piece of the request may get a share: it looks at its columns of all pieces until
// they are written (mla_decode_partial.cuh), adds them up (mla_decode_pieces.cuh), and writes the result. (Where a part goes on with
// the next request behind a last piece, it is left for the others. One request from anywhere behind it does not count.)
//
// Every part that has a piece departs from the merge, long before that: when it has asked for all its keys and knows what it has
// to know of the pieces. The same operation tells it its share. The last to depart leaves everything as the next call expects it.
//
// The thread blocks of a grid are on the device together as a rule, but nothing promises it. So nobody waits for ever, unless all
// have departed, which says that all pieces are written or about to be: a helper that loses patience before that leaves its
// task to the last to depart, and after that keeps it and waits. Either way one warp does it alone, and adds in another order: the
// last bits may differ then.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_partial.cuh"
#include "mla_decode_pieces.cuh"
#include "mla_decode_trace.cuh"
#include "mla_plan.cuh"
#include "ptx/convert.cuh"
#include "ptx/sync.cuh"

namespace {

constexpr int TEAM_PIECES = 10;  // from so many pieces on, the warps of a thread block share a task
static_assert(TILE_STRIPS <= CONSUMER_WARPS && TILE_STRIPS < TEAM_PIECES, "a worker for every strip: one task a worker will do");

constexpr int ORPHAN_WORDS = 4;  // at most 128 tasks

// What is kept of a tile from call to call. Zero at first.
struct MergeState {
    u32 phases;  // bit s: the phase of strip s
    // Of the merge whose first piece has the tile; zero between calls.
    u32 departures;  // the parts that departed, CLAIM times those of them that have a share, and perhaps TASKS_LEFT
    u32 orphans[ORPHAN_WORDS];  // the tasks that were left behind, a bit each
    u32 reserved[2];
    static constexpr u32 CLAIM = 1 << 12, TASKS_LEFT = 1u << 31;
    __device__ __forceinline__ static int departed(u32 departures) { return departures % CLAIM; }
    __device__ __forceinline__ static int claimed(u32 departures) { return departures / CLAIM % CLAIM; }
    __device__ __forceinline__ static MergeState& of(const MlaDecodeParams& params, int slot) {
        return static_cast<MergeState*>(params.merge_states)[merge_tile(slot)];
    }
    // Leaves a task to the last of `pieces` parts to depart. False: that one departed before, so whoever has the task keeps it.
    __device__ __forceinline__ bool leave_behind(int task, int pieces) {
        u32* const word = &orphans[task / 32];
        const u32 bit = 1u << task % 32;
        atomic_or(word, bit);
        memory_fence();  // who finds TASKS_LEFT finds the task
        const int before = departed(atomic_or(&departures, TASKS_LEFT));
        if (before > 0 && before < pieces) return true;
        if (before == 0) atomic_and(&departures, ~TASKS_LEFT);  // cleared already, for the next call
        return (atomic_and(word, ~bit) & bit) == 0;             // or it was found with others
    }
};
static_assert(sizeof(MergeState) == config::TILE_STATE_BYTES, "the host allocates this much a tile");

// What there is to know of the merge of the request that the part begins or ends with a piece of. What it concludes depends on
// the rows of the request's pieces alone, so all pieces conclude the same; if these rows contradict each other there is no
// merge, and nothing is left for it. Called by a whole warp.
__device__ __forceinline__ void find_merge(const MlaDecodeParams& params, Shared& shared, int end, int first_row) {
    const int lane = here(threadIdx.x) % 32;
    const Part part(shared.plan_row, gridDim.z, params.batch);
    const PlanRow* rows = reinterpret_cast<const PlanRow*>(params.plan);
    const int piece = end == FRONT ? shared.plan_row.begin_split : 0;
    const int request = end == FRONT ? part.first_request : part.last_request;
    const int num_parts = gridDim.z, head = blockIdx.z - piece;
    Merge merge = {};
    if ((end == FRONT ? part.begin_block > 0 : part.end_is_cut) && piece >= 0 && head >= 0) {
        int pieces = rows[head].merge_count;
        if (pieces < 2 || pieces <= piece || pieces > num_parts - head) pieces = 0;
        bool agrees = pieces > 0;
#pragma unroll 1
        for (int i = lane; i < pieces; i += 32) {
            const PlanRow row = rows[head + i];
            const bool goes_on = row.end_is_cut && row.end_request == request;
            if (i == 0) {
                agrees &= goes_on && row.begin_request >= 0 &&
                          (row.begin_request < request || (row.begin_request == request && row.begin_block <= 0));
            } else {
                agrees &= row.begin_request == request && row.begin_block > 0 && row.begin_split == i &&
                          (i + 1 < pieces ? goes_on : !goes_on && row.end_request >= request);
            }
        }
        if (__all_sync(0xFFFFFFFF, agrees)) {
            const bool goes_on = min(rows[head + pieces - 1].end_request, params.batch - 1) > request;  // behind its last piece
            merge.head = head;
            merge.pieces = pieces;
            merge.piece = piece;
            merge.strips = (min(params.rows_per_group - first_row, ROWS) + STRIP_ROWS - 1) / STRIP_ROWS * 2;
            merge.team = pieces >= TEAM_PIECES;
            const int workers = (pieces - goes_on) * (merge.team ? 1 : CONSUMER_WARPS);
            merge.lines = merge.strips <= 4 ? 1 : 2;  // at most 128 tasks
            merge.log2_tasks = __ffs(STRIP_LINES / merge.lines) - 1;
            while (merge.tasks() > workers) {
                merge.lines *= 2;
                merge.log2_tasks--;
            }
#pragma unroll 1
            for (int i = lane; i < pieces; i += 32) {
                shared.phases[end][i] = MergeState::of(params, piece_slot(head + i, num_parts, i == 0)).phases;
            }
        }
    }
    if (lane == 0) shared.merges[end] = merge;
    mbarrier_arrive(shared_address(&shared.merges_found));
}

// Which merge a part's last work belongs to.
__device__ __forceinline__ int last_end(const Part& part) {
    return part.first_request == part.last_request && part.begin_block > 0 ? FRONT : BACK;  // front: a single piece
}

__device__ __forceinline__ MergeTask merge_task(const MlaDecodeParams& params, const Merge& merge, int task) {
    const int strip = task >> merge.log2_tasks, number = task - (strip << merge.log2_tasks);
    const int lines = number * merge.lines * 32, at = strip * STRIP_SIZE + lines;
    const int first = piece_strips_at(params, piece_slot(merge.head, gridDim.z, true)) + at;
    const int later = piece_strips_at(params, piece_slot(merge.head, gridDim.z, false)) + at;
    return {task, strip, number, first, later, STRIP_LINES * 32 - lines};
}

// The last part to depart from a merge leaves its state as the next call expects it. Called by a warp.
__device__ __forceinline__ void conclude(const MlaDecodeParams& params, const Shared& shared, int end, int lane) {
    const Merge& merge = shared.merges[end];
    const int head = piece_slot(merge.head, gridDim.z, true), after = piece_slot(merge.head, gridDim.z, false);
    if (lane == 0) atomic_and(&MergeState::of(params, head).departures, 0);
#pragma unroll 1
    for (int piece = lane; piece < merge.pieces; piece += 32) {
        MergeState::of(params, piece == 0 ? head : after + piece).phases = shared.phases[end][piece] ^ ((1u << merge.strips) - 1);
    }
}

// Departs from the merges that the part has pieces in, and finds the tasks of this thread block in the merge of the request that it
// ends with: whoever departs first gets the first. Called by one warp.
__device__ __forceinline__ void depart(const MlaDecodeParams& params, Shared& shared, int lane) {
    const Part part(shared.plan_row, gridDim.z, params.batch);
    if (!part.has_pieces()) return;
    wait(shared.merges_found, 0);
    wait(shared.keys_asked, 0);
#pragma unroll 1
    for (int end = FRONT; end <= BACK; end++) {
        const Merge& merge = shared.merges[end];
        u32 before = 0;
        bool is_last = false;
        if (merge.pieces > 0) {
            const bool helps = end == last_end(part);
            u32* const departures = &MergeState::of(params, piece_slot(merge.head, gridDim.z, true)).departures;
            if (lane == 0) before = atomic_add(departures, 1 + (helps ? MergeState::CLAIM : 0));
            before = uniform(before);
            is_last = MergeState::departed(before) + 1 == merge.pieces;
            if (helps && lane < CONSUMER_WARPS) {
                const int share = MergeState::claimed(before), task = merge.team ? share : share * CONSUMER_WARPS + lane;
                shared.tasks[lane] = task < merge.tasks() ? merge_task(params, merge, task) : MergeTask{-1, 0, 0, 0, 0, 0};
            }
        }
        const bool has_orphans = is_last && before >= MergeState::TASKS_LEFT;
        if (has_orphans) memory_fence();  // who finds that tasks were left behind finds which
        if (lane == 0) shared.has_orphans[end] = has_orphans;
        if (is_last) conclude(params, shared, end, lane);
    }
    arrive_as_warp(shared.tasks_ready, lane);
}

// What a row's sum of exponentials says: 1 / sum, and lse, its natural logarithm (a row without keys: 0, +inf).
struct RowSum {
    float sum, reference_log2;
    __device__ __forceinline__ RowSum(float sum, float reference_log2) : sum(sum), reference_log2(reference_log2) {}
    __device__ __forceinline__ float inverse() const { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }
    __device__ __forceinline__ float lse() const { return sum == 0.0f ? INFINITY_F32 : (reference_log2 + log2f(sum)) * LN_2; }
};

// Where the rows lane / 4 and lane / 4 + 8 of a task's strip go, from its first group on.
struct MergedRows {
    u16* out[2];  // null for a row that does not exist
    float* lse[2];
    __device__ __forceinline__ MergedRows() {}
    __device__ __forceinline__ MergedRows(
        const MlaDecodeParams& params, const Merge& merge, int request, int strip, int number, int lane) {
        const int groups = merge.lines * GROUPS_A_LINE;
        const int column = strip % 2 * (HEAD_DIM_V / 2) + number * groups * GROUP_COLUMNS + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = blockIdx.x * ROWS + strip / 2 * STRIP_ROWS + lane / 4 + half * 8;
            const RowPlace place(params, row);
            const bool exists = row < params.rows_per_group;
            out[half] = exists ? params.out + request * params.out_stride_batch + place.query * params.out_stride_seq +
                                     place.head * params.out_stride_head + column
                               : nullptr;
            lse[half] = exists && column == 0 ? params.lse + request * params.lse_stride_batch +
                                                    place.head * params.lse_stride_head + place.query * params.lse_stride_seq
                                              : nullptr;
        }
    }
    // Groups from `group` on, `count` of them.
    template <int GROUPS>
    __device__ __forceinline__ void write(
        const MlaDecodeParams& params, const PieceSum<GROUPS>& total, int group, int count) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (out[half] == nullptr) continue;
            const RowSum row(total.sum[half], total.largest[half]);
            const float inverse = row.inverse();
            if (group == 0 && lse[half] != nullptr) *lse[half] = row.lse();
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                if (g >= count) break;
                const float4& o = total.output[g];
                const float first = half == 0 ? o.x : o.z, second = half == 0 ? o.y : o.w;
                const u32 pair = pack2<Element>(first * inverse, second * inverse);
                u16* const to = out[half] + (group + g) * GROUP_COLUMNS;
                if (config::PLAIN || params.out_is_aligned) {
                    *reinterpret_cast<u32*>(to) = pair;
                } else {
                    to[0] = pair;
                    to[1] = pair >> 16;
                }
            }
        }
    }
};

// What the warps of a team leave for each other, where keys were.
struct Team {
    float4 output[CONSUMER_WARPS][STRIP_GROUPS][32];
    float4 weights[CONSUMER_WARPS][32];
    int complete[CONSUMER_WARPS];
};
static_assert(sizeof(Team) <= sizeof(Shared::pairs), "a team's sums fit in the slots");

// Adds the sums of the team's warps for one group.
__device__ __forceinline__ PieceSum<1> add_team(const Team& team, int group, int lane) {
    PieceSum<1> total;
    float4 weights[CONSUMER_WARPS], output[CONSUMER_WARPS];
    float now[2] = {NO_REFERENCE, NO_REFERENCE};
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; w++) {
        weights[w] = team.weights[w][lane];
        output[w] = team.output[w][group][lane];
        now[0] = fmaxf(now[0], weights[w].x);
        now[1] = fmaxf(now[1], weights[w].y);
    }
    total.raise(now);
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; w++) {
        const float low = exp2_approx(weights[w].x - now[0]), high = exp2_approx(weights[w].y - now[1]);
        total.add_sums({weights[w].z, weights[w].w}, low, high);
        total.add(0, {output[w].x, output[w].y}, {output[w].z, output[w].w}, low, high);
    }
    return total;
}

// Adds the pieces of a task that are this warp's, and writes the result or leaves it to the team.
template <int LINES, int LOADS>
__device__ __forceinline__ bool merge_lines(const MlaDecodeParams& params, Team& team, const Merge& merge, const TaskPieces& from,
    MergedRows& rows, int request, const MergeTask& task, int warp, int lane) {
#pragma unroll 1
    for (int line = 0; line < uniform(merge.lines); line += LINES) {
        PieceSum<GROUPS_A_LINE * LINES> total;
        const auto find_rows = [&] { rows = MergedRows(params, merge, request, task.strip, task.number, lane); };
        const auto if_there_is_room = [&] {
            if (LINES < 8) find_rows();
        };
        const int first = uniform(merge.team) ? warp : 0, step = uniform(merge.team) ? LOG2_CONSUMER_WARPS : 0;
        if (!add_pieces<LINES, LOADS>(
                total, from, first, step, uniform(merge.pieces), line, config::MERGE_PATIENCE, lane, if_there_is_room)) {
            return false;
        }
        if (LINES >= 8) find_rows();
        if (merge.team) {
#pragma unroll
            for (int i = 0; i < GROUPS_A_LINE * LINES; i++) {
                if (i >= min(LINES, merge.lines) * GROUPS_A_LINE) break;
                team.output[warp][line * GROUPS_A_LINE + i][lane] = total.output[i];
            }
            team.weights[warp][lane] = {total.largest[0], total.largest[1], total.sum[0], total.sum[1]};
        } else {
            rows.write(params, total, line * GROUPS_A_LINE, min(LINES, merge.lines) * GROUPS_A_LINE);
        }
    }
    return true;
}

// Called by every consumer warp when its part ends with a piece of a request: does its task in the merge, or leaves it behind.
// Returns the task that it could not leave and has to do alone, or a negative number.
__device__ __forceinline__ int merge_share(
    const MlaDecodeParams& params, Shared& shared, int end, int request, int warp, int lane, Trace& trace) {
    const Merge& merge = shared.merges[end];
    Team& team = reinterpret_cast<Team&>(shared.pairs);  // both sides are done with keys
    const MergeTask& task = shared.tasks[merge.team ? 0 : warp];
    if (uniform(task.task) < 0) return -1;
    const TaskPieces from(params, shared, end, merge, task);
    MergedRows rows;
    // As many loads at once as there are registers for.
    bool complete = merge.lines <= 2   ? merge_lines<2, 8>(params, team, merge, from, rows, request, task, warp, lane)
                    : merge.lines == 4 ? merge_lines<4, 4>(params, team, merge, from, rows, request, task, warp, lane)
                                       : merge_lines<8, 2>(params, team, merge, from, rows, request, task, warp, lane);
    trace.mark(TRACE_FETCHED);
    if (merge.team) {
        if (lane == 0) team.complete[here(warp)] = complete;
        named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);
        complete = __all_sync(0xFFFFFFFF, team.complete[here(lane) % CONSUMER_WARPS]);
        if (complete) {
#pragma unroll 1
            for (int group = here(warp); group < merge.lines * GROUPS_A_LINE; group += CONSUMER_WARPS) {
                rows.write(params, add_team(team, group, lane), group, 1);
            }
        }
    }
    if (complete || (merge.team && warp > 0)) return -1;
    bool is_left = false;
    if (lane == 0) {
        MergeState& state = MergeState::of(params, piece_slot(merge.head, gridDim.z, true));
        is_left = state.leave_behind(task.task, merge.pieces);
    }
    return __any_sync(0xFFFFFFFF, is_left) ? -1 : uniform(task.task);
}

// Tasks for which one warp waits until all pieces are written: `alone`, if it is not negative, of the merge at the part's end, and,
// where it `takes_over`, what others left behind in merges from which this thread block departed last.
__device__ __forceinline__ void merge_rest(
    const MlaDecodeParams& params, const Shared& shared, const Part& part, int alone, bool takes_over, int lane) {
#pragma unroll 1
    for (int i = 0; i < 2 * ORPHAN_WORDS; i++) {
        const int end = i / ORPHAN_WORDS, word = i % ORPHAN_WORDS;
        const Merge& merge = shared.merges[end];
        const int request = end == FRONT ? part.first_request : part.last_request;
        u32 tasks = 0;
        if (lane == 0 && takes_over && shared.has_orphans[end]) {
            tasks = atomic_and(&MergeState::of(params, piece_slot(merge.head, gridDim.z, true)).orphans[word], 0);
        }
        tasks = uniform(tasks);
        if (alone >= 0 && alone / 32 == word && end == last_end(part)) tasks |= 1u << alone % 32;
        for (; tasks != 0; tasks &= tasks - 1) {
            const MergeTask task = merge_task(params, merge, word * 32 + __ffs(tasks) - 1);
            const TaskPieces from(params, shared, end, merge, task);
            const MergedRows rows(params, merge, request, task.strip, task.number, lane);
#pragma unroll 1
            for (int line = 0; line < merge.lines; line++) {
                PieceSum<GROUPS_A_LINE> total;
                add_pieces<1, 1>(total, from, 0, 0, merge.pieces, line, FOR_EVER, lane, [] {});
                rows.write(params, total, line * GROUPS_A_LINE, GROUPS_A_LINE);
            }
        }
    }
}

}  // namespace
