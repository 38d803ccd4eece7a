// The producer warps of the decode kernel: K by the copy engine, Q by 16-byte copies of their own.
#pragma once
#include "mla_decode_block.cuh"
#include "mla_decode_merge.cuh"
#include "mla_decode_trace.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace {

// Fills one K slot: the even (slot 0) or odd (slot 1) blocks of every piece. One lane does it all.
__device__ void produce_k(const MlaDecodeParams& params, Shared& shared, int slot, int first_row) {
    const u64 policy = gridDim.x > 1 ? l2_evict_normal() : l2_evict_first();  // several row blocks share K through L2
    const int kv_head = blockIdx.y;
    u32 parity = 0;
    Trace trace(TRACE_LOADER, slot == 0);
    const Part part(shared.plan_row, gridDim.z, params.batch);
    for (int number = part.first_request; number <= part.last_request; number++) {
        const int* table = params.block_table + number * params.block_table_stride;
        const int begin = min(part.begin(number) + slot, params.max_blocks - 1);
        int page = begin >= 0 ? load_now(table + begin) : -1;  // under way while the length arrives
        const Request request(params, number, first_row);
        const int first = part.first(number, request.blocks()), last = part.last(number, request.blocks());
        for (int block = first + slot; block < last; block += 2) {
            // A page out of range: the copy engine fills in zeros and the scores will be masked.
            const bool valid = page >= 0 && page < params.num_blocks;
            const int coordinate = valid ? page : -1;
            page = block + 2 < last ? table[block + 2] : -1;  // fetched ahead

            auto load = [&](int box) {
                const u32 barrier = shared_address(&shared.k_full[slot][box]);
                mbarrier_arrive_expect(barrier, BOX_BYTES);
                tma_load_4d(shared_address(shared.k[slot][box]), &params.k_map, barrier, box * BOX_COLUMNS, 0, kv_head,
                            coordinate, policy);
            };
            wait(shared.k_empty[slot][ROPE_BOXES_FREE], parity ^ 1);
            trace.mark(TRACE_FREE);
            shared.page_is_valid[slot] = valid;
            load(ROPE_BOX);
            for (int half = 0; half < 2; half++) {  // the owner of the slot frees its own half first
                const int side = slot ^ half;
                wait(shared.k_empty[slot][side], parity ^ 1);
#pragma unroll
                for (int box = 0; box < HALF_BOXES; box++) load(side * HALF_BOXES + box);
            }
            trace.mark(TRACE_ISSUED);
            parity ^= 1;
        }
    }
}

// Copies the 64 query rows of every piece to shared memory, in the boxes that TMA would have made: rows are pairs
// (query, head), which no tensor map can cut into runs of 64 for every head count. A warp takes 32 rows; each lane
// finds where one of them lies, then 8 lanes at a time copy a row's 128 bytes of a box.
__device__ void produce_q(const MlaDecodeParams& params, Shared& shared, int first_row) {
    constexpr int ROWS_A_WARP = ROWS / (Q_LOADERS / 32);
    static_assert(ROWS_A_WARP == 32, "one row a lane");
    u32 parity = 0;
    for (int number = Part(shared.plan_row, gridDim.z, params.batch).first_request;
         number <= Part(shared.plan_row, gridDim.z, params.batch).last_request; number++) {
        const int thread = here(threadIdx.x), lane = thread % 32, warp_row = (thread / 32 - 2) * ROWS_A_WARP;
        const int group_row = first_row + warp_row + lane;
        const bool row_exists = group_row < params.rows_per_group;
        const RowPlace place(params, group_row);
        const i64 row_offset = place.query * params.q_stride_seq + place.head * params.q_stride_head;
        const u16* const lane_row = params.q + (row_exists ? number * params.q_stride_batch + row_offset : 0);
        wait(shared.q_empty, parity ^ 1);
#pragma unroll 1
        for (int group = 0; group < ROWS_A_WARP; group += 4) {
            const int owner = group + lane / 8, row = warp_row + owner, chunk = lane % 8;
            const u16* source = reinterpret_cast<const u16*>(
                                    __shfl_sync(0xFFFFFFFF, reinterpret_cast<u64>(lane_row), owner)) + chunk * 8;
            const bool valid = __shfl_sync(0xFFFFFFFF, static_cast<int>(row_exists), owner) != 0;
            u8* destination = shared.q[0] + box_offset(row, chunk);
            if (params.q_is_aligned) {
#pragma unroll
                for (int box = 0; box < BOXES; box++) {
                    copy_async_16(shared_address(destination + box * BOX_BYTES), source + box * BOX_COLUMNS, valid);
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < BOXES * 8; i++) {
                    const int box = i / 8, element = i % 8;
                    reinterpret_cast<u16*>(destination + box * BOX_BYTES)[element] =
                        valid ? source[box * BOX_COLUMNS + element] : static_cast<u16>(0);
                }
            }
        }
        copy_async_wait_all();
        fence_async_shared();
        mbarrier_arrive(shared_address(&shared.q_full));
        parity ^= 1;
        if (number == Part(shared.plan_row, gridDim.z, params.batch).first_request) find_merge(params, shared, warp_row == 0 ? FRONT : BACK, first_row);
    }
}

}  // namespace
