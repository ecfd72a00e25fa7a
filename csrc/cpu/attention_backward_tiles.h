// Attention backward in fp32 on AMX's tiles. Included by attention_backward_kernel.h where VITFAST_AMX.
// P and dS [queries, keys] are made in 32 x 32 blocks and packed at once: both as right operands over the queries,
// which takes no transposition, for dV^T = dO^T P and dK^T = Q^T dS; dS as a left operand over the keys for dQ = dS K.
#include "attention_tiles.h"

struct PartBackward {
    int64_t head_dim, width_steps, key_steps, most_keys;
    int64_t sums_row, transposed_row, query_row;  // numbers between rows of sums
    // Of the head: K and V as right operands over E, K over the keys; the sums of dK^T and dV^T.
    uint32_t *keys, *values, *keys_across;
    float *d_keys, *d_values, *rows;  // rows: [length, width], for either in turn
    // Of a block of queries: Q and dO as left operands over E, and as left operands over the queries.
    uint32_t *queries, *d_outs, *queries_across, *d_outs_across;
    float *d_queries, *delta;
    // Of that and a range of keys; logits and d_weights of 32 queries, two sets that take turns.
    uint32_t *weights, *d_logits, *d_logit_rows;
    float *logits[2], *d_weights[2];
    float *prepared_keys, *prepared_queries;
    mutable PartProducts products;

    PartBackward(Scratch& scratch, int64_t length, int64_t dim)
        : head_dim(dim),
          width_steps(tile_steps<float>(dim)),
          key_steps(tile_steps<float>(length)),
          most_keys(std::min(length, kMostKeys)),
          sums_row(sums_pitch(most_keys)),
          transposed_row(sums_pitch(length)),
          query_row(sums_pitch(dim)) {
        scratch.reset();
        const int64_t most_queries = std::min(length, kMostQueries);
        keys = scratch.take<uint32_t>(tile_words<float>(dim, length));
        values = scratch.take<uint32_t>(tile_words<float>(dim, length));
        keys_across = scratch.take<uint32_t>(tile_words<float>(length, dim));
        d_keys = scratch.take<float>(tile_blocks(dim) * kTileLines * transposed_row);
        d_values = scratch.take<float>(tile_blocks(dim) * kTileLines * transposed_row);
        rows = scratch.take<float>(tile_blocks(length) * kTileLines * query_row);
        queries = scratch.take<uint32_t>(tile_words<float>(dim, most_queries));
        d_outs = scratch.take<uint32_t>(tile_words<float>(dim, most_queries));
        queries_across = scratch.take<uint32_t>(tile_words<float>(most_queries, dim));
        d_outs_across = scratch.take<uint32_t>(tile_words<float>(most_queries, dim));
        d_queries = scratch.take<float>(most_queries * query_row);
        delta = scratch.take<float>(most_queries);
        weights = scratch.take<uint32_t>(tile_words<float>(most_queries, most_keys));
        d_logits = scratch.take<uint32_t>(tile_words<float>(most_queries, most_keys));
        d_logit_rows = scratch.take<uint32_t>(tile_words<float>(most_keys, kTileLines));
        for (float** sums : {logits, d_weights}) {
            for (int i = 0; i < 2; ++i) sums[i] = scratch.take<float>(kTileLines * sums_row);
        }
        prepared_keys = scratch.take<float>(length * dim);
        prepared_queries = scratch.take<float>(most_queries * dim);
    }
};

// What 32 queries' logits and dP become: P and dS, packed. A piece is two queries, 16 apart, and 32 keys; pieces follow
// each other as their words do.
struct GradientJob {
    const AttentionBackward<float>* a;
    float *logits, *d_weights, *d_bias;  // of the first query and key; d_bias may be null
    uint32_t *weights, *d_logits, *d_logit_rows;
    const float *lse, *delta;  // of the first query
    int64_t sums_row, pitch;   // pitch: words between blocks of keys
    int64_t count, keys;
    int64_t pair = 0, block = 0;  // the next piece
    float unit[kTileLines], centre[kTileLines];

    int64_t left() const { return count > 0 ? (tile_blocks(keys) - block) * kTile - pair : 0; }

