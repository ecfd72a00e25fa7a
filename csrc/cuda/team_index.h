// Which thread owns which row and which columns. A team of `warps` warps works on one row at a time; a block holds
// `teams` teams; blocks stride over the rows. Within a row each warp of the team owns a run of CHUNKS * 32 * VEC
// columns, and lane l of the warp owns VEC neighbours in each chunk of 32 * VEC: a warp's access is one run of memory,
// and the chunks of a lane lie a compile-time distance apart.
#pragma once

#include "host_device.h"

namespace vitfast::cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxBlockWarps = 8;
// Widest row of LayerNorm, which keeps it in registers between its passes. The widest published ViT (22B) has 6144.
constexpr int kMaxWidth = 8192;
// Most threads a multiprocessor holds.
constexpr int kMostResidentThreads = 2048;

// The rows of one tensor as seen by a kernel; passed to the kernel by value.
struct TeamShape {
    int64_t rows;
    int width;   // columns in a row
    int warps;   // warps in a team
    int teams;   // teams in a block
    int blocks;  // blocks in the grid

    VITFAST_HOST_DEVICE int lanes() const { return warps * kWarpSize; }
    VITFAST_HOST_DEVICE int threads() const { return teams * lanes(); }
    VITFAST_HOST_DEVICE int64_t row_stride() const { return static_cast<int64_t>(blocks) * teams; }
    VITFAST_HOST_DEVICE int64_t first_row(int block, int team) const {
        return static_cast<int64_t>(block) * teams + team;
    }
};

// First column of the lane'th thread of a team; its later chunks follow at kChunkDistance<VEC>. Columns at or past the
// width are owned but not there.
template <int VEC, int CHUNKS>
VITFAST_HOST_DEVICE int first_column(int lane) {
    return (lane / kWarpSize * CHUNKS * kWarpSize + lane % kWarpSize) * VEC;
}

template <int VEC>
constexpr int kChunkDistance = kWarpSize * VEC;

// Fewest warps whose lanes, at `per_lane` columns each, cover a row.
inline int warps_to_cover(int width, int per_lane) {
    return static_cast<int>(ceil_div(width, static_cast<int64_t>(per_lane) * kWarpSize));
}

// A grid of at most one wave of blocks of `block_warps` warps (one team if a team is wider than that).
inline TeamShape make_team_shape(int64_t rows, int width, int warps, int block_warps, int resident_threads,
                                 int multiprocessors) {
    TeamShape shape{rows, width, warps, block_warps / warps > 1 ? block_warps / warps : 1, 0};
    const int64_t wave = static_cast<int64_t>(multiprocessors) * ceil_div(resident_threads, shape.threads());
    const int64_t needed = ceil_div(rows, shape.teams);
    shape.blocks = static_cast<int>(needed < wave ? needed : wave);
    return shape;
}

}  // namespace vitfast::cuda
