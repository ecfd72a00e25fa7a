// Attention forward for a block of queries of one (sequence, head). Included by for_each_isa.h.
// All logits of a query row are kept (an exact softmax in two passes); K and V of the head are packed once.
#include "attention_rows.h"
#include "gemm.h"
#include "vec_math.h"
// after those
#include "attention_heads_kernel.h"
#include "softmax_row.h"

template <class Y>
struct ForwardWorkspace {
    static constexpr bool kPairs = VITFAST_LEVEL >= 3 && std::is_same_v<Y, bf16>;
    uint32_t *keys, *values, *queries, *weights;
    float *logits, *sums, *out;
    Y *prepared_keys, *prepared_queries;  // rows of E after norm and rotation, where there is any

    // block: query rows at a time; length: longest sequence.
    ForwardWorkspace(Scratch& scratch, int64_t block, int64_t length, int64_t head_dim) {
        scratch.reset();
        const int64_t columns = round_to_lanes(length), width = round_to_lanes(head_dim);
        keys = scratch.take<uint32_t>(words_for<kPairs>(head_dim) * columns);
        values = scratch.take<uint32_t>(words_for<kPairs>(length) * width);
        logits = scratch.take<float>(block * columns);
        weights = kPairs ? scratch.take<uint32_t>(block * columns / 2) : reinterpret_cast<uint32_t*>(logits);
        queries = scratch.take<uint32_t>(block * words_for<kPairs>(head_dim));
        out = scratch.take<float>(block * width);
        sums = scratch.take<float>(block);
        prepared_keys = scratch.take<Y>(length * head_dim);
        prepared_queries = scratch.take<Y>(block * head_dim);
    }
};

template <class Y>
void attention_pack(const AttentionForward<Y>& a, const HeadOfSequence& item, ForwardWorkspace<Y>& w) {
    constexpr bool kPairs = ForwardWorkspace<Y>::kPairs;
    const int64_t stride = 3 * a.heads * a.head_dim;
    const int64_t columns = round_to_lanes(item.length), width = round_to_lanes(a.head_dim);
    const Y* const k = a.qkv + item.start * stride + (a.heads + item.head) * a.head_dim;
    if (a.options.active(1)) {
        prepare_rows(a.options, 1, item, 0, k, stride, item.length, a.head_dim, w.prepared_keys);
        transposed_panel<kPairs>(w.prepared_keys, a.head_dim, item.length, a.head_dim, columns, w.keys);
    } else {
        transposed_panel<kPairs>(k, stride, item.length, a.head_dim, columns, w.keys);
    }
    row_panel<kPairs>(k + a.heads * a.head_dim, stride, item.length, a.head_dim, width, w.values);
}

// Queries [begin, begin + count) of the packed head.
template <class Y>
void attention_block(const AttentionForward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t count,
                     ForwardWorkspace<Y>& w) {
    constexpr bool kPairs = ForwardWorkspace<Y>::kPairs;
    const int64_t stride = 3 * a.heads * a.head_dim, pitch = words_for<kPairs>(a.head_dim);
    const int64_t columns = round_to_lanes(item.length), width = round_to_lanes(a.head_dim);
    const Y* const q = a.qkv + (item.start + begin) * stride + item.head * a.head_dim;
    const bool prepare = a.options.active(0);
    if (prepare) prepare_rows(a.options, 0, item, begin, q, stride, count, a.head_dim, w.prepared_queries);
    const Operand queries = row_operand<kPairs>(prepare ? w.prepared_queries : q, prepare ? a.head_dim : stride, count,
                                                a.head_dim, w.queries);
    for (int64_t i = count; i < std::min(item.length - begin, 2 * count); ++i) {
        prefetch_row(q + i * stride, a.head_dim);  // the next block's
    }
    multiply<kPairs>(queries, w.keys, count, columns, pitch, w.logits, columns, false);

    const int64_t bias_start = a.bias.slice(item.sequence, item.head) * a.bias.length * a.bias.length;
    float* const lse = a.lse + item.head * a.rows + item.start + begin;
    for (int64_t i = 0; i < count; ++i) {
        float* const row = w.logits + i * columns;
        const float unit = finish_logits(row, a.bias, bias_start + (begin + i) * a.bias.length,
                                         a.padding.row(item.sequence), a.scale, item.length);
        float largest;
        if constexpr (kPairs) {
            w.sums[i] = softmax_row(row, unit, columns, reinterpret_cast<bf16*>(w.weights) + i * columns, &largest);
        } else {
            w.sums[i] = softmax_row(row, unit, columns, row, &largest);
        }
        lse[i] = largest * unit;
    }
    for (int64_t i = 0; i < count; ++i)
        lse[i] += std::log(w.sums[i]);  // apart: a call in the loop above costs registers

    Y* const out = a.out + ((item.start + begin) * a.heads + item.head) * a.head_dim;
    const int64_t out_stride = a.heads * a.head_dim;
    for (int64_t i = 0; i < count; ++i) prefetch_row_to_write(out + i * out_stride, a.head_dim);
    const int64_t weight_pitch = kPairs ? columns / 2 : columns;
    multiply<kPairs>({w.weights, weight_pitch, 1}, w.values, count, width, words_for<kPairs>(item.length), w.out, width,
                     false);
    for (int64_t i = 0; i < count; ++i) {
        const float normaliser = w.sums[i] == 0.0f ? 0.0f : 1.0f / w.sums[i];
        for (int64_t e = 0; e < a.head_dim; e += kLanes) {
            store(out + i * out_stride + e, load(w.out + i * width + e) * normaliser, a.head_dim - e);
        }
    }
}

template <class Y>
void attention_forward_queries(const AttentionForward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t end,
                               int64_t block, int64_t max_seqlen, bool pack, Scratch& scratch) {
    ForwardWorkspace<Y> workspace(scratch, block, max_seqlen, a.head_dim);
    if (pack) attention_pack(a, item, workspace);
    for (int64_t i = begin; i < end; i += block) attention_block(a, item, i, std::min(block, end - i), workspace);
}
