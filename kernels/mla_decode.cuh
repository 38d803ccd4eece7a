// Absorbed MLA decode for Hopper: one key-value head of 576 numbers a token, whose first 512 are also the value.
//
//   out[row] = sum_j softmax_j(scale * q[row] . k[j]) * k[j][:512]      row = (query, head of the group)
//
// A thread block works on 64 query rows of one KV head and, through its part of the plan, on runs of 64-key blocks
// (one block = one page). Four warpgroups:
//
//   producers  a thread has blocks of K copied by TMA, another one query tiles; a warp finds out about merges, has keys brought
//              to L2, and departs from the merges
//   left       output columns   0..255
//   right      output columns 256..511
//   scorers    scores and probabilities of all blocks
//
// The 64 x 512 float32 output fills half a register file. Left and right hold a half of it each and do nothing but multiply. The
// scorers hold most of the query tile in registers, as the A operand of their products: it is read from shared memory once
// a piece, and there is room for nearly three blocks of keys.
//
//   scorers        S1 = Q K1^T |  P1 = 2^(S1 - m)  S2 = Q K2^T |  P2 = 2^(S2 - m)  S3 = Q K3^T | ...
//   left, right                | O += P0 V0                    | O += P1 V1                    | ...
//
// Softmax needs time in which the tensor cores have something else to do: the product of the block before. So the scorers hold
// back P1 until S2 is nearly done. With one row block memory is the limit and not the tensor cores: when the keys of S2 are not
// there yet, P1 is given away at once, and the place of its keys gets free the sooner. With more row blocks the last keys of
// the block that the ring has no room for yet are brought to L2 instead.
//
// m, a row's reference, is what keeps 2^(S - m) in range. Any m does that is not far below the row's maximum. So nobody looks for
// the maximum of a block, but of the first: the probabilities are computed by the m that there is, and if their sums show that
// they are too large, again, by the maximum. Then, and only then, left and right rescale their output.
//
// Shared memory has rings. A block's value columns are four pairs of 64 x 64 boxes, with a barrier each, so that S starts with the
// first pair that lands; left reads two of them, right the others. The rope columns are in a ring of their own, the tails, and
// make room for the block's P when S is done. A query tile takes pairs too, on its way to registers.
//
// Who reads what, and why no barrier is missing:
//   pieces[n]           written by the K loader before piece_ready; again when all roles have arrived at piece_empty.
//   plan_row            written before plan_ready.
//   blocks_asked        a number that only grows; how old the answer is that a reader gets does not matter.
//   pairs               full when the copy engine says so, or those who gather a query tile (and q_ready). Released by left or
//                       right behind their product, for which they waited for P and so for the end of S; those of a query
//                       tile by the scorers.
//   tails[t]            rope columns, full when the copy engine says so; then P, written when all scorers have read them
//                       (rope_is_read), before p_ready. Released by left and right behind their product (tail_empty).
//   page_is_valid[t], row_factor[t], rescales[t]   written before tail_full or p_ready, read before tail_empty.
//   q                   written before q_ready, read by S; again after q_empty. Rows that no tile has are zero from the start.
//   row_sum[n], row_reference[n]   written before sums_ready, again in a piece for which pieces[n] was written again.
//   merges, phases, tasks, has_orphans   written once: the first two before merges_found, the others before tasks_ready, when the K
//                       loader has said that all keys are asked for (keys_asked).
#include "mla_decode_block.cuh"
#include "mla_decode_gather.cuh"
#include "mla_decode_load.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_scores.cuh"
#include "mla_decode_store.cuh"
#include "mla_decode_trace.cuh"
#include "mla_plan.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

namespace {

// Multiplies the output's rows by their factors.
__device__ __forceinline__ void rescale(float (&output)[128], const float* row_factor, const Place& place) {
    const float factor[2] = {row_factor[place.row(0)], row_factor[place.row(1)]};
#pragma unroll
    for (int i = 0; i < 128; i++) output[i] *= factor[(i / 2) % 2];
}

// O += P V for a side's columns of one block. At the end of the first function those of its first pair of boxes are done, and the
// pair is released; at the end of the second all are.
__device__ __forceinline__ void begin_product(float (&output)[128], Shared& shared, int first, int second, int tail, int lane) {
    const u64 p = descriptor(TAILS_OFFSET) + tail * NEXT_BOX;
    const u64 low = descriptor(0) + first * NEXT_PAIR, high = descriptor(0) + second * NEXT_PAIR;
    pin_registers(output);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        wgmma_n128_ss<Element, 0>(output, p + step * STEP_K_MAJOR, low + step * STEP_N_MAJOR);
    }
    wgmma_commit();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        wgmma_n128_ss<Element, 64>(output, p + step * STEP_K_MAJOR, high + step * STEP_N_MAJOR);
    }
    wgmma_commit();
    wgmma_wait<1>();
    arrive_as_warp(shared.pair_empty[first], lane);
}

