// Residual add, LayerScale, DropPath and LayerNorm in one pass over the rows, and the two parts of it on their own.
// T rows, D columns, B samples; X is the residual stream's type, Y the compute type.
//
// Bytes per element (x = sizeof(X), y = sizeof(Y)), and what 4.3 TB/s (an H200's measured copy) makes of it for
// ViT-B/16 at batch 256, bf16 (38.7 M elements); statistics (8 bytes a row) and parameters (cached) are left out:
//   forward, no branch      x + y              4 B   36 us
//   forward with a branch   x + y + x + y      8 B   72 us
//   apply                   x + y              4 B   36 us
//   scale_add               x + y + x          6 B   54 us
#pragma once

#include "layer_norm_math.h"
#include "team.cuh"
#include "vector_io.h"

namespace vitfast::cuda {

constexpr int kForwardThreads = 256;
// Columns one lane can hold in registers between the passes over a row: 32 floats and no spill at 256 threads a block.
constexpr int kForwardColumnsPerLane = 32;
static_assert(kMaxWidth == kForwardColumnsPerLane * kForwardThreads);

template <typename X, typename Y>
struct LayerNormForwardArgs {
    const X* x;              // [T, D]
    const Y* branch;         // [T, D] or null
    const float* scale;      // [D] or null
    const float* drop_path;  // [B] or null
    const float* weight;     // [D]
    const float* bias;       // [D]
    X* total;                // [T, D]; null without a branch
    Y* normed;               // [T, D]; unused by scale_add
    float* mean;             // [T]
    float* rstd;             // [T]
    int64_t rows_per_sample;
    float eps;
};

template <typename X, typename Y>
struct LayerNormApplyArgs {
    const X* total;       // [T, D]
    const float* mean;    // [T]
    const float* rstd;    // [T]
    const float* weight;  // [D]
    const float* bias;    // [D]
    Y* normed;            // [T, D]
};

template <typename X, typename Y>
__device__ __forceinline__ float drop_path_of(const LayerNormForwardArgs<X, Y>& args, int64_t row) {
    return args.drop_path ? args.drop_path[fast_div(row, args.rows_per_sample)] : 1.0f;
}

// One chunk of x + drop_path * scale * branch, rounded to X as it is stored, so that backward sees the same row.
template <int VEC, typename X, typename Y>
__device__ __forceinline__ void add_branch(const LayerNormForwardArgs<X, Y>& args, const Raw<X, VEC>& x,
                                           const Raw<Y, VEC>& branch, float drop, int64_t offset, int column,
                                           float (&total)[VEC]) {
    Raw<float, VEC> scale;
    if (args.scale) {
        scale = load<VEC>(args.scale + column);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const float factor = args.scale ? drop * scale[i] : drop;
        total[i] = static_cast<float>(static_cast<X>(residual_sum(x[i], branch[i], factor)));
    }
    store<VEC>(args.total + offset, total);
}

// Args: LayerNormForwardArgs or LayerNormApplyArgs.
template <int VEC, typename Args>
__device__ __forceinline__ void store_normed(const Args& args, const float (&total)[VEC], float mean, float rstd,
                                             int64_t offset, int column) {
    const Raw<float, VEC> weight = load<VEC>(args.weight + column);
    const Raw<float, VEC> bias = load<VEC>(args.bias + column);
    float normed[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        normed[i] = normalize(total[i], mean, rstd, weight[i], bias[i]);
    }
    store<VEC>(args.normed + offset, normed);
}

template <typename X, typename Y, int VEC, int CHUNKS, bool HAS_BRANCH>
__global__ void __launch_bounds__(kForwardThreads)
    layer_norm_forward_kernel(const LayerNormForwardArgs<X, Y> args, const TeamShape shape) {
    __shared__ TeamScratch<1> scratch;
    const Team team(shape);
    const int first = first_column<VEC, CHUNKS>(team.lane);
    int turn = 0;
    for (int64_t row = shape.first_row(blockIdx.x, team.index); row < shape.rows; row += shape.row_stride()) {
        const int64_t start = row * shape.width + first;
        float total[CHUNKS][VEC] = {};
        Raw<X, VEC> x[CHUNKS] = {};
        Raw<Y, VEC> branch[CHUNKS] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int step = chunk * kChunkDistance<VEC>;
            if (first + step < shape.width) {
                x[chunk] = load<VEC>(args.x + start + step);
                if constexpr (HAS_BRANCH) {
                    branch[chunk] = load<VEC>(args.branch + start + step);
                }
            }
        }
        const float drop = HAS_BRANCH ? drop_path_of(args, row) : 1.0f;
        float sum[1] = {0.0f};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int step = chunk * kChunkDistance<VEC>;
            if (first + step < shape.width) {
                if constexpr (HAS_BRANCH) {
                    add_branch<VEC>(args, x[chunk], branch[chunk], drop, start + step, first + step, total[chunk]);
                }
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    if constexpr (!HAS_BRANCH) {
                        total[chunk][i] = x[chunk][i];
                    }
                    sum[0] += total[chunk][i];
                }
            }
        }
        team_sum(sum, team, scratch, turn);
        const float mean = sum[0] / static_cast<float>(shape.width);

        float squares[1] = {0.0f};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (first + chunk * kChunkDistance<VEC> < shape.width) {
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float difference = total[chunk][i] - mean;
                    squares[0] = fmaf(difference, difference, squares[0]);
                }
            }
        }
        team_sum(squares, team, scratch, turn);
        const float rstd = reciprocal_std(squares[0], shape.width, args.eps);

        if (team.lane == 0) {
            args.mean[row] = mean;
            args.rstd[row] = rstd;
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int step = chunk * kChunkDistance<VEC>;
            if (first + step < shape.width) {
                store_normed<VEC>(args, total[chunk], mean, rstd, start + step, first + step);
            }
        }
    }
}

