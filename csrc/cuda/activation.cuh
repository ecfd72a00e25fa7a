// Activations forward and backward: [T, F] of type Y from h[T, F], or for SwiGLU from h[T, 2F], gate and up side by
// side.
//
// Bytes per element (y = sizeof(Y)) and the time at 4.3 TB/s for ViT-B/16's MLP at batch 256, bf16 (155 M elements):
//   forward                       2y    4 B   144 us
//   backward                      3y    6 B   216 us
//   backward, activation too      4y    8 B   288 us
//   SwiGLU forward                3y    6 B   216 us
//   SwiGLU backward               5y   10 B   360 us
//   SwiGLU backward, value too    6y   12 B   433 us
#pragma once

#include "activation_math.h"
#include "column_sum.cuh"
#include "vector_io.h"

namespace vitfast::cuda {

constexpr int kActivationThreads = 256;

template <typename Y>
constexpr bool kFast = sizeof(Y) == 2;

template <typename Y, int VEC, Activation KIND>
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
            value[i] = activate<KIND, kFast<Y>>(x[i]);
        }
        store<VEC>(out + vector * VEC, value);
    }
    const int64_t tail = vectors * VEC + thread;
    if (tail < count) {
        out[tail] = static_cast<Y>(activate<KIND, kFast<Y>>(static_cast<float>(h[tail])));
    }
}

template <typename Y>
struct ActivationBackwardArgs {
    const Y* h;      // [T, H], H = F or 2F
    const Y* d_act;  // [T, F]
    Y* d_h;          // [T, H]
    Y* act;          // [T, F] or null
    float* d_bias;   // [H] or null
    float* partial;  // [row blocks, H]; read and written only if d_bias
    int64_t rows;
    int width;  // F
};

// H / F.
constexpr int halves_of(Activation kind) { return kind == Activation::kSwiGlu ? 2 : 1; }

// A block is 32 lanes of VEC columns by 8 rows; blockIdx.x picks the columns, and blocks along y stride over the rows.
constexpr int kActivationRows = kActivationThreads / kWarpSize;

struct ActivationShape {  // of the kernels that go over columns and rows
    int column_blocks;
    int row_blocks;
};

inline ActivationShape activation_shape(int64_t rows, int width, int vec, int multiprocessors) {
    const int64_t column_blocks = ceil_div(width, static_cast<int64_t>(kWarpSize) * vec);
    const int64_t wave = static_cast<int64_t>(multiprocessors) * (kMostResidentThreads / kActivationThreads);
    const int64_t fill = ceil_div(wave, column_blocks);
    const int64_t needed = ceil_div(rows, kActivationRows);
    return {static_cast<int>(column_blocks), static_cast<int>(needed < fill ? needed : fill)};
}

// out[T, F] = silu(gate) * up for h[T, 2F] = [gate | up].
template <typename Y, int VEC>
__global__ void __launch_bounds__(kActivationThreads)
    swiglu_forward_kernel(const Y* __restrict__ h, Y* __restrict__ out, const int64_t rows, const int width) {
    const int column = (blockIdx.x * kWarpSize + threadIdx.x % kWarpSize) * VEC;
    if (column >= width) {
        return;
    }
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kActivationRows;
#pragma unroll 2
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kActivationRows + threadIdx.x / kWarpSize; row < rows;
         row += stride) {
        const Y* const gates = h + 2 * row * width + column;
        const Raw<Y, VEC> gate = load<VEC>(gates);
        const Raw<Y, VEC> up = load<VEC>(gates + width);
        float value[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            value[i] = activate<Activation::kSwiGlu, kFast<Y>>(gate[i]) * up[i];
        }
        store<VEC>(out + row * width + column, value);
    }
}