__device__ __forceinline__ void finish_product(float (&output)[128], Shared& shared, int second, int tail, int lane) {
    wgmma_wait<0>();
    pin_registers(output);
    arrive_as_warp(shared.pair_empty[second], lane);
    arrive_as_warp(shared.tail_empty[tail], lane);
}

// Read again wherever it is asked: left and right have no registers to keep it in.
__device__ __forceinline__ Part part(const MlaDecodeParams& params, const Shared& shared) {
    return Part(shared.plan_row, gridDim.z, params.batch);
}

__device__ __forceinline__ int side_of(int thread) { return thread / WARPGROUP - 1; }

// Where this warp's strip of a piece goes, once the merges are found.
__device__ __forceinline__ PieceStrip strip_of(const MlaDecodeParams& params, const Shared& shared, int number) {
    wait(shared.merges_found, 0);
    const int end = part(params, shared).begin(number) > 0 ? FRONT : BACK;
    return PieceStrip(params, shared, end, Place(here(threadIdx.x)), side_of(here(threadIdx.x)));
}

// Left or right: the output of all pieces.
__device__ __forceinline__ void produce_output(const MlaDecodeParams& params, Shared& shared) {
    Trace trace(side_of(threadIdx.x), threadIdx.x % WARPGROUP == 0);
    Ring<PAIRS> pair;
    Ring<TAILS> tail;
    Ring<PIECES> note;
    for (int number = part(params, shared).first_request; number <= part(params, shared).last_number; number++) {
        float output[128];
#pragma unroll
        for (int i = 0; i < 128; i++) output[i] = 0.0f;
        int low_exponents[2] = {0, 0};  // of the half of a piece's columns that is written first
        wait(shared.piece_ready[note.at()], note.turn());
        pair += Q_PAIRS;
        for (int left = shared.pieces[note.at()].last - shared.pieces[note.at()].first; left > 0; left--) {
            const Place place(here(threadIdx.x));
            const int first_pair = side_of(here(threadIdx.x)) * 2;
            const int first = uniform((pair + first_pair).at()), second = uniform((pair + (first_pair + 1)).at());
            const int at = uniform(tail.at());
            wait(shared.p_ready[at], tail.turn());
            if (shared.rescales[at][place.warp]) rescale(output, shared.row_factor[at], place);
            begin_product(output, shared, first, second, at, place.lane);
            pair += PAIRS_A_BLOCK;
            tail += 1;
            if (left == 1 && part(params, shared).is_partial(number)) {  // half of a piece is written beside its last products
                pin_registers<0, 64>(output);
                const PieceStrip strip = strip_of(params, shared, number);
                if (strip.exists) write_columns<0>(strip, output, low_exponents, place.lane);
                finish_product(output, shared, second, at, place.lane);
                trace.mark(TRACE_OUTPUT);
                break;
            }
            finish_product(output, shared, second, at, place.lane);
            trace.mark(TRACE_OUTPUT);
        }
        wait(shared.sums_ready[note.at()], note.turn());
        trace.mark(TRACE_SUMS);
        const int places = here(pair.steps | tail.steps << 8 | note.steps << 16);  // one register while the output is written
        if (part(params, shared).is_partial(number)) {
            const Place place(here(threadIdx.x));
            const PieceStrip strip = strip_of(params, shared, number);
            if (strip.exists) {
                const int at = Ring<PIECES>(places >> 16).at();
                int high_exponents[2];
                if (shared.pieces[at].last == shared.pieces[at].first) clear_columns(strip, place.lane);
                write_columns<1>(strip, output, high_exponents, place.lane);
                write_weights(params, strip, RowSums(shared, at), low_exponents, high_exponents, place);
            }
        } else {
            const RowSums sums(shared, Ring<PIECES>(places >> 16).at());
            const int request = part(params, shared).request(number);
            write_output(params, output, sums, Place(here(threadIdx.x)), side_of(here(threadIdx.x)), request);
        }
        trace.mark(TRACE_WRITTEN);
        pair.steps = places & 0xFF;
        tail.steps = places >> 8 & 0xFF;
        note.steps = places >> 16;
        arrive_as_warp(shared.piece_empty[note.at()], here(threadIdx.x) % 32);
        note += 1;
    }
}

