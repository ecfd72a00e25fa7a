// Included by attention_forward_kernel.h and first_token_kernel.h, after vec_math.h.

// Softmax of one row of logits without the division: weights[j] = exp(unit * (row[j] - largest)); returns their sum.
// weights may be the row itself. A row whose every key is masked (-inf) gets weights 0 and *largest -inf.
template <class W>
VITFAST_INLINE float softmax_row(const float* row, float unit, int64_t columns, W* weights, float* largest) {
    Vec tops = broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < columns; j += kLanes) tops = max(tops, load(row + j));
    float top = reduce_max(tops);
    *largest = top;
    if (__builtin_expect(top == -std::numeric_limits<float>::infinity(), 0)) {
        Vec total = {};
        for (int64_t j = 0; j < columns; j += kLanes) total += load(row + j);
        if (reduce_add(total) == top) {
            for (int64_t j = 0; j < columns; j += kLanes) store(weights + j, Vec{});
            return 0.0f;
        }
        top = std::numeric_limits<float>::quiet_NaN();  // a NaN among the -inf
    }
    const Vec centre = broadcast(top), to_log2 = broadcast(unit * kLog2E);
    Vec sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec weight = exp2<std::is_same_v<W, bf16>>((load(row + j) - centre) * to_log2);
        sum += weight;
        store(weights + j, weight);
    }
    return reduce_add(sum);
}
