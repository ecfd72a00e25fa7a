// Backward of residual add + LayerNorm: one pass over the rows for the input gradients and per-block partial sums of
// the parameter gradients, then column_sum adds the partials.
//
// Bytes per element (x = sizeof(X), y = sizeof(Y)) and the time at 4.3 TB/s for ViT-B/16 at batch 256, bf16:
//   d_normed, total -> d_x                                  y + 2x          6 B    54 us
//   and d_total                                             y + 3x          8 B    72 us
//   and d_branch                                            2y + 3x        10 B    90 us
//   and branch (for d_scale)                                3y + 3x        12 B   108 us
// and 4 B x parameters x D per block of partials, written and read once: 3.6 MB each way here, under 3 %.
#pragma once

#include "column_sum.cuh"
#include "layer_norm_math.h"
#include "team.cuh"
#include "vector_io.h"

namespace vitfast::cuda {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardBlockWarps = kBackwardThreads / kWarpSize;
// Columns a lane owns: 8, and 16 or 32 where a row is wider than 8 warps of 8 or 16. Each owned column costs a lane
// three accumulators that live across rows, so a row is spread over more warps than in forward.
constexpr int kBackwardColumnsPerLane = 8;
constexpr int kBackwardWidestPerLane = 32;
// With 32 columns a lane there is no room to have the whole row in flight, and d_total and branch wait for the
// reduction.
constexpr int kBackwardMostPrefetched = 16;
// Blocks per multiprocessor that ptxas leaves registers for (80 or 128 a thread) and the grid is sized by.
constexpr int kBackwardBlocks = 3;
constexpr int kBackwardBranchBlocks = 2;
constexpr int kBackwardWideBlocks = 1;
static_assert(kMaxWidth == kBackwardWidestPerLane * kBackwardThreads);
enum ParameterGrad { kWeightGrad, kBiasGrad, kScaleGrad, kParameterGrads };

template <typename X, typename Y>
struct LayerNormBackwardArgs {
    const Y* d_normed;       // [T, D]
    const X* d_total;        // [T, D] or null
    const X* total;          // [T, D]
    const float* mean;       // [T]
    const float* rstd;       // [T]
    const float* weight;     // [D]
    const Y* branch;         // [T, D] or null; read for d_scale alone
    const float* scale;      // [D] or null
    const float* drop_path;  // [B] or null
    X* d_x;                  // [T, D]
    Y* d_branch;             // [T, D] or null
    float* d_scale;          // [D] or null
    float* d_weight;         // [D]
    float* d_bias;           // [D]
    float* partial;          // [kParameterGrads, blocks, D], the scale's part only if d_scale
    int64_t rows_per_sample;
};

// Adds the accumulators of a block's teams in order and writes them to partial[grad][block].
template <int VEC, int CHUNKS>
__device__ __forceinline__ void store_partial(const float (&sum)[CHUNKS][VEC], const Team& team, const TeamShape& shape,
                                              float* out, float* scratch) {
    if (shape.teams > 1) {
        __syncthreads();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                scratch[(chunk * VEC + i) * shape.threads() + threadIdx.x] = sum[chunk][i];
            }
        }
        __syncthreads();
    }
    if (team.index > 0) {
        return;
    }
    const int first = first_column<VEC, CHUNKS>(team.lane);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int step = chunk * kChunkDistance<VEC>;
        if (first + step < shape.width) {
            float all[VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                all[i] = sum[chunk][i];
#pragma unroll 1
                for (int other = 1; other < shape.teams; ++other) {
                    all[i] += scratch[(chunk * VEC + i) * shape.threads() + other * team.lanes + team.lane];
                }
            }
            store<VEC>(out + first + step, all);
        }
    }
}

