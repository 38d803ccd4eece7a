// Merges the pieces of a request that was cut over several parts, inside the decode kernel.
//
// Piece s of a query row left an output o_s and a sum of exponentials l_s that are relative to 2^r_s. The whole row is
// sum_s w_s o_s / sum_s w_s l_s with w_s = 2^(r_s - m), m the largest r_s: exact, whatever the cuts. A piece without keys has
// l_s = 0; a row without keys gives 0 and lse = +inf. Pieces are always added in the same order, so a call gives the same
// bits every time.
//
// Every thread block that ends with a piece of the request helps: it looks at its share of the columns of all pieces until
// they are written (mla_decode_partial.cuh), and adds them up. (A last piece after which its part goes on with other
// requests is left for the others.)
//
// The thread blocks of a grid are on the device together as a rule, but nothing promises it. So nobody waits for ever: a
// helper that loses patience leaves its task behind. Every part that has a piece departs at the end; the last to depart knows
// that all pieces are written or about to be, and merges what was left behind (in another order of additions: the last bits
// may differ then).
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_partial.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/convert.cuh"
#include "ptx/sync.cuh"

namespace {

constexpr int CONSUMER_WARPS = 2 * WARPGROUP / 32, LOG2_CONSUMER_WARPS = 3;
constexpr int TEAM_PIECES = 10;       // from so many pieces on, the warps of a thread block share a task
constexpr int MOST_LINES = 16;        // of a task
constexpr u32 FOR_EVER = 0xFFFFFFFF;  // looks

// The tiles of this thread block's row block and KV head: of the pieces in `slot`.
__device__ __forceinline__ int merge_tile(int slot) {
    return (here(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * gridDim.z + slot;
}
// The strips of a tile.
__device__ __forceinline__ PieceWords* piece_strips(const MlaDecodeParams& params, int slot) {
    return static_cast<PieceWords*>(params.partials) + merge_tile(slot) * strips_a_tile(params) * STRIP_SIZE;
}

// What is kept of a tile from call to call. Zero at first.
struct MergeState {
    u32 phases;  // bit s: the phase of strip s
    // Of the merge whose first piece has the tile; zero between calls.
    u32 departures;  // low half: all; high half: those that left tasks behind
    u32 orphans[4];  // the tasks that were left behind
    u32 reserved[2];
    __device__ __forceinline__ static MergeState& of(const MlaDecodeParams& params, int slot) {
        return static_cast<MergeState*>(params.merge_states)[merge_tile(slot)];
    }
    __device__ __forceinline__ void leave_behind(int task) {
        atomic_or(&orphans[task / 32], 1u << task % 32);
        memory_fence();  // known before the departure is
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
            merge.workers = (pieces - goes_on) * (merge.team ? 1 : CONSUMER_WARPS);
            merge.lines = merge.strips <= 4 ? 1 : 2;  // at most 128 tasks
            merge.log2_tasks = __ffs(LINES_A_STRIP / merge.lines) - 1;
            while (merge.tasks() > merge.workers && merge.lines < MOST_LINES) {
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

// What a row's sum of exponentials says: 1 / sum, and lse, its natural logarithm (a row without keys: 0, +inf).
struct RowSum {
    float sum, reference_log2;
    __device__ __forceinline__ RowSum(float sum, float reference_log2) : sum(sum), reference_log2(reference_log2) {}
    __device__ __forceinline__ float inverse() const { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }
    __device__ __forceinline__ float lse() const { return sum == 0.0f ? INFINITY_F32 : (reference_log2 + log2f(sum)) * LN_2; }
};

// What a task of a merge reads: some lines of one strip of all pieces.
struct TaskPieces {
    const PieceWords *first, *later;  // the task's lines of piece 0; of piece p they lie p tiles behind `later`
    const u8* phases;                 // of the pieces
    int tile, weights, strip;         // in 16 bytes: from piece to piece, from the task's lines to the strip's weights
    bool is_single;                   // of one line
    __device__ __forceinline__ TaskPieces(
        const MlaDecodeParams& params, const Shared& shared, int end, const Merge& merge, int strip, int number)
        : phases(shared.phases[end]), strip(strip), is_single(merge.lines == 1) {
        const int lines = number * merge.lines * 32, at = strip * STRIP_SIZE + lines;
        tile = strips_a_tile(params) * STRIP_SIZE;
        first = piece_strips(params, piece_slot(merge.head, gridDim.z, true)) + at;
        later = piece_strips(params, piece_slot(merge.head, gridDim.z, false)) + at;
        weights = LINES_A_STRIP * 32 - lines;
    }
    __device__ __forceinline__ const PieceWords* piece(int number) const { return number == 0 ? first : later + number * tile; }
};

// Pieces' share of some groups: a lane has four columns of each, two of row lane / 4 (x, y) and two of the row 8 further.
template <int GROUPS>
struct PieceSum {
    float4 output[GROUPS];
    float largest[2], sum[2];
    __device__ __forceinline__ PieceSum() : largest{NO_REFERENCE, NO_REFERENCE}, sum{0.0f, 0.0f} {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) output[g] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    // Goes over to larger references.
    __device__ __forceinline__ void raise(const float (&now)[2]) {
        const float low = exp2_approx(largest[0] - now[0]), high = exp2_approx(largest[1] - now[1]);
        sum[0] *= low;
        sum[1] *= high;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            output[g] = {output[g].x * low, output[g].y * low, output[g].z * high, output[g].w * high};
        }
        largest[0] = now[0];
        largest[1] = now[1];
    }
    __device__ __forceinline__ void add_sums(const float2& sums, float low, float high) {
        sum[0] += low * sums.x;
        sum[1] += high * sums.y;
    }
    __device__ __forceinline__ void add(int g, const float2& in_low, const float2& in_high, float low, float high) {
        output[g].x += low * in_low.x;
        output[g].y += low * in_low.y;
        output[g].z += high * in_high.x;
        output[g].w += high * in_high.y;
    }
};

// `LINES` lines of one piece, and what their rows' numbers and sums are relative to.
template <int LINES>
struct PieceLines {
    PieceWord relative_to, sum, kept_relative_to;
    PieceWords lines[LINES];
    __device__ __forceinline__ PieceLines()
        : relative_to(NO_REFERENCE, NO_REFERENCE), sum(0.0f, 0.0f), kept_relative_to(NO_REFERENCE, NO_REFERENCE) {
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l] = {{0u, 0u}, {0u, 0u}};
    }
    // Of one line only, if `is_single`. Strips that are not in halves are kept relative to the same as their sums.
    __device__ __forceinline__ void load(
        const PieceWords* lines_at, const PieceWords* weights_at, bool is_single, bool wanted) {
        load_from_other_blocks(relative_to.bits, sum.bits, weights_at, wanted);
        load_from_other_blocks(kept_relative_to.bits, weights_at + 1, wanted && config::KEPT_IN_HALVES);
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l].load(lines_at + l * 32, wanted && (l == 0 || !is_single));
    }
    // Whether some word is still of the phase that it had before this call, bit 0 of `before`.
    __device__ __forceinline__ bool is_unwritten(u32 before, bool is_single) const {
        u32 unwritten = 0;
        relative_to.add_if_of(before, unwritten);
        sum.add_if_of(before, unwritten);
        if (config::KEPT_IN_HALVES) kept_relative_to.add_if_of(before, unwritten);
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            if (l == 0 || !is_single) lines[l].add_if_of(before, unwritten);
        }
        return unwritten & 1;
    }
    __device__ __forceinline__ void clear_phase() {
        relative_to.clear_phase();
        sum.clear_phase();
        kept_relative_to.clear_phase();
#pragma unroll
        for (int l = 0; l < LINES; l++) lines[l].clear_phase();
    }
    __device__ __forceinline__ void add_to(PieceSum<GROUPS_A_LINE * LINES>& total) const {
        const float low = exp2_approx(relative_to.numbers().x - total.largest[0]);
        const float high = exp2_approx(relative_to.numbers().y - total.largest[1]);
        total.add_sums(sum.numbers(), low, high);
#pragma unroll
        for (int l = 0; l < LINES; l++) total.add(l, lines[l].low.numbers(), lines[l].high.numbers(), low, high);
    }
    __device__ __forceinline__ void add_halves_to(PieceSum<GROUPS_A_LINE * LINES>& total) const {
        total.add_sums(sum.numbers(), exp2_approx(relative_to.numbers().x - total.largest[0]),
                       exp2_approx(relative_to.numbers().y - total.largest[1]));
        const float low = exp2_approx(kept_relative_to.numbers().x - total.largest[0]);
        const float high = exp2_approx(kept_relative_to.numbers().y - total.largest[1]);
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            const PieceWord &a = lines[l].low, &b = lines[l].high;
            total.add(2 * l, unpack2<Fp16>(a.x()), unpack2<Fp16>(a.y()), low, high);
            total.add(2 * l + 1, unpack2<Fp16>(b.x()), unpack2<Fp16>(b.y()), low, high);
        }
    }
};

// Adds `LINES` lines, from `line` on, of pieces first, first + 2^step, ... as they get written; `LOADS` pieces are under way at
// once, and those that were not written yet are looked at again. `meanwhile` is done while the first are. False: patience has
// ended.
template <int LINES, int LOADS, class Meanwhile>
__device__ __forceinline__ bool add_pieces(PieceSum<GROUPS_A_LINE * LINES>& total, const TaskPieces& from, int first, int step,
    int pieces, int line, u32 patience, int lane, Meanwhile meanwhile) {
    const int lines_at = line * 32 + lane, weights_at = from.weights + lane / 4 * 2;
#pragma unroll 1
    for (int base = first; base < pieces; base += LOADS << step) {
        const int count = min(((pieces - base - 1) >> step) + 1, LOADS);
        PieceLines<LINES> piece[LOADS];  // those that do not exist weigh nothing
        u32 missing = (1u << count) - 1;
#pragma unroll 1
        for (u32 looks = 0; missing != 0; looks++) {
            if (looks > patience && patience != FOR_EVER) return false;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const PieceWords* const at = from.piece(base + (i << step));
                piece[i].load(at + lines_at, at + weights_at, LINES == 2 && from.is_single, missing >> i & 1);
            }
            if (looks == 0 && base == first) meanwhile();
            u32 unwritten = 0;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const u32 before = from.phases[min(base + (i << step), pieces - 1)] >> from.strip;
                if (piece[i].is_unwritten(before, LINES == 2 && from.is_single)) unwritten |= 1u << i;
            }
            missing &= or_of_warp(unwritten);
        }
        float now[2] = {total.largest[0], total.largest[1]};
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            piece[i].clear_phase();
            now[0] = fmaxf(now[0], piece[i].relative_to.numbers().x);
            now[1] = fmaxf(now[1], piece[i].relative_to.numbers().y);
        }
        total.raise(now);
        if constexpr (config::KEPT_IN_HALVES) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) piece[i].add_halves_to(total);
        } else {
#pragma unroll
            for (int i = 0; i < LOADS; i++) piece[i].add_to(total);
        }
    }
    return true;
}

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
                if (config::ALIGNED || params.out_is_aligned) {
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
__device__ __forceinline__ bool merge_task(const MlaDecodeParams& params, Team& team, const Merge& merge, const TaskPieces& from,
    MergedRows& rows, int request, int strip, int number, int warp, int lane) {
#pragma unroll 1
    for (int line = 0; line < uniform(merge.lines); line += LINES) {
        PieceSum<GROUPS_A_LINE * LINES> total;
        const auto find_rows = [&] { rows = MergedRows(params, merge, request, strip, number, lane); };
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

// Called by every consumer warp when its part ends with a piece of a request: merges its share of it.
__device__ __forceinline__ void merge_share(
    const MlaDecodeParams& params, Shared& shared, int end, int request, int warp, int lane, Trace& trace) {
    const Merge& merge = shared.merges[end];
    Team& team = reinterpret_cast<Team&>(shared.pairs);  // both sides are done with keys
#pragma unroll 1
    for (int task = uniform(merge.team ? merge.piece : merge.piece * CONSUMER_WARPS + warp); task < uniform(merge.tasks());
         task += uniform(merge.workers)) {
        const int strip = task >> merge.log2_tasks, number = task - (strip << merge.log2_tasks);
        const TaskPieces from(params, shared, end, merge, strip, number);
        MergedRows rows;
        // As many loads at once as there are registers for.
        bool complete =
            merge.lines <= 2   ? merge_task<2, 8>(params, team, merge, from, rows, request, strip, number, warp, lane)
            : merge.lines == 4 ? merge_task<4, 4>(params, team, merge, from, rows, request, strip, number, warp, lane)
                               : merge_task<8, 2>(params, team, merge, from, rows, request, strip, number, warp, lane);
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
        if (!complete && lane == 0 && !(merge.team && warp > 0)) {
            MergeState::of(params, piece_slot(merge.head, gridDim.z, true)).leave_behind(task);
            shared.left_task = 1;
        }
        if (merge.team && task + merge.workers < merge.tasks()) named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);  // the room is free
    }
}

// A task that was left behind, by one warp.
__device__ __forceinline__ void merge_orphan(
    const MlaDecodeParams& params, const Shared& shared, int end, const Merge& merge, int request, int task, int lane) {
    const int strip = task >> merge.log2_tasks, number = task - (strip << merge.log2_tasks);
    const TaskPieces from(params, shared, end, merge, strip, number);
    const MergedRows rows(params, merge, request, strip, number, lane);
#pragma unroll 1
    for (int line = 0; line < merge.lines; line++) {
        PieceSum<GROUPS_A_LINE> total;
        add_pieces<1, 1>(total, from, 0, 0, merge.pieces, line, FOR_EVER, lane, [] {});
        rows.write(params, total, line * GROUPS_A_LINE, GROUPS_A_LINE);
    }
}

// Called by one warp when its thread block is done with a merge. The last of all merges what was left behind, and leaves everything
// as the next call expects it.
__device__ __forceinline__ void depart(
    const MlaDecodeParams& params, const Shared& shared, int end, int request, bool left_task, int lane) {
    const Merge& merge = shared.merges[end];
    const int head = piece_slot(merge.head, gridDim.z, true), after = piece_slot(merge.head, gridDim.z, false);
    MergeState& state = MergeState::of(params, head);
    u32 before = 0;
    if (lane == 0) {
        if (left_task) memory_fence();  // what another warp left behind is known before its departure is
        before = atomic_add(&state.departures, 1 + (left_task << 16));
    }
    __syncwarp();
    before = __shfl_sync(0xFFFFFFFF, before, 0);
    if ((before & 0xFFFF) + 1 != merge.pieces) return;
    if (left_task || before >> 16 != 0) {
        memory_fence();  // what was left behind before others departed is known now
#pragma unroll 1
        for (int word = 0; word < 4; word++) {
            u32 tasks = lane == 0 ? atomic_or(&state.orphans[word], 0) : 0;
            __syncwarp();
            tasks = __shfl_sync(0xFFFFFFFF, tasks, 0);
            if (lane == 0) state.orphans[word] = 0;
            for (; tasks != 0; tasks &= tasks - 1) {
                merge_orphan(params, shared, end, merge, request, word * 32 + __ffs(tasks) - 1, lane);
            }
        }
    }
    if (lane == 0) state.departures = 0;
#pragma unroll 1
    for (int piece = lane; piece < merge.pieces; piece += 32) {
        MergeState::of(params, piece == 0 ? head : after + piece).phases ^= (1u << merge.strips) - 1;
    }
}

}  // namespace
