// When each role of a thread block did what: `python -m flashmla_rtc timeline` records and draws it. Compiled in only where
// config::TRACE_EVENTS is not 0; the kernels that decode carry no trace of it.
#pragma once
#include "ptx/types.cuh"

// Roles: left, right, the loader of K, left and right again when they merge, and the scorers.
constexpr int TRACE_ROLES = 6, TRACE_LOADER = 2, TRACE_MERGING = 3, TRACE_SCORER = 5;
constexpr int TRACE_BLOCKS = 256;  // of the grid, in the order of their numbers; later ones leave no trace

constexpr int TRACE_ROOM = config::TRACE_EVENTS > 0 ? config::TRACE_EVENTS : 1;

// One event: nanoseconds of the device's clock in the high half, then 26 bits of the SM's cycle counter, then the kind. The
// device's clock takes long to read, so events within a block of keys leave it 0.
extern "C" {
__device__ u64 trace_log[config::TRACE_EVENTS > 0 ? TRACE_BLOCKS * TRACE_ROLES * TRACE_ROOM : 1];
}

namespace {

enum TraceKind : u32 {  // timeline.py has the same list
    TRACE_NONE,
    TRACE_START,    // the role begins
    TRACE_Q,        // the query tile has landed
    TRACE_SCORES,   // S is there
    TRACE_P,        // the probabilities are written
    TRACE_OUTPUT,   // the products of a block are done; at a piece's last block half of the piece is written, too
    TRACE_SUMS,     // a piece's sums are known, and left and right have done its last product
    TRACE_WRITTEN,  // the piece, or the share of a merge, is written
    TRACE_FETCHED,  // the pieces of a task of a merge are there and added
    TRACE_FREE,     // the loader found its first box free
    TRACE_ISSUED,   // the loader has asked for all boxes of a block
};

struct Trace {
    int next;  // where in the log; negative: no more

    // For the thread that calls it with `active`.
    __device__ __forceinline__ Trace(int role, bool active) {
        if constexpr (config::TRACE_EVENTS > 0) {
            const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
            next = active && block < TRACE_BLOCKS ? (block * TRACE_ROLES + role) * TRACE_ROOM : -1;
            mark(TRACE_START);
        }
    }
    __device__ __forceinline__ void mark(TraceKind kind) {
        if constexpr (config::TRACE_EVENTS > 0) {
            if (next < 0) return;
            u64 nanoseconds = 0;
            u32 cycles;
            if (kind <= TRACE_Q || (kind >= TRACE_SUMS && kind <= TRACE_FETCHED)) {
                asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
            }
            asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles)::"memory");
            trace_log[next] = nanoseconds << 32 | (cycles << 6 | kind);
            next++;
            if (next % TRACE_ROOM == 0) next = -1;
        }
    }
};

}  // namespace