    // Makes logits of the products of queries from `query` with keys from `first`.
    void begin(const HeadOfSequence& item, int64_t query, int64_t first) {
        const int64_t bias_start = a->bias.slice(item.sequence, item.head) * a->bias.length * a->bias.length;
        const uint8_t* const padding = a->padding.row(item.sequence);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t bias_row = bias_start + (query + i) * a->bias.length + first;
            unit[i] = finish_logits(logits + i * sums_row, a->bias, bias_row, padding ? padding + first : nullptr,
                                    a->scale, keys);
            const bool masked = lse[i] == -std::numeric_limits<float>::infinity();  // all keys: P becomes 0
            centre[i] = masked ? -lse[i] : lse[i];
        }
    }

    // A query's P and dS of 16 keys.
    VITFAST_INLINE_MEMBER void gradient(int64_t query, int64_t key, Vec* weight, Vec* d_logit) {
        if (query >= count || key >= keys) {
            *weight = *d_logit = Vec{};
            return;
        }
        const int64_t i = query * sums_row + key;
        *weight = exp2(fma(load(logits + i), broadcast(unit[query]), broadcast(-centre[query])) * kLog2E);
        *d_logit = *weight * (load(d_weights + i) - delta[query]);
        if (d_bias) {
            float* const to = d_bias + query * a->bias.length + key;
            store(to, load(to, keys - key) + *d_logit, keys - key);
        }
    }

    void advance() {
        Vec weight[2][2], d_logit[2][2], parts[3], upper[3], lower[3];  // [query][half of the keys]
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            gradient(pair, block * kTileLines + h * kTile, &weight[0][h], &d_logit[0][h]);
            gradient(pair + kTile, block * kTileLines + h * kTile, &weight[1][h], &d_logit[1][h]);
            Words<float>::split(weight[0][h], weight[1][h], parts);
            store_parts(weights + block * pitch + h * kTileWords + pair * kTile, parts);
        }
        uint32_t* const rows = d_logit_rows + block * kTileStep<float> + pair * kTile;
        Words<float>::split(d_logit[0][0], d_logit[0][1], upper);
        Words<float>::split(d_logit[1][0], d_logit[1][1], lower);
        store_parts(rows, upper);
        store_parts(rows + kTileWords, lower);
        // Words of two keys of one query become words of two queries of one key.
        uint32_t* const to = d_logits + block * pitch + pair * kTile;
        constexpr __mmask32 kSecond = 0xaaaaaaaa;
#pragma GCC unroll 3
        for (int p = 0; p < 3; ++p) {
            const __m512i u = (__m512i)upper[p], l = (__m512i)lower[p];
            upper[p] = (Vec)_mm512_mask_blend_epi16(kSecond, u, _mm512_slli_epi32(l, 16));
            lower[p] = (Vec)_mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(u, 16), l);
        }
        store_parts(to, upper);
        store_parts(to + kTileWords, lower);
        if (++pair < kTile) return;
        pair = 0;
        ++block;
    }

    void finish() {
        while (left() > 0) advance();
    }
};

// dK or dV's transposed sums [E, length] as rows of w.rows.
inline void transpose_sums(const PartBackward& w, const float* sums, int64_t length) {
    for (int64_t j = 0; j < length; j += kTile) {
        for (int64_t e = 0; e < w.head_dim; e += kTile) {
            transpose_block(reinterpret_cast<const uint32_t*>(sums) + e * w.transposed_row + j, w.transposed_row,
                            reinterpret_cast<uint32_t*>(w.rows) + j * w.query_row + e, w.query_row);
        }
    }
}

// Packed queries [begin, begin + count) and keys [first, first + keys).
inline void backward_by_tiles(const AttentionBackward<float>& a, const HeadOfSequence& item, int64_t begin,
                              int64_t count, int64_t first, int64_t keys, const PartBackward& w, float* d_bias) {
    const int64_t width_pitch = w.width_steps * kTileStep<float>, steps = tile_steps<float>(count);
    const int64_t across_pitch = steps * kTileStep<float>, units = tile_blocks(count), key_blocks = tile_blocks(keys);
    const int64_t offset = first / kTileLines * width_pitch, start = item.head * a.rows + item.start + begin;
    GradientJob job{};
    const uint32_t* const keys_across = w.keys_across + first / kTileLines * kTileStep<float>;
    for (int64_t unit = 0; unit <= units; ++unit) {
        const int64_t at = unit * kTileLines, height = std::min(count - at, kTileLines);
        if (unit < units) {
            Between<GradientJob> between(job, 2 * key_blocks * w.width_steps);
            w.products.multiply({w.queries + unit * width_pitch, 0}, {w.keys + offset, width_pitch}, height, keys,
                                w.width_steps, w.logits[unit % 2], w.sums_row, false, between);
            w.products.multiply({w.d_outs + unit * width_pitch, 0}, {w.values + offset, width_pitch}, height, keys,
                                w.width_steps, w.d_weights[unit % 2], w.sums_row, false, between);
        }
        job.finish();
        if (unit > 0) {
            w.products.multiply({w.d_logit_rows, 0}, {keys_across, w.key_steps * kTileStep<float>}, job.count,
                                w.head_dim, key_blocks, w.d_queries + (at - kTileLines) * w.query_row, w.query_row,
                                first > 0);
        }
        if (unit < units) {
            const int64_t bias_row = (begin + at) * a.bias.length + first, words = unit * kTileStep<float>;
            job = {&a,
                   w.logits[unit % 2],
                   w.d_weights[unit % 2],
                   d_bias ? d_bias + bias_row : nullptr,
                   w.weights + words,
                   w.d_logits + words,
                   w.d_logit_rows,
                   a.lse + start + at,
                   w.delta + at,
                   w.sums_row,
                   across_pitch,
                   height,
                   keys};
            job.begin(item, begin + at, first);
        }
    }
    w.products.multiply({w.d_outs_across, across_pitch}, {w.weights, across_pitch}, w.head_dim, keys, steps,
                        w.d_values + first, w.transposed_row, begin > 0);
    w.products.multiply({w.queries_across, across_pitch}, {w.d_logits, across_pitch}, w.head_dim, keys, steps,
                        w.d_keys + first, w.transposed_row, begin > 0);
}