// Left and right merge the request that the part ends with a piece of, and what was left for this thread block.
__device__ __forceinline__ void finish_part(const MlaDecodeParams& params, Shared& shared) {
    const Part at_first = part(params, shared);
    if (!at_first.has_pieces()) return;
    Trace trace(TRACE_MERGING + threadIdx.x / WARPGROUP - 1, threadIdx.x % WARPGROUP == 0);
    wait(shared.tasks_ready, 0);
    const int consumer = here(threadIdx.x) - WARPGROUP, warp = uniform(consumer / 32), lane = consumer % 32;
    const int last = last_end(at_first);
    int alone = -1;
    if (shared.merges[last].pieces > 0) alone = merge_share(params, shared, last, at_first.last_request, warp, lane, trace);
    trace.mark(TRACE_WRITTEN);
    const bool takes_over = here(warp) == 0 && (shared.has_orphans[FRONT] || shared.has_orphans[BACK]);
    if (alone >= 0 || takes_over) merge_rest(params, shared, part(params, shared), alone, takes_over, here(threadIdx.x) % 32);
}

// Called by one lane of each warp, which has the barriers of a pair of boxes, a tail or a note. The instruction takes an address
// that all lanes of a warp share. With another barrier in each lane ptxas makes it a loop: 47 barriers took one warp 1.6 us.
__device__ __forceinline__ void init_barriers(Shared& shared, int warp) {
    constexpr int WARPS = WARPGROUP / 32;
    static_assert(PAIRS + TAILS + PIECES <= THREADS / 32, "each has a warp");
    auto init = [](u64& barrier, int arrivals) { mbarrier_init(shared_address(&barrier), arrivals); };
    if (warp < PAIRS) {
        init(shared.pair_full[warp], 1);
        init(shared.pair_empty[warp], WARPS);
    } else if (warp < PAIRS + TAILS) {
        const int tail = warp - PAIRS;
        init(shared.tail_full[tail], 1);
        init(shared.tail_empty[tail], 2 * WARPS);
        init(shared.rope_is_read[tail], WARPS);
        init(shared.p_ready[tail], WARPS);
    } else if (warp < PAIRS + TAILS + PIECES) {
        const int note = warp - PAIRS - TAILS;
        init(shared.piece_ready[note], 1);
        init(shared.piece_empty[note], 3 * WARPS + Q_RELEASES);
        init(shared.q_ready[note], Q_ARRIVALS);
        init(shared.sums_ready[note], WARPS);
    }
    if (warp == 3) {  // which has nothing to do before this
        init(shared.q_empty, WARPS);
        init(shared.plan_ready, PLAN_ROW_INTS);
        init(shared.keys_asked, 1);
        init(shared.merges_found, 2 * 32);
        init(shared.tasks_ready, 1);
    }
    mbarrier_init_fence();
}

// What is read first and one after the other, on its way to L2 while the kernel before still runs: the part's row of the plan,
// all lengths, and page numbers. Every thread block has a share of the lines. Called by one warp.
__device__ __forceinline__ void ask_for_small_inputs(const MlaDecodeParams& params, int lane) {
    constexpr int INTS_A_LINE = 32;
    if (lane == 0) prefetch_to_l2(params.plan + blockIdx.z * PLAN_ROW_INTS);
    const i64 at = ((blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)) * 32 + lane) * INTS_A_LINE;
    if (at < params.batch) prefetch_to_l2(params.cache_seqlens + at);
    const i64 page_numbers = (params.batch - 1) * params.block_table_stride + params.max_blocks;
    const bool has_rows = params.max_blocks > 0 && params.block_table_stride >= params.max_blocks;
    if (has_rows && at < page_numbers) prefetch_to_l2(params.block_table + at);
}