template <typename X, typename Y, int VEC, int CHUNKS, bool HAS_BRANCH>
__global__ void __launch_bounds__(kBackwardThreads, CHUNKS* VEC > kBackwardColumnsPerLane ? kBackwardWideBlocks
                                                    : HAS_BRANCH                          ? kBackwardBranchBlocks
                                                                                          : kBackwardBlocks)
    layer_norm_backward_kernel(const LayerNormBackwardArgs<X, Y> args, const TeamShape shape) {
    constexpr int kColumns = CHUNKS * VEC;
    constexpr bool kPrefetch = kColumns <= kBackwardMostPrefetched;
    // Only rows of 8 columns a lane leave room for several teams in a block, whose accumulators meet in team_sums.
    __shared__ TeamScratch<2> scratch;
    __shared__ float team_sums[kColumns <= kBackwardColumnsPerLane ? kColumns * kBackwardThreads : 1];
    const Team team(shape);
    const int first = first_column<VEC, CHUNKS>(team.lane);
    int turn = 0;
    float d_weight[CHUNKS][VEC] = {};
    float d_bias[CHUNKS][VEC] = {};
    float d_scale[CHUNKS][VEC] = {};
    for (int64_t row = shape.first_row(blockIdx.x, team.index); row < shape.rows; row += shape.row_stride()) {
        const int64_t start = row * shape.width + first;
        Raw<Y, VEC> d_normed[CHUNKS] = {};
        Raw<X, VEC> total[CHUNKS] = {};
        Raw<X, VEC> d_total[CHUNKS] = {};
        Raw<Y, VEC> branch[CHUNKS] = {};
        const auto load_row = [&](int chunk) {
            const int64_t offset = start + chunk * kChunkDistance<VEC>;
            d_normed[chunk] = load<VEC>(args.d_normed + offset);
            total[chunk] = load<VEC>(args.total + offset);
        };
        const auto load_upstream = [&](int chunk) {
            const int64_t offset = start + chunk * kChunkDistance<VEC>;
            if (args.d_total) {
                d_total[chunk] = load<VEC>(args.d_total + offset);
            }
            if (HAS_BRANCH && args.d_scale) {
                branch[chunk] = load<VEC>(args.branch + offset);
            }
        };
        if constexpr (kPrefetch) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                if (first + chunk * kChunkDistance<VEC> < shape.width) {
                    load_row(chunk);
                    load_upstream(chunk);
                }
            }
        }
        const float mean = args.mean[row];
        const float rstd = args.rstd[row];
        const float drop = HAS_BRANCH && args.drop_path ? args.drop_path[fast_div(row, args.rows_per_sample)] : 1.0f;

        float g[CHUNKS][VEC] = {};
        float x_hat[CHUNKS][VEC] = {};
        float sum[2] = {0.0f, 0.0f};  // of g and of g * x_hat
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int step = chunk * kChunkDistance<VEC>;
            if (first + step < shape.width) {
                if constexpr (!kPrefetch) {
                    load_row(chunk);
                }
                const Raw<float, VEC> weight = load<VEC>(args.weight + first + step);
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float d_y = d_normed[chunk][i];
                    x_hat[chunk][i] = standardize(total[chunk][i], mean, rstd);
                    g[chunk][i] = d_y * weight[i];
                    d_weight[chunk][i] = fmaf(d_y, x_hat[chunk][i], d_weight[chunk][i]);
                    d_bias[chunk][i] += d_y;
                    sum[0] += g[chunk][i];
                    sum[1] = fmaf(g[chunk][i], x_hat[chunk][i], sum[1]);
                }
            }
        }
        team_sum(sum, team, scratch, turn);
        const float mean_g = sum[0] / static_cast<float>(shape.width);
        const float mean_g_x_hat = sum[1] / static_cast<float>(shape.width);

