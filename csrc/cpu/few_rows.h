// Products of very few rows, straight from the weight: packing a panel costs as much as the product of 7 rows. The
// class token of a model's last block is one row per image. Included by linear_kernel.h.

// sums[kRows, kPanelColumns] = x[kRows, inputs] * weight[count, inputs]^T.
template <int kRows>
void multiply_few_rows(const float* x, const float* weight, int64_t weight_row, int64_t inputs, int64_t count,
                       float* sums) {
    constexpr int kAtOnce = 4;
    for (int64_t o = 0; o < count; o += kAtOnce) {
        const float* rows[kAtOnce];
        for (int i = 0; i < kAtOnce; ++i) rows[i] = weight + std::min(o + i, count - 1) * weight_row;
        Vec sum[kRows][kAtOnce] = {};
        for (int64_t k = 0; k < inputs; k += kLanes) {
            const int64_t left = inputs - k;
            Vec b[kAtOnce];
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; ++i) b[i] = load(rows[i] + k, left);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Vec value = load(x + r * inputs + k, left);
#pragma GCC unroll 4
                for (int i = 0; i < kAtOnce; ++i) sum[r][i] = fma(value, b[i], sum[r][i]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int i = 0; i < kAtOnce; ++i) sums[r * kPanelColumns + o + i] = reduce_add(sum[r][i]);
        }
    }
}

inline void multiply_few_rows(int64_t rows, const float* x, const float* weight, int64_t weight_row, int64_t inputs,
                              int64_t count, float* sums) {
    switch (rows) {
        case 1:
            return multiply_few_rows<1>(x, weight, weight_row, inputs, count, sums);
        case 2:
            return multiply_few_rows<2>(x, weight, weight_row, inputs, count, sums);
        case 3:
            return multiply_few_rows<3>(x, weight, weight_row, inputs, count, sums);
        case 4:
            return multiply_few_rows<4>(x, weight, weight_row, inputs, count, sums);
    }
}