// Chunks of a row that the kernels without statistics have in flight at once.
constexpr int kStreamChunks = 3;

template <typename X, typename Y, int VEC>
__global__ void __launch_bounds__(kForwardThreads)
    layer_norm_apply_kernel(const LayerNormApplyArgs<X, Y> args, const TeamShape shape) {
    const Team team(shape);
    const int distance = team.lanes * VEC;
    for (int64_t row = shape.first_row(blockIdx.x, team.index); row < shape.rows; row += shape.row_stride()) {
        const int64_t start = row * shape.width;
        const float mean = args.mean[row];
        const float rstd = args.rstd[row];
        for (int first = team.lane * VEC; first < shape.width; first += distance * kStreamChunks) {
            Raw<X, VEC> x[kStreamChunks] = {};
#pragma unroll
            for (int chunk = 0; chunk < kStreamChunks; ++chunk) {
                const int column = first + chunk * distance;
                if (column < shape.width) {
                    x[chunk] = load<VEC>(args.total + start + column);
                }
            }
#pragma unroll
            for (int chunk = 0; chunk < kStreamChunks; ++chunk) {
                const int column = first + chunk * distance;
                if (column < shape.width) {
                    float total[VEC];
#pragma unroll
                    for (int i = 0; i < VEC; ++i) {
                        total[i] = x[chunk][i];
                    }
                    store_normed<VEC>(args, total, mean, rstd, start + column, column);
                }
            }
        }
    }
}

template <typename X, typename Y, int VEC>
__global__ void __launch_bounds__(kForwardThreads)
    scale_add_forward_kernel(const LayerNormForwardArgs<X, Y> args, const TeamShape shape) {
    const Team team(shape);
    const int distance = team.lanes * VEC;
    for (int64_t row = shape.first_row(blockIdx.x, team.index); row < shape.rows; row += shape.row_stride()) {
        const int64_t start = row * shape.width;
        const float drop = drop_path_of(args, row);
        for (int first = team.lane * VEC; first < shape.width; first += distance * kStreamChunks) {
            Raw<X, VEC> x[kStreamChunks] = {};
            Raw<Y, VEC> branch[kStreamChunks] = {};
#pragma unroll
            for (int chunk = 0; chunk < kStreamChunks; ++chunk) {
                const int column = first + chunk * distance;
                if (column < shape.width) {
                    x[chunk] = load<VEC>(args.x + start + column);
                    branch[chunk] = load<VEC>(args.branch + start + column);
                }
            }
#pragma unroll
            for (int chunk = 0; chunk < kStreamChunks; ++chunk) {
                const int column = first + chunk * distance;
                if (column < shape.width) {
                    float total[VEC];
                    add_branch<VEC>(args, x[chunk], branch[chunk], drop, start + column, column, total);
                }
            }
        }
    }
}