// The same for the first block of keys, by a plan, lengths and page numbers that the kernel before may still change. No harm is
// done if it does: what has been brought to L2 in vain is not used. Called by one thread.
__device__ __forceinline__ void ask_for_first_keys(const MlaDecodeParams& params) {
    const int* const at = params.plan + blockIdx.z * PLAN_ROW_INTS;
    auto word = [&](int i) { return load_from_other_blocks(at + i); };
    const PlanRow row = {word(0), word(1), word(2), word(3), 0, word(5), 0, 0};
    const Part part(row, gridDim.z, params.batch);
    const int number = part.first_request, block = part.begin_block;
    if (number > part.last_request || block >= params.max_blocks) return;
    const int page = load_from_other_blocks(params.block_table + number * params.block_table_stride + block);
    const int length = load_from_other_blocks(params.cache_seqlens + number);
    const bool exists = block * KEYS < length && !(part.cut_at_end(number) && block >= part.end_block);
    if (!exists || page < 0 || page >= params.num_blocks) return;
    const u32 policy = keys_policy(params, part);
    static_assert(ROPE_BOX == 2 * PAIRS_A_BLOCK, "the last pair is the rope columns and what lies outside");
#pragma unroll 1
    for (int i = blockIdx.x; i <= PAIRS_A_BLOCK; i += gridDim.x) {  // row blocks share the work
        tma_prefetch_5d(&params.k_map, 0, 0, i * 2, blockIdx.y, page, policy);
    }
}

// With one row block the parts ask for their first keys in 16 turns, since all at once they hold up the kernel before. Called by one
// warp, which waits as a whole (see elect_lane).
__device__ __forceinline__ void await_turn_to_ask() {
    constexpr int TURNS = 16, CYCLES_A_TURN = 150;
    if (gridDim.x == 1) spend_cycles(blockIdx.z % TURNS * CYCLES_A_TURN);
}

// Everything before this overlaps the end of the kernel before; behind it the part's row of the plan is there.
__device__ __forceinline__ void start(const MlaDecodeParams& params, Shared& shared) {
    wait_for_previous_kernel();
    if (threadIdx.x < PLAN_ROW_INTS) {
        const int word = params.plan[blockIdx.z * PLAN_ROW_INTS + threadIdx.x];
        reinterpret_cast<int*>(&shared.plan_row)[threadIdx.x] = checked_word(threadIdx.x, word, params.batch);
        mbarrier_arrive(shared_address(&shared.plan_ready));
    }
    wait(shared.plan_ready, 0);
}

}  // namespace

// Grid: (row blocks, KV heads, parts). Row blocks of a part are neighbours, so that they run in step and the second finds K in
// L2. An even number of them is launched as clusters of two, which keeps two neighbours on one TPC. They share nothing else.
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(const __grid_constant__ MlaDecodeParams params) {
    extern __shared__ u8 dynamic_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    const int first_row = blockIdx.x * ROWS;
    const int warp = threadIdx.x / 32;

    if (warp == 0) {
        if ((shared_address(&shared) & SHARED_OFFSET) != config::SHARED_BASE) __trap();
        tma_prefetch_map(&params.k_map);
        tma_prefetch_map(&params.k_tail_map);
        if (config::PLAIN) tma_prefetch_map(&params.q_map);
        shared.blocks_asked = 0;
    } else if (warp == 1) {
        ask_for_small_inputs(params, threadIdx.x % 32);
    } else if (config::PLAIN && !config::KEPT_IN_HALVES && warp == 2) {
        clear_missing_rows(params, shared, threadIdx.x % 32);
    }
    const int of_warp = uniform(warp);
    if (threadIdx.x % 32 == 0) init_barriers(shared, of_warp);
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (warp == 1) {
            await_turn_to_ask();
            if (elect_lane()) ask_for_first_keys(params);
        }
        start(params, shared);
        if (warp == 0) {
            if (elect_lane()) produce_k(params, shared);  // and nothing behind it in this warp: see elect_lane
        } else if (warp == 1) {
            find_merge(params, shared, FRONT, first_row);
            find_merge(params, shared, BACK, first_row);
            bring_keys_to_l2(params, shared, here(threadIdx.x) % 32);
            depart(params, shared, here(threadIdx.x) % 32);
        } else if constexpr (config::PLAIN) {
            if (warp == 2 && elect_lane()) produce_q(params, shared);
        } else {
            gather_q(params, shared);
        }
    } else if (threadIdx.x >= 3 * WARPGROUP) {
        grow_registers<SCORE_REGISTERS>();
        start(params, shared);
        produce_p(params, shared, first_row);
        named_barrier_sync(SCORERS, WARPGROUP);  // as PTX wants it between two changes
        shrink_registers<PRODUCER_REGISTERS>();
    } else {
        grow_registers<OUTPUT_REGISTERS>();
        start(params, shared);
        produce_output(params, shared);
        named_barrier_sync(BOTH_SIDES, 2 * WARPGROUP);  // no one reads keys any more; and as above
        grow_registers<MERGE_REGISTERS>();
        finish_part(params, shared);
    }
}
