// Attention forward for a block of queries of one (sequence, head). Included by for_each_isa.h.
// All logits of a query row are kept (an exact softmax in two passes); K and V of the head are packed once.
#include "attention_rows.h"
#include "gemm.h"
#include "vec_math.h"
// after those
#include "attention_heads_kernel.h"
#include "softmax_row.h"
// after that
#if VITFAST_AMX
#include "attention_forward_tiles.h"
#endif

// The operands of a head and of a block of its queries, as words (gemm.h), and their products.
template <class Y>
class WordForward {
  public:
    float *sums, *out;  // of weights [block]; out[block][out_pitch] before the division by them
    int64_t out_pitch;
    Y *prepared_keys, *prepared_queries;  // rows of E after norm and rotation, where there is any

    // block: query rows at a time; longest: of all sequences, which decides where in the scratch things are.
    WordForward(Scratch& scratch, int64_t block, int64_t longest, int64_t length, int64_t head_dim)
        : out_pitch(round_to_lanes(head_dim)), head_dim_(head_dim), length_(length), columns_(round_to_lanes(length)) {
        scratch.reset();
        const int64_t columns = round_to_lanes(longest);
        keys_ = scratch.take<uint32_t>(words_for<kPairs>(head_dim) * columns);
        values_ = scratch.take<uint32_t>(words_for<kPairs>(longest) * out_pitch);
        logits_ = scratch.take<float>(block * columns);
        weights_ = kPairs ? scratch.take<uint32_t>(block * columns / 2) : reinterpret_cast<uint32_t*>(logits_);
        queries_ = scratch.take<uint32_t>(block * words_for<kPairs>(head_dim));
        out = scratch.take<float>(block * out_pitch);
        sums = scratch.take<float>(block);
        prepared_keys = scratch.take<Y>(longest * head_dim);
        prepared_queries = scratch.take<Y>(block * head_dim);
    }

    void pack_keys(const Y* k, int64_t stride) {
        transposed_panel<kPairs>(k, stride, length_, head_dim_, columns_, keys_);
    }

    void pack_values(const Y* v, int64_t stride) {
        row_panel<kPairs>(v, stride, length_, head_dim_, out_pitch, values_);
    }

    void make_logits(const Y* q, int64_t stride, int64_t count) {
        const Operand queries = row_operand<kPairs>(q, stride, count, head_dim_, queries_);
        multiply<kPairs>(queries, keys_, count, columns_, words_for<kPairs>(head_dim_), logits_, columns_, false);
    }

    float* logits(int64_t i) { return logits_ + i * columns_; }

    // The weights of `count` queries, and their sums. finish(i) makes a row's logits and returns their unit; lse[i]
    // becomes the largest.
    template <class Finish>
    void softmax(int64_t count, const Finish& finish, float* lse) {
        using Weight = std::conditional_t<kPairs, bf16, float>;
        for (int64_t i = 0; i < count; ++i) {
            const float unit = finish(i);
            float largest;
            sums[i] =
                softmax_row(logits(i), unit, columns_, reinterpret_cast<Weight*>(weights_) + i * columns_, &largest);
            lse[i] = largest * unit;
        }
    }

    void add_values(int64_t count) {
        const Operand weights{weights_, kPairs ? columns_ / 2 : columns_, 1};
        multiply<kPairs>(weights, values_, count, out_pitch, words_for<kPairs>(length_), out, out_pitch, false);
    }

  private:
    static constexpr bool kPairs = VITFAST_LEVEL >= 3 && std::is_same_v<Y, bf16>;
    int64_t head_dim_, length_, columns_;
    uint32_t *keys_, *values_, *queries_, *weights_;
    float* logits_;
};

// W: WordForward, or what has its members.
template <class Y, class W>
void attention_pack(const AttentionForward<Y>& a, const HeadOfSequence& item, W& w) {
    const int64_t stride = 3 * a.heads * a.head_dim;
    const Y* const k = a.qkv + item.start * stride + (a.heads + item.head) * a.head_dim;
    if (a.options.active(1)) {
        prepare_rows(a.options, 1, item, 0, k, stride, item.length, a.head_dim, w.prepared_keys);
        w.pack_keys(w.prepared_keys, a.head_dim);
    } else {
        w.pack_keys(k, stride);
    }
    w.pack_values(k + a.heads * a.head_dim, stride);
}

// Queries [begin, begin + count) of the packed head.
template <class Y, class W>
void attention_block(const AttentionForward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t count, W& w) {
    const int64_t stride = 3 * a.heads * a.head_dim;
    const Y* const q = a.qkv + (item.start + begin) * stride + item.head * a.head_dim;
    const bool prepare = a.options.active(0);
    if (prepare) prepare_rows(a.options, 0, item, begin, q, stride, count, a.head_dim, w.prepared_queries);
    for (int64_t i = count; i < std::min(item.length - begin, 2 * count); ++i) {
        prefetch_row(q + i * stride, a.head_dim);  // the next block's
    }
    w.make_logits(prepare ? w.prepared_queries : q, prepare ? a.head_dim : stride, count);

    const int64_t bias_start = a.bias.slice(item.sequence, item.head) * a.bias.length * a.bias.length;
    float* const lse = a.lse + item.head * a.rows + item.start + begin;
    const auto finish = [&](int64_t i) __attribute__((always_inline)) {
        return finish_logits(w.logits(i), a.bias, bias_start + (begin + i) * a.bias.length,
                             a.padding.row(item.sequence), a.scale, item.length);
    };
    w.softmax(count, finish, lse);
    for (int64_t i = 0; i < count; ++i)
        lse[i] += std::log(w.sums[i]);  // apart: a call in the loop above costs registers

    const int64_t row = item.start + begin;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t e = 0; e < a.head_dim; e += kTileLines) __builtin_prefetch(a.place(row + i, item.head, e), 1);
    }
    w.add_values(count);
    for (int64_t i = 0; i < count; ++i) {
        const float normaliser = w.sums[i] == 0.0f ? 0.0f : 1.0f / w.sums[i];
        for (int64_t e = 0; e < a.head_dim; e += kLanes) {
            const Vec value = load(w.out + i * w.out_pitch + e) * normaliser;
            store(a.place(row + i, item.head, e), value, a.head_dim - e);
        }
    }
}

template <class W, class Y>
void attention_queries(const AttentionForward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t end,
                       int64_t block, int64_t longest, bool pack, Scratch& scratch) {
    W workspace(scratch, block, longest, item.length, a.head_dim);
    if (pack) attention_pack(a, item, workspace);
    for (int64_t i = begin; i < end; i += block) attention_block(a, item, i, std::min(block, end - i), workspace);
}

// in_parts: by AMX's tiles, three bf16 parts a number; fp32 on a CPU that has them.
template <class Y>
void attention_forward_queries(const AttentionForward<Y>& a, const HeadOfSequence& item, int64_t begin, int64_t end,
                               int64_t block, int64_t longest, bool pack, [[maybe_unused]] bool in_parts,
                               Scratch& scratch) {
#if VITFAST_AMX
    if constexpr (std::is_same_v<Y, float>) {
        if (in_parts) return attention_queries<PartForward>(a, item, begin, end, block, longest, pack, scratch);
    }
#endif
    attention_queries<WordForward<Y>>(a, item, begin, end, block, longest, pack, scratch);
}
