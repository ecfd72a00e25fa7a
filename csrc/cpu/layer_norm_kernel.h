// LayerNorm over rows of D elements, with an optional scaled branch added first. Included by for_each_isa.h.
// X: dtype of the residual stream, Y: dtype of branch and normed. All arithmetic is fp32.
#include "layer_norm_row.h"

// scale[d] * drop_path of the row's sample; 1 where neither is given.
VITFAST_INLINE Vec branch_factor(const float* scale, float drop_path, int64_t d, int64_t n) {
    return scale ? load(scale + d, n) * drop_path : broadcast(drop_path);
}

template <class X, class Y>
VITFAST_INLINE Vec scale_add(const X* x, const Y* branch, const float* scale, float drop_path, int64_t d, int64_t n) {
    return fma(branch_factor(scale, drop_path, d, n), load(branch + d, n), load(x + d, n));
}

// Row t of normed, in the order of TileRows.
template <class X>
void normalise_in_tiles(const LayerNormForward<X, bf16>& a, int64_t t, const X* row, const X* next) {
    for (int64_t d = 0; d < a.width; d += kTileLines) {
        bf16* const to = a.in_tiles + place_in_tiles(t, d, a.width);
        normalise_row(row + d, a.mean[t], a.rstd[t], a.weight + d, a.bias + d, to, kTileLines, next ? next + d : next);
    }
}

template <class X, class Y>
void layer_norm_forward_rows(const LayerNormForward<X, Y>& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const X* row = a.x + t * a.width;
        if (a.branch) {
            const float drop_path = a.drop_path ? a.drop_path[t / a.rows_per_sample] : 1.0f;
            X* total = a.total + t * a.width;
            for (int64_t d = 0; d < a.width; d += kLanes) {
                const int64_t n = a.width - d;
                __builtin_prefetch(row + a.width + d);
                __builtin_prefetch(a.branch + (t + 1) * a.width + d);
                store(total + d, scale_add(row, a.branch + t * a.width, a.scale, drop_path, d, n), n);
            }
            row = total;  // the statistics are those of the total as stored, rounded to X
        }
        if (!a.normed) continue;
        row_statistics(row, a.width, a.eps, a.mean + t, a.rstd + t);
        const X* const next = a.branch ? nullptr : row + a.width;
        if constexpr (std::is_same_v<Y, bf16>) {
            if (a.in_tiles) {
                normalise_in_tiles(a, t, row, next);
                continue;
            }
        }
        normalise_row(row, a.mean[t], a.rstd[t], a.weight, a.bias, a.normed + t * a.width, a.width, next);
    }
}

template <class X, class Y>
void layer_norm_apply_rows(const LayerNormApply<X, Y>& a, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const X* const row = a.total + t * a.width;
        normalise_row(row, a.mean[t], a.rstd[t], a.weight, a.bias, a.normed + t * a.width, a.width, row + a.width);
    }
}

// Writes d_x and d_branch of the rows and adds their share to partial[3, D]: d_weight, d_bias, d_scale.
//   y = w * xhat + b,  g = w * dy:  d_x = d_total + rstd * (g - mean(g) - xhat * mean(g * xhat))
template <class X, class Y>
void layer_norm_backward_rows(const LayerNormBackward<X, Y>& a, int64_t begin, int64_t end, float* partial) {
    const int64_t width = a.width;
    float* const d_weight = partial;
    float* const d_bias = partial + width;
    float* const d_scale = partial + 2 * width;
    for (int64_t t = begin; t < end; ++t) {
        const X* row = a.total + t * width;
        const Y* dy_row = a.d_normed + t * width;
        const float mean = a.mean[t], rstd = a.rstd[t];
        Vec sum_g = {}, sum_gx = {};
        for (int64_t d = 0; d < width; d += kLanes) {
            const int64_t n = width - d;
            const Vec dy = load(dy_row + d, n);
            const Vec normal = (load(row + d, n) - mean) * rstd;
            const Vec g = dy * load(a.weight + d, n);
            sum_g += g;
            sum_gx = fma(g, normal, sum_gx);
            store(d_weight + d, fma(dy, normal, load(d_weight + d, n)), n);
            store(d_bias + d, load(d_bias + d, n) + dy, n);
        }
        const Vec mean_g = broadcast(reduce_add(sum_g) / static_cast<float>(width));
        const Vec mean_gx = broadcast(reduce_add(sum_gx) / static_cast<float>(width));
        const float drop_path = a.drop_path ? a.drop_path[t / a.rows_per_sample] : 1.0f;
        for (int64_t d = 0; d < width; d += kLanes) {
            const int64_t n = width - d;
            const Vec normal = (load(row + d, n) - mean) * rstd;
            const Vec g = load(dy_row + d, n) * load(a.weight + d, n);
            Vec dx = (g - fma(normal, mean_gx, mean_g)) * rstd;
            if (a.d_total) dx += load(a.d_total + t * width + d, n);
            store(a.d_x + t * width + d, dx, n);
            if (a.d_branch) store(a.d_branch + t * width + d, dx * branch_factor(a.scale, drop_path, d, n), n);
            if (a.d_scale) {
                const Vec branch = load(a.branch + t * width + d, n);
                store(d_scale + d, fma(dx * drop_path, branch, load(d_scale + d, n)), n);
            }
        }
    }
}
