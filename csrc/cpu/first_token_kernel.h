// One query against all keys of a head, straight from where they are: packing them, as products of many queries do,
// would cost more than this. Included by for_each_isa.h.
#include "attention_rows.h"
#include "vec_math.h"
// after those
#include "softmax_row.h"

// weights: scratch for L numbers, rounded up to whole vectors.
template <class Y>
void first_token_head(const FirstToken<Y>& a, int64_t image, int64_t head, float* weights) {
    const int64_t token = 2 * a.heads * a.head_dim, columns = round_to_lanes(a.length);
    const int64_t own = (image * a.heads + head) * a.head_dim;
    const Y* const q = a.q + own;
    const Y* const k = a.kv + image * a.length * token + head * a.head_dim;
    const Y* const v = k + a.heads * a.head_dim;
    for (int64_t j = 0; j < a.length; ++j) {
        Vec product = {};
        for (int64_t e = 0; e < a.head_dim; e += kLanes) {
            const int64_t n = a.head_dim - e;
            product = fma(load(q + e, n), load(k + j * token + e, n), product);
        }
        weights[j] = reduce_add(product);
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
