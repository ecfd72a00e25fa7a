// Attention backward for one (sequence, head). Included by for_each_isa.h.
// Per block of queries: S = Q K^T and dP = dO V^T again, P = exp(S - lse), dS = P * (dP - delta) with
// delta = rowsum(dO * O); then dQ = dS K, dK += dS^T Q, dV += P^T dO (Dao et al., FlashAttention, 2022, algorithm 4).
#include "attention_rows.h"
#include "gemm.h"
#include "vec_math.h"
// after those
#include "attention_heads_kernel.h"
// after that
#include "attention_gradient.h"
// after that
#if VITFAST_AMX
#include "attention_backward_tiles.h"
#endif

template <class Y>
struct BackwardWorkspace {
    static constexpr bool kPairs = VITFAST_LEVEL >= 3 && std::is_same_v<Y, bf16>;
    // Panels of the head: K^T and V^T (product over E), K (product over the keys); sums over the query blocks.
    uint32_t *keys_t, *values_t, *keys;
    float *d_keys, *d_values;
    // Of a block of queries: Q and dO as left operands and as panels; S becomes P, dP becomes dS; with kPairs both once
    // more as bf16, paired along the queries, and dS paired along the keys.
    uint32_t *queries, *d_outs, *query_panel, *d_out_panel;
    float *logits, *d_weights, *d_queries;
    uint32_t *weight_pairs, *d_logit_pairs, *d_logit_rows;
    Y *prepared_keys, *prepared_queries;  // rows of E after norm and rotation, where there is any

    BackwardWorkspace(Scratch& scratch, int64_t block, int64_t length, int64_t head_dim) {
        scratch.reset();
        const int64_t columns = round_to_lanes(length), width = round_to_lanes(head_dim);
        const int64_t words = words_for<kPairs>(head_dim), block_words = words_for<kPairs>(block);
        keys_t = scratch.take<uint32_t>(words * columns);
        values_t = scratch.take<uint32_t>(words * columns);
        keys = scratch.take<uint32_t>(words_for<kPairs>(length) * width);
        d_keys = scratch.take<float>(length * width);
        d_values = scratch.take<float>(length * width);
        query_panel = scratch.take<uint32_t>(block_words * width);
        d_out_panel = scratch.take<uint32_t>(block_words * width);
        queries = scratch.take<uint32_t>(block * words);
        d_outs = scratch.take<uint32_t>(block * words);
        logits = scratch.take<float>(block * columns);
        d_weights = scratch.take<float>(block * columns);
        d_queries = scratch.take<float>(block * width);
        prepared_keys = scratch.take<Y>(length * head_dim);
        prepared_queries = scratch.take<Y>(block * head_dim);
        if constexpr (kPairs) {
            weight_pairs = scratch.take<uint32_t>(block_words * columns);
            d_logit_pairs = scratch.take<uint32_t>(block_words * columns);
            d_logit_rows = scratch.take<uint32_t>(block * columns / 2);
        } else {
            weight_pairs = reinterpret_cast<uint32_t*>(logits);
            d_logit_pairs = d_logit_rows = reinterpret_cast<uint32_t*>(d_weights);
        }
    }
};

// logits (in units of `unit`) becomes P, d_weights becomes dS; dS is added to d_bias where that is given.
// A row whose every key is masked (lse -inf) gets zeros.
VITFAST_INLINE void gradient_row(float* logits, float* d_weights, float unit, float lse, float delta, int64_t keys,
                                 float* d_bias) {
    if (lse == -std::numeric_limits<float>::infinity()) {
        for (int64_t j = 0; j < keys; j += kLanes) {
            store(logits + j, Vec{});
            store(d_weights + j, Vec{});
        }
        return;
    }
    for (int64_t j = 0; j < keys; j += kLanes) {
        const Vec weight = exp2(fma(load(logits + j), broadcast(unit), broadcast(-lse)) * kLog2E);
        const Vec d_logit = weight * (load(d_weights + j) - delta);
        store(logits + j, weight);
        store(d_weights + j, d_logit);
        if (d_bias) store(d_bias + j, load(d_bias + j, keys - j) + d_logit, keys - j);
    }
}

// P and dS of the block as bf16: pairs of queries per key, and for dS also pairs of keys per query.
template <class Y>
VITFAST_INLINE void pair_block(const BackwardWorkspace<Y>& w, int64_t count, int64_t columns) {
    for (int64_t i = 0; i < count; i += 2) {
        for (int64_t j = 0; j < columns; j += kLanes) {
            const int64_t at = i * columns + j;
            const bool both = i + 1 < count;
            const Vec d_first = load(w.d_weights + at), d_second = both ? load(w.d_weights + at + columns) : Vec{};
            const Vec second = both ? load(w.logits + at + columns) : Vec{};
            store_words(w.weight_pairs + i / 2 * columns + j, pair_words(load(w.logits + at), second));
            store_words(w.d_logit_pairs + i / 2 * columns + j, pair_words(d_first, d_second));
            bf16* const rows = reinterpret_cast<bf16*>(w.d_logit_rows);
            store(rows + at, d_first);
            if (both) store(rows + at + columns, d_second);
        }
    }
}

