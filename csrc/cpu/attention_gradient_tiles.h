// P and dS of 32 queries, from the products of Q and K and of dO and V, packed for the products that follow. Included
// by attention_backward_tiles.h.

// What 32 queries have of some keys.
struct GradientBlock {
    float *logits, *d_weights;  // products, `row` numbers apart; dP = d_weights
    int64_t row;
    float* d_bias;  // of the first query and key, or null
    int64_t d_bias_row;
    const float *centre, *delta;  // of the queries: lse, and rowsum(dO * O)
    float unit;                   // logits are in units of it
    // P and dS as right operands over the queries, `pitch` words from block to block of keys; dS as left one.
    uint32_t *weights, *d_logits, *d_logit_rows;
    int64_t pitch;
    int64_t count, keys;  // queries and keys that there are
};

// One query's P and dS of 16 keys; 0 where it or they are not there.
VITFAST_INLINE void gradient(const GradientBlock& g, int64_t query, int64_t key, Vec* weight, Vec* d_logit) {
    const __mmask16 there = -static_cast<int>(query < g.count && key < g.keys);
    const int64_t at = query * g.row + key;
    const Vec p = exp2(fma(load(g.logits + at), broadcast(g.unit), broadcast(-g.centre[query])) * kLog2E);
    *weight = _mm512_maskz_mov_ps(there, p);
    *d_logit = _mm512_maskz_mul_ps(there, p, load(g.d_weights + at) - g.delta[query]);
    if (!g.d_bias || !there) return;
    float* const to = g.d_bias + query * g.d_bias_row + key;
    store(to, load(to, g.keys - key) + *d_logit, g.keys - key);
}

// Words of two numbers of one line, of two lines, become words of two lines of one number.
VITFAST_INLINE void exchange_halves(Vec first[3], Vec second[3]) {
    constexpr __mmask32 kSecond = 0xaaaaaaaa;
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
        const __m512i a = (__m512i)first[p], b = (__m512i)second[p];
        first[p] = (Vec)_mm512_mask_blend_epi16(kSecond, a, _mm512_slli_epi32(b, 16));
        second[p] = (Vec)_mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
    }
}

// Two queries, 16 apart, at a time, which are the two numbers of a word over the queries.
inline void pack_gradients(const GradientBlock& g) {
    for (int64_t block = 0; block * kTileLines < g.keys; ++block) {
        for (int64_t i = 0; i < kTile; ++i) {
            Vec weight[2][2], d_logit[2][2], upper[3], lower[3];  // [half of the keys][query]
            const int64_t line = i * kTile, at = block * g.pitch + line, key = block * kTileLines;
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                gradient(g, i, key + half * kTile, &weight[half][0], &d_logit[half][0]);
                gradient(g, i + kTile, key + half * kTile, &weight[half][1], &d_logit[half][1]);
            }
            Words<float>::split(weight[0][0], weight[0][1], upper);
            Words<float>::split(weight[1][0], weight[1][1], lower);
            store_parts(g.weights + at, upper);
            store_parts(g.weights + at + kTileWords, lower);
            Words<float>::split(d_logit[0][0], d_logit[1][0], upper);
            Words<float>::split(d_logit[0][1], d_logit[1][1], lower);
            store_parts(g.d_logit_rows + block * kTileStep<float> + line, upper);
            store_parts(g.d_logit_rows + block * kTileStep<float> + line + kTileWords, lower);
            exchange_halves(upper, lower);
            store_parts(g.d_logits + at, upper);
            store_parts(g.d_logits + at + kTileWords, lower);
        }
    }
}

// Products of `count` queries from `query` and `keys` keys from `first` become logits in units of what is returned.
inline float finish_logits(const AttentionBackward<float>& a, const HeadOfSequence& item, int64_t query, int64_t count,
                           int64_t first, int64_t keys, float* logits, int64_t row) {
    const int64_t start = a.bias.slice(item.sequence, item.head) * a.bias.length * a.bias.length + first;
    const uint8_t* const padding = a.padding.row(item.sequence);
    float unit = 1.0f;
    for (int64_t i = 0; i < count; ++i) {
        unit = finish_logits(logits + i * row, a.bias, start + (query + i) * a.bias.length,
                             padding ? padding + first : nullptr, a.scale, keys);
    }
    return unit;
}
