// Attention backward in fp32 on AMX's tiles. Included by attention_backward_kernel.h where VITFAST_AMX.
// P and dS [queries, keys] are packed as they are made: both as right operands over the queries,
// which takes no transposition, for dV^T = dO^T P and dK^T = Q^T dS; dS as a left one over the keys, too, for dQ = dS
// K.
#include "attention_tiles.h"
// after that
#include "attention_gradient_tiles.h"

// length: of the sequence.
struct PartBackward {
    int64_t head_dim, width_steps, key_steps;
    int64_t sums_row, transposed_row, query_row;  // numbers between rows of sums
    // Of the head: K and V as right operands over E, K over the keys; the sums of dK^T and dV^T.
    uint32_t *keys, *values, *keys_across;
    float *d_keys, *d_values, *rows;  // rows: [length, width], for either in turn
    // Of a block of queries: Q and dO as left operands over E, and as left operands over the queries.
    uint32_t *queries, *d_outs, *queries_across, *d_outs_across;
    float *d_queries, *delta, *centre;
    // Of that and a range of keys; dS as a left operand of 32 queries; products of 32 queries.
    uint32_t *weights, *d_logits, *d_logit_rows;
    float *logits, *d_weights;
    float *prepared_keys, *prepared_queries;
    PartProducts products;

    PartBackward(Scratch& scratch, int64_t length, int64_t dim)
        : head_dim(dim),
          width_steps(tile_steps<float>(dim)),
          key_steps(tile_steps<float>(length)),
          sums_row(sums_pitch(std::min(length, kMostKeys))),
          transposed_row(sums_pitch(length)),
          query_row(sums_pitch(dim)) {
        scratch.reset();
        const int64_t most_queries = std::min(length, kMostQueries), most_keys = std::min(length, kMostKeys);
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
        delta = scratch.take<float>(tile_blocks(most_queries) * kTileLines);
        centre = scratch.take<float>(tile_blocks(most_queries) * kTileLines);
        weights = scratch.take<uint32_t>(tile_words<float>(most_queries, most_keys));
        d_logits = scratch.take<uint32_t>(tile_words<float>(most_queries, most_keys));
        d_logit_rows = scratch.take<uint32_t>(tile_words<float>(most_keys, kTileLines));
        logits = scratch.take<float>(kTileLines * sums_row);
        d_weights = scratch.take<float>(kTileLines * sums_row);
        prepared_keys = scratch.take<float>(length * dim);
        prepared_queries = scratch.take<float>(most_queries * dim);
    }
};

// dK or dV's transposed sums [E, length] as rows of w.rows.
inline void transpose_sums(PartBackward& w, const float* sums, int64_t length) {
    for (int64_t j = 0; j < length; j += kTile) {
        for (int64_t e = 0; e < w.head_dim; e += kTile) {
            transpose_block(reinterpret_cast<const uint32_t*>(sums) + e * w.transposed_row + j, w.transposed_row,
                            reinterpret_cast<uint32_t*>(w.rows) + j * w.query_row + e, w.query_row);
        }
    }
}

// Packed queries [begin, begin + count) and keys [first, first + keys).
inline void backward_by_tiles(const AttentionBackward<float>& a, const HeadOfSequence& item, int64_t begin,
                              int64_t count, int64_t first, int64_t keys, PartBackward& w, float* d_bias) {
    const int64_t width_pitch = w.width_steps * kTileStep<float>, key_pitch = w.key_steps * kTileStep<float>;
    const int64_t steps = tile_steps<float>(count), across_pitch = steps * kTileStep<float>;
    const int64_t right = first / kTileLines * width_pitch;
    const uint32_t* const keys_across = w.keys_across + first / kTileLines * kTileStep<float>;
    for (int64_t unit = 0; unit * kTileLines < count; ++unit) {
        const int64_t row = unit * kTileLines, height = std::min(count - row, kTileLines);
        const int64_t left = unit * width_pitch, words = unit * kTileStep<float>;
        const int64_t bias_row = (begin + row) * a.bias.length;
        w.products.multiply({w.queries + left, 0}, {w.keys + right, width_pitch}, height, keys, w.width_steps, w.logits,
                            w.sums_row, false);
        w.products.multiply({w.d_outs + left, 0}, {w.values + right, width_pitch}, height, keys, w.width_steps,
                            w.d_weights, w.sums_row, false);
        const float logit = finish_logits(a, item, begin + row, height, first, keys, w.logits, w.sums_row);
        pack_gradients({w.logits, w.d_weights, w.sums_row, d_bias ? d_bias + bias_row + first : nullptr, a.bias.length,
                        w.centre + row, w.delta + row, logit, w.weights + words, w.d_logits + words, w.d_logit_rows,
                        across_pitch, height, keys});
        w.products.multiply({w.d_logit_rows, 0}, {keys_across, key_pitch}, height, w.head_dim, tile_blocks(keys),
                            w.d_queries + row * w.query_row, w.query_row, first > 0);
    }
    w.products.multiply({w.d_outs_across, across_pitch}, {w.weights, across_pitch}, w.head_dim, keys, steps,
                        w.d_values + first, w.transposed_row, begin > 0);
    w.products.multiply({w.queries_across, across_pitch}, {w.d_logits, across_pitch}, w.head_dim, keys, steps,
                        w.d_keys + first, w.transposed_row, begin > 0);
}

// Queries [begin, begin + count) of the packed head.
inline void backward_queries_by_tiles(const AttentionBackward<float>& a, const HeadOfSequence& item, int64_t begin,
                                      int64_t count, PartBackward& w, float* d_bias) {
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
        const float lse = a.lse[item.head * a.rows + start + i];
        w.centre[i] = lse == -std::numeric_limits<float>::infinity() ? -lse : lse;  // all keys masked: P becomes 0
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
    PartBackward w(scratch, item.length, a.head_dim);
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