template <typename Y, int VEC, Activation KIND>
__global__ void __launch_bounds__(kActivationThreads) activation_backward_kernel(const ActivationBackwardArgs<Y> args) {
    constexpr int kHalves = halves_of(KIND);
    __shared__ float sums[kActivationRows][kHalves * VEC][kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int column = (blockIdx.x * kWarpSize + lane) * VEC;
    float d_bias[kHalves][VEC] = {};
    if (column < args.width) {
        const int64_t stride = static_cast<int64_t>(gridDim.y) * kActivationRows;
#pragma unroll 2
        for (int64_t row = static_cast<int64_t>(blockIdx.y) * kActivationRows + warp; row < args.rows; row += stride) {
            const int64_t offset = row * args.width + column;
            const int64_t h_offset = kHalves * row * args.width + column;
            const Raw<Y, VEC> h = load<VEC>(args.h + h_offset);
            const Raw<Y, VEC> d_act = load<VEC>(args.d_act + offset);
            Raw<Y, VEC> up;
            if constexpr (kHalves == 2) {
                up = load<VEC>(args.h + h_offset + args.width);
            }
            float act[VEC];
            float d_h[kHalves][VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const ActivationResult result = activate_with_derivative<KIND, kFast<Y>>(h[i]);
                if constexpr (kHalves == 2) {
                    act[i] = result.value * up[i];
                    d_h[0][i] = d_act[i] * up[i] * result.derivative;
                    d_h[1][i] = d_act[i] * result.value;
                } else {
                    act[i] = result.value;
                    d_h[0][i] = result.derivative * d_act[i];
                }
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    d_bias[half][i] += d_h[half][i];
                }
            }
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                store<VEC>(args.d_h + h_offset + half * args.width, d_h[half]);
            }
            if (args.act) {
                store<VEC>(args.act + offset, act);
            }
        }
    }
    if (args.d_bias == nullptr) {
        return;
    }
#pragma unroll
    for (int i = 0; i < kHalves * VEC; ++i) {
        sums[warp][i][lane] = d_bias[i / VEC][i % VEC];
    }
    __syncthreads();
    if (warp == 0 && column < args.width) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                for (int other = 1; other < kActivationRows; ++other) {
                    d_bias[half][i] += sums[other][half * VEC + i][lane];
                }
            }
            const int64_t part = static_cast<int64_t>(blockIdx.y) * kHalves + half;
            store<VEC>(args.partial + part * args.width + column, d_bias[half]);
        }
    }
}

// Floats of workspace that run_activation_backward needs in args.partial when it is asked for d_bias.
template <typename Y>
int64_t activation_workspace_size(Activation kind, int64_t rows, int width, int multiprocessors) {
    const int most_blocks_vec = vector_width<Y, Y>();
    return activation_shape(rows, width, most_blocks_vec, multiprocessors).row_blocks * static_cast<int64_t>(width) *
           halves_of(kind);
}

// out is [rows, width].
template <typename Y, Activation KIND, typename Launcher>
void run_activation_forward(const Y* h, Y* out, int64_t rows, int width, Launcher& launcher) {
    const int64_t count = rows * width;
    if (count == 0) {
        return;
    }
    constexpr int kVec = vector_width<Y, Y>();
    if constexpr (KIND == Activation::kSwiGlu) {
        const bool vectorize = can_vectorize(width, kVec, h, out);
        const auto shape = activation_shape(rows, width, vectorize ? kVec : 1, launcher.multiprocessors());
        const auto kernel = vectorize ? swiglu_forward_kernel<Y, kVec> : swiglu_forward_kernel<Y, 1>;
        launcher("swiglu_forward", kernel, dim3(shape.column_blocks, shape.row_blocks), dim3(kActivationThreads), h,
                 out, rows, width);
        return;
    }
    const bool vectorize = is_aligned(h) && is_aligned(out);
    const auto kernel = vectorize ? activation_forward_kernel<Y, kVec, KIND> : activation_forward_kernel<Y, 1, KIND>;
    const int64_t wave = static_cast<int64_t>(launcher.multiprocessors()) * (kMostResidentThreads / kActivationThreads);
    const int64_t needed = ceil_div(count, static_cast<int64_t>(kActivationThreads) * (vectorize ? kVec : 1));
    launcher("activation_forward", kernel, dim3(static_cast<unsigned>(needed < wave ? needed : wave)),
             dim3(kActivationThreads), h, out, count);
}

// width >= 1. No rows: d_bias is 0.
template <typename Y, Activation KIND, typename Launcher>
void run_activation_backward(const ActivationBackwardArgs<Y>& args, Launcher& launcher) {
    constexpr int kVec = vector_width<Y, Y>();
    const bool vectorize = can_vectorize(args.width, kVec, args.h, args.d_act, args.d_h, args.act, args.partial);
    const ActivationShape shape =
        activation_shape(args.rows, args.width, vectorize ? kVec : 1, launcher.multiprocessors());
    if (args.rows > 0) {
        const auto kernel =
            vectorize ? activation_backward_kernel<Y, kVec, KIND> : activation_backward_kernel<Y, 1, KIND>;
        launcher("activation_backward", kernel, dim3(shape.column_blocks, shape.row_blocks), dim3(kActivationThreads),
                 args);
    }
    if (args.d_bias) {
        const int columns = args.width * halves_of(KIND);
        run_column_sum({args.partial, {args.d_bias, nullptr, nullptr}, shape.row_blocks, columns}, 1, launcher);
    }
}

}  // namespace vitfast::cuda
