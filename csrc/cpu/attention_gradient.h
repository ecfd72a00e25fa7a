// Row-wise steps of attention's backward. Included by attention_backward_kernel.h.

template <class Y>
VITFAST_INLINE float dot_rows(const Y* a, const Y* b, int64_t width) {
    Vec sum = {};
    for (int64_t e = 0; e < width; e += kLanes) sum = fma(load(a + e, width - e), load(b + e, width - e), sum);
    return reduce_add(sum);
}

// to[rows, width] (row_stride elements apart) = from[rows][pitch] * factor
template <class Y>
void write_rows(const float* from, int64_t pitch, float factor, Y* to, int64_t row_stride, int64_t rows,
                int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t e = 0; e < width; e += kLanes) {
            store(to + r * row_stride + e, load(from + r * pitch + e) * factor, width - e);
        }
    }
}

// The gradient of q (which = 0) or k (1) from that of the prepared rows [token, token + count) in units of the scale;
// with it the head's shares of the gradients of their norm's weight and bias, where wanted.
template <class Y>
void write_gradient(const AttentionBackward<Y>& a, const HeadOfSequence& item, int which, int64_t token, int64_t count,
                    const float* sums, int64_t pitch) {
    const int64_t part = a.heads * a.head_dim, stride = 3 * part;
    const int64_t at = (item.start + token) * stride + which * part + item.head * a.head_dim;
    if (!a.options.active(which)) {
        return write_rows(sums, pitch, a.scale, a.d_qkv + at, stride, count, a.head_dim);
    }
    float* const norm_sums = a.norm_sums ? a.norm_sums + (item.index * 4 + 2 * which) * a.head_dim : nullptr;
    write_head_gradient(a.options, which, item, token, sums, pitch, a.scale, a.qkv + at, a.d_qkv + at, stride, count,
                        a.head_dim, norm_sums);
}
