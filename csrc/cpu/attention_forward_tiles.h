// Attention forward in fp32 on AMX's tiles: the operands of a head and of a block of its queries, and their products.
// Included by attention_forward_kernel.h where VITFAST_AMX.
#include "attention_tiles.h"

class PartForward {
  public:
    float *sums, *out;  // of weights [block]; out[block][out_pitch] before the division by them
    int64_t out_pitch;
    float *prepared_keys, *prepared_queries;

    PartForward(Scratch& scratch, int64_t block, int64_t longest, int64_t length, int64_t head_dim)
        : out_pitch(sums_pitch(head_dim)),
          head_dim_(head_dim),
          length_(length),
          width_steps_(tile_steps<float>(head_dim)),
          key_steps_(tile_steps<float>(length)),
          logits_pitch_(sums_pitch(length)) {
        scratch.reset();
        keys_ = scratch.take<uint32_t>(tile_words<float>(head_dim, longest));
        values_ = scratch.take<uint32_t>(tile_words<float>(longest, head_dim));
        queries_ = scratch.take<uint32_t>(tile_words<float>(head_dim, block));
        weights_ = scratch.take<uint32_t>(tile_words<float>(longest, block));
        logits_ = scratch.take<float>(block * sums_pitch(longest));
        out = scratch.take<float>(block * out_pitch);
        sums = scratch.take<float>(block);
        prepared_keys = scratch.take<float>(longest * head_dim);
        prepared_queries = scratch.take<float>(block * head_dim);
    }

    void pack_keys(const float* k, int64_t stride) { pack_lines<true, true>(k, stride, length_, head_dim_, keys_); }

    void pack_values(const float* v, int64_t stride) {
        pack_lines<false, true>(v, stride, head_dim_, length_, values_);
    }

    void make_logits(const float* q, int64_t stride, int64_t count) {
        pack_lines<true, false>(q, stride, count, head_dim_, queries_);
        const int64_t pitch = width_steps_ * kTileStep<float>;
        products_.multiply({queries_, pitch}, {keys_, pitch}, count, length_, width_steps_, logits_, logits_pitch_,
                           false);
    }

    float* logits(int64_t i) { return logits_ + i * logits_pitch_; }

    // The weights of `count` queries, and their sums. finish(i) makes a row's logits and returns their unit; lse[i]
    // becomes the largest. Words are written in the order in which they lie.
    template <class Finish>
    void softmax(int64_t count, const Finish& finish, float* lse) {
        for (int64_t first = 0; first < count; first += kTileLines) {
            const int64_t rows = std::min(count - first, kTileLines), columns = round_to_lanes(length_);
            uint32_t* to = weights_ + first / kTileLines * key_steps_ * kTileStep<float>;
            float unit = 1.0f, centre[kTileLines];
            Vec totals[kTileLines] = {};
            for (int64_t i = 0; i < rows; ++i) {
                unit = finish(first + i);
                const float largest = largest_logit(logits(first + i), columns);
                centre[i] = softmax_centre(largest);
                lse[first + i] = largest * unit;
            }
            for (int64_t j = 0; j < columns; j += kTileLines, to += kTileStep<float>) {
                const __mmask16 there = -static_cast<int>(j + kTile < columns);
                for (int64_t i = 0; i < rows; ++i) {
                    const float* const row = logits(first + i) + j;
                    const Vec to_log2 = broadcast(unit * kLog2E);
                    const Vec low = exp2((load(row) - centre[i]) * to_log2);
                    const Vec high = _mm512_maskz_mov_ps(there, exp2((load(row + kTile) - centre[i]) * to_log2));
                    Vec parts[3];
                    Words<float>::split(low, high, parts);
                    store_parts(to + i * kTile, parts);
                    totals[i] += low + high;
                }
            }
            for (int64_t i = 0; i < rows; ++i) sums[first + i] = reduce_add(totals[i]);
        }
    }

    void add_values(int64_t count) {
        const int64_t pitch = key_steps_ * kTileStep<float>;
        products_.multiply({weights_, pitch}, {values_, pitch}, count, head_dim_, key_steps_, out, out_pitch, false);
    }

  private:
    int64_t head_dim_, length_, width_steps_, key_steps_, logits_pitch_;
    uint32_t *keys_, *values_, *queries_, *weights_;
    float* logits_;
    PartProducts products_;
};
