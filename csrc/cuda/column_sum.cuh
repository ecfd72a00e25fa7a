// Second stage of a parameter gradient: out[k][d] = sum over p of partial[k][p][d], in a fixed order, without atomics.
// Bytes: 4 per partial read, mostly still in L2; a few microseconds beside the kernel that wrote them.
#pragma once

#include "team_index.h"

namespace vitfast::cuda {

constexpr int kColumnSumColumns = 32;
constexpr int kColumnSumRows = 16;
constexpr int kMaxColumnSums = 3;

struct ColumnSumArgs {
    const float* partial;        // [sums, parts, width]
    float* out[kMaxColumnSums];  // each [width], or null to skip that sum
    int64_t parts;               // 0 writes zeros
    int width;
};

// Block (x, k): columns 32x .. 32x + 31 of sum k. Thread (c, r) adds parts r, r + 16, ...; then the 16 are added in
// order.
static __global__ void __launch_bounds__(kColumnSumColumns* kColumnSumRows)
    column_sum_kernel(const ColumnSumArgs args) {
    __shared__ float sums[kColumnSumRows][kColumnSumColumns];
    float* const out = blockIdx.y == 0 ? args.out[0] : blockIdx.y == 1 ? args.out[1] : args.out[2];
    if (out == nullptr) {
        return;
    }
    const int lane = threadIdx.x % kColumnSumColumns;
    const int first = threadIdx.x / kColumnSumColumns;
    const int column = blockIdx.x * kColumnSumColumns + lane;
    float sum = 0.0f;
    if (column < args.width) {
        const float* const partial = args.partial + blockIdx.y * args.parts * args.width + column;
#pragma unroll 4
        for (int64_t part = first; part < args.parts; part += kColumnSumRows) {
            sum += partial[part * args.width];
        }
    }
    sums[first][lane] = sum;
    __syncthreads();
    if (first == 0 && column < args.width) {
#pragma unroll
        for (int row = 1; row < kColumnSumRows; ++row) {
            sum += sums[row][lane];
        }
        out[column] = sum;
    }
}

template <typename Launcher>
void run_column_sum(const ColumnSumArgs& args, int sums, Launcher& launcher) {
    launcher("column_sum", column_sum_kernel, dim3(ceil_div(args.width, kColumnSumColumns), sums),
             dim3(kColumnSumColumns * kColumnSumRows), args);
}

}  // namespace vitfast::cuda
