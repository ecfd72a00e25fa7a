// What becomes of a product's sums of 8-bit integers. Included by kernels after vec.h and vec_math.h.

VITFAST_INLINE IVec load_int(const void* from) {
    IVec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

// Reads sums[rows] (sums_row numbers apart) of output rows from `row` and columns [first, first + count); writes the
// outputs.
template <class Activation, class Y>
void finish_int8(const Int8Product<Y>& a, const int32_t* sums, int64_t sums_row, int64_t row, int64_t rows,
                 int64_t first, int64_t count) {
    const bool biased = bool(a.bias), scaled = bool(a.scale);
    for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t n = count - j;
        const IVec started = load_int(a.start + first + j);
        const Vec weight_scale = load(a.weight_scale + first + j, n);
        const Vec bias = biased ? load(a.bias, first + j, n) : Vec{},
                  scale = scaled ? load(a.scale, first + j, n) : Vec{};
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (row + i) * a.outputs + first + j;
            const Vec sum = __builtin_convertvector(load_int(sums + i * sums_row + j) + started, Vec);
            Vec value = fma(sum, weight_scale * a.row_scale[row + i], bias);
            if constexpr (!std::is_void_v<Activation>) {
                value = Activation::value(value);
            } else if (a.residual) {
                const Vec residual = load(a.residual + at, n);
                value = scaled ? fma(value, scale, residual) : value + residual;
            }
            store(a.out + at, value, n);
        }
    }
}

template <class Y>
void finish_rows(const Int8Product<Y>& a, const int32_t* sums, int64_t sums_row, int64_t row, int64_t rows,
                 int64_t first, int64_t count) {
    constexpr bool kFast = std::is_same_v<Y, bf16>;
    switch (a.finish) {
        case Finish::kGelu:
            return finish_int8<Gelu<kFast>>(a, sums, sums_row, row, rows, first, count);
        case Finish::kGeluTanh:
            return finish_int8<GeluTanh<kFast>>(a, sums, sums_row, row, rows, first, count);
        case Finish::kQuickGelu:
            return finish_int8<Silu<true, kFast>>(a, sums, sums_row, row, rows, first, count);
        case Finish::kNone:
            return finish_int8<void>(a, sums, sums_row, row, rows, first, count);
    }
}
