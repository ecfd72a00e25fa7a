// GELU forward and backward over [T, F] activations of type Y.
//
// Bytes per element (y = sizeof(Y)) and the time at 4.3 TB/s for ViT-B/16's MLP at batch 256, bf16 (155 M elements):
//   forward                       2y    4 B   144 us
//   backward                      3y    6 B   216 us
//   backward, activation too      4y    8 B   288 us
#pragma once

#include "column_sum.cuh"
#include "gelu_math.h"
#include "vector_io.h"

namespace vitfast::cuda {

constexpr int kActivationThreads = 256;

template <typename Y>
constexpr bool kFastGelu = sizeof(Y) == 2;

template <typename Y, int VEC, Gelu KIND>
__global__ void __launch_bounds__(kActivationThreads)
    activation_forward_kernel(const Y* __restrict__ h, Y* __restrict__ out, const int64_t count) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t vectors = count / VEC;
#pragma unroll 2
    for (int64_t vector = thread; vector < vectors; vector += threads) {
        const Raw<Y, VEC> x = load<VEC>(h + vector * VEC);
        float value[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            value[i] = gelu<KIND, kFastGelu<Y>>(x[i]);
        }
        store<VEC>(out + vector * VEC, value);
    }
    const int64_t tail = vectors * VEC + thread;
    if (tail < count) {
        out[tail] = static_cast<Y>(gelu<KIND, kFastGelu<Y>>(static_cast<float>(h[tail])));
    }
}

template <typename Y>
struct ActivationBackwardArgs {
    const Y* h;      // [T, F]
    const Y* d_act;  // [T, F]
    Y* d_h;          // [T, F]
    Y* act;          // [T, F] or null
    float* d_bias;   // [F] or null
    float* partial;  // [row blocks, F]; read and written only if d_bias
    int64_t rows;
    int width;
};

// A block is 32 lanes of VEC columns by 8 rows; blockIdx.x picks the columns, and blocks along y stride over the rows.
constexpr int kActivationRows = kActivationThreads / kWarpSize;

struct ActivationShape {
    int column_blocks;
    int row_blocks;
};

inline ActivationShape activation_backward_shape(int64_t rows, int width, int vec, int multiprocessors) {
    const int64_t column_blocks = ceil_div(width, static_cast<int64_t>(kWarpSize) * vec);
    const int64_t wave = static_cast<int64_t>(multiprocessors) * (kMostResidentThreads / kActivationThreads);
    const int64_t fill = ceil_div(wave, column_blocks);
    const int64_t needed = ceil_div(rows, kActivationRows);
    return {static_cast<int>(column_blocks), static_cast<int>(needed < fill ? needed : fill)};
}

template <typename Y, int VEC, Gelu KIND>
__global__ void __launch_bounds__(kActivationThreads) activation_backward_kernel(const ActivationBackwardArgs<Y> args) {
    __shared__ float sums[kActivationRows][VEC][kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int column = (blockIdx.x * kWarpSize + lane) * VEC;
    float d_bias[VEC] = {};
    if (column < args.width) {
        const int64_t stride = static_cast<int64_t>(gridDim.y) * kActivationRows;
#pragma unroll 2
        for (int64_t row = static_cast<int64_t>(blockIdx.y) * kActivationRows + warp; row < args.rows; row += stride) {
            const int64_t offset = row * args.width + column;
            const Raw<Y, VEC> h = load<VEC>(args.h + offset);
            const Raw<Y, VEC> d_act = load<VEC>(args.d_act + offset);
            float act[VEC];
            float d_h[VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const GeluResult gelu_x = gelu_with_derivative<KIND, kFastGelu<Y>>(h[i]);
                act[i] = gelu_x.value;
                d_h[i] = gelu_x.derivative * d_act[i];
                d_bias[i] += d_h[i];
            }
            store<VEC>(args.d_h + offset, d_h);
            if (args.act) {
                store<VEC>(args.act + offset, act);
            }
        }
    }
    if (args.d_bias == nullptr) {
        return;
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        sums[warp][i][lane] = d_bias[i];
    }
    __syncthreads();
    if (warp == 0 && column < args.width) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            for (int other = 1; other < kActivationRows; ++other) {
                d_bias[i] += sums[other][i][lane];
            }
        }
        store<VEC>(args.partial + static_cast<int64_t>(blockIdx.y) * args.width + column, d_bias);
    }
}

// Floats of workspace that run_activation_backward needs in args.partial when it is asked for d_bias.
template <typename Y>
int64_t activation_workspace_size(int64_t rows, int width, int multiprocessors) {
    const int most_blocks_vec = vector_width<Y, Y>();
    return activation_backward_shape(rows, width, most_blocks_vec, multiprocessors).row_blocks *
           static_cast<int64_t>(width);
}

template <typename Y, Gelu KIND, typename Launcher>
void run_activation_forward(const Y* h, Y* out, int64_t count, Launcher& launcher) {
    if (count == 0) {
        return;
    }
    constexpr int kVec = vector_width<Y, Y>();
    const bool vectorize = is_aligned(h) && is_aligned(out);
    const auto kernel = vectorize ? activation_forward_kernel<Y, kVec, KIND> : activation_forward_kernel<Y, 1, KIND>;
    const int64_t wave = static_cast<int64_t>(launcher.multiprocessors()) * (kMostResidentThreads / kActivationThreads);
    const int64_t needed = ceil_div(count, static_cast<int64_t>(kActivationThreads) * (vectorize ? kVec : 1));
    launcher("activation_forward", kernel, dim3(static_cast<unsigned>(needed < wave ? needed : wave)),
             dim3(kActivationThreads), h, out, count);
}

// width >= 1. No rows: d_bias is 0.
template <typename Y, Gelu KIND, typename Launcher>
void run_activation_backward(const ActivationBackwardArgs<Y>& args, Launcher& launcher) {
    constexpr int kVec = vector_width<Y, Y>();
    const bool vectorize = can_vectorize(args.width, kVec, args.h, args.d_act, args.d_h, args.act, args.partial);
    const ActivationShape shape =
        activation_backward_shape(args.rows, args.width, vectorize ? kVec : 1, launcher.multiprocessors());
    if (args.rows > 0) {
        const auto kernel =
            vectorize ? activation_backward_kernel<Y, kVec, KIND> : activation_backward_kernel<Y, 1, KIND>;
        launcher("activation_backward", kernel, dim3(shape.column_blocks, shape.row_blocks), dim3(kActivationThreads),
                 args);
    }
    if (args.d_bias) {
        run_column_sum({args.partial, {args.d_bias, nullptr, nullptr}, shape.row_blocks, args.width}, 1, launcher);
    }
}

}  // namespace vitfast::cuda
