// The producer warps of the decode kernel: K by the copy engine, Q by 16-byte copies of their own.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace {

// Finds out what each piece of the part is, tells the others, and has its blocks of keys copied. One thread does it.
__device__ __forceinline__ void produce_k(const MlaDecodeParams& params, Shared& shared) {
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    const u64 policy = gridDim.x > 1 ? L2_EVICT_NORMAL : L2_EVICT_FIRST;  // several row blocks share K through L2
    Trace trace(TRACE_LOADER, true);
    Ring<PAIRS> pair;
    Ring<TAILS> tail;
    Ring<PIECES> note;
    int asked = 0;  // blocks so far: 3 stands for more, too
    for (int number = part().first_request; number <= part().last_request; number++) {
        const int* table = params.block_table + number * params.block_table_stride;
        auto page_of = [&](int block) { return block < params.max_blocks ? load_now(table + block) : -1; };
        const int begin = part().begin(number);
        int page = page_of(begin), next_page = page_of(begin + 1);  // under way while the length arrives
        const Request request(params, number, blockIdx.x * ROWS);
        const int first = part().first(number, request.blocks()), last = part().last(number, request.blocks());
        wait(shared.piece_empty[note.at()], note.turn() ^ 1);
        shared.pieces[note.at()] = {request.length, request.limit_min, first, last, pair.steps};
        mbarrier_arrive(shared_address(&shared.piece_ready[note.at()]));
        note += 1;
        pair += Q_PAIRS;

        for (int block = first; block < last; block++) {
            // A page out of range: the copy engine fills in zeros and the scores will be masked.
            const bool valid = page >= 0 && page < params.num_blocks;
            const int coordinate = valid ? page : -1;
            page = next_page;
            next_page = page_of(block + 2);
            auto load = [&](u8* box, u32 full, int column) {
                tma_load_4d(shared_address(box), &params.k_map, full, column, 0, blockIdx.y, coordinate, policy);
            };
            // With one row block memory is the limit, and it gets slower when it is asked for more at once than keeps it busy. So
            // the second and third block are asked for as the one before lands, later ones when two before them are done with.
            const bool is_paced = gridDim.x == 1;
            if (is_paced && asked > 2) {
                const Ring<TAILS> done = tail + (2 * TAILS - 2);
                wait(shared.tail_empty[done.at()], done.turn());
            }
            trace.mark(TRACE_FREE);
#pragma unroll
            for (int i = 0; i < PAIRS_A_BLOCK; i++) {
                if (is_paced && asked > 0 && asked < 3 && block > first) {
                    const Ring<PAIRS> landed = pair + (2 * PAIRS - PAIRS_A_BLOCK + i);
                    wait(shared.pair_full[landed.at()], landed.turn());
                }
                if (i == PAIRS_A_BLOCK - 1) {  // before the pair whose place gets free last
                    wait(shared.tail_empty[tail.at()], tail.turn() ^ 1);
                    shared.page_is_valid[tail.at()] = valid;
                    const u32 full = shared_address(&shared.tail_full[tail.at()]);
                    mbarrier_arrive_expect(full, BOX_BYTES);
                    load(shared.tails[tail.at()], full, HEAD_DIM_V);
                }
                const Ring<PAIRS> to = pair + i;
                wait(shared.pair_empty[to.at()], to.turn() ^ 1);
                const u32 full = shared_address(&shared.pair_full[to.at()]);
                mbarrier_arrive_expect(full, PAIR_BYTES);
                load(shared.pairs[to.at()][0], full, i * 2 * BOX_COLUMNS);
                load(shared.pairs[to.at()][1], full, (i * 2 + 1) * BOX_COLUMNS);
            }
            tail += 1;
            asked = min(asked + 1, 3);
            trace.mark(TRACE_ISSUED);
            pair += PAIRS_A_BLOCK;
        }
    }
}

// Copies the 64 query rows of every piece to shared memory, in the boxes that TMA would have made: rows are pairs
// (query, head), which no tensor map can cut into runs of 64 for every head count. A warp takes 32 rows; each lane
// finds where one of them lies, then 8 lanes at a time copy a row's 128 bytes of a box.
__device__ void produce_q(const MlaDecodeParams& params, Shared& shared) {
    constexpr int ROWS_A_WARP = ROWS / Q_LOADERS;
    static_assert(ROWS_A_WARP == 32, "one row a lane");
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    Ring<PIECES> note;
    for (int number = part().first_request; number <= part().last_request; number++) {
        Ring<PAIRS> pair;  // the first piece's is known
        if (number > part().first_request) {
            wait(shared.piece_ready[note.at()], note.turn());
            pair.steps = shared.pieces[note.at()].pair;
        }
#pragma unroll 1
        for (int i = 0; i < Q_PAIRS; i++) {
            const Ring<PAIRS> to = pair + i;
            wait(shared.pair_empty[to.at()], to.turn() ^ 1);
            // The barrier keeps step with the ring; when the tile is there, q_ready says.
            if (here(threadIdx.x) == WARPGROUP - 32) mbarrier_arrive(shared_address(&shared.pair_full[to.at()]));
        }
        auto box_at = [&](int box) {
            const Ring<PAIRS> first(here(pair.steps));  // no addresses kept, for want of registers
            return box < Q_IN_REGISTERS ? shared_address(shared.pairs[(first + box / 2).at()][box % 2])
                                        : shared_address(shared.q[box - Q_IN_REGISTERS]);
        };
        wait(shared.q_empty, note.at() ^ 1);
        const int thread = here(threadIdx.x), lane = thread % 32;
        const int warp_row = (thread / 32 - (WARPGROUP / 32 - Q_LOADERS)) * ROWS_A_WARP;
        const int group_row = here(blockIdx.x) * ROWS + warp_row + lane;
        const bool row_exists = group_row < params.rows_per_group;
        const RowPlace place(params, group_row);
        const i64 row_offset = place.query * params.q_stride_seq + place.head * params.q_stride_head;
        const u64 lane_row = row_exists ? reinterpret_cast<u64>(params.q + number * params.q_stride_batch + row_offset) : 0;
#pragma unroll 1
        for (int group = 0; group < ROWS_A_WARP; group += 4) {
            const int owner = group + lane / 8, row = warp_row + owner, chunk = lane % 8;
            const u64 source_row = __shfl_sync(0xFFFFFFFF, lane_row, owner);
            const bool valid = source_row != 0;
            const u16* source = reinterpret_cast<const u16*>(source_row) + chunk * 8;
            const u32 at = box_offset(row, chunk);
            if (config::ALIGNED || params.q_is_aligned) {
#pragma unroll
                for (int box = 0; box < BOXES; box++) copy_async_16(box_at(box) + at, source + box * BOX_COLUMNS, valid);
            } else {
#pragma unroll 1
                for (int i = 0; i < BOXES * 8; i++) {
                    const int box = i / 8, element = i % 8;
                    store_shared(box_at(box) + at + element * 2, valid ? source[box * BOX_COLUMNS + element] : static_cast<u16>(0));
                }
            }
        }
        copy_async_wait_all();
        fence_async_shared();
        note = Ring<PIECES>(here(note.steps));
        mbarrier_arrive(shared_address(&shared.q_ready[note.at()]));
        arrive_as_warp(shared.piece_empty[note.at()], here(threadIdx.x) % 32);
        note += 1;
    }
}

}  // namespace