// Queries [begin, begin + count). d_bias: the head's slice [L, L], or null.
template <class Y>
void backward_block(const AttentionBackward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t count,
                    const BackwardWorkspace<Y>& w, float* d_bias) {
    constexpr bool kPairs = BackwardWorkspace<Y>::kPairs;
    const int64_t head_dim = a.head_dim, out_stride = a.heads * head_dim, stride = 3 * out_stride;
    const int64_t columns = round_to_lanes(item.length), width = round_to_lanes(head_dim);
    const int64_t words = words_for<kPairs>(head_dim), block_words = words_for<kPairs>(count);
    const int64_t start = item.start + begin;
    const Y* const q = a.qkv + start * stride + item.head * head_dim;
    const Y* const d_out = a.d_out + start * out_stride + item.head * head_dim;
    const Y* const out = a.out + start * out_stride + item.head * head_dim;
    const bool prepare = a.options.active(0);
    if (prepare) prepare_rows(a.options, 0, item, begin, q, stride, count, head_dim, w.prepared_queries);
    const Y* const seen = prepare ? w.prepared_queries : q;
    const int64_t seen_stride = prepare ? head_dim : stride;
    row_panel<kPairs>(seen, seen_stride, count, head_dim, width, w.query_panel);
    row_panel<kPairs>(d_out, out_stride, count, head_dim, width, w.d_out_panel);
    const Operand queries = row_operand<kPairs>(seen, seen_stride, count, head_dim, w.queries);
    const Operand d_outs = row_operand<kPairs>(d_out, out_stride, count, head_dim, w.d_outs);
    multiply<kPairs>(queries, w.keys_t, count, columns, words, w.logits, columns, false);
    multiply<kPairs>(d_outs, w.values_t, count, columns, words, w.d_weights, columns, false);

    const int64_t bias_start = a.bias.slice(item.sequence, item.head) * a.bias.length * a.bias.length;
    for (int64_t i = 0; i < count; ++i) {
        float* const row = w.logits + i * columns;
        const int64_t bias_row = (begin + i) * a.bias.length;
        const float unit =
            finish_logits(row, a.bias, bias_start + bias_row, a.padding.row(item.sequence), a.scale, item.length);
        const float delta = dot_rows(d_out + i * out_stride, out + i * out_stride, head_dim);
        gradient_row(row, w.d_weights + i * columns, unit, a.lse[item.head * a.rows + start + i], delta, item.length,
                     d_bias ? d_bias + bias_row : nullptr);
    }
    if constexpr (kPairs) pair_block(w, count, columns);

    const int64_t row_pitch = kPairs ? columns / 2 : columns;
    multiply<kPairs>({w.d_logit_rows, row_pitch, 1}, w.keys, count, width, words_for<kPairs>(item.length), w.d_queries,
                     width, false);
    multiply<kPairs>({w.weight_pairs, 1, columns}, w.d_out_panel, item.length, width, block_words, w.d_values, width,
                     begin > 0);
    multiply<kPairs>({w.d_logit_pairs, 1, columns}, w.query_panel, item.length, width, block_words, w.d_keys, width,
                     begin > 0);
    write_gradient(a, item, 0, begin, count, w.d_queries, width);
}

// in_parts: by AMX's tiles, three bf16 parts a number; fp32 on a CPU that has them.
template <class Y>
void attention_backward_head(const AttentionBackward<Y>& a, const HeadOfSequence& item, int64_t block,
                             int64_t max_seqlen, [[maybe_unused]] bool in_parts, Scratch& scratch, float* d_bias) {
#if VITFAST_AMX
    if constexpr (std::is_same_v<Y, float>) {
        if (in_parts) return attention_backward_by_tiles(a, item, scratch, d_bias);
    }
#endif
    constexpr bool kPairs = BackwardWorkspace<Y>::kPairs;
    const BackwardWorkspace<Y> w(scratch, block, max_seqlen, a.head_dim);
    const int64_t part = a.heads * a.head_dim, stride = 3 * part;
    const int64_t k_offset = item.start * stride + part + item.head * a.head_dim;
    const int64_t columns = round_to_lanes(item.length), width = round_to_lanes(a.head_dim);
    const Y* const k = a.qkv + k_offset;
    const bool prepare = a.options.active(1);
    if (prepare) prepare_rows(a.options, 1, item, 0, k, stride, item.length, a.head_dim, w.prepared_keys);
    const Y* const seen = prepare ? w.prepared_keys : k;
    const int64_t seen_stride = prepare ? a.head_dim : stride;
    transposed_panel<kPairs>(seen, seen_stride, item.length, a.head_dim, columns, w.keys_t);
    transposed_panel<kPairs>(a.qkv + k_offset + part, stride, item.length, a.head_dim, columns, w.values_t);
    row_panel<kPairs>(seen, seen_stride, item.length, a.head_dim, width, w.keys);
    for (int64_t i = 0; i < item.length; i += block) {
        backward_block(a, item, i, std::min(block, item.length - i), w, d_bias);
    }
    write_gradient(a, item, 1, 0, item.length, w.d_keys, width);
    write_rows(w.d_values, width, 1.0f, a.d_qkv + k_offset + part, stride, item.length, a.head_dim);
}
