// Row-wise steps of attention. Included by attention_*_kernel.h and first_token_kernel.h.

// row[j] = row[j] * scale + bias[j]
template <class B>
VITFAST_INLINE void add_bias_row(float* row, const B* bias, float scale, int64_t keys) {
    for (int64_t j = 0; j < keys; j += kLanes) {
        store(row + j, fma(load(row + j), broadcast(scale), load(bias + j, keys - j)));
    }
}

// Turns products q.k into logits in units of `return value`: multiplied by it they are scale * q.k + bias. Columns from
// `keys` to the end of their vector, and those of padding keys, become -inf.
VITFAST_INLINE float finish_logits(float* row, const AttentionBias& bias, int64_t bias_row, const uint8_t* padding,
                                   float scale, int64_t keys) {
    if (bias.as_float) {
        add_bias_row(row, bias.as_float + bias_row, scale, keys);
    } else if (bias.as_bf16) {
        add_bias_row(row, bias.as_bf16 + bias_row, scale, keys);
    } else if (!(scale > 0.0f)) {
        for (int64_t j = 0; j < keys; j += kLanes) store(row + j, load(row + j) * scale);
    }
    if (padding) {
        for (int64_t j = 0; j < keys; ++j) row[j] = padding[j] ? -std::numeric_limits<float>::infinity() : row[j];
    }
    for (int64_t j = keys; j < round_to_lanes(keys); ++j) row[j] = -std::numeric_limits<float>::infinity();
    return bias.as_float || bias.as_bf16 || !(scale > 0.0f) ? 1.0f : scale;
}
