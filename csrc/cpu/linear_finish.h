// What becomes of a product's sums. Included by kernels after vec.h and vec_math.h.

// Reads sums[rows] (sums_row numbers apart) of output rows from `row` and columns [first, first + count); writes the
// outputs to out[rows] (out_row numbers apart).
template <class Activation, class X, class Y>
void finish_rows(const Product<X, Y>& a, const float* sums, int64_t sums_row, int64_t row, int64_t rows, int64_t first,
                 int64_t count, X* out, int64_t out_row) {
    constexpr bool kActivates = !std::is_void_v<Activation>;
    const bool biased = bool(a.bias), scaled = bool(a.scale);
    for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t n = count - j;
        const Vec bias = biased ? load(a.bias, first + j, n) : Vec{},
                  scale = scaled ? load(a.scale, first + j, n) : Vec{};
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (row + i) * a.outputs + first + j;
            Vec value = load(sums + i * sums_row + j);
            if (biased) value += bias;
            if constexpr (kActivates) {
                if (a.before) {
                    store(a.before + at, value, n);
                    value = load(a.before + at, n);  // as backward will see it
                }
                value = Activation::value(value);
            } else if (a.residual) {
                if (scaled) value *= scale;
                const float kept = a.drop_path ? a.drop_path[(row + i) / a.rows_per_sample] : 1.0f;
                value = fma(value, broadcast(kept), load(a.residual + at, n));
            }
            store(out + i * out_row + j, value, n);
        }
    }
}

template <class X, class Y>
void finish_rows(const Product<X, Y>& a, const float* sums, int64_t sums_row, int64_t row, int64_t rows, int64_t first,
                 int64_t count, X* out, int64_t out_row) {
    if constexpr (std::is_same_v<X, Y>) {
        constexpr bool kFast = std::is_same_v<Y, bf16>;
        switch (a.finish) {
            case Finish::kGelu:
                return finish_rows<Gelu<kFast>>(a, sums, sums_row, row, rows, first, count, out, out_row);
            case Finish::kGeluTanh:
                return finish_rows<GeluTanh<kFast>>(a, sums, sums_row, row, rows, first, count, out, out_row);
            case Finish::kQuickGelu:
                return finish_rows<Silu<true, kFast>>(a, sums, sums_row, row, rows, first, count, out, out_row);
            case Finish::kNone:
                break;
        }
    }
    finish_rows<void>(a, sums, sums_row, row, rows, first, count, out, out_row);
}

template <class X, class Y>
void finish_rows(const Product<X, Y>& a, const float* sums, int64_t sums_row, int64_t row, int64_t rows, int64_t first,
                 int64_t count) {
    finish_rows(a, sums, sums_row, row, rows, first, count, a.out + row * a.outputs + first, a.outputs);
}