// Queries [begin, begin + count) of the packed head.
inline void backward_queries_by_tiles(const AttentionBackward<float>& a, const HeadOfSequence& item, int64_t begin,
                                      int64_t count, const PartBackward& w, float* d_bias) {
    const int64_t head_dim = a.head_dim, out_stride = a.heads * head_dim, stride = 3 * out_stride;
    const int64_t start = item.start + begin, from = start * out_stride + item.head * head_dim;
    const float* const q = a.qkv + start * stride + item.head * head_dim;
    const bool prepare = a.options.active(0);
    if (prepare) prepare_rows(a.options, 0, item, begin, q, stride, count, head_dim, w.prepared_queries);
    const float* const seen = prepare ? w.prepared_queries : q;
    const int64_t seen_stride = prepare ? head_dim : stride;
    pack_lines<true, false>(seen, seen_stride, count, head_dim, w.queries);
    pack_lines<false, false>(seen, seen_stride, head_dim, count, w.queries_across);
    pack_lines<true, false>(a.d_out + from, out_stride, count, head_dim, w.d_outs);
    pack_lines<false, false>(a.d_out + from, out_stride, head_dim, count, w.d_outs_across);
    for (int64_t i = 0; i < count; ++i) {
        w.delta[i] = dot_rows(a.d_out + from + i * out_stride, a.out + from + i * out_stride, head_dim);
    }
    const int64_t blocks = tile_blocks(item.length), ranges = (item.length + kMostKeys - 1) / kMostKeys;
    for (int64_t i = 0; i < ranges; ++i) {
        const int64_t first = blocks * i / ranges * kTileLines, last = blocks * (i + 1) / ranges * kTileLines;
        backward_by_tiles(a, item, begin, count, first, std::min(item.length, last) - first, w, d_bias);
    }
    write_gradient(a, item, 0, begin, count, w.d_queries, w.query_row);
}

inline void attention_backward_by_tiles(const AttentionBackward<float>& a, const HeadOfSequence& item, Scratch& scratch,
                                        float* d_bias) {
    const PartBackward w(scratch, item.length, a.head_dim);
    const int64_t part = a.heads * a.head_dim, stride = 3 * part;
    const float* const k = a.qkv + item.start * stride + part + item.head * a.head_dim;
    const bool prepare = a.options.active(1);
    if (prepare) prepare_rows(a.options, 1, item, 0, k, stride, item.length, a.head_dim, w.prepared_keys);
    const float* const seen = prepare ? w.prepared_keys : k;
    const int64_t seen_stride = prepare ? a.head_dim : stride;
    pack_lines<true, true>(seen, seen_stride, item.length, a.head_dim, w.keys);
    pack_lines<true, true>(k + part, stride, item.length, a.head_dim, w.values);
    pack_lines<false, true>(seen, seen_stride, a.head_dim, item.length, w.keys_across);
    const int64_t units = tile_blocks(item.length), blocks = (item.length + kMostQueries - 1) / kMostQueries;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t begin = units * i / blocks * kTileLines, end = units * (i + 1) / blocks * kTileLines;
        backward_queries_by_tiles(a, item, begin, std::min(item.length, end) - begin, w, d_bias);
    }
    transpose_sums(w, w.d_keys, item.length);
    write_gradient(a, item, 1, 0, item.length, w.rows, w.query_row);
    transpose_sums(w, w.d_values, item.length);
    write_rows(w.rows, w.query_row, 1.0f, a.d_qkv + (k - a.qkv) + part, stride, item.length, a.head_dim);
}