#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int step = chunk * kChunkDistance<VEC>;
            if (first + step < shape.width) {
                if constexpr (!kPrefetch) {
                    load_upstream(chunk);
                }
                float d_x[VEC];
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    d_x[i] = input_grad(g[chunk][i], x_hat[chunk][i], mean_g, mean_g_x_hat, rstd, d_total[chunk][i]);
                }
                store<VEC>(args.d_x + start + step, d_x);
                if constexpr (HAS_BRANCH) {
                    float d_branch[VEC];
#pragma unroll
                    for (int i = 0; i < VEC; ++i) {
                        d_branch[i] = drop * d_x[i];
                        d_scale[chunk][i] = fmaf(d_branch[i], branch[chunk][i], d_scale[chunk][i]);
                    }
                    if (args.d_branch) {
                        if (args.scale) {
                            const Raw<float, VEC> scale = load<VEC>(args.scale + first + step);
#pragma unroll
                            for (int i = 0; i < VEC; ++i) {
                                d_branch[i] *= scale[i];
                            }
                        }
                        store<VEC>(args.d_branch + start + step, d_branch);
                    }
                }
            }
        }
    }
    const int64_t part_size = static_cast<int64_t>(gridDim.x) * shape.width;
    float* const partial = args.partial + static_cast<int64_t>(blockIdx.x) * shape.width;
    store_partial<VEC, CHUNKS>(d_weight, team, shape, partial + kWeightGrad * part_size, team_sums);
    store_partial<VEC, CHUNKS>(d_bias, team, shape, partial + kBiasGrad * part_size, team_sums);
    if (HAS_BRANCH && args.d_scale) {
        store_partial<VEC, CHUNKS>(d_scale, team, shape, partial + kScaleGrad * part_size, team_sums);
    }
}

inline int backward_columns_per_lane(int width) {
    int columns = kBackwardColumnsPerLane;
    while (columns * kBackwardThreads < width) {
        columns *= 2;
    }
    return columns;
}

inline TeamShape backward_shape(int64_t rows, int width, bool has_branch, int multiprocessors) {
    const int columns = backward_columns_per_lane(width);
    const int blocks = columns > kBackwardColumnsPerLane ? kBackwardWideBlocks
                       : has_branch                      ? kBackwardBranchBlocks
                                                         : kBackwardBlocks;
    return make_team_shape(rows, width, warps_to_cover(width, columns), kBackwardBlockWarps, blocks * kBackwardThreads,
                           multiprocessors);
}

// Floats of workspace that run_layer_norm_backward needs in args.partial.
inline int64_t backward_workspace_size(int64_t rows, int width, bool has_branch, int multiprocessors) {
    return static_cast<int64_t>(kParameterGrads) * backward_shape(rows, width, has_branch, multiprocessors).blocks *
           width;
}

template <typename X, typename Y, int VEC, bool HAS_BRANCH, typename Launcher>
void launch_layer_norm_backward(const LayerNormBackwardArgs<X, Y>& args, const TeamShape& shape, Launcher& launcher) {
    const int columns = backward_columns_per_lane(shape.width);
    const auto kernel = columns == 8    ? layer_norm_backward_kernel<X, Y, VEC, 8 / VEC, HAS_BRANCH>
                        : columns == 16 ? layer_norm_backward_kernel<X, Y, VEC, 16 / VEC, HAS_BRANCH>
                                        : layer_norm_backward_kernel<X, Y, VEC, 32 / VEC, HAS_BRANCH>;
    launcher("layer_norm_backward", kernel, dim3(shape.blocks), dim3(shape.threads()), args, shape);
}

// 1 <= width <= kMaxWidth; args.partial holds backward_workspace_size floats. No rows: the parameter gradients are 0.
template <typename X, typename Y, typename Launcher>
void run_layer_norm_backward(const LayerNormBackwardArgs<X, Y>& args, int64_t rows, int width, Launcher& launcher) {
    constexpr int kVec = vector_width<X, Y>();
    const bool has_branch = args.d_branch || args.d_scale;
    const TeamShape shape = backward_shape(rows, width, has_branch, launcher.multiprocessors());
    if (rows > 0) {
        const bool vectorize = can_vectorize(width, kVec, args.d_normed, args.d_total, args.total, args.weight,
                                             args.branch, args.scale, args.d_x, args.d_branch, args.partial);
        if (vectorize && has_branch) {
            launch_layer_norm_backward<X, Y, kVec, true>(args, shape, launcher);
        } else if (vectorize) {
            launch_layer_norm_backward<X, Y, kVec, false>(args, shape, launcher);
        } else if (has_branch) {
            launch_layer_norm_backward<X, Y, 1, true>(args, shape, launcher);
        } else {
            launch_layer_norm_backward<X, Y, 1, false>(args, shape, launcher);
        }
    }
    const ColumnSumArgs sums{args.partial, {args.d_weight, args.d_bias, args.d_scale}, shape.blocks, width};
    run_column_sum(sums, args.d_scale ? 3 : 2, launcher);
}

}  // namespace vitfast::cuda
