// Q for layouts that no tensor map describes, or that are not aligned for one.
#pragma once
#include "mla_decode_block.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace {

// Copies the 64 query rows of every piece to shared memory, in the boxes that TMA would have made: rows are pairs
// (query, head), which no tensor map can cut into runs of 64 for every head count. A warp takes 32 rows; each lane
// finds where one of them lies, then 8 lanes at a time copy a row's 128 bytes of a box.
__device__ void gather_q(const MlaDecodeParams& params, Shared& shared) {
    constexpr int ROWS_A_WARP = ROWS / Q_LOADERS;
    static_assert(ROWS_A_WARP == 32, "one row a lane");
    auto part = [&] { return Part(shared.plan_row, gridDim.z, params.batch); };
    Ring<PIECES> note;
    for (int number = part().first_request; number <= part().last_number; number++) {
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
        const u64 lane_row = row_exists ? reinterpret_cast<u64>(params.q + part().request(number) * params.q_stride_batch + row_offset) : 0;
#pragma unroll 1
        for (int group = 0; group < ROWS_A_WARP; group += 4) {
            const int owner = group + lane / 8, row = warp_row + owner, chunk = lane % 8;
            const u64 source_row = __shfl_sync(0xFFFFFFFF, lane_row, owner);
            const bool valid = source_row != 0;
            const u16* source = reinterpret_cast<const u16*>(source_row) + chunk * 8;
            const u32 at = box_offset(row, chunk);
            if (params.q_is_aligned) {
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
