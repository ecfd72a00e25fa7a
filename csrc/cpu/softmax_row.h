// Included by attention_forward_kernel.h and first_token_kernel.h, after vec_math.h.

// The largest logit of a row; -inf where every key is masked, and where all others are and some are NaN.
VITFAST_INLINE float largest_logit(const float* row, int64_t columns) {
    Vec tops = broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < columns; j += kLanes) tops = max(tops, load(row + j));
    return reduce_max(tops);
}

// What is taken from a row's logits before exp: -inf minus 0 gives weights 0, and NaN stays NaN.
VITFAST_INLINE float softmax_centre(float largest) {
    return largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest;
}

// Softmax of one row of logits without the division: weights[j] = exp(unit * (row[j] - largest)); returns their sum.
// weights may be the row itself. A row whose every key is masked (-inf) gets weights 0 and *largest -inf.
template <class W>
VITFAST_INLINE float softmax_row(const float* row, float unit, int64_t columns, W* weights, float* largest) {
    *largest = largest_logit(row, columns);
    const Vec centre = broadcast(softmax_centre(*largest)), to_log2 = broadcast(unit * kLog2E);
    Vec sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec weight = exp2<std::is_same_v<W, bf16>>((load(row + j) - centre) * to_log2);
        sum += weight;
        store(weights + j, weight);
    }
    return reduce_add(sum);
}
