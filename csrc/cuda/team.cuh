// A team of warps inside a block (see team_index.h) and its reduction. Every thread of the team gets the same bits, and
// the order of the additions is fixed.
#pragma once

#include "team_index.h"

namespace vitfast::cuda {

struct Team {
    int index;  // of the team in its block
    int lane;   // of the thread in its team
    int lanes;
    int warps;

    __device__ explicit Team(const TeamShape& shape)
        : index(threadIdx.x / shape.lanes()),
          lane(threadIdx.x % shape.lanes()),
          lanes(shape.lanes()),
          warps(shape.warps) {}

    __device__ void barrier() const {
#ifdef __CUDACC__
        // Barrier 0 is __syncthreads; teams of several warps number at most 8 in a block, of the 16 barriers there are.
        asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(lanes) : "memory");
#else
        host_barrier(index + 1, lanes);
#endif
    }
};

// Two buffers take turns: a warp can write the next reduction's buffer while a slower one still reads this one's.
template <int COUNT>
struct TeamScratch {
    float sum[2][COUNT][kMaxBlockWarps];
};

template <int COUNT>
__device__ __forceinline__ void team_sum(float (&value)[COUNT], const Team& team, TeamScratch<COUNT>& scratch,
                                         int& turn) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
            value[i] += __shfl_xor_sync(0xffffffffu, value[i], offset);
        }
    }
    if (team.warps == 1) {
        return;
    }
    const int first_warp = team.index * team.warps;
    if (team.lane % kWarpSize == 0) {
        for (int i = 0; i < COUNT; ++i) {
            scratch.sum[turn][i][first_warp + team.lane / kWarpSize] = value[i];
        }
    }
    team.barrier();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        value[i] = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kMaxBlockWarps; ++warp) {
            if (warp < team.warps) {
                value[i] += scratch.sum[turn][i][first_warp + warp];
            }
        }
    }
    turn ^= 1;
}

}  // namespace vitfast::cuda
