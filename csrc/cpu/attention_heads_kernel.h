// Head norm and rotary embedding of rows of q or k, and the way back for their gradient. Included by
// attention_*_kernel.h. Rows are worked on as fp32, in a buffer that is a multiple of a vector wider than E.

// Which elements form pair i, and where the tables have its angle for either of them.
struct PairIndex {
    int64_t first, second, first_angle, second_angle;
};

VITFAST_INLINE PairIndex pair_index(const HeadOptions& options, int64_t half, int64_t i) {
    const int64_t first = options.interleaved ? 2 * i : i, second = options.interleaved ? first + 1 : first + half;
    if (options.columns == half) return {first, second, i, i};
    return {first, second, first, second};
}

// row[E] times exp(i * angle), pair by pair; with kBack times the transpose.
template <bool kBack>
VITFAST_INLINE void turn_row(const HeadOptions& options, float* row, int64_t head_dim, int64_t table_row) {
    if (!options.cos || table_row < 0) return;
    const float* const cos = options.cos + table_row * options.columns;
    const float* const sin = options.sin + table_row * options.columns;
    const int64_t half = head_dim / 2;
    if (!options.interleaved && half % kLanes == 0) {
        const int64_t more = options.columns == half ? 0 : half;
        for (int64_t i = 0; i < half; i += kLanes) {
            const Vec a = load(row + i), b = load(row + half + i);
            const Vec cos_a = load(cos + i), cos_b = load(cos + more + i);
            const Vec sin_a = load(sin + i), sin_b = load(sin + more + i);
            store(row + i, kBack ? fma(a, cos_a, b * sin_b) : fma(a, cos_a, -(b * sin_a)));
            store(row + half + i, kBack ? fma(b, cos_b, -(a * sin_a)) : fma(b, cos_b, a * sin_b));
        }
        return;
    }
    for (int64_t i = 0; i < half; ++i) {
        const PairIndex at = pair_index(options, half, i);
        const float a = row[at.first], b = row[at.second];
        const float sin_a = sin[at.first_angle], sin_b = sin[at.second_angle];
        row[at.first] = a * cos[at.first_angle] + (kBack ? b * sin_b : -(b * sin_a));
        row[at.second] = b * cos[at.second_angle] + (kBack ? -(a * sin_a) : a * sin_b);
    }
}

// row[E] centred for LayerNorm and over its deviation or root mean square; returns one over that. Past E stay zeros.
VITFAST_INLINE float standardise_row(const HeadNorm& norm, float* row, int64_t head_dim) {
    const float width = static_cast<float>(head_dim);
    if (norm.kind == HeadNormKind::kLayerNorm) {
        Vec sum = {};
        for (int64_t e = 0; e < head_dim; e += kLanes) sum += load(row + e);
        const Vec mean = broadcast(reduce_add(sum) / width);
        for (int64_t e = 0; e < head_dim; e += kLanes) store(row + e, load(row + e) - mean, head_dim - e);
    }
    Vec square = {};
    for (int64_t e = 0; e < head_dim; e += kLanes) square = fma(load(row + e), load(row + e), square);
    const float rstd = 1.0f / std::sqrt(reduce_add(square) / width + norm.eps);
    for (int64_t e = 0; e < head_dim; e += kLanes) store(row + e, load(row + e) * rstd);
    return rstd;
}

template <class Y>
VITFAST_INLINE void widen_row(const Y* from, int64_t head_dim, float* row) {
    for (int64_t e = 0; e < head_dim; e += kLanes) store(row + e, load(from + e, head_dim - e));
}

// to[count, E] = rows of q (which = 0) or k (1), `stride` elements apart, as attention sees them; `token` is the
// first's place in its sequence.
template <class Y>
void prepare_rows(const HeadOptions& options, int which, const HeadOfSequence& item, int64_t token, const Y* from,
                  int64_t stride, int64_t count, int64_t head_dim, Y* to) {
    const HeadNorm& norm = options.norms[which];
    alignas(64) float row[kMostHeadDim + kLanes];
    for (int64_t r = 0; r < count; ++r) {
        widen_row(from + r * stride, head_dim, row);
        if (norm.kind != HeadNormKind::kNone) {
            standardise_row(norm, row, head_dim);
            for (int64_t e = 0; e < head_dim; e += kLanes) {
                const int64_t n = head_dim - e;
                Vec value = load(row + e);
                if (norm.weight) value = value * load(norm.weight + e, n);
                if (norm.bias) value += load(norm.bias + e, n);
                store(row + e, value);
            }
        }
        turn_row<false>(options, row, head_dim, options.table_row(item.start, item.length, token + r));
        for (int64_t e = 0; e < head_dim; e += kLanes) store(to + r * head_dim + e, load(row + e), head_dim - e);
    }
}

// to[rows, E] (`stride` elements apart) = the gradient of q or k as given, from `gradient` * factor, that of the
// prepared rows (`pitch` apart). The shares of the norm's weight and bias are added to sums[2, E] where wanted.
template <class Y>
void write_head_gradient(const HeadOptions& options, int which, const HeadOfSequence& item, int64_t token,
                         const float* gradient, int64_t pitch, float factor, const Y* given, Y* to, int64_t stride,
                         int64_t count, int64_t head_dim, float* sums) {
    const HeadNorm& norm = options.norms[which];
    const float width = static_cast<float>(head_dim);
    alignas(64) float g[kMostHeadDim + kLanes], x[kMostHeadDim + kLanes];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t e = 0; e < head_dim; e += kLanes) {
            const int64_t n = head_dim - e;
            store(g + e, load(gradient + r * pitch + e, n) * factor);
        }
        turn_row<true>(options, g, head_dim, options.table_row(item.start, item.length, token + r));
        if (norm.kind != HeadNormKind::kNone) {
            widen_row(given + r * stride, head_dim, x);
            const float rstd = standardise_row(norm, x, head_dim);
            Vec total = {}, along = {};
            for (int64_t e = 0; e < head_dim; e += kLanes) {
                const int64_t n = head_dim - e;
                Vec value = load(g + e);
                if (sums) {
                    store(sums + e, fma(value, load(x + e), load(sums + e, n)), n);
                    store(sums + head_dim + e, load(sums + head_dim + e, n) + value, n);
                }
                if (norm.weight) value = value * load(norm.weight + e, n);
                store(g + e, value);
                total += value;
                along = fma(value, load(x + e), along);
            }
            const bool centred = norm.kind == HeadNormKind::kLayerNorm;
            const Vec mean = broadcast(centred ? reduce_add(total) / width : 0.0f);
            const Vec slope = broadcast(reduce_add(along) / width);
            for (int64_t e = 0; e < head_dim; e += kLanes) {
                store(g + e, (load(g + e) - fma(load(x + e), slope, mean)) * rstd);
            }
        }
        for (int64_t e = 0; e < head_dim; e += kLanes) store(to + r * stride + e, load(g + e), head_dim - e);
    }
}
