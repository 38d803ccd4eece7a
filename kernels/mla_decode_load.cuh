// The producers of the decode kernel: a thread that has blocks of K copied by the copy engine (TMA), another for query tiles, and a
// warp that has keys brought to L2 ahead of that.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace {

// How long L2 shall keep keys. Row blocks share them. Those that are read once shall not drive pieces out; without pieces few rows
// are faster the same way, others if keys are kept as usual (measured).
__device__ __forceinline__ u32 keys_policy(const MlaDecodeParams& params, const Part& part) {
    const bool keeps = gridDim.x > 1 || (params.rows_per_group > config::FEW_ROWS && !part.has_pieces());
    return keeps ? L2_EVICT_NORMAL : L2_EVICT_FIRST;
}

// Finds out what each piece of the part is, tells the others, and has its blocks of keys copied. One thread does it.
__device__ __forceinline__ void produce_k(const MlaDecodeParams& params, Shared& shared) {
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    Trace trace(TRACE_LOADER, true);
    const u32 policy = keys_policy(params, part());
    Ring<PAIRS> pair;
    Ring<TAILS> tail;
    Ring<PIECES> note;
    int asked = 0;  // blocks so far
    for (int number = part().first_request; number <= part().last_number; number++) {
        const int source = part().request(number);
        auto page_of = [&](int block) {
            const i64 row = here(source) * params.block_table_stride;  // not kept, for want of registers
            return block < params.max_blocks ? load_now(params.block_table + row + block) : -1;
        };
        const int begin = part().begin(number);
        int page = page_of(begin), next_page = page_of(begin + 1);  // under way while the length arrives
        const Request request(params, source, here(blockIdx.x) * ROWS);
        const int first = part().first(number, request.blocks()), last = part().last(number, request.blocks());
        wait(shared.piece_empty[note.at()], note.turn() ^ 1);
        shared.pieces[note.at()] = {request.length, request.limit_min, first, last, pair.steps};
        mbarrier_arrive(shared_address(&shared.piece_ready[note.at()]));
        pair += Q_PAIRS;
        // The next kernel may start when all thread blocks say so. We do behind our last keys, since what it reads first would get
        // in their way, or, if they are a single block, before it.
        if (number == part().last_number && last - first <= 1) launch_next_kernel();

        for (int block = first; block < shared.pieces[note.at()].last; block++) {
            // A page out of range: the copy engine fills in zeros and the scores will be masked.
            const int coordinate = page < params.num_blocks ? max(page, -1) : -1;
            page = next_page;
            next_page = page_of(block + 2);
            // With one row block memory is the limit, and it gets slower when it is asked for more at once than keeps it busy. So
            // the second and third block are asked for as the one before lands, later ones when two before them are done with. With
            // more row blocks the second waits for the first, and the ring holds back the others.
            const bool is_paced = gridDim.x == 1;
            auto load = [&](u8* boxes, const TensorMap& map, u32 full, int run) {
                tma_load_5d(shared_address(boxes), &map, full, 0, 0, run, blockIdx.y, coordinate, policy);
            };
            if (is_paced && asked > 2) {
                const Ring<TAILS> done = tail + (2 * TAILS - 2);
                wait(shared.tail_empty[done.at()], done.turn());
            }
            trace.mark(TRACE_FREE);
#pragma unroll
            for (int i = 0; i < PAIRS_A_BLOCK; i++) {
                if (asked > 0 && asked < (is_paced ? 3 : 2)) {
                    const Ring<PAIRS> landed = pair + (2 * PAIRS - PAIRS_A_BLOCK + i);
                    wait(shared.pair_full[landed.at()], landed.turn());
                }
                if (i == PAIRS_A_BLOCK - 1) {  // before the pair whose place gets free last
                    wait(shared.tail_empty[tail.at()], tail.turn() ^ 1);
                    shared.page_is_valid[tail.at()] = coordinate >= 0;
                    const u32 full = shared_address(&shared.tail_full[tail.at()]);
                    mbarrier_arrive_expect(full, BOX_BYTES);
                    load(shared.tails[tail.at()], params.k_tail_map, full, ROPE_BOX);
                }
                const Ring<PAIRS> to = pair + i;
                wait(shared.pair_empty[to.at()], to.turn() ^ 1);
                const u32 full = shared_address(&shared.pair_full[to.at()]);
                mbarrier_arrive_expect(full, PAIR_BYTES);
                load(shared.pairs[to.at()][0], params.k_map, full, i * 2);
            }
            tail += 1;
            shared.blocks_asked = ++asked;
            trace.mark(TRACE_ISSUED);
            pair += PAIRS_A_BLOCK;
        }
        note += 1;
    }
    shared.blocks_asked = ALL_BLOCKS;
    launch_next_kernel();
    mbarrier_arrive(shared_address(&shared.keys_asked));
}

