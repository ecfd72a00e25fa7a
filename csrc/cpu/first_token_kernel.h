// One query against all keys of a head, straight from where they are: packing them, as products of many queries do,
// would cost more than this. Included by for_each_isa.h.
#include "attention_rows.h"
#include "vec_math.h"
// after those
#include "attention_heads_kernel.h"
#include "softmax_row.h"

template <class Y, class Z>
VITFAST_INLINE float dot(const Y* a, const Z* b, int64_t size) {
    Vec product = {};
    for (int64_t e = 0; e < size; e += kLanes) product = fma(load(a + e, size - e), load(b + e, size - e), product);
    return reduce_add(product);
}

// weights: scratch for L numbers, rounded up to whole vectors.
template <class Y>
void first_token_head(const FirstToken<Y>& a, int64_t image, int64_t head, float* weights) {
    const int64_t token = 2 * a.heads * a.head_dim, columns = round_to_lanes(a.length);
    const int64_t own = (image * a.heads + head) * a.head_dim;
    const Y* const q = a.q + own;
    const Y* const k = a.kv + image * a.length * token + head * a.head_dim;
    const Y* const v = k + a.heads * a.head_dim;
    const int64_t still = a.length - a.turns.rotated;
    for (int64_t j = 0; j < still; ++j) weights[j] = dot(q, k + j * token, a.head_dim);
    alignas(64) float key[kMostHeadDim + kLanes];
    for (int64_t j = still; j < a.length; ++j) {
        widen_row(k + j * token, a.head_dim, key);
        turn_row<false>(a.turns, key, a.head_dim, j - still);
        weights[j] = dot(q, key, a.head_dim);
    }
    const float unit = finish_logits(weights, AttentionBias{}, 0, nullptr, a.scale, a.length);
    float largest;
    const Vec normaliser = broadcast(1.0f / softmax_row(weights, unit, columns, weights, &largest));
    for (int64_t e = 0; e < a.head_dim; e += kLanes) {
        const int64_t n = a.head_dim - e;
        Vec sum = {};
        for (int64_t j = 0; j < a.length; ++j) sum = fma(broadcast(weights[j]), load(v + j * token + e, n), sum);
        store(a.out + own + e, sum * normaliser, n);
    }
}
