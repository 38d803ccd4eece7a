// Merges the pieces of requests that were cut over several parts.
//
// Piece s of a query row left its normalised output o_s and lse_s, the base-2 logarithm of its sum of exponentials. The
// whole row is sum_s w_s o_s with w_s = 2^(lse_s - lse), lse = log2 sum_s 2^lse_s: exact, whatever the cuts. A piece
// without keys has lse_s = -inf and weight 0; a row without keys gives 0 and lse = +inf.
//
// A thread block takes a row at a time. Four warps share its columns, a float4 a lane; two such groups share the pieces and
// add up through shared memory. So a request cut into many pieces waits for few loads in a row.
#include "mla_plan.cuh"
#include "ptx/convert.cuh"
#include "ptx/sync.cuh"

namespace {

using Element = config::Element;
constexpr int THREADS = config::COMBINE_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int HEAD_DIM_V = config::HEAD_DIM_V;
constexpr int COLUMNS_A_WARP = 128;
constexpr int QUARTERS = HEAD_DIM_V / COLUMNS_A_WARP;
constexpr int GROUPS = WARPS / QUARTERS;
static_assert(QUARTERS == 4 && GROUPS == 2, "the warps of a block: two groups of four quarters");
constexpr int LOADS_IN_FLIGHT = 8;
constexpr int MAX_PARTS = config::MAX_PARTS;
static_assert(MAX_PARTS <= THREADS, "a thread looks at one part");
constexpr float LN_2 = 0.693147180559945309f;

// A cut request: its first piece is the last work of `part`, the others are the first work of the parts that follow.
struct Merge {
    int part, request, pieces;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, step));
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, step);
    return x;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 4) mla_combine(const __grid_constant__ MlaCombineParams params) {
    __shared__ Merge merges[MAX_PARTS];
    __shared__ int warp_merges[WARPS];
    __shared__ float4 other_half[QUARTERS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    wait_for_previous_kernel();
    launch_next_kernel();

    // Which parts hold the first piece of a cut request? Few do, often none. Every block makes the same list, in the order
    // of parts, since together they share out the rows of the whole list. Numbers that make no sense must not lead
    // outside the workspace.
    const int part = threadIdx.x;
    Merge mine = {part, -1, 0};
    if (part < params.num_parts) {
        const PlanRow& plan_row = reinterpret_cast<const PlanRow*>(params.plan)[part];
        mine.request = plan_row.end_request;
        mine.pieces = min(plan_row.merge_count, params.num_parts - part);
    }
    const bool merging = mine.pieces > 1 && mine.request >= 0 && mine.request < params.batch;
    const u32 merging_lanes = __ballot_sync(0xFFFFFFFF, merging);
    if (lane == 0) warp_merges[warp] = __popc(merging_lanes);
    __syncthreads();
    int merge_count = 0, my_place = __popc(merging_lanes & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; w++) {
        my_place += w < warp ? warp_merges[w] : 0;
        merge_count += warp_merges[w];
    }
    if (merging) merges[my_place] = mine;
    __syncthreads();

    const int quarter = warp % QUARTERS, group = warp / QUARTERS;
    const int column = quarter * COLUMNS_A_WARP + lane * 4;
    const int rows = params.heads_k * params.rows_per_group;
    for (int task = blockIdx.x; task < merge_count * rows; task += gridDim.x) {
        const int row = task % rows;  // over all KV heads
        const Merge merge = merges[task / rows];
        auto workspace_row = [&](int piece) {
            return static_cast<i64>(piece_slot(merge.part + piece, piece == 0)) * rows + row;
        };
        auto load = [&](int piece) {
            return *reinterpret_cast<const float4*>(params.partial_out + workspace_row(piece) * HEAD_DIM_V + column);
        };
        auto load_lse = [&](int piece) {
            return piece < merge.pieces ? params.partial_lse[workspace_row(piece)] : -INFINITY_F32;
        };

        // 1. lse of the whole row; a lane holds that of one piece. The group's first piece is fetched meanwhile.
        const float4 first = load(group);
        const float lane_lse = load_lse(lane);
        float largest = lane_lse;
        for (int piece = lane + 32; piece < merge.pieces; piece += 32) largest = fmaxf(largest, load_lse(piece));
        largest = warp_max(largest);
        const float reference = largest == -INFINITY_F32 ? 0.0f : largest;
        const float lane_power = exp2_approx(lane_lse - reference);
        float sum = lane_power;
        for (int piece = lane + 32; piece < merge.pieces; piece += 32) sum += exp2_approx(load_lse(piece) - reference);
        sum = warp_sum(sum);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

        // 2. The weighted sum of the group's pieces. A piece without keys wrote zeros, so its weight of 0 meets no NaN.
        float4 output = {0.0f, 0.0f, 0.0f, 0.0f};
        auto add = [&](float weight, const float4& o) {
            output.x += weight * o.x;
            output.y += weight * o.y;
            output.z += weight * o.z;
            output.w += weight * o.w;
        };
        add(__shfl_sync(0xFFFFFFFF, lane_power, group), first);
        for (int base = 0; base < merge.pieces; base += 32) {
            const float power = base == 0 ? lane_power : exp2_approx(load_lse(base + lane) - reference);
            const int here = min(32, merge.pieces - base);
#pragma unroll LOADS_IN_FLIGHT
            for (int i = base == 0 ? GROUPS + group : group; i < here; i += GROUPS) {
                add(__shfl_sync(0xFFFFFFFF, power, i), load(base + i));
            }
        }
        if (group == 1) other_half[quarter][lane] = output;
        __syncthreads();
        if (group == 0) add(1.0f, other_half[quarter][lane]);
        __syncthreads();
        if (group == 1) continue;

        // 3. Out, in the caller's strides.
        const int kv_head = row / params.rows_per_group, group_row = row % params.rows_per_group;
        const int query = group_row / params.heads_per_group;
        const int head = kv_head * params.heads_per_group + group_row % params.heads_per_group;
        u16* out = params.out + merge.request * params.out_stride_batch + query * params.out_stride_seq +
                   head * params.out_stride_head + column;
        const u32 low = pack2<Element>(output.x * inverse, output.y * inverse);
        const u32 high = pack2<Element>(output.z * inverse, output.w * inverse);
        if (params.out_is_aligned) {
            *reinterpret_cast<uint2*>(out) = {low, high};
        } else {
            out[0] = low;
            out[1] = low >> 16;
            out[2] = high;
            out[3] = high >> 16;
        }
        if (quarter == 0 && lane == 0) {
            params.lse[merge.request * params.lse_stride_batch + head * params.lse_stride_head +
                       query * params.lse_stride_seq] = sum == 0.0f ? INFINITY_F32 : (reference + log2f(sum)) * LN_2;
        }
    }
}