// Columns a lane holds, in three steps so that narrow rows do not carry empty chunks; a scalar row takes all 32.
template <typename X, typename Y, int VEC, bool HAS_BRANCH, typename Launcher>
void launch_layer_norm_forward(const LayerNormForwardArgs<X, Y>& args, const TeamShape& shape, Launcher& launcher) {
    constexpr const char* kName = "layer_norm_forward";
    const int64_t per_lane = ceil_div(shape.width, shape.lanes());
    const dim3 grid(shape.blocks), block(shape.threads());
    if constexpr (VEC > 1) {
        if (per_lane <= 16) {
            launcher(kName, layer_norm_forward_kernel<X, Y, VEC, 16 / VEC, HAS_BRANCH>, grid, block, args, shape);
            return;
        }
        if (per_lane <= 24) {
            launcher(kName, layer_norm_forward_kernel<X, Y, VEC, 24 / VEC, HAS_BRANCH>, grid, block, args, shape);
            return;
        }
    }
    launcher(kName, layer_norm_forward_kernel<X, Y, VEC, 32 / VEC, HAS_BRANCH>, grid, block, args, shape);
}

inline TeamShape forward_shape(int64_t rows, int width, int multiprocessors) {
    return make_team_shape(rows, width, warps_to_cover(width, kForwardColumnsPerLane), kForwardThreads / kWarpSize,
                           kMostResidentThreads, multiprocessors);
}

// 1 <= width <= kMaxWidth. Launcher: launcher(name, kernel, grid, block, arguments...), launcher.multiprocessors().
template <typename X, typename Y, typename Launcher>
void run_layer_norm_forward(const LayerNormForwardArgs<X, Y>& args, int64_t rows, int width, Launcher& launcher) {
    if (rows == 0 || width == 0) {
        return;
    }
    constexpr int kVec = vector_width<X, Y>();
    const bool vectorize =
        can_vectorize(width, kVec, args.x, args.branch, args.scale, args.weight, args.bias, args.total, args.normed);
    const TeamShape shape = forward_shape(rows, width, launcher.multiprocessors());
    if (vectorize && args.branch) {
        launch_layer_norm_forward<X, Y, kVec, true>(args, shape, launcher);
    } else if (vectorize) {
        launch_layer_norm_forward<X, Y, kVec, false>(args, shape, launcher);
    } else if (args.branch) {
        launch_layer_norm_forward<X, Y, 1, true>(args, shape, launcher);
    } else {
        launch_layer_norm_forward<X, Y, 1, false>(args, shape, launcher);
    }
}

template <typename X, typename Y, typename Launcher>
void run_layer_norm_apply(const LayerNormApplyArgs<X, Y>& args, int64_t rows, int width, Launcher& launcher) {
    if (rows == 0 || width == 0) {
        return;
    }
    constexpr int kVec = vector_width<X, Y>();
    const TeamShape shape = forward_shape(rows, width, launcher.multiprocessors());
    const bool vectorize = can_vectorize(width, kVec, args.total, args.weight, args.bias, args.normed);
    const auto kernel = vectorize ? layer_norm_apply_kernel<X, Y, kVec> : layer_norm_apply_kernel<X, Y, 1>;
    launcher("layer_norm_apply", kernel, dim3(shape.blocks), dim3(shape.threads()), args, shape);
}

template <typename X, typename Y, typename Launcher>
void run_scale_add_forward(const LayerNormForwardArgs<X, Y>& args, int64_t rows, int width, Launcher& launcher) {
    if (rows == 0 || width == 0) {
        return;
    }
    constexpr int kVec = vector_width<X, Y>();
    const TeamShape shape = forward_shape(rows, width, launcher.multiprocessors());
    const bool vectorize = can_vectorize(width, kVec, args.x, args.branch, args.scale, args.total);
    const auto kernel = vectorize ? scale_add_forward_kernel<X, Y, kVec> : scale_add_forward_kernel<X, Y, 1>;
    launcher("scale_add_forward", kernel, dim3(shape.blocks), dim3(shape.threads()), args, shape);
}

}  // namespace vitfast::cuda