// With several row blocks the scorers hold P back and places in the ring get free late: too late for what comes from device
// memory, but not for what is in L2. The latest is that of a block's last pair. So the last pair of the block that the ring has no
// room for yet is brought there, by prefetches; row blocks share the work (of an odd number the last has no share). Lengths are
// looked up anew and may be others than the loader saw, if somebody writes them meanwhile. Then too few blocks are brought, or too
// many. Called by one warp.
__device__ __forceinline__ void bring_keys_to_l2(const MlaDecodeParams& params, Shared& shared, int lane) {
    constexpr int LINE = 64, LINES_A_ROW = PAIR_BYTES / BOX_BYTES;  // 128 bytes, of a pair
    const int lanes_a_row = gridDim.x * 32 / KEYS;
    if (lanes_a_row == 0) return;
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    const volatile int& asked = shared.blocks_asked;
    int number_of_block = 0;
    for (int number = part().first_request; number <= part().last_number; number++) {
        const int source = part().request(number);
        const Request request(params, source, here(blockIdx.x) * ROWS);
        const int last = part().last(number, request.blocks());
        for (int block = part().first(number, request.blocks()); block < last; block++) {
            const int page = load_now(params.block_table + source * params.block_table_stride + block);
            u32 spins = 0;
            while (!__all_sync(0xFFFFFFFF, number_of_block <= asked)) {
                __nanosleep(100);
                if (config::TRAP_AFTER_SPINS > 0 && ++spins > config::TRAP_AFTER_SPINS) __trap();
            }
            const bool has_room = number_of_block++ < RING_BLOCKS;
            if (has_room || page < 0 || page >= params.num_blocks) continue;
            const int place = here(blockIdx.x) * 32 + lane, row = place % KEYS, first = place / KEYS;
            if (first >= lanes_a_row) continue;
            const u16* line = params.k + page * params.k_stride_page + row * params.k_stride_row +
                              blockIdx.y * params.k_stride_head + HEAD_DIM_V - (LINES_A_ROW - first) * LINE;
#pragma unroll 1
            for (int i = first; i < LINES_A_ROW; i += lanes_a_row, line += lanes_a_row * LINE) prefetch_to_l2(line);
        }
    }
}

// Where the 64 rows of this thread block's query tile begin in the tensor map of q: (column, head, query, KV head, request).
struct QueryTile {
    int head, query;
    __device__ __forceinline__ explicit QueryTile(const MlaDecodeParams& params) {
        const int first_row = blockIdx.x * ROWS;
        query = first_row / params.q_map_heads;
        head = first_row - query * params.q_map_heads;
    }
};

// The rows that no query tile has stay zero in the boxes that stay in shared memory. Called by one warp.
__device__ __forceinline__ void clear_missing_rows(const MlaDecodeParams& params, Shared& shared, int lane) {
    constexpr int ROW_BYTES = BOX_COLUMNS * 2;
#pragma unroll 1
    for (int at = query_rows(params) * ROW_BYTES + lane * 16; at < BOX_BYTES; at += 32 * 16) {
#pragma unroll
        for (int box = 0; box < Q_IN_SHARED; box++) *reinterpret_cast<uint4*>(shared.q[box] + at) = {0, 0, 0, 0};
    }
    fence_async_shared();
}

// Has the query tile of every piece copied. One thread does it.
__device__ __forceinline__ void produce_q(const MlaDecodeParams& params, Shared& shared) {
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    const QueryTile tile(params);
    Ring<PIECES> note;
    for (int number = part().first_request; number <= part().last_number; number++) {
        const int source = part().request(number);
        auto load = [&](u8* box, u32 full, int column) {
            tma_load_5d(
                shared_address(box), &params.q_map, full, column, tile.head, tile.query, blockIdx.y, source, L2_EVICT_NORMAL);
        };
        Ring<PAIRS> pair;  // the first piece's is known
        if (number > part().first_request) {
            wait(shared.piece_ready[note.at()], note.turn());
            pair.steps = shared.pieces[note.at()].pair;
        }
#pragma unroll 1
        for (int i = 0; i < Q_PAIRS; i++) {
            const Ring<PAIRS> to = pair + i;
            wait(shared.pair_empty[to.at()], to.turn() ^ 1);
            const u32 full = shared_address(&shared.pair_full[to.at()]);
            mbarrier_arrive_expect(full, query_rows(params) * (2 * BOX_COLUMNS * 2));
            load(shared.pairs[to.at()][0], full, i * 2 * BOX_COLUMNS);
            load(shared.pairs[to.at()][1], full, (i * 2 + 1) * BOX_COLUMNS);
        }
        wait(shared.q_empty, note.at() ^ 1);
        const u32 full = shared_address(&shared.q_ready[note.at()]);
        mbarrier_arrive_expect(full, query_rows(params) * (Q_IN_SHARED * BOX_COLUMNS * 2));
#pragma unroll 1
        for (int i = 0; i < Q_IN_SHARED; i++) load(shared.q[i], full, (Q_IN_REGISTERS + i) * BOX_COLUMNS);
        mbarrier_arrive(shared_address(&shared.piece_empty[note.at()]));
        note += 1;
    }
}

}  // namespace
