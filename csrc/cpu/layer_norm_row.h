// LayerNorm of one row. Included by *_kernel.h after vec.h, inside the instruction set's namespace.

// Two passes over the row: the mean, then the mean squared distance from it.
template <class X>
VITFAST_INLINE void row_statistics(const X* row, int64_t width, float eps, float* mean, float* rstd) {
    Vec sum[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
        for (int u = 0; u < 4; ++u) sum[u] += load(row + d + u * kLanes);
    }
    for (; d < width; d += kLanes) sum[0] += load(row + d, width - d);
    *mean = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(width);

    const Vec centre = broadcast(*mean);
    Vec square[4] = {};
    for (d = 0; d + 4 * kLanes <= width; d += 4 * kLanes) {
        for (int u = 0; u < 4; ++u) {
            const Vec distance = load(row + d + u * kLanes) - centre;
            square[u] = fma(distance, distance, square[u]);
        }
    }
    for (; d + kLanes <= width; d += kLanes) {
        const Vec distance = load(row + d) - centre;
        square[0] = fma(distance, distance, square[0]);
    }
    float total = reduce_add((square[0] + square[1]) + (square[2] + square[3]));
    for (; d < width; ++d) {
        const float distance = load(row + d, 1)[0] - *mean;
        total += distance * distance;
    }
    *rstd = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

// The one place that normalises, so that layer_norm_apply repeats layer_norm_forward bit for bit. `next`: what the next
// row reads first, fetched meanwhile (a sum has nothing else to do while it waits), or null.
template <class X, class Y>
VITFAST_INLINE void normalise_row(const X* row, float mean, float rstd, const float* weight, const float* bias, Y* out,
                                  int64_t width, const X* next = nullptr) {
    for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t n = width - d;
        if (next) __builtin_prefetch(next + d);
        __builtin_prefetch(out + width + d, 1);
        const Vec normal = (load(row + d, n) - mean) * rstd;
        store(out + d, fma(normal, load(weight + d, n), load(bias + d, n)), n);
    }
}
